"""What the rules know of experts without the general knowledge that other experts stand for.

Rules read a subtracted expert from the buffers that are there anyway: its own z, and behind it those of the general
experts. Source: general knowledge subtraction, as in PEFT's ArrowConfig (`use_gks`); in update space it is ours.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lorary.ops.spectrum import RELATIVE_ZERO
from lorary.route.facts import Facts, expert_facts

GeneralMode = Literal["delta", "factors"]


def delta_facts(
    lora_a: Float[Tensor, "experts rank d_in"],
    lora_b: Float[Tensor, "experts d_out rank"],
    general_a: Float[Tensor, "ranks d_in"],
    general_b: Float[Tensor, "d_out ranks"],
) -> Facts:
    """Facts of `ΔW_e - ΔW_general`, from both in one rank-concatenated update.

    Args:
        lora_a: down-projections of experts of one rank, any float dtype.
        lora_b: their up-projections, scalings folded in.
        general_a: down-projections of the general experts, one below the other.
        general_b: their up-projections, divided by how many there are.

    Returns:
        The facts; matrices are for an expert's own z and then those of the general experts. An expert that is no more
        than the general ones are has the prototype 0.
    """
    number = len(lora_a)
    down = torch.cat([lora_a, general_a.expand(number, -1, -1)], dim=1).double()
    up = torch.cat([lora_b, -general_b.expand(number, -1, -1)], dim=2).double()
    return _without_rounding(expert_facts(down, up), down, lora_a, lora_b)


def factor_facts(
    lora_a: Float[Tensor, "experts rank d_in"],
    lora_b: Float[Tensor, "experts d_out rank"],
    scalings: Float[Tensor, " experts"],
    general_a: Float[Tensor, "general rank d_in"],
    general_b: Float[Tensor, "general d_out rank"],
) -> Facts:
    """Facts of `scaling (B_e - mean B_g) (A_e - mean A_g)`.

    Args:
        lora_a: down-projections, any float dtype.
        lora_b: up-projections, scalings folded in.
        scalings: of the experts.
        general_a: down-projections of the general experts, all of one rank.
        general_b: their up-projections, as they are stored.

    Returns:
        As for `delta_facts`.
    """
    number = len(general_a)
    down = lora_a.double() - general_a.double().mean(dim=0)
    up = lora_b.double() - scalings.double()[:, None, None] * general_b.double().mean(dim=0)
    facts = _without_rounding(expert_facts(down, up), down, lora_a, lora_b)

    def on_both(matrices: Tensor) -> Tensor:
        return torch.cat([matrices, *[-matrices / number] * number], dim=2)

    return facts._replace(row_space=on_both(facts.row_space), outputs=on_both(facts.outputs))


def _without_rounding(facts: Facts, down: Tensor, lora_a: Tensor, lora_b: Tensor) -> Facts:
    """Experts of which next to nothing is left have no direction: what looks like one is rounding."""
    before = _largest(expert_facts(lora_a, lora_b), lora_a.double())
    is_left = _largest(facts, down) > RELATIVE_ZERO * before
    return facts._replace(prototypes=facts.prototypes * is_left[:, None])


def _largest(facts: Facts, down: Tensor) -> Tensor:
    """The largest singular value of each update: how much of its own prototype comes out of it."""
    z = down @ facts.prototypes[..., None]
    return torch.linalg.vector_norm((facts.outputs @ z).squeeze(2), dim=1)
