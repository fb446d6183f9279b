"""Routing by contrast without data: prompts that ship with the package stand in, expert by expert."""

import dataclasses
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.adapters import write_adapter
from torch import Tensor

from lorary.adapter import Adapter
from lorary.data.yardstick import yardstick_digest, yardstick_prompts
from lorary.errors import BaseModelError, LibraryError, RouterError
from lorary.library.derived import iterate_derived
from lorary.library.prepared import Prepared, group_key, save_prepared
from lorary.library.store import Library
from lorary.model import yardstick as module
from lorary.model.attach import attach, detach, routing
from lorary.model.base import Base
from lorary.model.layers import build_layers
from lorary.model.live import add_expert, remove_expert, replace_expert
from lorary.model.prepare import prepare
from lorary.model.prepared import prepared_marks
from lorary.model.prompt_scores import watch_prompts
from lorary.model.save import load, save
from lorary.model.seating import seating
from lorary.model.trace import trace
from lorary.model.yardstick import yardstick_for, yardstick_moments
from lorary.prepare.contrast import pooled_moments
from lorary.prepare.prepare_library import prepare_yardstick
from lorary.prepare.settings import PrepareSettings
from lorary.recipes.prepare import run_prepare
from lorary.route import ROUTERS
from lorary.route.setting import Routing

