"""The nn.Module edge: modules that sit beside a frozen linear layer and add to its output."""
