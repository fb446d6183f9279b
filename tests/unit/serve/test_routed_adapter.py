"""A library exported as one routed adapter, served by a stand-in of vLLM with the plugin: it answers as ours does."""

import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from vllm_seam import LoraConfig, Server, make_modules

from lorary.adapter import Adapter
from lorary.errors import AdapterError, LibraryError, RouterError, UsageError
from lorary.formats.peft import read_adapter
from lorary.library.store import Library
from lorary.model.attach import attach, detach, routing
from lorary.route.setting import Routing
from lorary.serve.routed_adapter import gated_factors, routed_adapter, write_routed_folder
from lorary.serve.routed_folder import read_routed_folder
from lorary.serve.routed_layout import ROUTING_FILE, RoutedLayout, read_layout
from lorary.serve.slot_gate import SlotGate
from lorary.serve.vllm_plugin import register

Make = Callable[..., Any]
IDS = torch.randint(1, 300, (3, 7), generator=torch.Generator().manual_seed(5))


def make_library(path: Path, model: Any, adapters: Sequence[Adapter]) -> Library:
    library = Library.create(path, model, base_name="tiny")
    for adapter in adapters:
        library.add_adapter(adapter, {"tasks": [adapter.name]})
    return library


@pytest.fixture
def use_vllm(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Put the stand-in in vLLM's place, and register the plugin in it."""

    def use(**settings: Any) -> None:
        for name, module in make_modules(**settings).items():
            monkeypatch.setitem(sys.modules, name, module)
        register()
        register()  # vLLM may do so more than once in a process

    return use


@pytest.fixture
def adapters(tiny_model: Make, random_adapter: Make, generator: torch.Generator) -> list[Adapter]:
    """Experts of unequal ranks and layers, one of zero, in a base of seed 0."""
    model = tiny_model()
    return [
        random_adapter(model, "a", generator, rank=3),
        random_adapter(model, "b", generator, rank=1, size=3.0),
        random_adapter(model, "c", generator, rank=5, layers=[1]),
        random_adapter(model, "d", generator, rank=2, targets=("q_proj",)),
        random_adapter(model, "zero", generator, rank=2, size=0.0),
    ]


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(input_ids=IDS).logits
    return found


@pytest.mark.filterwarnings("ignore:.*prototypes are ambiguous")
@pytest.mark.parametrize(
    "setting",
    [
        {"router": "arrow", "top_k": 2},
        {"router": "arrow", "top_k": 1, "temperature": 0.2},
        {"router": "arrow", "top_k": 9, "temperature": 3.0},
        {"router": "projection", "top_k": 2},
        {"router": "norm", "top_k": 2, "temperature": 0.5},
        {"router": "arrow", "top_k": 2, "allow": ["a", "c", "zero"]},
    ],
    ids=str,
)
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_the_served_adapter_computes_what_the_routed_model_computes(
    tiny_model: Make, adapters: list[Adapter], tmp_path: Path, use_vllm: Make, setting: dict[str, Any], platform: str
) -> None:
    use_vllm(platform=platform)
    model = tiny_model()
    library = make_library(tmp_path / "lib", model, adapters)
    folder = write_routed_folder(tmp_path / "out", routed_adapter(library, Routing.of(**setting)))
    bare = logits(model)
    attach(model, library, **setting)
    ours = logits(model)
    detach(model)
    server = Server(model)
    server.load("routed", folder)
    served = server.logits(IDS, ["routed"] * len(IDS))
    effect = (ours - bare).abs().max()
    assert effect > 0.1
    assert (served - ours).abs().max() < 1e-5 * effect


def test_routed_plain_and_base_rows_share_a_batch(
    tiny_model: Make, adapters: list[Adapter], tmp_path: Path, use_vllm: Make
) -> None:
    use_vllm()
    model = tiny_model()
    library = make_library(tmp_path / "lib", model, adapters)
    arrow, norm = Routing.of("arrow", top_k=1), Routing.of("norm", top_k=3, temperature=0.7)
    server = Server(tiny_model(), LoraConfig(max_loras=3))
    for name, setting in (("arrow", arrow), ("norm", norm)):
        server.load(name, write_routed_folder(tmp_path, routed_adapter(library, setting)))
    server.load("b", library.path / "adapters" / "b")
    ids = torch.cat([IDS, IDS[:1]])
    served = server.logits(ids, ["arrow", "b", None, "norm"])
    attach(model, library)
    rows = [arrow, Routing.of(experts=["b"]), Routing.of("base"), norm]
    with torch.no_grad(), routing(model, rows):
        ours = model(input_ids=ids).logits
    assert (served - ours).abs().max() < 1e-4
    assert torch.equal(served.argmax(-1), ours.argmax(-1))


def test_a_slot_that_is_given_away_is_gated_no_longer(
    tiny_model: Make, adapters: list[Adapter], tmp_path: Path, use_vllm: Make
) -> None:
    use_vllm()
    model = tiny_model()
    library = make_library(tmp_path / "lib", model, adapters)
    server = Server(tiny_model(), LoraConfig(max_loras=1))
    server.load("routed", write_routed_folder(tmp_path, routed_adapter(library, Routing.of("arrow"))))
    server.unload("routed")
    server.load("a", library.path / "adapters" / "a")
    attach(model, library, experts=["a"])
    assert torch.allclose(server.logits(IDS, ["a"] * 3), logits(model), atol=1e-4)


def test_tied_scores_choose_either_of_equal_experts(
    tiny_model: Make, random_adapter: Make, tmp_path: Path, use_vllm: Make, generator: torch.Generator
) -> None:
    use_vllm()
    model = tiny_model()
    twin = random_adapter(model, "a", generator)
    library = make_library(tmp_path / "lib", model, [twin, Adapter("b", twin.modules, twin.config)])
    for top_k in (1, 2):
        setting = Routing.of("arrow", top_k=top_k)
        server = Server(model)
        server.load("routed", write_routed_folder(tmp_path, routed_adapter(library, setting)))
        served = server.logits(IDS, ["routed"] * 3)
        with torch.no_grad():
            attach(model, library, experts=["a"])
            assert torch.allclose(served, logits(model), atol=1e-4)
            detach(model)


def test_the_gate_has_one_graph_for_all_contents(generator: torch.Generator) -> None:
    """What is put into slots later is served by what was traced before."""
    gate = SlotGate(2, 8)
    z, slot = torch.randn(5, 8, generator=generator), torch.tensor([0, 1, 1, -1, 0])
    alive = torch.ones(2, 4, dtype=torch.bool)
    traced = make_fx(gate)(z, slot, alive)
    assert torch.equal(traced(z, slot, alive)[4], z[4])
    gate.put(1, RoutedLayout("arrow", 1, 1.0, ("a", "b"), (2, 1), "0" * 64))
    gated = gate(z, slot, alive)
    assert torch.equal(traced(z, slot, alive), gated)
    assert not torch.equal(gated[1], z[1])
    assert not gated[3].any()


def test_one_expert_wins_each_token_with_top_k_1(generator: torch.Generator) -> None:
    gate = SlotGate(1, 16)
    gate.put(0, RoutedLayout("arrow", 1, 1.0, ("a", "b", "c"), (2, 3, 1), "0" * 64))
    z = torch.randn(50, 16, generator=generator)
    alive = torch.tensor([[True, True, False, False, False, False, False, False]])
    gated = gate(z, torch.zeros(50, dtype=torch.int64), alive)
    first = z[:, 6].abs() > z[:, 7].abs()
    assert torch.equal(gated[first, :2], z[first, :2])
    assert torch.equal(gated[~first, 2:5], z[~first, 2:5])
    assert not gated[first, 2:].any()
    assert not gated[~first, :2].any()
    assert not gated[:, 5:].any()


def test_a_token_without_an_expert_that_acts_is_the_bases(generator: torch.Generator) -> None:
    gate = SlotGate(1, 8)
    gate.put(0, RoutedLayout("norm", 2, 1.0, ("a", "b"), (1, 1), "0" * 64))
    z = torch.randn(3, 8, generator=generator)
    assert not gate(z, torch.zeros(3, dtype=torch.int64), torch.zeros(1, 4, dtype=torch.bool)).any()


def test_a_buffer_that_is_too_narrow_is_refused() -> None:
    with pytest.raises(AdapterError, match="max-lora-rank"):
        SlotGate(1, 4).put(0, RoutedLayout("arrow", 1, 1.0, ("a", "b"), (2, 1), "0" * 64))


@pytest.mark.parametrize("router", ["projection", "norm"])
def test_factors_that_are_written_anew_are_the_same_update(
    router: str, tiny_model: Make, random_adapter: Make, generator: torch.Generator
) -> None:
    for _, factors in random_adapter(tiny_model(), "a", generator, rank=4):
        lora_a, lora_b, _ = gated_factors(factors, router)
        assert torch.allclose(lora_b @ lora_a, factors.delta(), atol=1e-6)


def test_the_exported_adapter_is_an_ordinary_folder_with_its_hash_in_the_name(
    tiny_model: Make, adapters: list[Adapter], tmp_path: Path
) -> None:
    library = make_library(tmp_path / "lib", tiny_model(), adapters)
    routed = routed_adapter(library, Routing.of("arrow", top_k=2))
    folder = write_routed_folder(tmp_path / "out", routed)
    assert folder == write_routed_folder(tmp_path / "out", routed_adapter(library, Routing.of("arrow", top_k=2)))
    assert folder != write_routed_folder(tmp_path / "out", routed_adapter(library, Routing.of("arrow", top_k=3)))
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", ROUTING_FILE
    ]  # fmt: skip
    assert read_adapter(folder).rank == 3 + 1 + 5 + 2 + 2 + 5
    assert routed.max_lora_rank == 32
    assert read_routed_folder(folder) == routed.layout
    assert read_layout(library.path / "adapters" / "a") is None
    document = json.loads((folder / ROUTING_FILE).read_text())
    assert {key: document[key] for key in ("router", "top_k", "temperature", "experts", "ranks")} == {
        "router": "arrow", "top_k": 2, "temperature": 1.0, "experts": ["a", "b", "c", "d", "zero"],
        "ranks": [3, 1, 5, 2, 2],
    }  # fmt: skip


