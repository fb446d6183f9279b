"""A routed pass on a device: the host never waits for it, and no shape depends on its values.

There is no device: `stand_in` takes its place, and says of whatever would wait.
"""

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
import torch
from stand_in import DEVICE, StandIn
from tests.support.adapters import as_dora, with_biases
from torch import Tensor
from transformers import StaticCache

from lorary.lora import plans
from lorary.model.attach import routing
from lorary.model.decision import Request
from lorary.model.fallback import Evidence
from lorary.model.features import texts_of
from lorary.model.live import add_expert
from lorary.model.prepare import prepare
from lorary.model.row_routing import RowRouting
from lorary.model.seating import seating
from lorary.ops.choose import Choice, Chosen
from lorary.route import ROUTERS
from lorary.route.setting import Routing

Make = Callable[..., Any]
NAMES = ("a", "b", "c", "d", "e", "f", "g", "h")
HIDDEN = 32
PERS = [(name, per) for name, rule in ROUTERS.items() for per in rule.pers if per != "request"]
PLAIN: dict[str, Any] = {
    **{f"{name} per {per}": {"router": name, "per": per} for name, per in PERS},
    "arrow with all steps": {"top_p": 0.9, "threshold": 1e-3, "null": 0.2, "top_k": 3},
    "arrow of unit inputs": {"input_norm": "unit"},
    "norm of layer-normalised inputs": {"router": "norm", "input_norm": "layer"},
    "projection, proportional": {"router": "projection", "scale": "proportional"},
    "factors": {"mix": "factors"},
    "arrow tied": {"tie": "concat"},
    "general experts": {"general": ["a", "b"]},
    "general factors": {"general": ["a"], "general_mode": "factors"},
    "uniform": "uniform",
    "base": "base",
    "one expert": {"experts": ["b"]},
    "rows": ["arrow", {"experts": ["b"]}],
    "rows that all decide": ["arrow", {"router": "projection"}],
    "rows per token": [{"per": "token"}, "base"],
}
REQUESTS: dict[str, Any] = {
    **{name: {"router": name} for name, rule in ROUTERS.items() if rule.pers == ("request",)},
    "auto with the mean of all": {"router": "auto", "fallback": "uniform"},
    "auto with an expert": {"router": "auto", "fallback": "b"},
    "auto by rows": [{"router": "auto"}, "base"],
    "arrow per request": {"per": "request"},
    "contrast or one expert": {"router": "contrast", "threshold": 0.0, "fallback": "a"},
    "rows": [{"per": "request"}, {"experts": ["b"]}],
    "rows that all decide": [{"per": "request"}, {"router": "retrieval"}],
}


@pytest.fixture
def routed(tiny_model: Make, random_adapter: Make, route: Make, generator: torch.Generator) -> Any:
    """Eight experts in three layers, for whom everything is prepared; moved to the device with a setting in force."""
    model = tiny_model(num_hidden_layers=1)
    routed = route(model, [random_adapter(model, name, generator, rank=2) for name in NAMES], top_k=2)
    layers = seating(routed).layers
    widths = {path: layer.lora.down.shape[1] for path, layer in layers.items()}
    rows = {name: {path: torch.randn(d_in, generator=generator) for path, d_in in widths.items()} for name in NAMES}
    for router in ("centroid", "phatgoose"):
        prepare(routed, router, rows)
    moments = {name: {path: torch.tensor([0.1, 1.0]) for path in widths} for name in NAMES}
    prepare(routed, "contrast", moments)
    for kind, shape in (("samples", (6, HIDDEN)), ("retrieval", (HIDDEN,)), ("task_predictor", (HIDDEN + 1,))):
        prepare(routed, f"{kind}_early", {n: {"request": torch.randn(shape, generator=generator)} for n in NAMES})
    return routed


def prompt(rows: int = 2, seq: int = 5) -> dict[str, Tensor]:
    ids = torch.ones(rows, seq, dtype=torch.int64, device=DEVICE)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def passes(model: Any, seq: int = 5) -> tuple[StandIn, StandIn]:
    """What happened in the pass over a prompt, and in a pass for the next token."""
    prefill, decode = StandIn(), StandIn()
    inputs = prompt(seq=seq)
    with torch.no_grad():
        with prefill:
            output = model(**inputs, use_cache=True)
        longer = torch.ones(2, seq + 1, dtype=torch.int64, device=DEVICE)
        with decode:
            model(
                input_ids=inputs["input_ids"][:, :1], attention_mask=longer, past_key_values=output.past_key_values,
                use_cache=True,
            )  # fmt: skip
    return prefill, decode


