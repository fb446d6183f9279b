"""How the data of each rule is measured, by the name of the rule: one file of this room each."""

from collections.abc import Mapping

from lorary.prepare.centroid import expert_centroids
from lorary.prepare.contrast import pooled_contrast
from lorary.prepare.measure import Measure
from lorary.prepare.norm import expert_norms
from lorary.prepare.phatgoose import expert_gates
from lorary.prepare.retrieval import mean_prompt
from lorary.prepare.task_predictor import expert_prompts, fitted_predictor

MEASURES: Mapping[str, Measure] = {
    "norm": Measure(per_expert=expert_norms),
    "centroid": Measure(per_expert=expert_centroids),
    "phatgoose": Measure(per_expert=expert_gates, decided_by=("steps", "batch_size", "learning_rate")),
    "contrast": Measure(pooled=pooled_contrast),
    "auto": Measure(per_expert=expert_prompts),
    "discriminant": Measure(per_expert=expert_prompts),
    "task-predictor": Measure(per_expert=expert_prompts, fit=fitted_predictor),
    "retrieval": Measure(per_expert=mean_prompt),
}
