"""What a decoder makes of a prompt in its first layers: enough to say what kind of prompt it is, at a part of the cost.

A pass is stopped by an exception out of a hook of the last of these layers, so that it runs as it always does: with the
decoder's own masks and positions, on whatever device each layer is.
"""

from collections.abc import Callable, Mapping
from math import ceil
from threading import get_ident
from typing import Any

from torch import Tensor, nn

from lorary.errors import BaseModelError

# Which part of a decoder's layers reads prompts, rounded up. More of them tell kinds of prompts apart no better
# (docs/adr/0015-prompts-read-early.md).
PART = 1 / 5
# (batch, seq, d) hidden states -> whether the pass may stop there.
Look = Callable[[Tensor], bool]


class _StoppedError(Exception):
    """The pass may stop here."""


def early_pass(decoder: nn.Module, arguments: Mapping[str, Any], look: Look) -> Tensor | None:
    """Run a decoder until its first layers have been looked at, or to its end.

    Where a decoder has no layers one behind the other, or these give no state for each token, its last hidden states
    are looked at.

    Args:
        decoder: as `lorary.model.features.decoder_of` gives it. Hooks of its own do not run.
        arguments: by name.
        look: is shown the hidden states behind the first layers, once.

    Returns:
        (batch, seq, d), the last hidden states; None where the pass stopped before.

    Raises:
        BaseModelError: if the layer to look behind did not run.
    """
    block, seen, runs = early_block(decoder), list[bool](), 0
    inputs = arguments.get("input_ids")
    shape = (inputs if inputs is not None else arguments["inputs_embeds"]).shape[:2]
    thread = get_ident()

    def stop(_block: nn.Module, _args: Any, output: Any) -> None:
        nonlocal runs
        if get_ident() != thread:  # another thread's pass through the same model goes on
            return
        runs += 1
        hidden = output[0] if isinstance(output, (tuple, list)) else output
        # Some families carry several streams, or tokens of their own, or put tokens first.
        if hidden.dim() == 3 and hidden.shape[:2] == shape:
            seen.append(look(hidden))
            if seen[-1]:
                raise _StoppedError

    handle = None if block is None else block.register_forward_hook(stop)
    try:
        last: Tensor = decoder.forward(**arguments)[0]
    except _StoppedError:
        return None
    finally:
        if handle is not None:
            handle.remove()
    if runs != (block is not None):
        raise BaseModelError(
            "the layer that prompts are read behind must run once in a pass, as a module with its hooks",
            found=f"{type(block).__name__} ran {runs} times",
            remedy="compile the whole model instead of its layers",
        )
    if not seen:
        look(last)
    return last


def early_block(decoder: nn.Module) -> nn.Module | None:
    """The layer behind which prompts are read; None where a decoder's layers cannot be told.

    Args:
        decoder: of transformers, or another module.
    """
    config: Any = getattr(decoder, "config", None)
    if not hasattr(config, "get_text_config") or getattr(config, "is_encoder_decoder", False):
        return None
    whole: Any = decoder
    inner = whole.get_decoder() if hasattr(whole, "get_decoder") else whole
    number = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
    stacks = [part for part in inner.modules() if isinstance(part, nn.ModuleList) and len(part) == number]
    return stacks[0][ceil(PART * len(stacks[0])) - 1] if len(stacks) == 1 else None
