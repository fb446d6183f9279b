"""What is given for a model and is none, said by name."""

from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from lorary.errors import UsageError
from lorary.library.store import Library
from lorary.model.base import Base


def check_model(given: Any) -> None:
    """Refuse what is no bare model in memory.

    Args:
        given: for a transformers model.

    Raises:
        UsageError: naming what it is, and how to come to a model from there.
    """
    found, remedy = type(given).__name__, "lorary.load_base(...).model, or a model of transformers"
    if isinstance(given, (str, Path)):
        found, remedy = f"the path {str(given)!a}", f"lorary.load_base({str(given)!r}).model"
    elif isinstance(given, Base):
        found, remedy = "a lorary.Base, which holds a model and its tokenizer", "give its .model"
    elif isinstance(given, PreTrainedTokenizerBase):
        found, remedy = f"a tokenizer ({found})", "give the model here, and this as tokenizer=..."
    elif isinstance(given, Library):
        found, remedy = "a library", "give the model first: lorary.attach(model, library)"
    elif any(kind.__module__.split(".")[0] == "peft" for kind in type(given).__mro__):
        found = f"a model wrapped by PEFT ({found})"
        remedy = "give what its unload() returns, or merge_and_unload() to keep PEFT's adapter in the weights"
    elif isinstance(given, nn.Module):
        return
    raise UsageError("experts are seated in a bare model in memory", found=found, remedy=remedy)