@pytest.mark.parametrize("setting", PLAIN.values(), ids=PLAIN)
def test_layers_and_tokens_never_make_the_host_wait(routed: Any, setting: Any) -> None:
    with routing(routed, setting):
        routed.to(DEVICE)
        prefill, decode = passes(routed)
        assert prefill.ours == decode.ours == []


@pytest.mark.parametrize("setting", ["arrow", "uniform", {"general": ["a"]}, ["arrow", {"experts": ["x"]}]], ids=str)
@pytest.mark.filterwarnings("ignore:router 'arrow' scores a DoRA:UserWarning")
def test_biases_and_magnitudes_make_the_host_wait_no_more(
    routed: Any, random_adapter: Make, generator: torch.Generator, setting: Any
) -> None:
    for name, more in (("x", partial(as_dora, model=routed)), ("y", with_biases)):
        add_expert(routed, more(random_adapter(routed, name, generator), generator=generator))
    with routing(routed, setting):
        routed.to(DEVICE)
        prefill, decode = passes(routed)
        assert prefill.ours == decode.ours == []


@pytest.mark.parametrize("setting", REQUESTS.values(), ids=REQUESTS)
def test_a_request_makes_the_host_wait_once_and_its_tokens_never(routed: Any, setting: Any) -> None:
    seating(routed).evidence = Evidence(torch.randn(6, HIDDEN), torch.ones(6))
    with routing(routed, setting):
        routed.to(DEVICE)
        passes(routed)  # what decides is brought to the device
        prefill, decode = passes(routed)
        requests = [request for request in seating(routed).prober.requests if request is not None]
        assert ["decision.py" in event for event in prefill.waits] == [True] * len(requests), prefill.waits
        assert decode.ours == []
    if setting == {"router": "auto"}:
        assert (requests[0].rule, requests[0].evidence.vectors.device) == ("discriminant", DEVICE)
        assert {requests[0].prefers_mean.device, requests[0].chosen.weights.device} == {DEVICE}
        assert requests[0].chosen.weights.shape == (2, len(NAMES))  # room for the fallback


@pytest.mark.parametrize(
    ("setting", "expected"), [("arrow", ["dense", "gathered"]), ("norm", ["dense"]), ("uniform", ["fixed"])]
)
def test_each_plan_of_a_device_runs_without_waiting(
    routed: Any, monkeypatch: pytest.MonkeyPatch, setting: str, expected: list[str]
) -> None:
    ran: dict[str, None] = {}

    def watched(name: str, plan: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args: (ran.setdefault(name), plan(*args))[1]

    for name in ("compiled", "compiled_at_once", "gathered", "dense", "fixed"):
        monkeypatch.setattr(plans, name, watched(name, getattr(plans, name)))
    with routing(routed, setting):
        routed.to(DEVICE)
        assert [mode.ours for mode in passes(routed)] == [[], []]
    assert list(ran) == expected


def test_an_expert_to_fall_back_on_is_taken_without_waiting(routed: Any) -> None:
    lost, fallback = torch.zeros(3, 2, device=DEVICE), Chosen.of(torch.tensor([0.0, 0.5, 0.5, 0.0, 1.0]))
    with StandIn() as mode:
        found = Chosen(torch.zeros(3, 2, dtype=torch.int64, device=DEVICE), lost).or_else(fallback)
    assert (found.experts.shape, found.weights.shape, mode.waits) == ((3, 3), (3, 3), [])


def test_on_the_cpu_a_choice_gets_wider_only_where_a_token_is_lost() -> None:
    experts, fallback = torch.tensor([[2], [0]]), Chosen.of(torch.tensor([0.5, 0.5, 0.0]))
    chosen = Chosen(experts, torch.tensor([[1.0], [1.0]]))
    assert chosen.or_else(fallback) is chosen
    found = Chosen(experts, torch.tensor([[1.0], [0.0]])).or_else(fallback)
    assert torch.equal(found.dense(3), torch.tensor([[0.0, 0.0, 1.0], [0.5, 0.5, 0.0]]))


def test_evidence_on_the_fallback_is_weighed_on_the_device(generator: torch.Generator) -> None:
    vectors = torch.randn(6, HIDDEN, generator=generator)
    evidence = Evidence(vectors, torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0]))
    assert evidence.prefers_mean(vectors).tolist() == [True, False] * 3
    with StandIn() as mode:
        found = evidence.to(DEVICE).prefers_mean(torch.ones(2, HIDDEN, device=DEVICE))
    assert (found.device, mode.waits) == (DEVICE, [])


