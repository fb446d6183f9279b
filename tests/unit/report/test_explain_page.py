"""The page of an explanation: what it says without a script, what the script gets, and that no text becomes code."""

import base64
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pages import Page

from lorary.evaluate.explanation import Explanation, SeenPrompt, SeenToken
from lorary.report import explain_map
from lorary.report.explain import render_explanation, write_explanation
from lorary.report.explain_map import NUM_COLUMNS, map_data

ATTACK = "</script><img src=x onerror=alert(1)>\"'&<!--\u2028"


def make(num_experts: int = 3, num_prompts: int = 1, seed: int = 0, **changes: Any) -> Explanation:
    """Four layers of two kinds at two depths; each token has two experts; the last layer lacks the first expert."""
    generator = torch.Generator().manual_seed(seed)
    layers = [f"model.layers.{depth}.{kind}" for depth in (7, 8) for kind in ("attn.q", "mlp.up")]
    reach = torch.ones(4, num_experts, dtype=torch.bool)
    reach[3, 0] = False
    prompts = []
    for i in range(num_prompts):
        scores = torch.randn(4, 5, num_experts, generator=generator).masked_fill(~reach[:, None], -torch.inf)
        best, ids = scores.topk(min(2, num_experts), dim=-1)
        weights = torch.zeros_like(scores).scatter(-1, ids, best.softmax(-1).nan_to_num())
        tokens = [SeenToken(f"t{i}_{t}", "answer" if t == 4 else "prompt", "" if t else "first") for t in range(5)]
        prompts.append(SeenPrompt(f"prompt {i}", f"answer {i}", False, True, 2, tokens, weights))
    names = [f"expert_{i:02}" for i in range(num_experts)]
    known: dict[str, Any] = {
        "library": "lib", "base_model": "tiny", "template": "plain", "router": "arrow", "settings": {"top_k": 2},
        "experts": names, "layers": layers, "reach": reach, "prompts": prompts, "fixed": None,
        "log_likelihood": [-1.0] * num_prompts, "base": [-4.0] * num_prompts,
        "without": {names[0]: [-3.0] * num_prompts, names[-1]: [-0.5] * num_prompts},
    }  # fmt: skip
    return Explanation(**{**known, **changes})


class Titled(Page):
    """A page with what stands under the pointer."""

    def titles(self, kind: str) -> list[str]:
        found = [a for tag, a in self.elements if kind in (a.get("class") or "").split()]
        return [str(attributes.get("title")) for attributes in found]


def test_the_page_says_its_numbers_without_a_script() -> None:
    found = make()
    page = Titled(render_explanation(found))
    sections = [attributes["id"] for tag, attributes in page.elements if tag == "section"]
    assert sections == ["tokens", "map", "experts", "worth", "entropy", "reading"]
    assert "changes by −3.000 nats, −1.500 per token of the 2 tokens" in page.text
    assert re.search(r"without change nats per token expert_00 −2\.000 −1\.000 expert_02 \+0\.500 \+0\.250", page.text)
    for name, use in zip(found.experts, found.uses, strict=True):
        shown = f"{name} {100 * use.usage:.1f} % {use.layers} {100 * use.chosen:.1f} % {100 * use.leads:.1f} %"
        assert shown in page.text
    m = found.overall.measures
    assert f"all layers {m.entropy:.2f} {m.balance:.2f} {m.information:.2f}" in page.text


def test_each_token_names_its_experts_and_the_reason_why_it_does_not_count() -> None:
    found = make()
    page = Titled(render_explanation(found))
    titles = page.titles("token")
    assert len(titles) == 5
    assert [title.endswith("; left out: first") for title in titles] == [True, False, False, False, False]
    assert len(page.titles("left-out")) == 1
    weights = found.prompts[0].weights
    assert weights is not None
    best = int(weights[:, 2].mean(dim=0).argmax())
    assert titles[2].startswith(f"token 3: expert_{best:02} {float(weights[:, 2].mean(dim=0).max()):.2f}")


def test_a_cell_of_the_map_is_hatched_where_no_expert_can_be_chosen() -> None:
    found = make()
    data = map_data(found)
    column = data["columns"][0]
    assert data["kinds"] == ["all", "attn.q", "mlp.up"]
    up = data["usage"][data["kinds"].index("mlp.up")]
    assert [row[column] is None for row in up] == [False, True]
    assert [row[column] is None for row in data["usage"][0]] == [False, False]
    only_up = replace(found, reach=found.reach & torch.tensor([[True], [True], [False], [False]]))
    assert len(Titled(render_explanation(only_up)).titles("none")) == 3


