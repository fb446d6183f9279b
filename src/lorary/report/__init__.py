"""The report page: what goes into it, the HTML that Python writes, and the templates a browser runs."""
