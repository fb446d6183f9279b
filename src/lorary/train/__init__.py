"""Training many experts in one pass over one frozen base."""
