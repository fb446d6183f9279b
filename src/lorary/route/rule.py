"""What a routing rule is told, and what the catalogue says about one."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from lorary.ops.blocks import Block
from lorary.ops.choose import Scale
from lorary.ops.normalise import InputNorm

# What a rule must have before it can run: the adapters' weights alone, a pass over the prompt, or prepared data.
Needs = Literal["weights", "probe", "prepared"]
# What is measured. `vector`: (d_in,) for each expert and layer. `moments`: (2,) for each expert and layer, the mean and
# the deviation of its scores there. `request`: one tensor for each expert.
Holds = Literal["vector", "moments", "request"]
# `layer`: each token in each layer. `token`: each token once. `request`: each row once. `always`: nothing to decide.
Per = Literal["layer", "token", "request"]
Decides = Literal["layer", "token", "request", "always"]
# What a decision for a request is taken from. `mean`: the scores over all tokens and layers. `last`: the last token in
# one layer.
Measures = Literal["mean", "last"]
# What a rule reads in a layer. `score_rows`: products of the token with one row per expert, its prototype or what was
# prepared; `row_space`, `outputs`: small matrices on the low-rank buffer.
Reads = Literal["score_rows", "row_space", "outputs"]
# What a rule that looks at a whole request reads of its prompt. `hidden`: the mean hidden state behind the first layers
# of the bare base (`lorary.model.early`). `text`: the vector of a sentence encoder.
Features = Literal["hidden", "text"]
UNREAD = torch.empty(0)


@dataclass(frozen=True)
class Data:
    """What a rule needs beyond the adapters' weights; `lorary.prepare.catalogue` says how it is measured.

    Args:
        kind: the name under which a library keeps it; the features are appended for `request`.
        holds: what is measured.
        is_joint: whether it is measured for all experts together, so that a change of one changes all.
        is_optional: whether the rule runs without it too, and reads it with `calibrated` alone.
        num_rows: training rows of each task that it is measured on, where nobody says.
        has_yardstick: for moments: whether prompts that ship with the package stand in where it was not prepared.
    """

    kind: str
    holds: Holds = "vector"
    is_joint: bool = False
    is_optional: bool = False
    num_rows: int = 100
    has_yardstick: bool = False

    def kind_of(self, features: Features) -> str:
        """The name under which a library keeps what is measured.

        Args:
            features: for `request`, what is read of a prompt. Behind all layers, `hidden` stood for other vectors.
        """
        return f"{self.kind}_{'early' if features == 'hidden' else features}" if self.holds == "request" else self.kind

    @property
    def yardstick_kind(self) -> str:
        """The name under which a library keeps, expert by expert, what was measured on the prompts that stand in."""
        return f"{self.kind}_yardstick"


@dataclass(frozen=True)
class Reading:
    """What a rule that looks at tokens may read in one layer; input normalisation is done already.

    What a rule does not read is `UNREAD`.

    Args:
        z: (tokens, ranks), the experts' down-projections of the tokens, for a rule that reads what is built on them.
        projections: (tokens, experts), products with one row per expert, for a rule that reads `score_rows`.
        alive: (experts,) bool, whether each expert may be chosen: its update is not zero, and it is allowed.
        row_space: for a rule that reads it; see `lorary.route.projection`.
        outputs: for a rule that reads it; see `lorary.route.norm`.
        calibration: (experts, 2), mean and deviation of each expert's scores, where they were measured for the rule.
        candidates: how many experts a first stage lets pass.
    """

    z: Tensor
    projections: Tensor
    alive: Tensor
    row_space: Sequence[Block] = ()
    outputs: Sequence[Block] = ()
    calibration: Tensor | None = None
    candidates: int = 20


def _stacked(prepared: Sequence[Tensor], _tasks: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(prepared))


@dataclass(frozen=True)
class Rule:
    """One router of the catalogue.

    Args:
        summary: one sentence for `--help` and the documentation.
        data: what it needs beyond the adapters' weights; None where it needs nothing.
        decides: when it decides by default; a setting's `per` may choose another of `pers`.
        pers: the values of `per` that it can run under; none for a rule that looks at nothing.
        reads: what it reads in a layer.
        scale: what becomes of the chosen scores by default; a setting's `scale` may name another.
        measures: what it decides by for a request.
        scores: for a rule that looks at tokens: the pure function from a reading to (tokens, experts) scores.
        score_rows: for a rule that reads rows made from data: (experts, d_in) as prepared -> the rows it reads.
        input_norm: what it does to hidden states where a setting does not say.
        request: for a rule that looks at a whole request: the pure function from (batch, features) and what `fit` made
            of the prepared data to (batch, experts) scores.
        fit: for such a rule: what was prepared for each expert, and the number of the task of each prompt of it, where
            it has prompts -> what `request` reads, which follows a tensor by `to`. The tensors stacked by default.
        quick: whether compiled code knows its scores (`lorary.ops.native.Quick`): |x . row| for one that reads rows,
            the norms of small matrices for one that reads these, and the latter among candidates for one of both.
        weights: for a rule that looks at nothing: names of the experts -> (experts,) weights.
        defaults: fields of the flat spelling that differ from those of other rules where nobody says.
        tries: for a rule that only picks another: the names of rules, of which the first that has all its data acts.
        edition: goes up when the same weights, data and settings would be scored otherwise, by a constant of the rule
            for example: results of an earlier edition are computed again.
    """

    summary: str
    data: Data | None = None
    decides: Decides = "layer"
    pers: tuple[Per, ...] = ("layer", "token", "request")
    reads: frozenset[Reads] = frozenset()
    scale: Scale = "softmax"
    measures: Measures = "mean"
    scores: Callable[[Reading], Tensor] | None = None
    score_rows: Callable[[Tensor], Tensor] | None = None
    input_norm: InputNorm = "none"
    request: Callable[[Tensor, Any], Tensor] | None = None
    fit: Callable[[Sequence[Tensor], Sequence[Tensor]], Any] = _stacked
    quick: bool = False
    weights: Callable[[Sequence[str]], Tensor] | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict, hash=False)
    tries: tuple[str, ...] = ()
    edition: int = 1

    @property
    def measured_by(self) -> dict[str, int]:
        """What keys of prepared data have beside: moments are of the rule's own scores, and follow its edition."""
        is_own = self.data is not None and self.data.holds == "moments"
        return {"edition": self.edition} if is_own and self.edition > 1 else {}

    @property
    def needs(self) -> Needs:
        """What it must have before it can run."""
        if self.data is not None and not self.data.is_optional and not self.tries:
            return "prepared"
        return "probe" if self.measures == "last" else "weights"