def test_the_exported_adapter_loads_in_peft(
    tiny_model: Make, adapters: list[Adapter], tmp_path: Path, generator: torch.Generator
) -> None:
    from peft import PeftModel

    model = tiny_model()
    library = make_library(tmp_path / "lib", model, adapters)
    folder = write_routed_folder(tmp_path / "out", routed_adapter(library, Routing.of("arrow")))
    loaded = PeftModel.from_pretrained(model, folder)
    stored = read_adapter(folder).modules
    for path, factors in stored.items():
        layer = loaded.base_model.model.get_submodule(path)
        assert torch.equal(layer.lora_A["default"].weight, factors.lora_a)
        assert layer.scaling["default"] == 1.0


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (Routing.of("auto", top_k=1, threshold=0.0), "per token and layer"),
        (Routing.of("lag"), "per token and layer"),
        (Routing.of("arrow", per="request"), "decides per request"),
        (Routing.of("uniform"), "lorary merge"),
        (Routing.of(experts=["a"]), "lorary merge"),
        (Routing.of("arrow", top_p=0.5), "top_p=0.5"),
        (Routing.of("arrow", mix="factors"), "mix='factors'"),
        (Routing.of("norm", calibrated=True), "calibrated=True"),
        (Routing.of("arrow", temperature={0: 2.0}), "one temperature"),
        (Routing.of("arrow", allow=["nobody"]), "nobody"),
    ],
)
def test_what_the_gate_cannot_follow_is_refused(
    tiny_model: Make, random_adapter: Make, tmp_path: Path, generator: torch.Generator, setting: Routing, message: str
) -> None:
    model = tiny_model()
    library = make_library(tmp_path / "lib", model, [random_adapter(model, "a", generator)])
    with pytest.raises(RouterError) as error:
        routed_adapter(library, setting)
    assert message in str(error.value)


