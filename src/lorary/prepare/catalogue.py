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
    "norm": Measure(each=expert_norms),
    "centroid": Measure(each=expert_centroids),
    "phatgoose": Measure(each=expert_gates, decided_by=("steps", "batch_size", "learning_rate")),
    "contrast": Measure(pooled=pooled_contrast),
    "auto": Measure(each=expert_prompts),
    "discriminant": Measure(each=expert_prompts),
    "task-predictor": Measure(each=expert_prompts, fit=fitted_predictor),
    "retrieval": Measure(each=mean_prompt),
}
