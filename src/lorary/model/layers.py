"""The experts of a library, stacked layer by layer for one base model."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorary.adapter import Adapter, LoraFactors
from lorary.axes import layer_number
from lorary.errors import AdapterError, RouterError
from lorary.formats.peft_copies import check_copies, copies_of
from lorary.formats.peft_files import Shape
from lorary.library.base_weights import is_plain, weights_of_model
from lorary.lora.gated import GatedLora
from lorary.lora.seat import device_of, find_linear, linear_shape
from lorary.model.beside import Beside, beside_of, scaled_up
from lorary.ops.finite import is_finite
from lorary.ops.growable import append_rows, remove_rows, widen
from lorary.route.facts import expert_facts

# What models call the projection of queries, fused ones included.
_QUERIES = frozenset({"q_proj", "query", "q", "q_lin", "qkv_proj", "query_key_value", "c_attn", "Wqkv"})

# Factors that are decomposed at once, in numbers: they are copied in float64 several times over, and what a thread has
# freed its allocator may keep.
_MOST_NUMBERS = 2**18


# Bias and magnitude of one expert.
Further = tuple[Tensor | None, Tensor | None]


@dataclass
class SeatedLayer:
    """One routed linear layer and what the rules know of its experts.

    Args:
        experts: where each seat's expert stands in the order of names: fresh layers are seated in that order, one
            that changed live keeps its seats and renumbers these.
        ranks: rank of each expert.
        alive: (experts,) bool, whether it does anything.
        gap: (experts,) σ2/σ1, how clear its prototype is.
        row_space: (ranks, widest rank), for each expert its matrix of `lorary.route.facts`, one below the other.
        outputs: likewise.
        scalings: of each expert, folded into the `up` of the module.
        further: of each expert, its bias and its magnitude, as its adapter has them: what the module's offsets and
            gains were computed from.
        lora: the module.
    """

    experts: tuple[int, ...]
    ranks: tuple[int, ...]
    alive: Tensor
    gap: Tensor
    row_space: Tensor
    outputs: Tensor
    scalings: tuple[float, ...]
    further: tuple["Further", ...]
    lora: GatedLora

    def rank_index(self, seat: int) -> slice:
        """Where the ranks of one seat lie."""
        start = sum(self.ranks[:seat])
        return slice(start, start + self.ranks[seat])

    def only(self, positions: Collection[int]) -> "SeatedLayer | None":
        """The layer with some of its experts alone, for looking at them; None where it has none of them.

        Args:
            positions: of the experts in the order of names.

        Returns:
            Itself where these are all of them; else one with tensors of its own.
        """
        seats = [seat for seat, position in enumerate(self.experts) if position in positions]
        if len(seats) in (0, len(self.experts)):
            return self if seats else None
        ranks = torch.cat([torch.arange(index.start, index.stop) for index in map(self.rank_index, seats)])
        down = torch.cat([self.lora.down[ranks], self.lora.prototypes[seats]])
        sizes = torch.tensor([self.ranks[seat] for seat in seats])
        expert_of_rank = torch.arange(len(seats)).repeat_interleave(sizes).to(down.device)
        offset, gain = (rows if rows is None else rows[seats] for rows in (self.lora.offset, self.lora.gain))
        return SeatedLayer(
            experts=tuple(self.experts[seat] for seat in seats),
            ranks=tuple(sizes.tolist()),
            alive=self.alive[seats],
            gap=self.gap[seats],
            row_space=self.row_space[ranks],
            outputs=self.outputs[ranks],
            scalings=tuple(self.scalings[seat] for seat in seats),
            further=tuple(self.further[seat] for seat in seats),
            lora=GatedLora(down, self.lora.up[ranks], expert_of_rank, offset, gain),
        )

    def append(self, position: int, factors: LoraFactors, beside: Beside) -> None:
        """Seat one more expert, behind the others: in time of that expert, and of moving the prototypes.

        Args:
            position: in the order of names.
            factors: that fit the layer.
            beside: what the expert adds beside them, as `beside_of` gives it.
        """
        rows = [*self._beside_rows(), beside]
        down = self.lora.down.new_zeros(factors.rank, factors.d_in)
        self.lora.append(down, down[0], self.lora.up.new_zeros(factors.rank, factors.d_out))
        self.experts, self.ranks = (*self.experts, position), (*self.ranks, factors.rank)
        self.scalings, self.further = (*self.scalings, factors.scaling), (*self.further, further_of(factors))
        width = max(self.row_space.shape[1], factors.rank)
        for name in ("row_space", "outputs"):
            matrix = widen(getattr(self, name), width)
            setattr(self, name, append_rows(matrix, matrix.new_zeros(factors.rank, width)))
        self.alive = torch.cat([self.alive, self.alive.new_zeros(1)])
        self.gap = torch.cat([self.gap, self.gap.new_zeros(1)])
        self._take(len(self.experts) - 1, factors, rows)

    def replace(self, seat: int, factors: LoraFactors, beside: Beside) -> None:
        """Give a seat other factors of the same rank, in time of those alone; see `append`."""
        rows = self._beside_rows()
        rows[seat] = beside
        self.scalings = (*self.scalings[:seat], factors.scaling, *self.scalings[seat + 1 :])
        self.further = (*self.further[:seat], further_of(factors), *self.further[seat + 1 :])
        self._take(seat, factors, rows)

    def remove(self, seat: int) -> None:
        """Take the expert of one seat away; those behind it move up."""
        rows = self._beside_rows()
        rank_index = self.rank_index(seat)
        self.lora.remove(seat, rank_index.start, rank_index.stop)
        self.row_space = remove_rows(self.row_space, rank_index.start, rank_index.stop)
        self.outputs = remove_rows(self.outputs, rank_index.start, rank_index.stop)
        remaining = [index for index in range(len(self.experts)) if index != seat]
        self.alive, self.gap = self.alive[remaining], self.gap[remaining]
        self.experts = tuple(self.experts[index] for index in remaining)
        self.ranks = tuple(self.ranks[index] for index in remaining)
        self.scalings = tuple(self.scalings[index] for index in remaining)
        self.further = tuple(self.further[index] for index in remaining)
        self.lora.set_beside(*stacked_beside([rows[index] for index in remaining], self.lora.up))

    def _take(self, seat: int, factors: LoraFactors, rows: Sequence[Beside]) -> None:
        """Put factors into a seat, and what all experts add beside theirs."""
        lora, rank_index = self.lora, self.rank_index(seat)
        offset, gain = stacked_beside(rows, lora.up)
        lora.set_beside(offset, gain)
        down, up = factors.lora_a.to(lora.down), scaled_up(factors, None if gain is None else gain[seat], lora.up)
        facts = expert_facts(down[None], up.mT[None])
        prototype = facts.prototypes[0].to(down)
        lora.down[rank_index], lora.up[rank_index] = down, up
        lora.down[lora.num_ranks + seat] = prototype
        width = self.row_space.shape[1]
        self.row_space[rank_index] = widen(facts.row_space[0], width).to(self.row_space)
        self.outputs[rank_index] = widen(facts.outputs[0], width).to(self.outputs)
        self.alive[seat] = alive_of(prototype[None], rows[seat : seat + 1])[0]
        self.gap[seat] = facts.gap[0]

    def _beside_rows(self) -> list[Beside]:
        """What each expert adds beside its factors, as it stands in the stacks."""
        number = len(self.experts)
        columns = [[None] * number if rows is None else list(rows) for rows in (self.lora.offset, self.lora.gain)]
        return [Beside(*pair) for pair in zip(*columns, strict=True)]


def further_of(factors: LoraFactors) -> Further:
    """What factors have beside lora_a and lora_b, in copies that keep nothing else alive."""
    bias, magnitude = (None if part is None else part.clone() for part in (factors.bias, factors.magnitude))
    return bias, magnitude


def stacked_beside(rows: Sequence[Beside], like: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Offsets and gains of the experts of a layer, (experts, d_out) each, zero for those that lack one.

    Args:
        rows: of each expert.
        like: of the dtype and device that they get, (ranks, d_out).

    Returns:
        None for what no expert has, or is zero in all.
    """
    offset, gain = (_stacked(parts, like) for parts in zip(*rows, strict=True))
    return offset, gain


