"""The three properties that a base model must have, over every family that docs/models.md names.

They are looked for by other means than the trial has: masks and positions are given by hand, and each layer's output is
disturbed in turn.
"""

from inspect import signature
from typing import Any

import pytest
import torch
from tests.support.families import FAMILIES
from tests.support.family_tables import PAGE, judged, written
from torch import Tensor

from lorary.lora.seat import linear_shape
from lorary.lora.targets import find_targets
from lorary.model.verdict import settle, verdict_of

IDS = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(1))
# By the spread of the logits.
CAUSAL = {torch.float64: 1e-9, torch.float32: 1e-6}
# Recurrent layers and some attention of a float64 model compute in float32, and generation hands out that.
ALIKE = 1e-5


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Any:
    tried, verdict = judged(request.param)
    if verdict.fault:
        pytest.skip(f"refused: {verdict.rule}")
    return tried


@torch.no_grad()
def logits(model: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    given = {} if mask is None else {"attention_mask": mask}
    if mask is not None and "position_ids" in signature(model.forward).parameters:
        given["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
    found: Tensor = model(input_ids=ids, use_cache=False, **given).logits
    return found


def distance(left: Tensor, right: Tensor) -> float:
    return float((left - right).abs().max() / (right.max() - right.min()))


def test_a_token_changes_no_logits_before_it(model: Any) -> None:
    changed = IDS.clone()
    changed[:, 6] = IDS[:, 6] % 90 + 4
    before, after = logits(model, IDS), logits(model, changed)
    assert distance(after[:, :6], before[:, :6]) < CAUSAL[model.dtype]
    assert distance(after[:, 6:], before[:, 6:]) > 1e-3


def test_a_row_is_the_same_alone_and_padded_in_company(model: Any) -> None:
    handles = settle(model, verdict_of(model))
    try:
        mask = torch.tensor([[0] * 5 + [1] * 4, [1] * 9])
        together = logits(model, IDS, mask)
        assert distance(together[0, 5:], logits(model, IDS[:1, 5:])[0]) < ALIKE
        assert distance(together[1], logits(model, IDS[1:])[0]) < ALIKE
    finally:
        for handle in handles:
            handle.remove()


def test_generation_with_a_cache_gives_the_logits_of_one_pass(model: Any) -> None:
    handles = settle(model, verdict_of(model))
    try:
        found = model.generate(
            IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=4, min_new_tokens=4, do_sample=False,
            pad_token_id=0, return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        whole = logits(model, found.sequences)
    finally:
        for handle in handles:
            handle.remove()
    for step, each in enumerate(found.logits):
        assert distance(each, whole[:, 8 + step]) < ALIKE


def test_layers_that_are_adapted_reach_the_logits_and_silent_ones_do_not(model: Any) -> None:
    _, verdict = judged(model.config.model_type if model.config.model_type in FAMILIES else "gpt-sw3")
    bare = logits(model, IDS)
    for path, layer in model.named_modules():
        if not linear_shape(layer):
            continue
        handle = layer.register_forward_hook(_disturbed)
        moved = distance(logits(model, IDS), bare)
        handle.remove()
        if path not in verdict.dead:
            assert moved > 0 or "expert" in path, f"{path} is silent"
    targets = find_targets(model, ["all-linear"], silent=verdict.dead)
    assert not set(targets) & set(verdict.dead)


def _disturbed(_layer: Any, _args: Any, output: Any) -> Any:
    if not isinstance(output, Tensor):
        return output
    return output + 0.5 * torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output)


def test_the_page_says_what_the_trials_say() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == written(page), "run: python -m tests.support.family_tables"
