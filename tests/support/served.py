"""What a served library of tiny experts must answer, computed in this process."""

from pathlib import Path

import torch
from tests.conftest import make_random_adapter, make_tiny_model

from lorary.adapter import Adapter
from lorary.evaluate.completion import complete
from lorary.library.store import Library
from lorary.model.attach import attach, routing
from lorary.model.base import load_base
from lorary.route.setting import Routing

NAMES = ("blue", "june", "three")
PROMPT = [5, 9, 17, 33, 65, 129]


def make_library(folder: Path, base: Path) -> Library:
    """A library of three random experts."""
    library = Library.create(folder, str(base))
    generator = torch.Generator().manual_seed(1)
    for name in NAMES:
        library.add_adapter(make_random_adapter(make_tiny_model(), name, generator), {"tasks": [name]})
    return library


def another_adapter(name: str, seed: int = 2) -> Adapter:
    """A random adapter that no library holds."""
    adapter: Adapter = make_random_adapter(make_tiny_model(), name, torch.Generator().manual_seed(seed))
    return adapter


def text_of(library: Library, base_folder: Path, name: str, num_tokens: int) -> str:
    """What an expert answers to the prompt."""
    base = load_base(str(base_folder))
    attach(base.model, library)
    with routing(base.model, Routing(experts=[name])):
        return str(base.tokenizer.decode(complete(base, tuple(PROMPT), max_new_tokens=num_tokens)))
