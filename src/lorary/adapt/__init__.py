"""Adapting a library to new tasks: each way ends as one adapter."""
