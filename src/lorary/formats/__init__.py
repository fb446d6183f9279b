"""Foreign layouts (PEFT, GGUF, bases): turned into ours here and nowhere else."""