@pytest.mark.parametrize("num_experts", [1, 3, NUM_COLUMNS + 5])
def test_the_map_holds_the_weights_of_every_token(num_experts: int) -> None:
    found = make(num_experts, num_prompts=2)
    data = map_data(found)
    assert len(data["names"]) == min(num_experts, NUM_COLUMNS + 1)
    for prompt, packed in zip(found.prompts, data["prompts"], strict=True):
        shape = (4, packed["tokens"], packed["kept"])
        ids, weights = (
            np.frombuffer(base64.b64decode(packed[key]), kind).reshape(shape).astype(np.int64)
            for key, kind in (("ids", "<u2"), ("weights", "<u1"))
        )
        dense = torch.zeros(4, 5, num_experts).scatter_(
            -1, torch.from_numpy(ids), torch.from_numpy(weights / 255).float()
        )
        assert prompt.weights is not None
        assert float((dense - prompt.weights).abs().max()) < 1 / 255
    columns, usage = torch.tensor(data["columns"]), found.overall.measures.usage
    by_column = torch.zeros(len(data["names"]), dtype=torch.float64).index_add_(0, columns, usage)
    means = torch.tensor([[value or 0.0 for value in row] for row in data["usage"][0]]).mean(dim=0)
    assert torch.allclose(means.double(), by_column, atol=1e-3)


def test_prompts_that_a_page_has_no_room_for_are_shown_and_said_to_have_no_map(monkeypatch: pytest.MonkeyPatch) -> None:
    found = make(num_prompts=3)
    monkeypatch.setattr(explain_map, "MOST_BYTES", 2 * 3 * 4 * 5 * 2)
    page = Titled(render_explanation(found))
    strips = [a for _, a in page.elements if "strip" in (a.get("class") or "").split()]
    assert [a.get("data-prompt") for a in strips] == ["0", "1", None]
    assert "The tokens of 1 prompt have no map" in page.text
    assert len(json.loads(page.scripts[0])["prompts"]) == 2


def test_agreement_is_shown_where_both_decide_and_else_the_reason() -> None:
    one, other = make(), make(seed=1)
    prompts = [replace(one.prompts[0], against=other.prompts[0].weights)]
    page = Titled(render_explanation(replace(one, prompts=prompts, against=("norm", [-0.5]))))
    assert "Under norm the answers are likelier: +0.500 nats" in page.text
    assert re.search(r"divergence, bits all layers [\d.]+ % [\d.]+ % 0\.\d{3} attn\.q", page.text)
    fixed = Titled(render_explanation(replace(one, against=("uniform", [-1.5]))))
    assert "less likely: −0.500 nats" in fixed.text
    assert "One of the two decides nothing" in fixed.text


def test_a_router_that_decides_nothing_has_no_map_and_says_what_acts() -> None:
    bare = replace(make().prompts[0], weights=None)
    settings: dict[str, Any] = {"layers": [], "reach": torch.zeros(0, 3, dtype=torch.bool), "prompts": [bare]}
    page = Titled(render_explanation(make(fixed={"expert_01": 0.5}, router="fixed", **settings)))
    assert "Router fixed decides nothing" in page.text
    assert "All tokens get the same experts in every layer: expert_01 0.5" in page.text
    assert "heat" not in {a.get("id") for _, a in page.elements}
    base = Titled(render_explanation(make(fixed={}, router="base", without={}, **settings)))
    assert "No expert acts." in base.text


def test_no_text_can_become_markup_and_only_the_script_of_the_page_may_run() -> None:
    found = make()
    token = SeenToken(ATTACK, "prompt", ATTACK)
    prompt = replace(found.prompts[0], prompt=ATTACK, answer=ATTACK, tokens=[token, *found.prompts[0].tokens[1:]])
    names = [ATTACK, *found.experts[1:]]
    source = render_explanation(
        replace(found, library=ATTACK, experts=names, without={ATTACK: [-2.0]}, prompts=[prompt])
    )
    page = Titled(source)
    assert "img" not in {tag for tag, _ in page.elements}
    assert len(page.scripts) == 2
    assert not [a for _, a in page.elements if {"src", "onerror", "onclick"} & set(a)]
    assert "http" not in re.sub(r'http-equiv="[^"]+"', "", source)
    policy = next(a["content"] for _, a in page.elements if a.get("http-equiv"))
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def test_a_page_is_small_and_replaces_an_older_one(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text("old")
    write_explanation(path, make())
    assert "</html>" in path.read_text()
    assert path.stat().st_size < 60_000
