"""Settings: what they refuse, how they merge, presets, temperatures by layer, allow-lists, normalised inputs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from unchecked import check_unchecked

from lorary.adapter import Adapter
from lorary.errors import RouterError, UsageError
from lorary.model.attach import detach, routing
from lorary.model.seating import seating
from lorary.model.trace import trace
from lorary.route.presets import merged
from lorary.route.setting import Routing

Make = Callable[..., Any]
IDS = torch.arange(1, 13).view(2, 6)
Q0 = "model.layers.0.self_attn.q_proj"
Q1 = "model.layers.1.self_attn.q_proj"


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(input_ids=IDS).logits
    return found


def weights(model: Any, path: str = Q0) -> Tensor:
    with trace(model) as traced:
        logits(model)
    return traced.weights(path)


@pytest.fixture
def adapters(tiny_model: Make, random_adapter: Make, generator: torch.Generator) -> list[Adapter]:
    return [random_adapter(tiny_model(), name, generator) for name in "abcd"]


@pytest.fixture
def routed(tiny_model: Make, adapters: list[Adapter], route: Make) -> Any:
    return route(tiny_model(), adapters, top_k=2)


@pytest.mark.parametrize(
    ("setting", "error", "message"),
    [
        ({"input_norm": "batch"}, UsageError, "input_norm must be one of"),
        ({"per": "row"}, UsageError, "per must be one of"),
        ({"tie": "sum"}, UsageError, "tie must be one of"),
        ({"zeros": "drop"}, UsageError, "zeros must be one of"),
        ({"features": "image"}, UsageError, "features must be one of"),
        ({"candidates": 0}, UsageError, "candidates must be a whole number"),
        ({"at": Q0}, UsageError, "at names the layer that decides"),
        ({"router": "logo", "per": "token"}, RouterError, r"router 'logo' can decide per \['request'\]"),
        ({"router": "logo", "temperature": {Q0: 2.0}}, UsageError, "takes one temperature"),
        ({"router": "logo", "calibrated": True}, UsageError, "calibrated scores are for routers by norm"),
        ({"allow": []}, UsageError, "allow must be a list of different experts, at least one"),
        ({"allow": ["a", "a"]}, UsageError, "allow must be a list of different experts"),
        ({"allow": ["a"], "experts": ["b"]}, RouterError, "named experts must be allowed"),
        ({"temperature": {Q0: 0.0}}, UsageError, "temperature must be a positive number"),
        ({"temperature": {Q0: 2.0}, "per": "request"}, UsageError, "takes one temperature"),
        ({"router": "lag", "per": "request"}, RouterError, r"router 'lag' can decide per \['layer', 'token'\]"),
        ({"calibrated": True}, UsageError, "calibrated scores are for routers by norm"),
        ({"router": "norm", "calibrated": True, "input_norm": "unit"}, UsageError, "against means .*input_norm='none'"),
        ({"router": "contrast", "input_norm": "layer"}, UsageError, "against means of inputs by input_norm='unit'"),
        ({"router": "norm", "tie": "concat"}, UsageError, "tie and zeros are for routers by prototypes"),
        ({"top_p": 2.0}, UsageError, "top_p must be"),
    ],
)
def test_settings_that_make_no_sense_are_refused(setting: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        check_unchecked(setting)


@pytest.mark.parametrize(
    ("setting", "error", "message"),
    [
        ({"preset": "papers"}, UsageError, r"preset must exist\nfound: 'papers'\nremedy: one of \['paper-2024'"),
        (["arrow", {"topk": 3}], UsageError, "known fields only"),
        ([], UsageError, "one for each row"),
        ([{"mix": "factors"}, "arrow"], RouterError, "must share one mix"),
        ({"allow": ["a", "z"]}, RouterError, r"allowed experts must be seated\nfound: \['z'\]"),
        ({"per": "token", "at": "lm_head"}, UsageError, "at must name a routed layer"),
        ({"temperature": {"7": 2.0}}, UsageError, r"must be for routed layers, by path or number\nfound: \['7'\]"),
        ({"router": "norm", "calibrated": True}, RouterError, "'norm_calibration' must be prepared from data"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused_and_change_nothing(
    routed: Any, setting: Any, error: Any, message: str
) -> None:
    before, in_force = logits(routed), seating(routed).routing
    with pytest.raises(error, match=message):
        routing(routed, setting).__enter__()
    assert seating(routed).routing == in_force
    assert torch.equal(logits(routed), before)


@pytest.mark.parametrize("weights", [{"a": -1.0}, {"a": 1.0, "b": -0.5}, {"a": -1.0, "b": -1.0}])
def test_negative_weights_are_for_updates_and_not_for_factors(weights: dict[str, float]) -> None:
    assert Routing.of(experts=weights, mix="outputs").fixed == weights
    with pytest.raises(
        UsageError, match=r"whose factors are mixed must not be negative.*\nfound: .*\nremedy: mix='outp"
    ):
        Routing.of(experts=weights, mix="factors")


def test_a_setting_keeps_what_it_does_not_name_and_a_preset_keeps_nothing() -> None:
    before = Routing.of("norm", top_k=3, temperature=0.5, calibrated=True, per="token")
    assert merged(before, "arrow") == Routing.of("arrow", top_k=3, temperature=0.5, per="token")
    assert merged(before, {"top_k": 1}) == Routing.of("norm", top_k=1, temperature=0.5, calibrated=True, per="token")
    assert merged(before, {"preset": "peft"}) == Routing.of("arrow", top_k=3)
    assert merged(before, {"preset": "paper-2024", "top_k": 2}) == Routing.of(
        "arrow", top_k=2, temperature=1.0, mix="factors", tie="concat", zeros="keep"
    )
    assert merged(Routing.of(experts=["a"]), "arrow").experts is None


def test_scores_in_a_rules_own_units_go_when_another_one_is_named() -> None:
    before = Routing.of("arrow", top_k=3, threshold=0.3, null=0.5, top_p=0.9)
    for other in ("norm", "projection", "logo", "uniform", "base", {"router": "contrast", "top_k": 2}):
        after = merged(before, other)
        assert (after.choosing.threshold, after.choosing.null, after.choosing.top_p) == (None, None, 0.9)
    assert merged(before, {"router": "norm", "threshold": 2.0}) == Routing.of("norm", top_k=3, threshold=2.0, top_p=0.9)
    for same in ("arrow", {"router": "arrow"}, {"top_k": 3}, {"experts": None}):
        assert merged(before, same) == before
    assert merged(Routing.of(experts=["a"], threshold=0.3), "arrow").choosing.threshold is None
    # A bound that lies above the new rule's null would be refused, though nobody asked for both.
    assert merged(Routing.of("norm", null=0.5), {"router": "arrow", "threshold": 0.6}).choosing.null is None


def test_what_a_setting_leaves_open_is_the_rules_own_way() -> None:
    assert (Routing().decides, Routing.of("logo").decides, Routing.of("uniform").decides) == (
        "layer",
        "request",
        "always",
    )
    assert merged(Routing.of("logo"), "arrow") == Routing()
    assert (Routing().choice("").scale, Routing.of("logo").choice("").scale) == ("softmax", "proportional")
    assert Routing.of("logo", scale="unit").choice("").scale == "unit"
    assert Routing.of(per="request").decides == "request"


def test_settings_survive_json() -> None:
    import json

    for setting in (
        Routing(),
        Routing.of(experts={"a": 0.5}),
        Routing.of(
            "lag",
            top_k=1,
            temperature={3: 0.5, Q0: 2.0},
            mix="outputs",
            candidates=5,
            allow=["a", "b"],
            null=0.5,
            per="token",
            at=Q0,
        ),
    ):
        again = Routing.of(**json.loads(json.dumps(setting.to_json())))
        assert again.to_json() == setting.to_json()
        assert again.choice(Q0) == setting.choice(Q0)
    assert list(Routing().to_json()) == ["router", "top_k", "temperature", "mix", "experts"]


def test_temperatures_by_layer_are_taken_by_path_before_number(routed: Any) -> None:
    with routing(routed, {"temperature": {Q0: 3.0, 0: 0.5, "1": 2.0}}):
        choices = [layer.lora.in_force.gate.choice.temperature for layer in seating(routed).layers.values()]  # type: ignore
    assert choices == [3.0, 0.5, 0.5, 2.0, 2.0, 2.0]
    with routing(routed, {"temperature": {Q1: 1e-6}}):
        assert torch.allclose(weights(routed, Q1).max(dim=-1).values, torch.ones(2, 6))
        assert not torch.allclose(weights(routed, Q0).max(dim=-1).values, torch.ones(2, 6))


@pytest.mark.parametrize("router", ["arrow", "projection", "norm", "lag", "uniform"])
def test_only_allowed_experts_act(
    tiny_model: Make, adapters: list[Adapter], routed: Any, route: Make, router: str
) -> None:
    with routing(routed, {"router": router, "allow": ["d", "b"]}):
        found = logits(routed)
    few = route(tiny_model(), [adapters[1], adapters[3]], router=router, top_k=2)
    assert (found - logits(few)).abs().max() < 1e-4


def test_a_layer_without_an_allowed_expert_is_the_base(
    tiny_model: Make, random_adapter: Make, route: Make, generator: torch.Generator
) -> None:
    model = tiny_model()
    here = random_adapter(model, "here", generator, layers=[0])
    there = random_adapter(model, "there", generator, layers=[1])
    route(model, [here, there], allow=["here"])
    found = logits(model)
    detach(model)
    assert torch.allclose(logits(route(model, [here])), found, atol=1e-5)


def test_scores_of_unit_inputs_do_not_depend_on_their_length(routed: Any) -> None:
    layer = seating(routed).layers[Q0].lora
    seen: dict[str, Tensor] = {}
    layer.recorders.append(lambda weights: seen.update(last=weights))
    x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    with routing(routed, {"input_norm": "unit", "temperature": 0.1}):
        layer(x, torch.zeros(2, 3, 32))
        once = seen["last"]
        layer(100 * x, torch.zeros(2, 3, 32))
        assert torch.allclose(seen["last"], once, atol=1e-5)
    layer(100 * x, torch.zeros(2, 3, 32))
    assert not torch.allclose(seen["last"], once, atol=1e-2)
    layer.recorders.clear()


def test_tied_layers_route_every_token_alike(
    tiny_model: Make, random_adapter: Make, route: Make, generator: torch.Generator
) -> None:
    model, attention = tiny_model(), "model.layers.0.self_attn."
    targets = ("q_proj", "k_proj", "v_proj", "o_proj")
    experts = [random_adapter(model, name, generator, targets=targets) for name in "abcd"]
    only_q = random_adapter(model, "only_q", generator, targets=("q_proj",))
    route(model, [*experts, only_q], tie="concat", top_k=2, allow=list("abcd"))
    q, k, v, o = (weights(model, attention + name) for name in targets)
    assert torch.allclose(q, k, atol=1e-5)
    assert torch.allclose(q, v, atol=1e-5)
    assert not torch.allclose(q, o, atol=1e-2)
    with routing(model, {"tie": "none"}):
        assert not torch.allclose(weights(model, attention + "q_proj"), weights(model, attention + "k_proj"), atol=1e-2)


def test_zero_experts_keep_their_seats_where_asked(
    tiny_model: Make, random_adapter: Make, route: Make, generator: torch.Generator
) -> None:
    model = tiny_model()
    zero = random_adapter(model, "zero", generator, size=0.0)
    route(model, [random_adapter(model, "one", generator), zero], preset="paper-2024")
    assert (weights(model)[..., 1] > 0).all()
    with routing(model, {"zeros": "skip"}):
        assert (weights(model)[..., 1] == 0).all()


def test_a_rule_of_prepared_rows_finds_its_seat(
    routed: Any, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    from lorary.model.prepare import prepare
    from lorary.route import ROUTERS
    from lorary.route.rule import Data, Rule

    def signed(reading: Any) -> Tensor:
        return reading.projections.masked_fill(~reading.alive, -torch.inf)  # type: ignore[no-any-return]

    rule = Rule("a rule for this test", data=Data("mine"), reads=frozenset({"score_rows"}), scores=signed)
    monkeypatch.setitem(ROUTERS, "mine", rule)  # type: ignore[arg-type]
    with pytest.raises(RouterError, match=r"'mine' must be prepared.*\nfound: nothing for expert 'a'"):
        routing(routed, "mine").__enter__()
    rows = torch.randn(4, 32, generator=generator)
    layers = seating(routed).layers
    shapes = {path: layer.lora.down.shape[1] for path, layer in layers.items()}
    prepare(
        routed, "mine",
        {name: {path: rows[i] if width == 32 else rows[i].repeat(2)[:width] for path, width in shapes.items()}
         for i, name in enumerate("abcd")},
    )  # fmt: skip
    x: list[Tensor] = []
    handle = routed.get_submodule(Q0).register_forward_pre_hook(lambda _, args: x.append(args[0]))
    with routing(routed, {"router": "mine", "input_norm": "layer", "top_k": 4}):
        found = weights(routed)
    handle.remove()
    expected = (torch.nn.functional.layer_norm(x[0], (32,)) @ rows.mT).softmax(-1)
    assert torch.allclose(found, expected, atol=1e-5)


def test_calibrated_norms_follow_what_was_prepared(routed: Any) -> None:
    from lorary.model.prepare import prepare

    layers = seating(routed).layers
    # An expert whose norms are always far above its own mean wins every token.
    prepare(
        routed, "norm_calibration",
        {name: {path: torch.tensor([-1000.0 if name == "c" else 0.0, 1.0]) for path in layers} for name in "abcd"},
    )  # fmt: skip
    with routing(routed, {"router": "norm", "calibrated": True}):
        assert torch.allclose(weights(routed)[..., 2], torch.ones(2, 6))
    with pytest.raises(UsageError, match="must be a mean and a deviation above 0"):
        prepare(routed, "norm_calibration", {"a": {Q0: torch.tensor([0.0, 0.0])}})
