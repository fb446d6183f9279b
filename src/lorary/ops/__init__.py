"""Tensors in, tensors out: no names, no files."""
