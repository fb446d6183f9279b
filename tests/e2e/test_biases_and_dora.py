"""What becomes of adapters with a bias or a magnitude (DoRA) where others than the router use them."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import ArrowConfig as PeftArrow
from peft import LoraConfig, PeftModel, create_arrow_model, get_peft_model
from tests.support.adapters import as_dora, with_biases, write_adapter
from torch import Tensor

import lorary
from lorary.adapt.export_settings import StaticSettings
from lorary.adapt.export_static import export_static
from lorary.adapt.merge_library import merge_library
from lorary.adapt.merge_settings import MergeSettings
from lorary.adapter import Adapter
from lorary.cluster.mbc import cluster_adapters
from lorary.errors import AdapterError
from lorary.formats.gguf_lora import lora_tensors
from lorary.library.prepared import expert_key
from lorary.library.store import Library
from lorary.model.attach import attach, detach, routing
from lorary.model.beside import beside_of
from lorary.model.merged import add_to_weights
from lorary.model.seating import seating
from lorary.report.evaluation_page import _similarity
from lorary.route.setting import Routing
from lorary.serve.routed_adapter import routed_adapter

Make = Callable[..., Any]
IDS = torch.randint(1, 300, (2, 9), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    answer: Tensor = model(input_ids=IDS).logits
    return answer


@pytest.fixture
def base(tiny_model: Make, generator: torch.Generator) -> Callable[[], Any]:
    """A factory of one base whose layers have biases."""
    biases = 0.5 * torch.randn(1000, generator=generator)

    def make() -> Any:
        model = tiny_model(attention_bias=True, mlp_bias=True)
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.copy_(biases[: parameter.numel()])
        return model

    return make


@pytest.fixture
def library(base: Callable[[], Any], random_adapter: Make, generator: torch.Generator, tmp_path: Path) -> Library:
    """A plain adapter, two with biases and a DoRA."""
    model = base()
    plain = {name: random_adapter(model, name, generator, rank=rank) for rank, name in enumerate("abcd", start=1)}
    library = Library.create(tmp_path / "lib", model, base_name="tiny")
    weaker = {path: replace(factors, scaling=0.7) for path, factors in plain["c"]}
    biased = [with_biases(each, generator) for each in (plain["b"], replace(plain["c"], modules=weaker))]
    for adapter in (plain["a"], *biased, as_dora(plain["d"], model, generator)):
        library.add_adapter(adapter, {"tasks": [adapter.name]})
    return library


def in_peft(adapter: Adapter, model: Any, folder: Path) -> Any:
    write_adapter(adapter, folder)
    return PeftModel.from_pretrained(model, str(folder)).eval()


def close(found: Tensor, expected: Tensor, bare: Tensor) -> bool:
    """Within the stated agreement: 1e-5 of the largest effect on a logit."""
    effect = float((expected - bare).abs().max())
    assert effect > 0.1
    return float((found - expected).abs().max()) < 1e-5 * effect


def test_a_sum_of_adapters_adds_their_biases_up_and_is_one_adapter_in_peft(
    library: Library, base: Callable[[], Any], tmp_path: Path
) -> None:
    weights = {"a": 0.5, "b": -1.5, "c": 0.25}
    model = attach(base(), library, experts=weights)
    expected = logits(model)
    bare = logits(detach(model))
    merged = merge_library(library, MergeSettings("concat", weights=weights), name="sum").adapter
    assert close(logits(in_peft(merged, base(), tmp_path / "sum")), expected, bare)
    add_to_weights(model, merged)
    assert close(logits(model), expected, bare)
    # The bias acts on no input: truncation leaves it whole.
    cut = merge_library(library, MergeSettings("concat", weights=weights, rank=1), name="cut").adapter
    for path, factors in cut:
        whole = merged.modules[path]
        assert factors.rank == 1
        assert factors.bias is not None
        assert whole.bias is not None
        assert torch.allclose(factors.scaling * factors.bias, whole.scaling * whole.bias, atol=1e-6)


def test_a_dora_alone_is_merged_as_it_is_and_in_a_sum_refused(library: Library, base: Callable[[], Any]) -> None:
    model = attach(base(), library, experts=["d"])
    expected = logits(model)
    bare = logits(detach(model))
    alone = merge_library(library, MergeSettings("concat", weights={"d": 1.0}), name="alone").adapter
    add_to_weights(model, alone)
    assert close(logits(model), expected, bare)
    for fields in ({"weights": {"a": 0.5, "d": 0.5}}, {"weights": {"d": 0.5}}, {"weights": {"d": 1.0}, "rank": 1}):
        with pytest.raises(AdapterError, match="adapter 'd' must be a plain LoRA to be merged by 'concat'"):
            merge_library(library, MergeSettings("concat", **fields))
    with pytest.raises(AdapterError, match="a DoRA must be given at scale 1"):
        merge_library(library, MergeSettings("concat", weights={"d": 1.0}, scale=0.5))
    for method in ("mu", "ties", "tsv", "linear", "pico"):
        with pytest.raises(AdapterError, match=rf"adapter 'b' must be a plain LoRA to be merged by '{method}'"):
            merge_library(library, MergeSettings(method, experts=("b", "c")))


def test_exports_for_others_refuse_what_they_cannot_hold_before_anything_is_written(
    library: Library, tmp_path: Path
) -> None:
    configuration = {"model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 4}
    for name in "bd":
        with pytest.raises(AdapterError, match="must be a plain LoRA to be written as a GGUF LoRA"):
            lora_tensors(library.get(name), configuration)
        with pytest.raises(AdapterError, match=f"adapter '{name}' must be a plain LoRA to be one of vLLM's routed"):
            routed_adapter(library, Routing("arrow", allow=["a", name]))
    assert routed_adapter(library, Routing("arrow", allow=["a"])).layout.experts == ("a",)
    export_static(library, tmp_path / "plain", "peft", StaticSettings(), "")
    for name in library.names():
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            stored = library.path / "adapters" / name / file
            assert (tmp_path / "plain" / name / file).read_bytes() == stored.read_bytes()


def test_similarity_is_that_of_factors_and_refuses_a_dora(library: Library) -> None:
    for method in ("delta", "sketch"):
        assert cluster_adapters(["a", "b", "c"], library.get, k=2, method=method).k == 2
        with pytest.raises(AdapterError, match="adapter 'd' must be a plain LoRA to be compared with others"):
            cluster_adapters(list("abcd"), library.get, k=2, method=method)
    assert _similarity(library, {}) is None
    library.remove("d")
    assert _similarity(library, {}) is not None


def test_verify_and_keys_of_prepared_data_follow_biases_and_magnitudes(
    library: Library, base: Callable[[], Any], generator: torch.Generator
) -> None:
    assert library.verify() == []
    for name in "bd":
        before = expert_key(library, name)
        kept = library.get(name)
        library.remove(name)
        changed = with_biases(kept, generator) if name == "b" else as_dora(kept, base(), generator)
        assert torch.equal(next(iter(changed))[1].lora_b, next(iter(kept))[1].lora_b)
        library.add_adapter(changed, {"tasks": [name]})
        assert expert_key(library, name) != before
        weights = library.path / "adapters" / name / "adapter_model.safetensors"
        data = bytearray(weights.read_bytes())
        data[-4:] = b"\x00\x00\xc0\x7f"
        weights.write_bytes(data)
        rules = [problem.rule for problem in library.verify() if problem.adapter == name]
        assert rules, "a NaN must be found"


def test_auto_routes_a_mixed_library_without_a_warning(
    tiny_base_folder: Path, random_adapter: Make, generator: torch.Generator, tmp_path: Path
) -> None:
    loaded = lorary.load_base(str(tiny_base_folder), device="cpu")
    plain = [random_adapter(loaded.model, name, generator) for name in "abc"]
    library = Library.create(tmp_path / "lib", str(tiny_base_folder))
    for adapter in (plain[0], as_dora(plain[1], loaded.model, generator), with_biases(plain[2], generator)):
        library.add_adapter(adapter, {"tasks": [adapter.name]})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = attach(loaded.model, library, router="auto", tokenizer=loaded.tokenizer)
        routed = logits(model)
    assert bool(routed.isfinite().all())
    alone = []
    for name in "abc":
        with routing(model, {"experts": [name]}):
            alone.append(logits(model))
    with routing(model, "uniform"):
        alone.append(logits(model))
    # Each row is answered by one expert, or by what all have in common.
    for row in range(len(IDS)):
        assert min(float((routed[row] - other[row]).abs().max()) for other in alone) < 1e-4
    settings = StaticSettings(experts=("b",))
    exported = export_static(library, tmp_path / "whole", "transformers", settings, str(tiny_base_folder))
    assert exported.difference is not None
    assert exported.difference < 1e-5
    whole = lorary.load_base(str(tmp_path / "whole"), device="cpu").model
    assert (logits(whole) - alone[1]).abs().max() < 1e-4


def test_rules_that_score_by_weights_say_what_they_see_of_a_dora(library: Library, base: Callable[[], Any]) -> None:
    message = r"router 'arrow' scores a DoRA by its low-rank part.*\['d'\]"
    with pytest.warns(UserWarning, match=message):
        model = attach(base(), library, router="arrow")
    with pytest.warns(UserWarning, match=message), routing(model, [{"experts": ["a"]}, "arrow"]):
        pass
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with routing(model, "uniform"), routing(model, {"experts": ["d"]}):
            pass


@pytest.mark.parametrize("kind", ["use_dora", "lora_bias"])
def test_peft_unmerged_and_merged_gives_our_logits_and_its_arrow_leaves_these_parts_out(
    base: Callable[[], Any], random_adapter: Make, generator: torch.Generator, tmp_path: Path, kind: str
) -> None:
    plain = random_adapter(base(), "one", generator)
    adapter = as_dora(plain, base(), generator) if kind == "use_dora" else with_biases(plain, generator)
    library = Library.create(tmp_path / "lib", base(), base_name="tiny")
    library.add_adapter(adapter, {"tasks": ["one"]})
    bare, theirs = logits(base()), in_peft(adapter, base(), tmp_path / "one")
    expected = logits(theirs)
    model = attach(base(), library, experts=["one"])
    assert close(logits(model), expected, bare)
    assert close(logits(model), logits(theirs.merge_and_unload()), bare)
    # PEFT's own Arrow mixes lora_A and lora_B alone, and says nothing: with one expert it should be that expert.
    arrow = create_arrow_model(base(), [str(tmp_path / "one")], PeftArrow(top_k=1, rng_seed=0))
    assert not close(logits(arrow), expected, bare)


def test_a_layer_whose_weight_cannot_be_read_is_refused_by_name(
    base: Callable[[], Any], random_adapter: Make, generator: torch.Generator, tmp_path: Path
) -> None:
    class Halved(torch.nn.Linear):
        """Computes something else than its weight says."""

        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) / 2

    class AsItIs(torch.nn.Linear):
        """Computes what its weight says, in code of its own."""

        def forward(self, input: Tensor) -> Tensor:
            return input @ self.weight.mT + (0 if self.bias is None else self.bias)

    path = "model.layers.0.self_attn.q_proj"
    adapter = as_dora(random_adapter(base(), "one", generator), base(), generator)
    library = Library.create(tmp_path / "lib", base(), base_name="tiny")
    library.add_adapter(adapter, {"tasks": ["one"]})
    expected = logits(attach(base(), library, experts=["one"]))

    def with_layer(kind: type[torch.nn.Linear]) -> Any:
        model = base()
        layer = model.get_submodule(path)
        other = kind(layer.in_features, layer.out_features, bias=True).requires_grad_(False)
        other.load_state_dict(layer.state_dict())
        model.set_submodule(path, other)
        return model

    assert torch.allclose(logits(attach(with_layer(AsItIs), library, experts=["one"])), expected, atol=1e-5)
    message = f"(?s)adapter 'one' is a DoRA and must find the base's weight at {path}"
    model = with_layer(Halved)
    with pytest.raises(AdapterError, match=f"{message}.*something else than weight @ x"):
        attach(model, library, experts=["one"])
    assert not hasattr(model, "_lorary")
    assert not any(hasattr(module, "lorary") for module in model.modules())
    factors = adapter.modules[path]
    layer = base().get_submodule(path)
    with pytest.raises(AdapterError, match=f"{message}.*it is offloaded"):
        beside_of(layer.to("meta"), path, "one", factors)
    layer = base().get_submodule(path)
    layer.weight = torch.nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(AdapterError, match=f"{message}.*torch.int8"):
        beside_of(layer, path, "one", factors)
    layer.weight = torch.nn.Parameter(base().get_submodule(path).weight.clone(), requires_grad=False)
    layer.weight[3], zero = 0.0, replace(factors, lora_b=torch.zeros_like(factors.lora_b))
    with pytest.raises(AdapterError, match=f"(?s)adapter 'one' must have at {path} no row of W .* zero.*row 3"):
        beside_of(layer, path, "one", zero)


class Halves(torch.Tensor):
    """Stands for a quantised weight that looks like a matrix of floats: it holds half of what it means."""

    def dequantize(self) -> Tensor:
        return self.as_subclass(Tensor) * 2


def test_a_quantised_weight_that_can_be_read_is_what_its_layer_multiplies_with(
    base: Callable[[], Any], random_adapter: Make, generator: torch.Generator
) -> None:
    class Dequantising(torch.nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return torch.nn.functional.linear(input, self.weight.dequantize(), self.bias)

    path = "model.layers.0.self_attn.q_proj"
    plain = base().get_submodule(path)
    factors = as_dora(random_adapter(base(), "one", generator), base(), generator).modules[path]
    expected = beside_of(plain, path, "one", factors)
    for kind in (Dequantising, torch.nn.Linear):
        layer = kind(plain.in_features, plain.out_features, bias=True)
        layer.load_state_dict(plain.state_dict())
        layer.weight = torch.nn.Parameter((plain.weight / 2).as_subclass(Halves), requires_grad=False)
        if kind is Dequantising:
            for part, whole in zip(beside_of(layer, path, "one", factors), expected, strict=True):
                assert part is not None
                assert whole is not None
                assert torch.equal(part, whole)
            continue
        with pytest.raises(AdapterError, match="something else than weight @ x"):
            beside_of(layer, path, "one", factors)  # it multiplies by the halves


def test_a_dora_that_peft_trained_keeps_its_state_over_steps(base: Callable[[], Any], tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], use_dora=True)
        theirs = get_peft_model(base(), config)
        optimiser = torch.optim.Adam([p for p in theirs.parameters() if p.requires_grad], lr=0.05)
        for _ in range(5):
            theirs(input_ids=IDS, labels=IDS).loss.backward()
            optimiser.step()
            optimiser.zero_grad()
    theirs.eval().save_pretrained(tmp_path / "trained")
    library = Library.create(tmp_path / "lib", base(), base_name="tiny")
    library.add(tmp_path / "trained")
    model = attach(base(), library, experts=["trained"])
    assert close(logits(model), logits(theirs), logits(base()))
    assert all(layer.lora.gain is not None for layer in seating(model).layers.values())
