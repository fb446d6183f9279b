"""LoGo: one look at the prompt's last token decides for the whole request."""

from collections.abc import Sequence

from jaxtyping import Bool, Float
from torch import Tensor

from lorary.ops.blocks import Block
from lorary.route.norm import norm_readout


def logo_readout(
    z: Float[Tensor, "tokens ranks"], outputs: Sequence[Block], alive: Bool[Tensor, " experts"]
) -> Float[Tensor, "tokens experts"]:
    """Score each expert by the norm of its update's output, `‖ΔW x‖`.

    What makes it LoGo is where it is asked: for one token (`last_tokens`) of one layer, once for a request. Source:
    LoGo, arXiv 2511.07129, the signal by norm.

    Args:
        z: the low-rank buffer of the layer.
        outputs: for each expert the triangular factor of its lora_b, scaling folded in.
        alive: whether each expert may be chosen.

    Returns:
        Non-negative scores, minus infinity for experts that are not alive.
    """
    return norm_readout(z, outputs, alive)


def last_tokens(real: Bool[Tensor, "batch seq"]) -> Bool[Tensor, "batch seq"]:
    """The last token of each row that counts, whichever side is padded.

    Args:
        real: which tokens count; at least one in each row.

    Returns:
        One True per row.
    """
    from_the_end = real.flip(1).int().cumsum(dim=1).flip(1)  # tokens that count, from here to the end
    return real & (from_the_end == 1)
