"""Against PEFT in the same process: plain LoRA, Arrow and its preset, and one place where PEFT is not exact.

Tolerances are relative to the experts' effect: the largest difference between routed and bare logits.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.adapters import write_adapter
from torch import Tensor

from lorary.adapter import Adapter
from lorary.formats.peft import read_adapter
from lorary.model.attach import routing
from lorary.model.seating import seating

peft = pytest.importorskip("peft")

Make = Callable[..., Any]
DTYPES = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-9)])
TARGETS = ("q_proj", "o_proj", "down_proj")
IDS = torch.randint(1, 300, (2, 9), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(input_ids=IDS).logits
    return found


def effect(model: Any) -> float:
    with routing(model, "base"):
        bare = logits(model)
    largest = float((logits(model) - bare).abs().max())
    assert largest > 0.1
    return largest


def saved(adapters: Sequence[Adapter], folder: Path) -> list[str]:
    for adapter in adapters:
        write_adapter(adapter, folder / adapter.name)
    return [str(folder / adapter.name) for adapter in adapters]


# One expert: PEFT's own LoRA.


@DTYPES
@pytest.mark.parametrize("settings", [{"top_k": 1}, {"top_k": 4}, {"router": "uniform"}, {"experts": ["one"]}])
def test_one_expert_equals_lora_inference_in_peft(
    tiny_model: Make, random_adapter: Make, route: Make, generator: torch.Generator, tmp_path: Path,
    settings: dict[str, Any], dtype: torch.dtype, tolerance: float,
) -> None:  # fmt: skip
    adapter = random_adapter(tiny_model(dtype=dtype), "one", generator)
    (folder,) = saved([adapter], tmp_path)
    expected = logits(peft.PeftModel.from_pretrained(tiny_model(dtype=dtype), folder))
    model = route(tiny_model(dtype=dtype), [adapter], **settings)
    assert (logits(model) - expected).abs().max() < tolerance * effect(model)


@pytest.mark.parametrize(
    "changes",
    [
        {"use_rslora": True},
        {"rank_pattern": {"o_proj": 2}},
        {"alpha_pattern": {"layers.1.self_attn.q_proj": 11, "down_proj": 1}},
        {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"q_proj": 3}, "use_rslora": True},
    ],
)
def test_patterns_and_rslora_mean_what_they_mean_in_peft(
    tiny_model: Make, route: Make, tmp_path: Path, changes: dict[str, Any]
) -> None:
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=list(TARGETS), init_lora_weights=False, **changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = peft.get_peft_model(tiny_model(dtype=torch.float64), config)
    theirs.save_pretrained(tmp_path / "one")
    model = route(tiny_model(dtype=torch.float64), [read_adapter(tmp_path / "one")], top_k=1)
    assert (logits(model) - logits(theirs.eval())).abs().max() < 1e-9 * effect(model)


# Arrow.


def arrow_in_peft(model: Any, adapters: Sequence[Adapter], folder: Path, top_k: int, temperature: float) -> Tensor:
    settings = peft.ArrowConfig(top_k=top_k, router_temperature=temperature, rng_seed=0)
    return logits(peft.create_arrow_model(model, saved(adapters, folder), settings))


def arrow_in_float64(model: Any, adapters: Sequence[Adapter], top_k: int, temperature: float) -> Tensor:
    """Arrow by its definition: a full SVD of each update, then token by token in plain loops."""

    def routed(path: str) -> Callable[..., Tensor]:
        deltas = [adapter.modules[path].scaling * full_product(adapter, path) for adapter in adapters]
        prototypes = [torch.linalg.svd(full_product(adapter, path)).Vh[0] for adapter in adapters]

        def hook(_layer: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            result = output.clone()
            for row, column in ((r, c) for r in range(output.shape[0]) for c in range(output.shape[1])):
                x = args[0][row, column]
                scores = [abs(float(x @ prototype)) for prototype in prototypes]
                chosen = sorted(range(len(scores)), key=lambda e: -scores[e])[:top_k]
                weights = torch.tensor([scores[e] / temperature for e in chosen], dtype=torch.float64).softmax(0)
                for weight, expert in zip(weights, chosen, strict=True):
                    result[row, column] += weight * (deltas[expert] @ x)
            return result

        return hook

    for path in adapters[0].modules:
        model.get_submodule(path).register_forward_hook(routed(path))
    return logits(model)


def full_product(adapter: Adapter, path: str) -> Tensor:
    factors = adapter.modules[path]
    return factors.lora_b.double() @ factors.lora_a.double()


@pytest.mark.parametrize(("top_k", "temperature"), [(1, 1.0), (2, 0.5), (4, 2.0)])
def test_arrow_equals_peft_where_singular_values_are_far_apart(
    tiny_model: Make, random_adapter: Make, route: Make, generator: torch.Generator, tmp_path: Path,
    top_k: int, temperature: float,
) -> None:  # fmt: skip
    adapters = [random_adapter(tiny_model(), f"e{i}", generator, gap=0.3) for i in range(5)]
    expected = arrow_in_peft(tiny_model(), adapters, tmp_path, top_k, temperature)
    model = route(tiny_model(), adapters, top_k=top_k, temperature=temperature)
    assert (logits(model) - expected).abs().max() < 1e-3 * effect(model)


def test_the_preset_equals_pefts_arrow_as_it_comes(
    tiny_model: Make, random_adapter: Make, route: Make, generator: torch.Generator, tmp_path: Path
) -> None:
    adapters = [random_adapter(tiny_model(), f"e{i}", generator, gap=0.3) for i in range(5)]
    settings = peft.ArrowConfig(rng_seed=0)
    assert (settings.top_k, settings.router_temperature, settings.use_gks) == (3, 1.0, False)
    expected = logits(peft.create_arrow_model(tiny_model(), saved(adapters, tmp_path), settings))
    model = route(tiny_model(), adapters, preset="peft")
    assert (logits(model) - expected).abs().max() < 1e-3 * effect(model)
    with routing(model, "uniform"), routing(model, {"preset": "peft"}):
        assert (logits(model) - expected).abs().max() < 1e-3 * effect(model)


@pytest.mark.parametrize("rank", [1, 3])
def test_general_knowledge_is_taken_away_as_peft_does(
    tiny_model: Make, random_adapter: Make, route: Make, generator: torch.Generator, tmp_path: Path, rank: int
) -> None:
    make = [random_adapter(tiny_model(), f"{n}{i}", generator, rank=rank, gap=0.1) for n in "eg" for i in range(4)]
    tasks, general = make[:4], make[4:6]
    settings = peft.ArrowConfig(top_k=2, rng_seed=0, use_gks=True)
    theirs = peft.create_arrow_model(
        tiny_model(), saved(tasks, tmp_path), settings, general_adapter_paths=saved(general, tmp_path)
    )
    expected = logits(theirs)
    names = [adapter.name for adapter in general]
    model = route(tiny_model(), [*tasks, *general], top_k=2, general=names, general_mode="factors")
    assert (logits(model) - expected).abs().max() < 1e-3 * effect(model)
    with routing(model, {"general": None}):  # it does something
        assert (logits(model) - expected).abs().max() > 0.1 * effect(model)


def test_arrow_is_exact_where_singular_values_are_close_and_peft_is_not(
    tiny_model: Make, random_adapter: Make, route: Make, generator: torch.Generator, tmp_path: Path
) -> None:
    adapters = [random_adapter(tiny_model(), f"e{i}", generator, gap=0.98) for i in range(5)]
    exact = arrow_in_float64(tiny_model().double(), adapters, 2, 1.0)
    theirs = arrow_in_peft(tiny_model(), adapters, tmp_path, 2, 1.0)
    model = route(tiny_model(), adapters, top_k=2)
    assert (logits(model) - exact).abs().max() < 5e-5 * effect(model)
    # Fifteen steps of power iteration from a random start have not found the first direction yet.
    assert (theirs - exact).abs().max() > 1e-2 * effect(model)
    assert not seating(model).ambiguous()
