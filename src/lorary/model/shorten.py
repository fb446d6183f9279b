"""A base model with few of its blocks and without its output head, for as long as a trial lasts.

Blocks of one kind do alike what a trial looks at, and most models repeat one kind, or a pattern of few. The first
blocks, up to where each kind has come once, stand for the whole.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from lorary.model.positions import text_config

Rename = Callable[[str], str]
_PLAIN = (bool, int, float, str, type(None))
# The attributes that every module has, except whether it trains: no kind differs in them.
_OF_EVERY_MODULE = frozenset(vars(nn.Module())) - {"training"}


@contextmanager
def shortened(model: Any) -> Iterator[Rename | None]:
    """Run the model with its first blocks, its output head handing on what it is given.

    Args:
        model: a transformers model; nothing of it is changed once the block is left.

    Yields:
        What turns the path of any module into that of the module which stands for it; None where the model has no
        blocks to leave out, and is as it was.
    """
    stacks = list(_stacks(model))
    if not stacks:
        yield None
        return
    renamed: dict[str, str] = {}
    with ExitStack() as stack:
        for path, blocks, stand_ins in stacks:
            num_blocks = max(stand_ins) + 1
            renamed |= {f"{path}.{number}.": f"{path}.{stand_in}." for number, stand_in in enumerate(stand_ins)}
            stack.enter_context(_first(blocks, num_blocks))
        stack.enter_context(_passing_on(model.get_output_embeddings()))
        yield lambda path: _renamed(path, renamed)


def _renamed(path: str, renamed: dict[str, str]) -> str:
    for start, new in renamed.items():
        if path.startswith(start):
            return new + path[len(start) :]
    return path


def _stacks(model: Any) -> Iterator[tuple[str, nn.ModuleList, list[int]]]:
    """Lists of blocks of which some can be left out: path, list, and for each block the first one of its kind."""
    number = getattr(text_config(model), "num_hidden_layers", None)
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) != number:
            continue
        kinds = [_kind(block, i) for i, block in enumerate(module)]
        stand_ins = [kinds.index(kind) for kind in kinds]
        if max(stand_ins) + 1 < len(module):
            yield path, module, stand_ins


def _kind(block: nn.Module, number: int) -> tuple[Any, ...]:
    """What blocks of one kind have in common: classes, shapes and plain attributes, but for the block's own number."""
    return tuple(
        (
            name,
            type(module),
            tuple((key, tuple(p.shape)) for key, p in module._parameters.items() if p is not None),
            tuple(
                (key, value)
                for key, value in vars(module).items()
                if key not in _OF_EVERY_MODULE
                and isinstance(value, _PLAIN)
                and not (value == number and any(part in key for part in ("idx", "layer", "index")))
            ),
        )
        for name, module in block.named_modules()
    )


@contextmanager
def _first(blocks: nn.ModuleList, number: int) -> Iterator[None]:
    modules = blocks._modules
    blocks._modules = dict(list(modules.items())[:number])
    try:
        yield
    finally:
        blocks._modules = modules


@contextmanager
def _passing_on(head: nn.Module | None) -> Iterator[None]:
    """The output head returns its input: a fifth of a small model's arithmetic is spared."""
    if head is None or "forward" in vars(head):
        yield
        return
    vars(head)["forward"] = _same
    try:
        yield
    finally:
        del vars(head)["forward"]


def _same(states: Tensor) -> Tensor:
    return states
