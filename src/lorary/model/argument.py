"""What is given for a model and is none, said by name."""

from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from lorary.errors import UsageError
from lorary.library.store import Library
from lorary.model.base import Base


def check_model(model: Any) -> None:
    """Refuse what is no bare model in memory.

    Args:
        model: what was given for a transformers model.

    Raises:
        UsageError: naming what it is, and how to come to a model from there.
    """
    kind, remedy = type(model).__name__, "lorary.load_base(...).model, or a model of transformers"
    if isinstance(model, (str, Path)):
        kind, remedy = f"the path {str(model)!a}", f"lorary.load_base({str(model)!r}).model"
    elif isinstance(model, Base):
        kind, remedy = "a lorary.Base, which holds a model and its tokenizer", "give its .model"
    elif isinstance(model, PreTrainedTokenizerBase):
        kind, remedy = f"a tokenizer ({kind})", "give the model here, and this as tokenizer=..."
    elif isinstance(model, Library):
        kind, remedy = "a library", "give the model first: lorary.attach(model, library)"
    elif any(base.__module__.split(".")[0] == "peft" for base in type(model).__mro__):
        kind = f"a model wrapped by PEFT ({kind})"
        remedy = "give what its unload() returns, or merge_and_unload() to keep PEFT's adapter in the weights"
    elif isinstance(model, nn.Module):
        return
    raise UsageError("experts are seated in a bare model in memory", found=kind, remedy=remedy)