def _stacked(parts: Sequence[Tensor | None], like: Tensor) -> Tensor | None:
    if all(part is None for part in parts):
        return None
    stack = like.new_zeros(len(parts), like.shape[1])
    for row, part in zip(stack, parts, strict=True):
        if part is not None:
            row.copy_(part)
    return stack if bool(stack.any()) else None


def alive_of(prototypes: Tensor, rows: Sequence[Beside]) -> Tensor:
    """(experts,) bool, whether each does anything: by its factors, or beside them."""
    beside = [any(part is not None and bool(part.any()) for part in row) for row in rows]
    return prototypes.any(dim=1) | torch.tensor(beside, device=prototypes.device)


def build_layers(
    model: nn.Module,
    adapters: Iterable[Adapter],
    positions: Sequence[int] | None = None,
    shapes: Mapping[str, Mapping[str, Shape]] | None = None,
) -> dict[str, SeatedLayer]:
    """Stack all experts of each linear layer, in the order in which the model holds its layers.

    Args:
        model: the base model, unchanged.
        adapters: the experts, in the order of their seats. A lazy collection never holds more than one adapter
            beside the stacks; it is gone through twice where shapes are not given.
        positions: where each of them stands in the order of names; as they come where None.
        shapes: by name of the expert and path of the layer, in the order of seats.

    Returns:
        The seated layers by path.

    Raises:
        AdapterError: if an adapter does not fit the model.
    """
    members: dict[str, list[tuple[int, int]]] = {}
    names: dict[int, str] = {}
    outlines: Iterable[tuple[str, Mapping[str, Shape]]] = (
        shapes.items() if shapes is not None else ((adapter.name, _shapes_of(adapter)) for adapter in adapters)
    )
    for seat, (name, outline) in enumerate(outlines):
        position = positions[seat] if positions else seat
        names[position] = name
        for path, (rank, d_in, d_out) in outline.items():
            find_linear(model, path, name, d_in, d_out)
            members.setdefault(path, []).append((position, rank))
    stacks = {path: _Stack(model, path, members[path], names) for path in in_order(model, members)}
    for seat, adapter in enumerate(adapters):
        if shapes is not None and shapes[adapter.name] != _shapes_of(adapter):
            raise AdapterError(
                f"adapter '{adapter.name}' must stay as it is while it is attached", found="other shapes than before"
            )
        check_copies_of(adapter, model)
        for path, factors in adapter:
            stacks[path].put(positions[seat] if positions else seat, factors)
    # Small factorisations run in one thread each, and one after the other they are most of the time.
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return dict(zip(stacks, pool.map(_Stack.seat, stacks.values()), strict=True))


