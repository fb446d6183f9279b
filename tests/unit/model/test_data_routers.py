"""Routed models by rules that know experts by their data, against their definitions."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lorary.adapter import Adapter
from lorary.errors import RouterError, UsageError
from lorary.model import features as features_module
from lorary.model.attach import attach, detach, routing
from lorary.model.live import add_expert, remove_expert, replace_expert
from lorary.model.prepare import prepare
from lorary.model.save import load, save
from lorary.model.seating import seating
from lorary.model.trace import trace
from lorary.route.presets import merged
from lorary.route.setting import Routing

Make = Callable[..., Any]
IDS = torch.randint(1, 300, (3, 9), generator=torch.Generator().manual_seed(7))
NAMES = ("a", "b", "c", "d")
Tensors = dict[str, dict[str, Tensor]]


@torch.no_grad()
def logits(model: Any, ids: Tensor = IDS, **inputs: Any) -> Tensor:
    found: Tensor = model(input_ids=ids, **inputs).logits
    return found


def first_weights(model: Any) -> Tensor:
    with trace(model) as traced:
        logits(model)
    return traced.stacked()[0]


@pytest.fixture
def adapters(tiny_model: Make, random_adapter: Make, generator: torch.Generator) -> list[Adapter]:
    """The last one does nothing."""
    model = tiny_model(dtype=torch.float64)
    return [random_adapter(model, name, generator, rank=2, size=float(name != "d")) for name in NAMES]


@pytest.fixture
def routed(tiny_model: Make, adapters: list[Adapter], route: Make) -> Any:
    return route(tiny_model(dtype=torch.float64), adapters, top_k=2)


@pytest.fixture
def rows(adapters: list[Adapter], generator: torch.Generator) -> Tensors:
    def row(d_in: int) -> Tensor:
        return torch.randn(d_in, generator=generator, dtype=torch.float64)

    return {a.name: {path: row(own.d_in) for path, own in a} for a in adapters}


@pytest.fixture
def vectors(generator: torch.Generator) -> Tensors:
    return {name: {"request": torch.randn(32, generator=generator, dtype=torch.float64)} for name in NAMES}


@torch.no_grad()
def mean_states(model: Any, ids: Tensor) -> Tensor:
    with routing(model, "base"):
        layer = copy.deepcopy(model).model  # transformers leaves hooks that no pickle takes
        found: Tensor = layer(input_ids=ids, output_hidden_states=True).hidden_states[1].mean(dim=1)
    return found


def by_hand(scores: Tensor) -> Tensor:
    """Top 2 of the three experts that do something."""
    scores = scores.clone()
    scores[..., 3] = -torch.inf
    best, chosen = scores.topk(2)
    return torch.zeros_like(scores).scatter(-1, chosen, best.softmax(dim=-1))


@pytest.mark.parametrize("router", ["centroid", "phatgoose"])
def test_rows_from_data_score_every_token(routed: Any, rows: Tensors, router: str) -> None:
    prepare(routed, router, rows)
    path, seen = next(iter(seating(routed).layers)), []
    with routing(routed, router):
        handle = routed.get_submodule(path).register_forward_pre_hook(lambda _layer, args: seen.append(args[0]))
        found = first_weights(routed)
        handle.remove()
    x = seen[0]
    scores = []
    for name in NAMES:
        row = rows[name][path]
        if router == "centroid":
            scores.append(x @ row / row.norm() / 32**0.5)
        else:
            scores.append(
                torch.nn.functional.layer_norm(x, (32,)) @ torch.nn.functional.layer_norm(row, (32,)) / 32**0.5
            )
    assert torch.allclose(found.double(), by_hand(torch.stack(scores, dim=-1)), atol=1e-4)


@pytest.mark.parametrize("router", ["task-predictor", "retrieval"])
def test_a_request_is_scored_by_the_mean_state_of_the_bare_base(routed: Any, vectors: Tensors, router: str) -> None:
    if router == "task-predictor":
        vectors = {name: {"request": torch.cat([own["request"], own["request"][:1]])} for name, own in vectors.items()}
    known = torch.stack([vectors[name]["request"] for name in NAMES])
    prepare(routed, f"{router.replace('-', '_')}_early", vectors)
    mean = mean_states(routed, IDS)
    if router == "retrieval":
        scores = torch.cosine_similarity(mean[:, None], known[None], dim=-1)
    else:
        scores = mean @ known[:, :-1].mT + known[:, -1]
    with routing(routed, {"router": router, "temperature": 0.3}):
        found = first_weights(routed).double()
    assert torch.allclose(found, by_hand(scores / 0.3)[:, None].expand(3, 9, 4), atol=1e-6)
    with routing(routed, {"router": router, "allow": ["b", "d"]}):
        assert torch.equal(first_weights(routed)[..., 1], torch.ones(3, 9))
    with routing(routed, router):
        expected, copied, pickled = logits(routed), copy.deepcopy(routed), pickle.loads(pickle.dumps(routed))
    assert not torch.equal(logits(routed), expected)
    assert torch.equal(logits(copied), expected)
    assert torch.equal(logits(pickled), expected)


def test_company_padding_cache_and_beams_change_nothing(routed: Any, vectors: Tensors) -> None:
    prepare(routed, "retrieval_early", vectors)
    mask = torch.stack([torch.arange(9) >= start for start in (0, 5, 2)])
    with routing(routed, {"router": "retrieval", "temperature": 0.1}):
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        together = logits(routed, attention_mask=mask.long(), position_ids=positions)
        for row in range(3):
            alone = logits(routed, IDS[row, mask[row]][None])[0]
            assert torch.allclose(together[row, mask[row]], alone, atol=1e-9)

        def generate(**settings: Any) -> Any:
            return routed.generate(
                IDS, attention_mask=mask.long(), max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0,
                **settings,
            )  # fmt: skip

        assert torch.equal(generate(), generate(use_cache=False))
        assert torch.equal(generate(num_beams=2), generate(num_beams=2, use_cache=False))
    one = routing(routed, [{"router": "retrieval"}, "base", {"router": "arrow", "per": "request"}])
    with one, trace(routed) as mixed:
        logits(routed)
    assert not mixed.stacked()[:, 1].any()
    with routing(routed, "retrieval"), trace(routed) as plain:
        logits(routed)
    assert torch.allclose(mixed.stacked()[:, 0], plain.stacked()[:, 0])


def test_text_comes_from_the_tokens_of_the_prompt(
    tiny_base_folder: Path, tiny_tokenizer: Any, routed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def embed(texts: list[str]) -> Tensor:
        asked.append(texts)
        return torch.stack([torch.tensor([1.0, float("sky" in text)]) for text in texts])

    monkeypatch.setattr(features_module, "embed_texts", embed)
    corners = {"a": (1.0, 0.0), "b": (0.0, 1.0), "c": (-1.0, 0.0), "d": (0.0, 1.0)}
    known = {name: {"request": torch.tensor(corner)} for name, corner in corners.items()}
    setting = {"router": "retrieval", "features": "text", "top_k": 1}
    prepare(routed, "retrieval_text", known)
    with pytest.raises(UsageError, match=r"needs the base's tokenizer.*\n.*\nremedy: lorary.attach"):
        routing(routed, setting).__enter__()
    library = seating(routed).library
    detach(routed)
    attach(routed, library, tokenizer=tiny_tokenizer)
    prepare(routed, "retrieval_text", known)
    texts = ["Name the sky", "Add one"]
    ids = [tiny_tokenizer(text)["input_ids"] for text in texts]
    width = max(map(len, ids))
    batch = torch.tensor([[0] * (width - len(row)) + row for row in ids])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids])
    with routing(routed, setting), trace(routed) as traced:
        logits(routed, batch, attention_mask=mask)
    assert asked == [texts]
    with routing(routed, setting):  # the tokenizer goes along, the encoder does not
        copied = pickle.loads(pickle.dumps(routed))
    logits(copied, batch, attention_mask=mask)
    assert asked == [texts, texts]
    # "d" is as near as "b", and does nothing.
    assert traced.stacked()[0, :, -1].tolist() == [[0.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]]
    with routing(routed, setting), pytest.raises(UsageError, match="needs the tokens of a request"):
        routed(inputs_embeds=routed.get_input_embeddings()(batch))
    saved = save(routed, tmp_path / "saved", copy_base=True)  # the tokenizer goes along
    with routing(load(saved, device="cpu"), setting) as again:
        logits(again, batch, attention_mask=mask)
    assert asked.pop() == texts
    # Without being given one: the tokenizer that lies beside the base's own files.
    routed.name_or_path = str(tiny_base_folder)
    seating(routed).tokenizer = None
    with routing(routed, setting):
        logits(routed, batch, attention_mask=mask)
    assert asked[-1] == texts


def test_what_was_prepared_is_saved_with_the_model(
    routed: Any, rows: Tensors, vectors: Tensors, tmp_path: Path
) -> None:
    prepare(routed, "centroid", rows)
    prepare(routed, "retrieval_early", vectors)
    library = seating(routed).library
    again = load(save(routed, tmp_path / "saved"), device="cpu")
    for setting in ("centroid", "retrieval"):
        with routing(routed, setting), routing(again, setting):
            # The bare base itself, loaded in float64, is off in the last bit.
            assert torch.allclose(logits(again), logits(routed), rtol=0, atol=1e-12)
    # And where such a router is in force while it is saved.
    detach(routed)
    attach(routed, library, router="base")
    prepare(routed, "retrieval_early", vectors)
    from lorary.model.apply import apply_routing

    apply_routing(routed, seating(routed), Routing.of("retrieval", top_k=1))
    again = load(save(routed, tmp_path / "in force"), device="cpu")
    assert seating(again).routing == seating(routed).routing
    assert torch.allclose(logits(again), logits(routed), rtol=0, atol=1e-12)


def test_experts_that_come_live_must_be_prepared_and_changed_ones_are_unknown(
    routed: Any, adapters: list[Adapter], rows: Tensors, vectors: Tensors
) -> None:
    for kind, known in (("centroid", rows), ("retrieval_early", vectors)):
        prepare(routed, kind, known)
    new = Adapter("new", adapters[1].modules, adapters[1].config)
    add_expert(routed, new)
    for router, place in (("centroid", r"model\.layers"), ("retrieval", "whole requests")):
        with pytest.raises(RouterError, match=f"nothing for expert 'new' at {place}"):
            routing(routed, router).__enter__()
    remove_expert(routed, "new")
    with routing(routed, "centroid"), routing(routed, "retrieval"):
        logits(routed)
    replace_expert(routed, Adapter("b", adapters[0].modules, adapters[0].config))
    with pytest.raises(RouterError, match=r"nothing for expert 'b' .*\nremedy: .* for one that came live"):
        routing(routed, "retrieval").__enter__()
    prepare(routed, "retrieval_early", vectors)
    from lorary.model.apply import apply_routing

    state = seating(routed)
    apply_routing(routed, state, merged(state.routing, "retrieval"))
    with pytest.raises(RouterError, match="'retrieval_early' must be prepared before\nfound: nothing for 'new'"):
        add_expert(routed, new)
    with pytest.raises(RouterError, match="cannot be replaced under a router that knows the old one"):
        replace_expert(routed, Adapter("b", adapters[2].modules, adapters[2].config))
    prepare(routed, "retrieval_early", {**vectors, "new": vectors["a"]})
    add_expert(routed, new)
    assert logits(routed).isfinite().all()


def test_shapes_that_do_not_fit_are_refused(routed: Any, rows: Tensors, vectors: Tensors) -> None:
    path = "model.layers.0.self_attn.q_proj"
    prepare(routed, "centroid", {**rows, "c": {**rows["c"], path: torch.ones(5)}})
    with pytest.raises(RouterError, match=rf"for expert 'c' at {path} must have shape \(32,\)\nfound: \(5,\)"):
        routing(routed, "centroid").__enter__()
    prepare(routed, "retrieval_early", {**vectors, "c": {"request": torch.ones(5)}})
    with pytest.raises(RouterError, match=r"expert 'c' must have the shape .*\nfound: \(5,\) beside \(32,\)"):
        routing(routed, "retrieval").__enter__()


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"router": "retrieval", "per": "layer"}, RouterError, r"'retrieval' can decide per \['request'\]"),
        ({"router": "retrieval", "input_norm": "unit"}, UsageError, "input_norm is for routers"),
        ({"router": "retrieval", "temperature": {0: 2.0}}, UsageError, "takes one temperature"),
        ({"router": "arrow", "features": "text"}, UsageError, "features are for routers that look at whole requests"),
        ({"router": "centroid", "tie": "concat"}, UsageError, "tie and zeros are for routers by prototypes"),
    ],
)
def test_settings_that_mean_nothing_are_refused(fields: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Routing.of(**fields)


def test_a_router_decides_at_its_own_moment_unless_told() -> None:
    assert [Routing.of(router).decides for router in ("arrow", "retrieval", "task-predictor", "centroid")] == [
        "layer", "request", "request", "layer",
    ]  # fmt: skip
    assert merged(Routing.of("retrieval", features="text"), "arrow") == Routing.of("arrow")
