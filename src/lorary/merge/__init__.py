"""Several adapters become one: weight arithmetic on factors and updates, tensors in, tensors out."""
