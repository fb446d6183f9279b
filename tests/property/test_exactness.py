"""How exact a routed model is in float32, in numbers, and what becomes of input that is not a number."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lorary.adapter import Adapter
from lorary.model.attach import routing
from lorary.model.seating import seating
from lorary.route import ROUTERS

Make = Callable[..., Any]
SCORING = [name for name, rule in ROUTERS.items() if rule.scores is not None and rule.needs in ("weights", "probe")]
PER_LAYER = [name for name in SCORING if "layer" in ROUTERS[name].pers]
IDS = torch.randint(1, 300, (3, 9), generator=torch.Generator().manual_seed(11))
MASK = torch.stack([torch.arange(9) >= start for start in (0, 5, 2)]).long()


@torch.no_grad()
def logits(model: Any, **inputs: Any) -> Tensor:
    found: Tensor = model(**inputs).logits
    return found


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.fixture
def adapters(tiny_model: Make, random_adapter: Make, generator: torch.Generator) -> list[Adapter]:
    shapes: list[dict[str, Any]] = [{"rank": 1}, {"layers": [1]}, {"rank": 4, "size": 1.5}, {}, {"rank": 2}]
    return [random_adapter(tiny_model(), f"e{i}", generator, **shape) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("most", [1, 600])
def test_factors_decomposed_a_few_at_a_time_give_the_same_bits(
    tiny_model: Make, route: Make, adapters: list[Adapter], monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    # As a library of many experts is seated: here all of a rank fit into one part unless the bound is lowered.
    whole = seating(route(tiny_model(), adapters)).layers
    monkeypatch.setattr("lorary.model.layers._MOST_NUMBERS", most)
    parts = seating(route(tiny_model(), adapters)).layers
    for path, layer in whole.items():
        for name in ("alive", "gap", "row_space", "outputs"):
            assert torch.equal(getattr(parts[path], name), getattr(layer, name)), (path, name)
        assert torch.equal(parts[path].lora.down, layer.lora.down), path


@pytest.mark.parametrize("gap", [0.5, 0.8, 0.9, 0.95, 0.99])
def test_seated_prototypes_equal_those_of_a_full_svd_in_float64(
    tiny_model: Make, random_adapter: Make, route: Make, generator: torch.Generator, gap: float
) -> None:
    adapters = [random_adapter(tiny_model(), f"e{i}", generator, rank=4, gap=gap) for i in range(4)]
    model = route(tiny_model(), adapters)
    for path, layer in seating(model).layers.items():
        full = torch.stack(
            [adapter.modules[path].lora_b.double() @ adapter.modules[path].lora_a.double() for adapter in adapters]
        )
        expected = torch.linalg.svd(full).Vh[:, 0]
        seated = layer.lora.down[layer.lora.num_ranks :]
        assert seated.dtype == torch.float32
        cosine = torch.nn.functional.cosine_similarity(seated.double(), expected)
        assert (cosine.abs() > 1 - 1e-6).all(), path


def test_all_that_is_seated_has_the_same_bits_in_any_order_of_adding(
    tiny_model: Make, adapters: list[Adapter], route: Make
) -> None:
    first = seating(route(tiny_model(), adapters)).layers
    again = seating(route(tiny_model(), [adapters[i] for i in (3, 1, 4, 0, 2)])).layers
    for path, layer in first.items():
        for name in ("gap", "alive", "row_space", "outputs"):
            assert torch.equal(getattr(layer, name), getattr(again[path], name)), name
        assert torch.equal(layer.lora.down, again[path].lora.down)
        assert torch.equal(layer.lora.up, again[path].lora.up)


@pytest.mark.parametrize("router", SCORING)
def test_batches_and_caches_agree_to_a_hundred_thousandth_in_float32(
    tiny_model: Make, adapters: list[Adapter], route: Make, router: str
) -> None:
    model = route(tiny_model(), adapters, router=router, top_k=2)
    together = logits(model, input_ids=IDS, attention_mask=MASK, position_ids=(MASK.cumsum(1) - 1).clamp_min(0))
    for row, start in enumerate((0, 5, 2)):
        alone = logits(model, input_ids=IDS[row : row + 1, start:])
        assert relative(together[row, start:], alone[0]) < 1e-5
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    cached, uncached = (
        model.generate(
            IDS, attention_mask=MASK, use_cache=cache, return_dict_in_generate=True, output_logits=True, **settings
        )
        for cache in (True, False)
    )  # fmt: skip
    assert torch.equal(cached.sequences, uncached.sequences)
    assert relative(torch.stack(cached.logits), torch.stack(uncached.logits)) < 1e-5


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "setting", [*SCORING, "uniform", {"per": "request"}, {"per": "token"}, {"scale": "unit"}], ids=str
)
def test_activations_that_are_no_numbers_show_in_their_row_and_in_no_other(
    tiny_model: Make, adapters: list[Adapter], route: Make, setting: Any, bad: float
) -> None:
    model = route(tiny_model(), adapters, top_k=2)
    embedded = model.get_input_embeddings()(IDS)
    broken = embedded.clone()
    broken[1, 4, 7] = bad
    with routing(model, setting):
        clean, found = logits(model, inputs_embeds=embedded), logits(model, inputs_embeds=broken)
    assert relative(found[[0, 2]], clean[[0, 2]]) < 1e-5
    assert found[1, 4:].isnan().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("setting", [*PER_LAYER, "uniform", {"scale": "unit"}, {"input_norm": "layer"}], ids=str)
def test_a_token_that_is_no_number_is_never_given_a_clean_update(
    tiny_model: Make, adapters: list[Adapter], route: Make, generator: torch.Generator, setting: Any, bad: float
) -> None:
    model = route(tiny_model(), adapters, top_k=2)
    x = torch.randn(2, 4, 32, generator=generator)
    broken = x.clone()
    broken[1, 2, 7] = bad
    with routing(model, setting):
        layer = seating(model).layers["model.layers.1.self_attn.q_proj"].lora
        clean, found = layer(x, torch.zeros(2, 4, 32)), layer(broken, torch.zeros(2, 4, 32))
    assert not found[1, 2].isfinite().any()
    found[1, 2] = clean[1, 2] = 0.0
    assert torch.allclose(found, clean, atol=1e-6)


@pytest.mark.parametrize(
    "setting", [*SCORING, "uniform", {"per": "request"}, {"scale": "unit"}, {"null": 0.1}], ids=str
)
def test_an_allow_list_that_leaves_nothing_to_choose_leaves_the_base(
    tiny_model: Make,
    random_adapter: Make,
    adapters: list[Adapter],
    route: Make,
    generator: torch.Generator,
    setting: Any,
) -> None:
    model = tiny_model()
    bare = logits(model, input_ids=IDS)
    route(model, [*adapters, random_adapter(model, "zero", generator, size=0.0)], top_k=2)
    assert not torch.equal(logits(model, input_ids=IDS), bare)
    with routing(model, setting), routing(model, {"allow": ["zero"]}):
        assert torch.equal(logits(model, input_ids=IDS), bare)
