"""Gates: what a routed layer asks for its routing weights, one kind for each moment of decision.

    ScoreGate     scores of this layer, then the choice, for each token
    TokenGate     what one layer decided for the token, in all later layers of the same pass
    RequestGate   what was decided for the row before the pass began        (row_gates.py, as those below)
    FixedGate     the same weights for every token
    RowGate       each row of the batch by a gate of its own

Gates are modules so that their tensors follow the model to its device and into copies of it.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from lorary.lora.context import PerThread
from lorary.lora.gate import LayerInput
from lorary.model.decision import TokenDecision
from lorary.model.layers import SeatedLayer
from lorary.model.seated import Seated
from lorary.ops.blocks import Block, split_blocks
from lorary.ops.choose import Choice, Chosen, choose
from lorary.ops.native import Quick
from lorary.ops.normalise import InputNorm, normalise, normalise_products
from lorary.route.rule import UNREAD, Reading, Rule


class ScoreGate(nn.Module):
    """Scores by a rule, then the choice.

    Args:
        rule: a rule that looks at tokens.
        layer: the layer it is for.
        choice: what becomes of the scores.
        allowed: (experts,) bool, which experts of the layer may be used.
        input_norm: what is done to hidden states before scoring.
        candidates: for a rule of two stages.
        score_rows: (experts, d_in), what the rule reads in place of the prototypes: prepared rows, tied prototypes.
        blocks: by kind, what it reads in place of the layer's small matrices.
        calibration: (experts, 2), mean and deviation of each expert's scores.
    """

    def __init__(
        self,
        rule: Rule,
        layer: SeatedLayer,
        choice: Choice,
        allowed: Tensor,
        *,
        input_norm: InputNorm = "none",
        candidates: int = 20,
        score_rows: Tensor | None = None,
        blocks: Mapping[str, Sequence[Block]] | None = None,
        calibration: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.rule, self.choice, self.input_norm, self.candidates = rule, choice, input_norm, candidates
        down = layer.lora.down
        self.num_ranks = layer.lora.num_ranks
        is_plain = choice == Choice(top_k=choice.top_k, temperature=choice.temperature)
        self.is_quick = rule.quick and is_plain and input_norm == "none" and blocks is None and calibration is None
        alive = layer.alive if score_rows is None else score_rows.any(dim=1)
        self._keep("alive", (alive.to(allowed.device) & allowed).to(down.device))
        self._keep("score_rows", None if score_rows is None else score_rows.to(down).contiguous())
        self._keep("calibration", None if calibration is None else calibration.to(down))
        # Only one kind of normalisation needs them, and they take a walk through all factors.
        self._keep("row_sums", down.sum(dim=1) if input_norm == "layer" else None)
        self.num_blocks: dict[str, int] = {
            kind: self._keep_blocks(
                kind, split_blocks(layer.ranks, getattr(layer, kind)) if blocks is None else blocks[kind]
            )
            for kind in ("row_space", "outputs")
            if kind in rule.reads
        }
        matrices = [getattr(layer, kind).to(down).contiguous() for kind in self.num_blocks] if self.is_quick else []
        self._keep("matrices", matrices[0] if matrices else None)

    decided = None

    @property
    def reads_prototypes(self) -> bool:
        """Whether the rule reads score rows and has none of its own."""
        return "score_rows" in self.rule.reads and self.score_rows is None

    @property
    def reads_z(self) -> bool:
        """Whether the rule reads the experts' down-projections."""
        return bool(self.num_blocks)

    @property
    def most(self) -> int:
        """Experts of a token at most."""
        return self.choice.most(len(self.alive))

    @property
    def quick(self) -> Quick | None:
        """What compiled code needs to do all of this, where that is no more than magnitudes and a softmax."""
        if not self.is_quick:
            return None
        candidates = min(self.candidates, len(self.alive))
        return Quick(self.score_rows, self.matrices, self.alive, self.most, candidates, self.choice.temperature)

    def forward(self, inputs: LayerInput) -> Chosen:
        """The experts of each token."""
        return choose(self.scores(inputs), self.choice)

    def scores(self, inputs: LayerInput) -> Tensor:
        """Scores of each token, (tokens, experts)."""
        z, projections = inputs.z, inputs.projections
        if self.input_norm != "none":
            num_ranks = self.num_ranks
            sums = self.row_sums if self.row_sums is not None else inputs.x.new_zeros(num_ranks + len(self.alive))
            if z is not None:
                z = normalise_products(z, inputs.x, sums[:num_ranks], self.input_norm)
            if projections is not None:
                projections = normalise_products(projections, inputs.x, sums[num_ranks:], self.input_norm)
        if self.score_rows is not None:
            projections = normalise(inputs.x, self.input_norm) @ self.score_rows.mT
        reading = Reading(
            UNREAD if z is None else z, UNREAD if projections is None else projections, self.alive,
            self._blocks("row_space"), self._blocks("outputs"), self.calibration, self.candidates,
        )  # fmt: skip
        assert self.rule.scores is not None
        return self.rule.scores(reading)

    alive: Tensor
    score_rows: Tensor | None
    matrices: Tensor | None
    calibration: Tensor | None
    row_sums: Tensor | None

    def _keep(self, name: str, tensor: Tensor | None) -> None:
        self.register_buffer(name, tensor, persistent=False)

    def _keep_blocks(self, kind: str, blocks: Sequence[Block]) -> int:
        for number, block in enumerate(blocks):
            for part, tensor in zip(Block._fields, block, strict=True):
                self._keep(f"{kind}_{number}_{part}", tensor.to(self.alive.device))
        return len(blocks)

    def _blocks(self, kind: str) -> list[Block]:
        return [
            Block(*(getattr(self, f"{kind}_{number}_{part}") for part in Block._fields))
            for number in range(self.num_blocks.get(kind, 0))
        ]


class TokenGate(nn.Module):
    """One layer decides for each token, and all that run later in the pass do as it did.

    Args:
        decisions: of each thread; shared by all layers of the setting.
        layer: path of the layer.
        seated: which experts sit in it.
        decides: its scores, where it may decide: the first such layer to run does. The order in which a model holds
            its layers is not always that in which it runs them (Phi-3).
        most: experts of a token at most.
    """

    quick = decided = None

    def __init__(
        self, decisions: PerThread[TokenDecision], layer: str, seated: Seated, decides: ScoreGate | None, most: int
    ) -> None:
        super().__init__()
        self.decisions, self.layer, self.seated, self.decides, self.most = decisions, layer, seated, decides, most

    @property
    def decision(self) -> TokenDecision:
        """Of the thread that runs."""
        return self.decisions.here

    @property
    def reads_prototypes(self) -> bool:
        """Whether this layer decides, by a rule that reads them."""
        return self.decides is not None and self.decision.falls_to(self.layer) and self.decides.reads_prototypes

    @property
    def reads_z(self) -> bool:
        """Whether this layer decides, by a rule that reads the down-projections."""
        return self.decides is not None and self.decision.falls_to(self.layer) and self.decides.reads_z

    def forward(self, inputs: LayerInput) -> Chosen | None:
        """The experts of each token; None in a layer that runs before the decision."""
        if self.decides is None or not self.decision.falls_to(self.layer):
            return self.decision.read(self.seated.seats, inputs.x)
        chosen: Chosen = self.decides(inputs)
        self.decision.write(self.seated.experts, chosen, self.layer)
        return chosen
