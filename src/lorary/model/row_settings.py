"""The score rows that a rule reads where the prototypes will not do: prepared from data, or tied between layers."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lorary.errors import RouterError
from lorary.library.store import Library
from lorary.model.layers import SeatedLayer
from lorary.model.prepared import PreparedTensors, not_prepared
from lorary.route.facts import input_directions, tied_prototypes
from lorary.route.rule import Rule
from lorary.route.setting import Routing

# Layers of one attention that are given the same input, by the last parts of their paths.
_TIED = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q", "k", "v"))


def score_rows_for(
    setting: Routing, rule: Rule, library: Library, experts: Sequence[str], layers: Mapping[str, SeatedLayer],
    prepared: PreparedTensors,
) -> dict[str, Tensor]:  # fmt: skip
    """(experts, d_in) score rows of each layer, by its path; nothing where the prototypes serve.

    Args:
        setting: the router.
        rule: its rule.
        library: where the experts came from.
        experts: names, in canonical order.
        layers: the routed layers.
        prepared: what was prepared for this setting, by expert and path.

    Raises:
        RouterError: if the rule needs score rows that were not prepared.
    """
    if "score_rows" not in rule.reads:
        return {}
    if rule.needs == "prepared":
        stacked = prepared_tensors(setting, library, experts, layers, prepared)
        # Data may be there for an expert that does nothing in a layer: it is no more chosen there than by its weights.
        alive = {path: stacked[path] * layer.alive[:, None].to(stacked[path]) for path, layer in layers.items()}
        return (
            alive
            if rule.score_rows is None
            else {path: rule.score_rows(score_rows) for path, score_rows in alive.items()}
        )
    if not setting.options.changes_prototypes:
        return {}
    score_rows: dict[str, Tensor] = {}
    for group in _groups(layers) if setting.options.tie == "concat" else [[path] for path in layers]:
        score_rows.update(_tied_score_rows({path: layers[path] for path in group}, setting.options.zeros == "keep"))
    return score_rows


def prepared_tensors(
    setting: Routing, library: Library, experts: Sequence[str], layers: Mapping[str, SeatedLayer],
    prepared: PreparedTensors,
) -> dict[str, Tensor]:  # fmt: skip
    """What was prepared for a setting, stacked for each layer in the order of its seats.

    Args and errors as for `score_rows_for`.

    Raises:
        RouterError: naming the first expert and layer for which nothing was prepared, or not that shape.
    """
    stacked = {}
    for path, layer in layers.items():
        shape = (2,) if setting.is_calibrated else (layer.lora.down.shape[1],)
        tensors = []
        for name in (experts[position] for position in layer.experts):
            tensor = prepared.get(name, {}).get(path)
            if tensor is None:
                raise not_prepared(setting, library, name, path)
            if tensor.shape != shape:
                raise RouterError(
                    f"what was prepared for expert '{name}' at {path} must have shape {tuple(shape)}",
                    found=tuple(tensor.shape),
                    remedy="prepare it over this base model",
                )
            tensors.append(tensor)
        stacked[path] = torch.stack(tensors)
    return stacked


def _groups(layers: Mapping[str, SeatedLayer]) -> list[list[str]]:
    """Paths of the routed layers, those that are tied together."""
    groups: dict[str, list[str]] = {}
    for path in layers:
        parent, _, last = path.rpartition(".")
        names = next((names for names in _TIED if last in names), (last,))
        groups.setdefault(f"{parent}.{'+'.join(names)}", []).append(path)
    return list(groups.values())


def _tied_score_rows(layers: Mapping[str, SeatedLayer], keep_zeros: bool) -> dict[str, Tensor]:
    """One prototype for each expert of a group of layers, handed to every layer of the group that it has."""
    seats: dict[int, list[tuple[str, int]]] = {}
    for path, layer in layers.items():
        for seat, position in enumerate(layer.experts):
            seats.setdefault(position, []).append((path, seat))
    # One batched factorisation for all experts that have the same layers at the same ranks.
    alike: dict[tuple[tuple[str, int], ...], list[int]] = {}
    for position, layer_seats in seats.items():
        alike.setdefault(tuple((path, layers[path].ranks[seat]) for path, seat in layer_seats), []).append(position)
    score_rows = {path: torch.zeros_like(layer.lora.down[layer.lora.num_ranks :]) for path, layer in layers.items()}
    for signature, positions in alike.items():
        expert_seats = {path: [layers[path].experts.index(p) for p in positions] for path, _ in signature}
        lora_a = [_stacked(layers[path].lora.down, layers[path], expert_seats[path]) for path, _ in signature]
        outputs = [
            _stacked(layers[path].outputs, layers[path], expert_seats[path])[..., :rank].to(lora_a[0].device)
            for path, rank in signature
        ]
        prototypes = tied_prototypes(lora_a, outputs)
        if keep_zeros:
            is_zero = ~prototypes.any(dim=1)
            prototypes[is_zero] = input_directions(torch.cat(lora_a, dim=1)[is_zero])
        for path, seat_index in expert_seats.items():
            score_rows[path][seat_index] = prototypes.to(score_rows[path])
    return score_rows


def _stacked(matrix: Tensor, layer: SeatedLayer, seats: Sequence[int]) -> Tensor:
    """Rows of seats of one rank: (seats, rank, width)."""
    return torch.stack([matrix[layer.rank_index(seat)] for seat in seats])
