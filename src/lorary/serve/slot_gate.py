"""The gate of routed adapters in an engine that serves many: a function on its low-rank buffer, with static shapes.

An engine computes `z = x lora_aᵀ` for a batch whose tokens belong to different slots (adapters), and then adds
`z lora_bᵀ`. In between, the columns of a routed adapter are multiplied by the routing weights of their experts. What
differs between slots stands in tensors, so that one captured graph serves whatever adapters are loaded later.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lorary.errors import AdapterError
from lorary.ops.choose import softmax_weights
from lorary.serve.routed_layout import RoutedLayout

NO_EXPERT = -1


class SlotGate(nn.Module):
    """How the columns of each slot are gated; a slot without a routed adapter is left as it is.

    Args:
        num_slots: adapters that the engine holds at once.
        num_columns: of its low-rank buffer: the largest rank it takes.
        device: of the buffer.
    """

    expert_of_column: Tensor
    score_column: Tensor
    top_k: Tensor
    temperature: Tensor
    is_routed: Tensor
    reads_rows: Tensor

    def __init__(self, num_slots: int, num_columns: int, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.num_slots, self.num_columns = num_slots, num_columns
        # An expert has one column for its rank and one for its score at least.
        self.most_experts = max(1, num_columns // 2)
        tables = {
            "expert_of_column": torch.full((num_slots, num_columns), NO_EXPERT),
            "score_column": torch.zeros(num_slots, self.most_experts, dtype=torch.int64),
            "top_k": torch.ones(num_slots, dtype=torch.int64),
            "temperature": torch.ones(num_slots),
            "is_routed": torch.zeros(num_slots, dtype=torch.bool),
            "reads_rows": torch.zeros(num_slots, dtype=torch.bool),
        }
        for name, table in tables.items():
            self.register_buffer(name, table.to(device), persistent=False)

    def put(self, slot: int, layout: RoutedLayout | None) -> None:
        """Say what a slot holds; the tensors stay where they are.

        Args:
            slot: number of the slot.
            layout: of a routed adapter; None for an ordinary one, or none.

        Raises:
            AdapterError: if the adapter has more columns than the buffer.
        """
        if layout is not None and layout.num_columns > self.num_columns:
            raise AdapterError(
                f"a routed adapter must fit the {self.num_columns} columns of the low-rank buffer",
                found=f"{layout.num_columns} columns",
                remedy="start the server with a larger --max-lora-rank",
            )
        self.is_routed[slot] = False
        if layout is None:
            return
        num_experts = len(layout.experts)
        of_rank = torch.arange(num_experts).repeat_interleave(torch.tensor(layout.ranks))
        self.expert_of_column[slot] = NO_EXPERT
        self.expert_of_column[slot, : layout.num_ranks] = of_rank.to(self.expert_of_column.device)
        columns = torch.arange(layout.num_ranks, layout.num_columns)
        self.score_column[slot] = 0
        self.score_column[slot, :num_experts] = columns.to(self.score_column.device)
        self.top_k[slot], self.temperature[slot] = layout.top_k, layout.temperature
        self.reads_rows[slot] = layout.router == "arrow"
        self.is_routed[slot] = True

    def alive(self, lora_b: Float[Tensor, "slots d_out columns"]) -> Bool[Tensor, "slots experts"]:
        """Which experts act in a layer: those that the exporter marked in the score columns of lora_b.

        Args:
            lora_b: of the layer, as the engine stacks the slots'.
        """
        markers = lora_b[:, 0].gather(1, self.score_column) != 0
        return markers & (self.score_column > 0)

    def forward(
        self,
        z: Float[Tensor, "tokens columns"],
        slot: Int[Tensor, " tokens"],
        alive: Bool[Tensor, "slots experts"],
    ) -> Float[Tensor, "tokens columns"]:
        """The gated buffer.

        Args:
            z: the low-rank buffer of one layer, whole sums; at least float32.
            slot: of each token; below 0 for one without an adapter.
            alive: see there.

        Returns:
            `z` with the columns of routed adapters weighed: each expert's by its routing weight, scores by 0. Tokens
            without an adapter have zeros, those of ordinary adapters what they had.
        """
        held = slot.clamp_min(0)
        routed = (self.is_routed[held] & (slot >= 0))[:, None]
        weights = self.weights(z, held, alive)
        of_column = self.expert_of_column[held]
        by_column = weights.gather(1, of_column.clamp_min(0)).masked_fill(of_column == NO_EXPERT, 0.0)
        gated = torch.where(of_column == NO_EXPERT, 0.0, z) * by_column
        # Without an adapter the buffer may hold anything: GPU kernels leave it as it was allocated, and those of the
        # CPU take -1 for the last slot.
        return torch.where(routed, gated, torch.where((slot < 0)[:, None], 0.0, z))

    def weights(
        self, z: Float[Tensor, "tokens columns"], held: Int[Tensor, " tokens"], alive: Bool[Tensor, "slots experts"]
    ) -> Float[Tensor, "tokens experts"]:
        """Routing weights of each token over the experts of its slot.

        Args:
            z: as for `forward`.
            held: the slot of each token, 0 for one without.
            alive: as for `forward`.
        """
        projections = z.gather(1, self.score_column[held]).abs()
        of_column = self.expert_of_column[held]
        # What belongs to no expert is summed up in a place of its own.
        place = torch.where(of_column == NO_EXPERT, self.most_experts, of_column)
        squares = z.new_zeros(z.shape[0], self.most_experts + 1).scatter_add(1, place, z.square())
        scores = torch.where(self.reads_rows[held][:, None], projections, squares[:, :-1].sqrt())
        scores = scores.masked_fill(~alive[held], -torch.inf)
        best, experts = scores.topk(self.most_experts, dim=1)
        is_out = torch.arange(self.most_experts, device=z.device) >= self.top_k[held][:, None]
        logits = (best / self.temperature[held][:, None].to(best)).masked_fill(is_out, -torch.inf)
        return torch.zeros_like(scores).scatter(1, experts, softmax_weights(logits))
