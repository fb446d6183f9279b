"""Comparing and grouping adapters by their weights alone."""
