"""The axis words: one word per axis, the same in annotations, docstrings and documentation.

| word    | axis |
|---------|------|
| batch   | rows of a batch |
| seq     | positions of a row |
| tokens  | all positions of a batch, flattened |
| experts | experts seated in a layer, in the order of their seats: that of the names, late comers last |
| rank    | the low-rank axis of one expert |
| ranks   | the low-rank axes of all experts of a layer, concatenated |
| d_in    | input features of a linear layer |
| d_out   | output features of a linear layer |
| tasks   | tasks of a task set |
| layers  | routed linear layers, in the order the model runs them |
"""

import re

AXES = ("batch", "seq", "tokens", "experts", "rank", "ranks", "d_in", "d_out", "tasks", "layers")
_LAYER_NUMBER = re.compile(r"\.(\d+)\.")


def layer_number(path: str) -> int | None:
    """Number of the transformer layer a path lies in: the first number in it."""
    match = _LAYER_NUMBER.search(path)
    return int(match.group(1)) if match else None