def test_too_many_ranks_and_layers_without_a_seam_are_refused(
    tiny_model: Make, random_adapter: Make, tmp_path: Path, generator: torch.Generator
) -> None:
    model = tiny_model(tie_word_embeddings=False)
    with pytest.raises(LibraryError, match="must hold an adapter"):
        routed_adapter(make_library(tmp_path / "empty", model, []), Routing.of("arrow"))
    wide = [random_adapter(model, f"e{number}", generator, rank=30) for number in range(17)]
    with pytest.raises(AdapterError, match="512"):
        routed_adapter(make_library(tmp_path / "wide", model, wide), Routing.of("arrow"))


def test_a_file_that_belongs_to_other_weights_is_refused(
    tiny_model: Make, adapters: list[Adapter], tmp_path: Path
) -> None:
    library = make_library(tmp_path / "lib", tiny_model(), adapters)
    one = write_routed_folder(tmp_path, routed_adapter(library, Routing.of("arrow")))
    other = write_routed_folder(tmp_path, routed_adapter(library, Routing.of("norm")))
    (one / ROUTING_FILE).write_bytes((other / ROUTING_FILE).read_bytes())
    with pytest.raises(AdapterError, match="another hash"):
        read_routed_folder(one)
    again = routed_adapter(library, Routing.of("arrow"))
    with pytest.raises(UsageError, match="something else"):
        write_routed_folder(tmp_path, again)