def check_copies_of(adapter: Adapter, model: nn.Module) -> None:
    """Check that weights of the base which an adapter brings are those of the model.

    Raises:
        AdapterError: naming the weight that the adapter would change.
    """
    copies = copies_of(adapter)
    if not copies:
        return
    weights = weights_of_model(model, list(copies))
    # Where the model has them quantised or elsewhere, they were compared with its file when the adapter was added.
    comparable = {name: copy for name, copy in copies.items() if name not in weights or is_plain(weights[name])}
    check_copies(adapter, comparable, weights, type(model).__name__, is_cast=True)


def _shapes_of(adapter: Adapter) -> dict[str, Shape]:
    return {path: Shape(factors.rank, factors.d_in, factors.d_out) for path, factors in adapter}


def in_order(model: nn.Module, paths: Iterable[str]) -> list[str]:
    """Paths in the order in which the model holds its layers.

    Duplicates stay in: a tied layer that two paths lead to is refused when it is seated, not dropped.
    """
    routed = set(paths)
    return [name for name, _ in model.named_modules(remove_duplicate=False) if name in routed]


def late_layer(paths: Sequence[str]) -> str:
    """The query projection of the last block, or what comes first there.

    Args:
        paths: of routed layers, in the model's order.
    """
    blocks = {number for path in paths if (number := layer_number(path)) is not None}
    last = [path for path in paths if not blocks or layer_number(path) == max(blocks)]
    return next((path for path in last if path.rpartition(".")[2] in _QUERIES), last[0])


