"""The library: a folder of adapters over one base model."""
