"""General experts of a routed model: what the rules know of the others without them, and how they are taken away."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorary.errors import RouterError
from lorary.lora.general_subtraction import DeltaSubtraction, FactorSubtraction
from lorary.model.layers import SeatedLayer, more_than_factors
from lorary.ops.blocks import Block
from lorary.route.facts import Facts
from lorary.route.general_subtraction import delta_facts, factor_facts
from lorary.route.setting import Routing


@dataclass(frozen=True)
class Subtracted:
    """One layer without general knowledge.

    Args:
        score_rows: (experts, d_in), prototypes; zero for general experts and those that do nothing.
        blocks: `row_space` and `outputs`, to be read from an expert's own z and those of the general experts.
        module: takes it away from the mixture.
    """

    score_rows: Tensor
    blocks: Mapping[str, Sequence[Block]]
    module: nn.Module


def subtract_general(
    setting: Routing, experts: Sequence[str], layers: Mapping[str, SeatedLayer]
) -> dict[str, Subtracted]:
    """Every layer in which a general expert is seated, without what it knows.

    An expert that does nothing in a layer is left alone there.

    Args:
        setting: names the general experts.
        experts: names, in canonical order.
        layers: the routed layers.

    Returns:
        By path; nothing where no general expert is named.

    Raises:
        RouterError: as `check_general`.
    """
    if setting.general.experts is None:
        return {}
    check_general(setting, experts, seated_ranks(experts, layers))
    positions = {experts.index(name) for name in setting.general.experts}
    subtracted = {}
    for path, layer in layers.items():
        general = [seat for seat, position in enumerate(layer.experts) if position in positions]
        zero = [experts[layer.experts[seat]] for seat in general if layer.scalings[seat] == 0]
        if zero and setting.general.mode == "factors":
            raise RouterError(
                f"general_mode='factors' needs the lora_b of expert '{zero[0]}' at {path}", found="a scaling of 0"
            )
        if general and setting.general.mode == "factors" and layer.lora.has_beside:
            raise more_than_factors("general_mode='factors'", path, "general_mode='delta'")
        if general:
            subtracted[path] = _subtracted(setting, layer, general)
    return subtracted


def seated_ranks(experts: Sequence[str], layers: Mapping[str, SeatedLayer]) -> dict[str, dict[str, int]]:
    """The rank of each expert by layer."""
    return {
        path: {experts[position]: rank for position, rank in zip(layer.experts, layer.ranks, strict=True)}
        for path, layer in layers.items()
    }


def check_general(setting: Routing, experts: Sequence[str], ranks: Mapping[str, Mapping[str, int]]) -> None:
    """Refuse general experts that are not there, leave none to choose, or cannot be subtracted factor by factor.

    Args:
        setting: names the general experts, or none.
        experts: all names.
        ranks: rank of each expert by layer.

    Raises:
        RouterError: as said, naming expert and layer.
    """
    general = list(setting.general.experts or ())
    if missing := [name for name in general if name not in experts]:
        raise RouterError("general experts must be seated", found=missing, remedy=f"it has {list(experts)}")
    if set(general) >= set(experts):
        raise RouterError(
            "an expert that is not general must be left to choose", found=f"general={general} of {list(experts)}"
        )
    if not general or setting.general.mode == "delta":
        return
    for path, expert_ranks in ranks.items():
        lacking = [name for name in general if name not in expert_ranks]
        if lacking or len(set(expert_ranks.values())) > 1:
            raise RouterError(
                f"general_mode='factors' needs all experts of one rank, and each general one, at layer '{path}' too",
                found=f"'{lacking[0]}' lacks the layer" if lacking else f"ranks {dict(expert_ranks)}",
                remedy="general_mode='delta'",
            )


def _subtracted(setting: Routing, layer: SeatedLayer, general: Sequence[int]) -> Subtracted:
    lora, number = layer.lora, len(setting.general.experts or ())
    is_general = torch.tensor([seat in general for seat in range(len(layer.experts))])
    taken_from = layer.alive.cpu() & ~is_general
    score_rows, blocks = _subtracted_reads(setting, layer, general, taken_from.nonzero().squeeze(1).tolist())
    module: nn.Module
    if setting.general.mode == "delta":
        module = DeltaSubtraction(lora.expert_of_rank.cpu(), is_general, taken_from, number, lora.up.dtype)
    else:
        module = FactorSubtraction(is_general, taken_from, torch.tensor(layer.scalings, dtype=lora.up.dtype))
    return Subtracted(score_rows, blocks, module.to(lora.up.device))


def _subtracted_reads(
    setting: Routing, layer: SeatedLayer, general: Sequence[int], seats: Sequence[int]
) -> tuple[Tensor, dict[str, list[Block]]]:
    """Prototypes and matrices of the experts that something is taken from, one factorisation for each rank."""
    lora = layer.lora
    score_rows = torch.zeros_like(lora.down[lora.num_ranks :])
    blocks: dict[str, list[Block]] = {"row_space": [], "outputs": []}
    behind = torch.cat([_columns(layer, seat) for seat in general])
    for rank in sorted({layer.ranks[seat] for seat in seats}):
        equal_rank = [seat for seat in seats if layer.ranks[seat] == rank]
        facts = _facts(setting, layer, general, equal_rank)
        score_rows[equal_rank] = facts.prototypes.to(score_rows)
        columns = torch.stack([torch.cat([_columns(layer, seat), behind]) for seat in equal_rank])
        for kind, kind_blocks in blocks.items():
            kind_blocks.append(Block(torch.tensor(equal_rank), columns, getattr(facts, kind).to(lora.up)))
    return score_rows, blocks


def _facts(setting: Routing, layer: SeatedLayer, general: Sequence[int], seats: Sequence[int]) -> Facts:
    down, up = layer.lora.down, layer.lora.up.mT
    expert_a = torch.stack([down[layer.rank_index(seat)] for seat in seats])
    expert_b = torch.stack([up[:, layer.rank_index(seat)] for seat in seats])
    general_a = [down[layer.rank_index(seat)] for seat in general]
    general_b = [up[:, layer.rank_index(seat)] for seat in general]
    if setting.general.mode == "delta":
        return delta_facts(
            expert_a, expert_b, torch.cat(general_a), torch.cat(general_b, dim=1) / len(setting.general.experts or ())
        )
    stored = [matrix / layer.scalings[seat] for matrix, seat in zip(general_b, general, strict=True)]
    scalings = torch.tensor([layer.scalings[seat] for seat in seats], dtype=up.dtype, device=up.device)
    return factor_facts(expert_a, expert_b, scalings, torch.stack(general_a), torch.stack(stored))


def _columns(layer: SeatedLayer, seat: int) -> Tensor:
    ranks = layer.rank_index(seat)
    return torch.arange(ranks.start, ranks.stop)