class _Stack:
    """Room for the factors of one layer's experts, filled one by one.

    Args:
        model: the base model.
        path: of the linear layer.
        members: (position in the order of names, rank) of each expert that has the layer, in the order of seats.
        names: of the experts, by that position.
    """

    def __init__(
        self, model: nn.Module, path: str, members: Sequence[tuple[int, int]], names: Mapping[int, str]
    ) -> None:
        self.path, self.names = path, names
        self.layer = layer = model.get_submodule(path)
        shape = linear_shape(layer)
        assert shape is not None
        d_in, d_out = shape
        dtype = _compute_dtype(layer)
        self.device = device_of(layer, model)
        self.experts = tuple(position for position, _ in members)
        self.ranks = torch.tensor([rank for _, rank in members])
        ends = self.ranks.cumsum(0).tolist()
        self.slices = {position: slice(end - rank, end) for (position, rank), end in zip(members, ends, strict=True)}
        self.down = torch.zeros(ends[-1] + len(members), d_in, dtype=dtype)
        self.up = torch.zeros(ends[-1], d_out, dtype=dtype)
        self.scalings: dict[int, float] = {}
        self.further: dict[int, Further] = {}
        self.beside: dict[int, Beside] = {}

    def put(self, position: int, factors: LoraFactors) -> None:
        """Copy the factors of one expert into its place, its scaling folded into lora_b.

        Raises:
            AdapterError: as `beside_of`.
        """
        rank_index = self.slices[position]
        beside = self.beside[position] = beside_of(self.layer, self.path, self.names[position], factors)
        gain = None if beside.gain is None else beside.gain.to(self.up)
        self.down[rank_index].copy_(factors.lora_a)
        self.up[rank_index] = scaled_up(factors, gain, self.up)
        self.scalings[position], self.further[position] = factors.scaling, further_of(factors)

    def seat(self) -> SeatedLayer:
        """Compute what the rules know and make the module.

        Raises:
            AdapterError: if a factor, or lora_b with its scaling, is more than the dtype of the experts can hold.
        """
        rows = [self.beside[position] for position in self.experts]
        offset, gain = stacked_beside(rows, self.up)
        beside = [matrix for matrix in (offset, gain) if matrix is not None]
        if not all(map(is_finite, (self.down, self.up, *beside))):
            self._refuse()
        experts, width = len(self.experts), int(self.ranks.max())
        prototypes, gap = self.down[-experts:], torch.zeros(experts, dtype=torch.float64)
        row_space = self.down.new_zeros(len(self.up), width)
        outputs = torch.zeros_like(row_space)
        starts = self.ranks.cumsum(0) - self.ranks
        for rank in self.ranks.unique().tolist():  # batched factorisations of the experts of a rank
            equal_rank = (self.ranks == rank).nonzero().squeeze(1)
            most = max(1, _MOST_NUMBERS // (rank * (self.down.shape[1] + self.up.shape[1])))
            for part in equal_rank.split(most):
                rank_index = starts[part][:, None] + torch.arange(rank)  # (experts of this part, rank)
                facts = expert_facts(self.down[rank_index], self.up[rank_index].mT)
                prototypes[part], gap[part] = facts.prototypes.to(prototypes), facts.gap
                row_space[rank_index] = (
                    widen(facts.row_space.flatten(0, 1), width).view(*rank_index.shape, width).to(row_space)
                )
                outputs[rank_index] = (
                    widen(facts.outputs.flatten(0, 1), width).view(*rank_index.shape, width).to(outputs)
                )
        expert_of_rank = torch.arange(experts).repeat_interleave(self.ranks)
        lora = GatedLora(self.down.to(self.device), self.up.to(self.device), expert_of_rank.to(self.device))
        lora.set_beside(*(matrix if matrix is None else matrix.to(self.device) for matrix in (offset, gain)))
        # These stay where they were computed: a router takes what it reads to the layer's device.
        return SeatedLayer(
            experts=self.experts,
            ranks=tuple(self.ranks.tolist()),
            alive=alive_of(prototypes, rows),
            gap=gap,
            row_space=row_space,
            outputs=outputs,
            scalings=tuple(self.scalings[position] for position in self.experts),
            further=tuple(self.further[position] for position in self.experts),
            lora=lora,
        )

    def _refuse(self) -> None:
        for position, rank_index in self.slices.items():
            parts = [part.to(self.up.dtype) for part in self.beside[position] if part is not None]
            if not all(map(is_finite, (self.down[rank_index], self.up[rank_index], *parts))):
                raise beyond(self.names[position], self.path, self.scalings[position])


def beyond(name: str, path: str, scaling: float) -> AdapterError:
    """The error over an expert whose numbers are too large to compute with."""
    return AdapterError(
        f"adapter '{name}' must have factors and a scaling at {path} that float32 can hold",
        found=f"scaling {scaling:g}",
        remedy="leave it out: training diverged, or lora_alpha is a slip",
    )


def more_than_factors(action: str, path: str, remedy: str) -> RouterError:
    """The error where factors alone are put together, and an expert has a bias or a magnitude beside them.

    Args:
        action: what is done to factors.
        path: of the layer.
        remedy: what to do instead.
    """
    return RouterError(
        f"{action} needs experts that are plain LoRAs, at layer '{path}' too",
        found="an expert with a bias (lora_bias) or a magnitude (DoRA)",
        remedy=remedy,
    )


def _compute_dtype(layer: nn.Module) -> torch.dtype:
    """float64 beside a float64 layer, else float32: adapters are small, and scores in half precision choose others."""
    double = any(p.dtype == torch.float64 for p in layer.parameters(recurse=False))
    return torch.float64 if double else torch.float32