@pytest.mark.parametrize(
    "change",
    [
        {"format_version": 2}, {"router": "lag"}, {"top_k": 0}, {"temperature": -1}, {"ranks": [1]}, {"ranks": [0, 1]},
        {"experts": "ab"}, {"temperature": None},
    ],
)  # fmt: skip
def test_a_damaged_file_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    layout = RoutedLayout("arrow", 1, 1.0, ("a", "b"), (2, 1), "0" * 64)
    (tmp_path / ROUTING_FILE).write_bytes(layout.encode())
    assert read_layout(tmp_path) == layout
    (tmp_path / ROUTING_FILE).write_text(json.dumps({**json.loads(layout.encode()), **change}))
    with pytest.raises(AdapterError, match="export the library again"):
        read_layout(tmp_path)


def test_tensor_parallelism_takes_fully_sharded_adapters_alone(
    tiny_model: Make, adapters: list[Adapter], tmp_path: Path, use_vllm: Make
) -> None:
    use_vllm(world_size=2)
    library = make_library(tmp_path / "lib", tiny_model(), adapters)
    folder = write_routed_folder(tmp_path, routed_adapter(library, Routing.of("arrow")))
    server = Server(tiny_model())
    with pytest.raises(ValueError, match="fully-sharded-loras"):
        server.load("routed", folder)
    server.load("a", library.path / "adapters" / "a")
    Server(tiny_model(), LoraConfig(fully_sharded_loras=True)).load("routed", folder)


def test_under_another_version_routed_adapters_alone_are_refused(
    tiny_model: Make,
    adapters: list[Adapter],
    tmp_path: Path,
    use_vllm: Make,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        use_vllm(version="0.33.1+cu130")
    assert "0.33.1" in caplog.text
    assert "0.32.0" in caplog.text
    library = make_library(tmp_path / "lib", tiny_model(), adapters)
    folder = write_routed_folder(tmp_path, routed_adapter(library, Routing.of("arrow")))
    server = Server(tiny_model())
    server.load("a", library.path / "adapters" / "a")
    with pytest.raises(ValueError, match="no other version"):
        server.load("routed", folder)