Make = Callable[..., Any]
Moments = Mapping[str, Mapping[str, Tensor]]
KIND = "contrast_yardstick"
IDS = torch.arange(1, 25).view(3, 8)
# Rank and target modules of each expert.
EXPERTS: Mapping[str, tuple[int, tuple[str, ...]]] = {
    "few": (1, ("q_proj",)),
    "many": (12, ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")),
    "narrow": (1, ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")),
    "wide": (12, ("q_proj",)),
}


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some prompts are enough here."""
    monkeypatch.setattr(module, "measured_prompts", lambda: yardstick_prompts(per_kind=1))


@pytest.fixture
def bare(base: Base) -> Iterator[Base]:
    """The base, bare again afterwards."""
    yield base
    if hasattr(base.model, "_lorary"):
        detach(base.model)


@pytest.fixture
def adapters(base: Base, random_adapter: Make, generator: torch.Generator) -> dict[str, Adapter]:
    """Experts of unequal ranks and layers."""
    return {
        name: random_adapter(base.model, name, generator, rank=rank, targets=targets, gap=0.9)
        for name, (rank, targets) in EXPERTS.items()
    }


@pytest.fixture
def experts(library: Library, adapters: dict[str, Adapter], tmp_path: Path) -> Library:
    """These experts, imported: nothing is known of their tasks."""
    for name, adapter in adapters.items():
        write_adapter(adapter, tmp_path / "peft" / name)
        library.add(tmp_path / "peft" / name)
    return library


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """The experts of each measurement."""
    calls: list[set[str]] = []
    real = module.yardstick_moments

    def counted(model: Any, rule: Any, layers: Any, names: Any, yardstick: Any) -> Any:
        calls.append({names[position] for layer in layers.values() for position in layer.experts})
        return real(model, rule, layers, names, yardstick)

    monkeypatch.setattr(module, "yardstick_moments", counted)
    return calls


@torch.no_grad()
def weights(model: Any, ids: Tensor = IDS) -> Tensor:
    """(rows, experts): the largest weight in any layer is that of the request."""
    with trace(model) as traced:
        model(input_ids=ids)
    return traced.stacked().amax(dim=(0, 2))


def same(one: Moments, other: Moments) -> bool:
    return all(
        torch.allclose(other[name][path], own, rtol=1e-5, atol=1e-4)
        for name, paths in one.items()
        for path, own in paths.items()
    )


def test_imported_experts_are_routed_at_once_and_measured_once(
    bare: Base, experts: Library, measured: list[set[str]]
) -> None:
    first = weights(attach(bare.model, experts, router="contrast"))
    assert (first > 0).all()
    assert measured == [set(EXPERTS)]
    assert len(list(iterate_derived(experts.path, KIND))) == len(EXPERTS)
    assert experts.verify() == []
    detach(bare.model)
    assert torch.equal(weights(attach(bare.model, experts, router="contrast")), first)
    assert len(measured) == 1


def test_an_expert_that_comes_is_measured_alone_and_one_that_goes_costs_nothing(
    bare: Base, experts: Library, adapters: dict[str, Adapter], measured: list[set[str]]
) -> None:
    before = dict(seating(attach(bare.model, experts, router="contrast")).prepared[KIND])
    detach(bare.model)
    experts.add_adapter(Adapter("new", adapters["wide"].modules, adapters["wide"].config), {"tasks": []})
    attach(bare.model, experts, router="contrast")
    assert measured == [set(EXPERTS)]  # its weights are known under another name
    detach(bare.model)
    other = {path: type(own)(own.lora_a, own.lora_b * 2 + 0.01, own.scaling) for path, own in adapters["few"]}
    experts.replace_adapter(Adapter("new", other, adapters["few"].config), {"tasks": []})
    attach(bare.model, experts, router="contrast")
    assert measured == [set(EXPERTS), {"new"}]
    assert same(before, seating(bare.model).prepared[KIND])
    detach(bare.model)
    experts.remove("new")
    experts.remove("few")
    attach(bare.model, experts, router="contrast")
    assert len(measured) == 2


def test_means_are_those_over_the_prompts_and_a_request_varies_by_one(
    bare: Base, experts: Library, adapters: dict[str, Adapter]
) -> None:
    yardstick = yardstick_for(bare.model, bare.tokenizer, experts, ROUTERS["contrast"])
    layers = build_layers(bare.model, list(adapters.values()))
    rule = ROUTERS["contrast"]
    moments = yardstick_moments(bare.model, rule, layers, list(adapters), yardstick)
    pooled = pooled_moments(bare.model, experts, yardstick.prompts)
    scores = {path: torch.zeros(len(yardstick.prompts), len(layer.experts)) for path, layer in layers.items()}
    watch_prompts(
        bare.model, rule, layers, yardstick.prompts,
        lambda path, prompts, means: scores[path].__setitem__(list(prompts), means.float()),
    )  # fmt: skip
    factors = {}
    for position, (name, adapter) in enumerate(adapters.items()):
        requests = torch.zeros(len(yardstick.prompts))
        for path in adapter.modules:
            own = moments[name][path]
            assert torch.allclose(own[0], pooled[name][path][0], rtol=1e-4)
            factors.setdefault(name, []).append(float(own[1] / pooled[name][path][1]))
            seat = layers[path].experts.index(position)
            requests += (scores[path][:, seat] - own[0]) / own[1] / len(adapter.modules)
        assert float(requests.mean()) == pytest.approx(0, abs=1e-3)
        assert torch.allclose(moments[name]["request"], requests, atol=1e-2)
        assert float(requests.std()) == pytest.approx(1, abs=1e-3)
        assert factors[name] == pytest.approx([factors[name][0]] * len(factors[name]), rel=1e-3)
    assert factors["many"][0] < factors["wide"][0] < 1.001  # a mean over more layers varies less


def test_experts_of_any_rank_and_layers_are_chosen_about_as_often(bare: Base, experts: Library) -> None:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, 300, (160, 20), generator=generator)
    attach(bare.model, experts, router="contrast", top_k=1)
    shares = (weights(bare.model, ids) > 0).double().mean(dim=0)
    assert float(shares.sum()) == pytest.approx(1)
    assert float(shares.max()) < 0.6, shares
    with routing(bare.model, {"router": "projection", "per": "request", "top_k": 1, "input_norm": "unit"}):
        by_length = (weights(bare.model, ids) > 0).double().mean(dim=0)
    names = seating(bare.model).experts
    assert float(by_length[names.index("few")] + by_length[names.index("narrow")]) == 0  # what contrast takes away


def test_a_model_that_is_routed_otherwise_gets_the_same_and_goes_on_as_before(
    bare: Base, experts: Library, tmp_path: Path
) -> None:
    shutil.copytree(experts.path, tmp_path / "copy")
    expected = seating(attach(bare.model, experts, router="contrast")).prepared[KIND]
    detach(bare.model)
    model = attach(bare.model, str(tmp_path / "copy"), router="arrow", top_k=2)
    with trace(model) as traced, torch.no_grad():
        model(input_ids=IDS)
        before = traced.stacked()
        with routing(model, "contrast"):
            assert traced.stacked().shape == before.shape  # nothing of the measurement
        assert same(expected, seating(model).prepared[KIND])
    with trace(model) as again, torch.no_grad():
        model(input_ids=IDS)
    assert torch.equal(again.stacked(), before)


def test_a_measurement_that_fails_changes_nothing(
    bare: Base, experts: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = attach(bare.model, experts, router="arrow", top_k=2)
    with torch.no_grad():
        before = model(input_ids=IDS).logits

    def fail(*_args: Any, **_more: Any) -> None:
        raise BaseModelError("the base must compute", found="nothing")

    with monkeypatch.context() as patched:
        patched.setattr(type(model.model), "forward", fail)
        with pytest.raises(BaseModelError, match="the base must compute"):
            routing(model, "contrast").__enter__()
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, before)
    assert KIND not in seating(model).prepared
    assert not list(iterate_derived(experts.path, KIND))


def test_a_library_that_cannot_be_written_is_routed_all_the_same(
    bare: Base, experts: Library, monkeypatch: pytest.MonkeyPatch, measured: list[set[str]]
) -> None:
    def refuse(*_args: Any) -> None:
        raise LibraryError("the library must be writable", found="read-only file system")

    monkeypatch.setattr(module, "save_prepared", refuse)
    with pytest.warns(UserWarning, match=r"'contrast_yardstick' holds is not stored.*read-only"):
        model = attach(bare.model, experts, router="contrast")
    assert (weights(model) > 0).all()
    with routing(model, "arrow"), routing(model, "contrast"):
        assert len(measured) == 1  # the model keeps it


def test_own_prompts_go_first_for_all_experts_or_for_none(
    bare: Base, experts: Library, adapters: dict[str, Adapter], measured: list[set[str]]
) -> None:
    own = pooled_moments(bare.model, experts, [[5, 6, 7], [8, 9], [10, 11, 12, 13]])
    model = attach(bare.model, experts, router="arrow")
    prepare(model, "contrast", own)
    with routing(model, "contrast"):
        weights(model)
        assert not measured
    prepare(model, "contrast", {name: own[name] for name in ("few", "many")})
    with routing(model, "contrast"):
        weights(model)
    assert measured == [set(EXPERTS)]


def test_results_know_what_was_measured_on(bare: Base, experts: Library) -> None:
    setting = Routing.of("contrast")
    assert prepared_marks(setting, experts) == {"": {"yardstick": yardstick_digest()}}
    assert prepared_marks(Routing.of("arrow"), experts) == {}
    tensors = {"few/x": torch.ones(2)}
    save_prepared(experts, "contrast", group_key(experts, experts.names()), Prepared(tensors, {}, {}))
    assert set(prepared_marks(setting, experts)[""]) == {"prepared.safetensors", "made.json"}


@pytest.mark.parametrize("prepared", [True, False])
def test_what_was_measured_for_another_edition_of_the_rule_is_measured_again(
    bare: Base, experts: Library, measured: list[set[str]], monkeypatch: pytest.MonkeyPatch, prepared: bool
) -> None:
    contrast = ROUTERS["contrast"]
    if prepared:
        tensors = {f"{name}/{path}": torch.ones(2) for name in experts.names() for path in experts.shapes(name)}
        key = group_key(experts, experts.names())
        save_prepared(experts, "contrast", key, Prepared(tensors, {}, {}))
    attach(bare.model, experts, router="contrast")
    detach(bare.model)
    assert len(measured) == (0 if prepared else 1)
    monkeypatch.setitem(ROUTERS, "contrast", dataclasses.replace(contrast, edition=2))
    for _ in range(2):
        if prepared:
            with pytest.warns(UserWarning, match="prompts that ship with Lorary stand in"):
                attach(bare.model, experts, router="contrast")
        else:
            attach(bare.model, experts, router="contrast")
        detach(bare.model)
    assert len(measured) == (1 if prepared else 2)


def test_experts_come_live_are_replaced_and_go(
    bare: Base, experts: Library, adapters: dict[str, Adapter], measured: list[set[str]]
) -> None:
    model = attach(bare.model, experts, router="contrast")
    kept = dict(seating(model).prepared[KIND])
    add_expert(model, Adapter("live", adapters["narrow"].modules, adapters["narrow"].config))
    assert measured[1:] == [{"live"}]
    assert same({"live": kept["narrow"]}, seating(model).prepared[KIND])
    found = weights(model)
    names = seating(model).experts
    assert torch.allclose(found[:, names.index("live")], found[:, names.index("narrow")], atol=1e-4)
    replace_expert(model, Adapter("many", adapters["narrow"].modules, adapters["narrow"].config))
    assert measured[2:] == [{"many"}]
    assert same({"many": kept["narrow"]}, seating(model).prepared[KIND])
    remove_expert(model, "live")
    weights(model)
    assert len(measured) == 3
    assert len(list(iterate_derived(experts.path, KIND))) == len(EXPERTS)  # the library is left alone


def test_without_a_tokenizer_it_says_what_to_do_and_changes_nothing(
    tiny_model: Make, random_adapter: Make, route: Make, generator: torch.Generator, tiny_tokenizer: Any
) -> None:
    model = tiny_model()
    one, other = (random_adapter(model, name, generator) for name in "ab")
    route(model, [one], router="arrow")
    words = r"'contrast' must be prepared(.|\n)*no tokenizer(.|\n)*--router contrast(.|\n)*tokenizer=tokenizer"
    with pytest.raises(RouterError, match=words):
        routing(model, "contrast").__enter__()
    seating(model).tokenizer = tiny_tokenizer
    with routing(model, "contrast"):
        weights(model)
    add_expert(model, other)
    assert seating(model).experts == ("a", "b")


def test_a_saved_model_holds_what_was_measured(
    bare: Base, experts: Library, tmp_path: Path, measured: list[set[str]]
) -> None:
    model = attach(bare.model, experts, router="contrast")
    expected = weights(model)
    save(model, tmp_path / "saved")
    loaded = load(tmp_path / "saved")
    assert torch.equal(weights(loaded), expected)
    assert len(measured) == 1


def test_experts_of_different_templates_have_no_yardstick(
    bare: Base, experts: Library, adapters: dict[str, Adapter]
) -> None:
    for name, template in (("p", "plain"), ("q", "chat")):
        experts.add_adapter(
            Adapter(name, adapters["few"].modules, adapters["few"].config), {"tasks": [], "template": template}
        )
    with pytest.raises(LibraryError, match="must be used with the template it was trained with"):
        attach(bare.model, experts, router="contrast")


def test_prompts_that_come_in_the_chat_template_have_a_yardstick_in_it(
    bare: Base, experts: Library, measured: list[set[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bare.tokenizer, "chat_template", "{% for m in messages %}<u>{{ m.content }}</u>{% endfor %}<a>")
    plain = seating(attach(bare.model, experts, tokenizer=bare.tokenizer, router="contrast")).prepared[KIND]
    detach(bare.model)
    model = attach(bare.model, experts, tokenizer=bare.tokenizer, router="contrast", template="chat")
    assert len(measured) == 2
    assert not same(plain, seating(model).prepared[KIND])
    assert len(list(iterate_derived(experts.path, KIND))) == 2 * len(EXPERTS)


def test_it_is_prepared_beforehand_and_kept(bare: Base, experts: Library, measured: list[set[str]]) -> None:
    settings = PrepareSettings("contrast")
    result = prepare_yardstick(bare, experts, ["few", "many"], settings)
    assert (result.kind, result.prepared, result.kept) == (KIND, ["few", "many"], [])
    result = prepare_yardstick(bare, experts, experts.names(), settings)
    assert (result.prepared, result.kept) == (["narrow", "wide"], ["few", "many"])
    attach(bare.model, experts, router="contrast")
    assert not measured


def test_the_command_takes_own_prompts_where_there_are_tasks(experts: Library) -> None:
    result = run_prepare(str(experts.path), "contrast")
    assert result.is_from_yardstick
    assert result.prepared == sorted(EXPERTS)
    with pytest.raises(Exception, match="the tasks of expert 'few' must be known"):
        run_prepare(str(experts.path), "contrast", tasks="builtin")
    with pytest.raises(Exception, match="the tasks of expert 'few' must be known"):
        run_prepare(str(experts.path), "centroid")
    every = ",".join(f"{name}=sentiment" for name in EXPERTS)
    own = run_prepare(str(experts.path), "contrast", mapping=every, rows=4)
    assert (own.kind, own.is_from_yardstick) == ("contrast", False)


def test_different_layers_are_said_once_where_a_library_is_attached(bare: Base, experts: Library) -> None:
    words = r"library 'lib' adapt different layers: q_proj \(few, wide\); down_proj, .* \(many, narrow\)\."
    with pytest.warns(UserWarning, match=words) as caught:
        attach(bare.model, experts)
    assert len([warning for warning in caught if "adapt different layers" in str(warning.message)]) == 1
