"""Real rows of ARC-easy, PIQA and BoolQ score alike with lm-evaluation-harness's own class, with ours, and natively."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from lorary.data.template import make_template
from lorary.evaluate.loglik import answer_losses

Make = Callable[..., Any]
# A folder with heldout/arc_easy.jsonl and so on: rows as docs/tasks.md has them, with options.
SUITE = os.environ.get("LORARY_SUITE", "")
ROWS = 20


class Asked(NamedTuple):
    """A request as the harness makes it."""

    args: tuple[str, str]
    task_name: str


def order(values: Sequence[float]) -> list[int]:
    return sorted(range(len(values)), key=lambda i: -values[i])


@pytest.mark.slow
@pytest.mark.usefixtures("embedded_cache")
@pytest.mark.skipif(not SUITE, reason="LORARY_SUITE must name a folder with heldout/arc_easy.jsonl and its like")
@pytest.mark.parametrize("name", ["arc_easy", "piqa", "boolq"])
@pytest.mark.parametrize("is_routed", [False, True], ids=["bare", "routed"])
def test_real_rows_score_as_the_harness_scores_them(
    name: str, is_routed: bool, random_adapter: Make, route: Make, generator: Any
) -> None:
    pytest.importorskip("lm_eval")
    from lorary.evaluate.harness import HFLM, HarnessModel
    from lorary.model.base import load_base

    # In float32 rounding may decide between two experts that are all but equal, and does so otherwise in other batches.
    base = load_base("embedded", dtype="float64" if is_routed else "float32", device="cpu")
    if is_routed:
        route(base.model, [random_adapter(base.model, each, generator, size=0.5) for each in "abcd"], top_k=2)
    lines = (Path(SUITE) / "heldout" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["split"] == "test"][:ROWS]
    pairs = [(row["source"], option) for row in rows for option in row["options"]]
    requests = [Asked((source, f" {option}"), name) for source, option in pairs]
    ours = [value for value, _ in HarnessModel(base.model, base.tokenizer).loglikelihood(requests)]
    theirs = HFLM(pretrained=base.model, tokenizer=base.tokenizer, batch_size=8).loglikelihood(requests)
    wanted = [value for value, _ in theirs]
    template = make_template("plain", base.tokenizer)
    losses = answer_losses(base.model, [template.encode(*pair) for pair in pairs])
    native = [loss.eos - loss.total for loss in losses]
    assert ours == pytest.approx(wanted, abs=1e-4)
    assert native == pytest.approx(wanted, abs=1e-4)
    stop = 0
    for row in rows:
        start, stop = stop, stop + len(row["options"])
        assert order(ours[start:stop]) == order(native[start:stop]) == order(wanted[start:stop])
