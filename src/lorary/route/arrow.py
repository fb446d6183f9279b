"""Arrow: each expert is known by the input direction it amplifies most."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lorary.errors import ShapeError
from lorary.ops.spectrum import Spectrum, low_rank_spectrum

# Above this ratio of the second to the first singular value, the first direction is not well defined: a float32
# factorisation of such an update is off by 1e-5 and more.
AMBIGUOUS_GAP = 0.999


def arrow_prototypes(
    lora_a: Float[Tensor, "experts rank d_in"], lora_b: Float[Tensor, "experts d_out rank"]
) -> tuple[Float[Tensor, "experts d_in"], Float[Tensor, " experts"]]:
    """The first right singular vector of each expert's update, and how ambiguous it is.

    Scaling does not turn the direction, so that it takes no part. Paper: 2405.11157, Arrow routing.

    Args:
        lora_a: down-projections of experts of one rank, any float dtype.
        lora_b: their up-projections.

    Returns:
        Unit prototypes and the ratios σ2/σ1 (0 for rank 1), both float64. An expert whose update is zero has the
        prototype 0 and the ratio 0.
    """
    return prototypes_of(low_rank_spectrum(lora_a, lora_b))


def prototypes_of(spectrum: Spectrum) -> tuple[Float[Tensor, "experts d_in"], Float[Tensor, " experts"]]:
    """Prototypes and ratios, as `arrow_prototypes` gives them, from spectra that are there already."""
    alive = is_alive(spectrum)
    prototypes = spectrum.directions[:, 0] * alive[:, None]
    second = spectrum.values[:, 1] if spectrum.values.shape[1] > 1 else torch.zeros_like(spectrum.values[:, 0])
    ratio = torch.where(alive, second / spectrum.values[:, 0].clamp_min(torch.finfo(torch.float64).tiny), 0.0)
    return prototypes, ratio


def is_alive(spectrum: Spectrum) -> Bool[Tensor, " experts"]:
    """Whether each update is more than zero; one that is smaller than float32 can hold counts as zero."""
    return spectrum.values[:, 0] > torch.finfo(torch.float32).tiny


def arrow_scores(
    x: Float[Tensor, "*tokens d_in"], prototypes: Float[Tensor, "experts d_in"]
) -> Float[Tensor, "*tokens experts"]:
    """Score each expert by how far its dominant input direction explains the token: |x . v_e|.

    The sign of a singular vector is arbitrary, hence the absolute value. Paper: 2405.11157, Arrow routing.

    Args:
        x: hidden states entering the routed linear layer; scored in the wider of their dtype and the prototypes'.
        prototypes: one unit vector per expert, in library order; a zero vector marks an expert that does nothing.

    Returns:
        Non-negative scores, and minus infinity for experts whose prototype is zero; turn them into weights with
        `top_k_softmax(scores, top_k, temperature)`.

    Raises:
        ShapeError: if `d_in` differs between `x` and `prototypes`.
    """
    if x.shape[-1] != prototypes.shape[-1]:
        raise ShapeError("x and prototypes must share d_in", found=f"{x.shape[-1]} and {prototypes.shape[-1]}")
    dtype = torch.promote_types(x.dtype, prototypes.dtype)
    return arrow_readout(x.to(dtype) @ prototypes.to(dtype).mT, prototypes.any(dim=-1))


def arrow_readout(
    projections: Float[Tensor, "*tokens experts"], alive: Bool[Tensor, " experts"]
) -> Float[Tensor, "*tokens experts"]:
    """Arrow's scores from projections that are already there: the routed layer computes them with its own.

    Args:
        projections: x . v_e for each token and expert.
        alive: whether each expert may be chosen.

    Returns:
        |x . v_e|, minus infinity for experts that are not alive.
    """
    return projections.abs().masked_fill(~alive, -torch.inf)
