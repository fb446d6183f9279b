"""What routers with data need to know of each expert, computed once and kept."""
