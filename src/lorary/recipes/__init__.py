"""One flat story per command: read files, call the floors below, write files."""
