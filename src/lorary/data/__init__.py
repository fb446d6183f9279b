"""Tasks, prompt templates and where rows come from: files, folders, data sets, the builtin tasks."""
