"""The builtin tasks: one file per family, and a catalogue."""
