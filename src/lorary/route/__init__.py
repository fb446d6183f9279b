"""Routing rules: one rule = one file = one pure function. The whole menu stands in `ROUTERS`.

A rule that looks at tokens turns a `Reading` of one layer into scores, one that looks at a whole request turns a vector
of its prompt into them; what becomes of scores (`lorary.ops.choose`), when it is decided and how experts are mixed are
settings that any of them takes.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lorary.route.arrow import arrow_readout
from lorary.route.base import base_weights
from lorary.route.centroid import centroid_score_rows, product_readout
from lorary.route.contrast import contrast_readout
from lorary.route.discriminant import discriminant_scores, fit_discriminant
from lorary.route.lag import lag_readout
from lorary.route.logo import logo_readout
from lorary.route.norm import norm_readout
from lorary.route.phatgoose import gate_score_rows
from lorary.route.projection import projection_readout
from lorary.route.retrieval import retrieval_scores
from lorary.route.rule import Data, Reading, Rule
from lorary.route.task_predictor import predictor_logits
from lorary.route.uniform import uniform_weights

__all__ = ["ROUTERS", "SAMPLES", "Reading", "Rule"]


def _arrow(reading: Reading) -> Tensor:
    return arrow_readout(reading.projections, reading.alive)


def _projection(reading: Reading) -> Tensor:
    return projection_readout(reading.z, reading.row_space, reading.alive)


def _norm(reading: Reading) -> Tensor:
    return norm_readout(reading.z, reading.outputs, reading.alive, reading.calibration)


def _lag(reading: Reading) -> Tensor:
    return lag_readout(_arrow(reading), _projection(reading), reading.candidates)


def _products(reading: Reading) -> Tensor:
    return product_readout(reading.projections, reading.alive)


def _logo(reading: Reading) -> Tensor:
    return logo_readout(reading.z, reading.outputs, reading.alive)


def _contrast(reading: Reading) -> Tensor:
    assert reading.calibration is not None
    return contrast_readout(reading.z, reading.row_space, reading.alive, reading.calibration)


# Vectors of some of an expert's prompts.
SAMPLES = Data("samples", holds="request", num_rows=16)
# One expert that fits, else what all of them have in common.
_ONE_OR_ALL: Mapping[str, Any] = {"top_k": 1, "threshold": 0.0, "fallback": "chat"}

ROUTERS: Mapping[str, Rule] = {
    "auto": Rule(
        "per request, by the best rule for what is known of the experts",
        data=SAMPLES,
        decides="request",
        pers=("request",),
        defaults=_ONE_OR_ALL,
        tries=("discriminant", "contrast"),
    ),
    "arrow": Rule(
        "per token and layer, the experts whose dominant input direction explains the token",
        reads=frozenset({"score_rows"}),
        scores=_arrow,
        quick=True,
    ),
    "projection": Rule(
        "per token and layer, the experts whose input space holds most of the token",
        reads=frozenset({"row_space"}),
        scores=_projection,
        quick=True,
    ),
    "norm": Rule(
        "per token and layer, the experts that change the layer's output most",
        data=Data("norm_calibration", holds="moments", is_optional=True),
        reads=frozenset({"outputs"}),
        scores=_norm,
        quick=True,
    ),
    "lag": Rule(
        "per token and layer, projection among the best candidates by arrow",
        # A mean over tokens has no meaning where most experts of each token are left out.
        pers=("layer", "token"),
        reads=frozenset({"score_rows", "row_space"}),
        scores=_lag,
        quick=True,
    ),
    "centroid": Rule(
        "per token and layer, the experts whose own data the token is like",
        data=Data("centroid"),
        reads=frozenset({"score_rows"}),
        score_rows=centroid_score_rows,
        scores=_products,
    ),
    "phatgoose": Rule(
        "per token and layer, the experts whose trained gate the token opens",
        data=Data("phatgoose"),
        reads=frozenset({"score_rows"}),
        score_rows=gate_score_rows,
        input_norm="layer",
        scores=_products,
    ),
    "contrast": Rule(
        "per request, the experts whose input space holds more of it than of the other experts' prompts",
        # The moments of all experts together settle sooner than the mean of one.
        data=Data("contrast", holds="moments", is_joint=True, num_rows=16, has_yardstick=True),
        decides="request",
        pers=("request",),
        reads=frozenset({"row_space"}),
        input_norm="unit",
        scores=_contrast,
    ),
    "discriminant": Rule(
        "per request, the expert in whose prompts' distribution it lies; the mean of all where it lies in no one's",
        data=SAMPLES,
        decides="request",
        pers=("request",),
        request=discriminant_scores,
        fit=fit_discriminant,
        defaults=_ONE_OR_ALL,
    ),
    "task-predictor": Rule(
        "per request, the experts whose prompts a classifier takes it for",
        data=Data("task_predictor", holds="request", is_joint=True),
        decides="request",
        pers=("request",),
        request=predictor_logits,
    ),
    "retrieval": Rule(
        "per request, the experts whose own prompts it is most like",
        data=Data("retrieval", holds="request"),
        decides="request",
        pers=("request",),
        request=retrieval_scores,
    ),
    "logo": Rule(
        "per request, the experts that change the prompt's last token most in one late layer",
        decides="request",
        pers=("request",),
        reads=frozenset({"outputs"}),
        scale="proportional",
        measures="last",
        scores=_logo,
    ),
    "uniform": Rule("the mean of all experts, everywhere", decides="always", pers=(), weights=uniform_weights),
    "base": Rule("no expert: the bare base model", decides="always", pers=(), weights=base_weights),
}