def test_rows_that_come_and_go_are_told_once_and_never_waited_for(routed: Any) -> None:
    settings = [Routing("arrow"), Routing(experts=["b"])]
    with RowRouting(routed) as rows, torch.no_grad():
        routed.to(DEVICE)
        rows.use([rows.ready(setting) for setting in settings])
        prefill, decode = passes(routed)
        assert prefill.waits == decode.waits == []
        assert not [event for event in passes(routed)[1].events if event.is_ours]


def test_a_step_over_a_static_cache_can_be_captured(routed: Any) -> None:
    """CUDA refuses to capture a step in which the host waits or copies, whoever does that."""
    routed.to(DEVICE)
    cache, ids = StaticCache(routed.config, max_cache_len=8), torch.ones(2, 5, dtype=torch.int64, device=DEVICE)
    with torch.no_grad():
        routed(input_ids=ids, past_key_values=cache, use_cache=True)
        with StandIn() as mode:
            routed(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
    assert [str(event) for event in mode.events] == []


def test_text_features_are_read_on_the_host_as_the_manual_says(routed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with StandIn() as mode:
        texts_of(None, torch.zeros(0, 3, dtype=torch.int64, device=DEVICE), torch.zeros(0, 3, device=DEVICE).bool())
    assert [event.kind for event in mode.events] == ["download", "download"]


def test_a_model_on_several_devices_counts_each_layer_where_the_prompt_lies() -> None:
    """Positions of experts lie beside their layer, which may be another device than that of the sums."""
    request = Request(3, Choice(top_k=1))
    request.start(torch.ones(2, 4, dtype=torch.bool))
    device = torch.device("meta")
    request._sums, request._layers = request._sums.to(device), request._layers.to(device)
    scores, alive = torch.ones(2, 4, 2), torch.ones(2, dtype=torch.bool)
    with StandIn() as mode:
        request.add(torch.tensor([0, 2]), scores, alive)
    assert {event.kind for event in mode.events} == {"upload"}


def look(x: Tensor) -> None:
    assert x.sum() > 0


SINS: dict[str, tuple[str, Callable[[Tensor], Any]]] = {
    "item": ("look", lambda x: x.sum().item()),
    "a condition": ("look", look),
    "comparing": ("look", lambda x: torch.equal(x, x)),
    "nonzero": ("shape", lambda x: x.nonzero()),
    "a mask as index": ("shape", lambda x: x[x > 0]),
    "writing by a mask": ("shape", lambda x: x.__setitem__(x > 0, torch.zeros(2, device=DEVICE))),
    "unique": ("shape", lambda x: x.unique()),
    "repeating by counts": ("shape", lambda x: x.repeat_interleave(x.long())),
    "cpu": ("download", lambda x: x.cpu()),
    "copying out": ("download", lambda x: torch.zeros(3).copy_(x)),
    "moving in": ("upload", lambda x: torch.zeros(3).to(x.device)),
    "numbers": ("upload", lambda x: torch.tensor([1.0, 2.0], device=x.device)),
    "choosing a number of the host": ("upload", lambda x: torch.where(x > 0, torch.tensor(0.0), x)),
    "queueing": ("queued", lambda x: torch.zeros(3).to(x.device, non_blocking=True)),
    "copying in": ("upload", lambda x: x.copy_(torch.zeros(3))),
    "both in one": ("mixed", lambda x: x + torch.ones(3)),
}


@pytest.mark.parametrize(("kind", "sin"), SINS.values(), ids=SINS)
def test_the_stand_in_sees_what_a_device_would_wait_for(kind: str, sin: Callable[[Tensor], Any]) -> None:
    x = torch.ones(3, device=DEVICE)
    with StandIn() as mode, suppress(AssertionError):
        sin(x)
    assert [event.kind for event in mode.events] == [kind]
    assert mode.events[0].file.endswith("test_device_passes.py")


def test_what_the_host_does_for_itself_is_no_sin() -> None:
    with StandIn() as mode:
        x = torch.tensor([1.0, 0.0])
        assert x.nonzero().tolist() == [[0]]
        assert x[x > 0].item() == 1
    assert mode.events == []
