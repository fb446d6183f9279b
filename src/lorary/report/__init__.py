"""Results for readers: pages, tables in the terminal, Markdown, CSV and JSON."""
