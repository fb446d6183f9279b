"""Serving: one routed model behind an OpenAI-compatible interface, and a page that shows how it chooses."""
