"""Bases beside plain float32 on one device: half precision, quantised, offloaded, pickled; and bad activations."""

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorary.adapter import Adapter
from lorary.errors import AdapterError, BaseModelError
from lorary.library.store import Library
from lorary.lora.seat import find_linear
from lorary.model.attach import attach, detach, routing
from lorary.model.live import add_expert
from lorary.model.save import save
from lorary.model.seating import seating
from lorary.model.trace import trace

Make = Callable[..., Any]
IDS = torch.randint(1, 300, (2, 7), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    found: Tensor = model(input_ids=ids).logits
    return found


def updated(model: Any, adapter: Adapter) -> Tensor:
    """What a bare base computes when each layer's output gains `delta @ x`, from full matrices in float32."""

    def plus(delta: Tensor) -> Callable[..., Tensor]:
        return lambda _layer, args, output: output + (args[0].float() @ delta.mT).to(output.dtype)

    handles = [model.get_submodule(p).register_forward_hook(plus(factors.delta().float())) for p, factors in adapter]
    found = logits(model)
    for handle in handles:
        handle.remove()
    return found


def check_routed(model: Any, library: Library, tolerance: float) -> None:
    """One expert equals its full update, a batch equals its rows, a cache changes nothing, the base comes back."""
    bare, adapter = logits(model), library.get("a")
    expected = updated(model, adapter)
    effect = float((expected - bare).abs().max())
    assert effect > 0.1
    attach(model, library, top_k=2)
    with routing(model, {"experts": ["a"]}):
        assert (logits(model) - expected).abs().max() < tolerance * effect
    together = logits(model)
    assert together.dtype == bare.dtype
    for row in range(len(IDS)):
        assert (logits(model, IDS[row : row + 1]) - together[row]).abs().max() < tolerance * effect
    cached, uncached = (
        model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=3, use_cache=cache, do_sample=False)
        for cache in (True, False)
    )
    assert torch.equal(cached, uncached)
    detach(model)
    assert torch.equal(logits(model), bare)


@pytest.fixture
def library(tiny_model: Make, random_adapter: Make, generator: torch.Generator, tmp_path: Path) -> Library:
    """Three experts for the tiny model in float32."""
    model = tiny_model()
    library = Library.create(tmp_path / "library", model, base_name="tiny")
    for name in "abc":
        library.add_adapter(random_adapter(model, name, generator), {"tasks": [name]})
    return library


# A base in half precision has rounded weights, and so other sampled values.
@pytest.mark.filterwarnings("ignore:the base model at hand is the library's base model:UserWarning")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float16, 1e-2), (torch.bfloat16, 1e-1)])
def test_a_base_of_any_precision_is_routed(
    tiny_model: Make, library: Library, dtype: torch.dtype, tolerance: float
) -> None:
    check_routed(tiny_model(dtype=dtype), library, tolerance)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("as_float32", [False, True])
def test_a_rounded_base_is_told_once_and_that_nothing_is_wrong(
    tiny_model: Make, library: Library, dtype: torch.dtype, as_float32: bool
) -> None:
    model, name = tiny_model(dtype=dtype), str(dtype).removeprefix("torch.")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        attach(model.float() if as_float32 else model, library, top_k=2)
        with routing(model, {"per": "request"}):
            model.generate(IDS, max_new_tokens=2, do_sample=False, attention_mask=torch.ones_like(IDS))
    (message,) = [str(warning.message) for warning in caught]
    assert f"'tiny' with weights rounded to {name}: nothing is wrong" in message
    detach(model)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.mul_(1.01)
    with pytest.warns(UserWarning, match="is related to .*its weights have other values"):
        attach(model, library)


# Quantised: only the layer's own forward knows what it holds.


class Packed(nn.Module):
    """A linear layer that holds int8 buffers under names of its own, and no parameter."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scales = linear.weight.abs().amax(dim=1, keepdim=True) / 127
        self.register_buffer("packed", (linear.weight / scales).round().to(torch.int8))
        self.register_buffer("scales", scales)

    def forward(self, x: Tensor) -> Tensor:
        weight: Tensor = self.packed * self.scales
        return x @ weight.mT


class Nibbles(nn.Module):
    """A linear layer of 4 bits, held as bitsandbytes does: its `weight` is one column of bytes."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scales = linear.weight.abs().amax(dim=1, keepdim=True) / 7
        low, high = ((linear.weight / self.scales).round() + 8).to(torch.uint8).view(-1, 2).unbind(dim=1)
        self.weight = nn.Parameter((low + 16 * high)[:, None], requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        numbers = torch.cat([self.weight % 16, self.weight // 16], dim=1).float() - 8
        return x @ (numbers.view(self.out_features, -1) * self.scales).mT


class Sealed(Packed):
    """A linear layer as GPTQ and AWQ have it, whose `weight` nobody may read."""

    @property
    def weight(self) -> Tensor:
        raise AssertionError("the weight of a quantised layer was read")


def replace_linear(model: Any, make: Callable[[nn.Linear], nn.Module]) -> Any:
    linears = [path for path, m in model.named_modules() if isinstance(m, nn.Linear) and path != "lm_head"]
    for path in linears:
        parent, _, last = path.rpartition(".")
        setattr(model.get_submodule(parent), last, make(model.get_submodule(path)))
    return model


def by_torchao(model: Any) -> Any:
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed: pip install torchao")
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    return model


def by_torchao_int4(model: Any) -> Any:
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed: pip install torchao")
    torchao.quantize_(model, torchao.IntxWeightOnlyConfig(torch.int4, torchao.PerGroup(16)))
    return model


def by_bitsandbytes(bits: int) -> Callable[[Any], Any]:
    def quantise(model: Any) -> Any:
        modules = pytest.importorskip("bitsandbytes.nn", reason="bitsandbytes is not installed")

        def make(linear: nn.Linear) -> nn.Module:
            sizes = (linear.in_features, linear.out_features, False)
            if bits == 4:
                layer = modules.Linear4bit(*sizes, compute_dtype=torch.float32, quant_type="nf4")
            else:
                # Without a threshold: the columns that stay in float16 would depend on all rows of the batch.
                layer = modules.Linear8bitLt(*sizes, has_fp16_weights=False, threshold=0.0)
            layer.load_state_dict({"weight": linear.weight})
            return layer.to("cpu")

        return replace_linear(model, make)

    return quantise


def by_gptqmodel(kind: str) -> Callable[[Any], Any]:
    def quantise(model: Any) -> Any:
        name = {"gptq": "torch", "awq": "torch_awq"}[kind]
        package = pytest.importorskip(f"gptqmodel.nn_modules.qlinear.{name}", reason="GPTQModel is not installed")

        def make(linear: nn.Linear) -> nn.Module:
            groups = linear.weight.view(linear.out_features, -1, 16)
            scales = (groups.abs().amax(dim=2) / 7).half().float()
            layer = {"gptq": "TorchLinear", "awq": "AwqTorchLinear"}[kind]
            sizes = {"in_features": linear.in_features, "out_features": linear.out_features, "bias": False}
            packed = getattr(package, layer)(
                bits=4, group_size=16, sym=True, desc_act=False, register_buffers=True, **sizes
            )
            index = torch.arange(linear.in_features, dtype=torch.int32) // 16
            pack = packed.pack_original if kind == "gptq" else packed.pack
            pack(linear, scales, torch.full_like(scales, 8), g_idx=index)
            packed.optimized = True  # else it compiles, which takes minutes
            packed.post_init()
            return packed.eval()

        return replace_linear(model, make)

    return quantise


def by_quanto(model: Any) -> Any:
    quanto = pytest.importorskip("optimum.quanto", reason="Quanto is not installed: pip install optimum-quanto")
    quanto.quantize(model, weights=quanto.qint8, exclude=["lm_head"])
    quanto.freeze(model)
    return model


def by_hqq(model: Any) -> Any:
    hqq = pytest.importorskip("hqq.core.quantize", reason="HQQ is not installed: pip install hqq")
    config = hqq.BaseQuantizeConfig(nbits=8, group_size=16)
    return replace_linear(model, lambda m: hqq.HQQLinear(m, config, compute_dtype=torch.float32, device="cpu"))


OTHER_VALUES, UNREADABLE = "its weights have other values", "not all of its weights can be read"
QUANTISED = {
    "buffers": (lambda model: replace_linear(model, Packed), UNREADABLE),
    "bytes of two numbers": (lambda model: replace_linear(model, Nibbles), UNREADABLE),
    "a weight nobody may read": (lambda model: replace_linear(model, Sealed), UNREADABLE),
    "torchao": (by_torchao, OTHER_VALUES),
    "torchao int4": (by_torchao_int4, OTHER_VALUES),
    "bitsandbytes 8-bit": (by_bitsandbytes(8), UNREADABLE),
    "bitsandbytes 4-bit": (by_bitsandbytes(4), UNREADABLE),
    "gptq": (by_gptqmodel("gptq"), UNREADABLE),
    "awq": (by_gptqmodel("awq"), UNREADABLE),
    "quanto": (by_quanto, OTHER_VALUES),
    "hqq": (by_hqq, UNREADABLE),
}


# What these packages, and transformers where it finds them, do when they are imported.
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("kind", QUANTISED)
def test_a_quantised_base_is_routed_through_its_own_forward(tiny_model: Make, library: Library, kind: str) -> None:
    quantise, warning = QUANTISED[kind]
    model = quantise(tiny_model())
    assert not torch.equal(logits(model), logits(tiny_model()))
    names = list(model.state_dict())
    with pytest.warns(UserWarning, match=f"is related to .*{warning}"):
        check_routed(model, library, 1e-4)
    assert list(model.state_dict()) == names


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:the base model at hand is related:UserWarning")
@pytest.mark.parametrize("kind", QUANTISED)
def test_a_quantised_base_is_not_saved(tiny_model: Make, library: Library, kind: str, tmp_path: Path) -> None:
    model = attach(QUANTISED[kind][0](tiny_model()), library, top_k=2)
    with pytest.raises(BaseModelError, match=r"to be saved\nfound: layer 'model.layers.0.self_attn.q_proj' \("):
        save(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


# Offloaded, copied.


@pytest.mark.parametrize("to_disk", [False, True])
def test_experts_sit_where_an_offloaded_layer_computes(
    tiny_model: Make, library: Library, tmp_path: Path, to_disk: bool
) -> None:
    accelerate = pytest.importorskip("accelerate")
    expected = logits(attach(tiny_model(), library, top_k=2))
    model = tiny_model()
    if to_disk:
        accelerate.disk_offload(model, tmp_path / "weights", execution_device=torch.device("cpu"))
    else:
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.get_submodule("model.layers.0.self_attn.q_proj").weight.is_meta
    with pytest.warns(UserWarning, match=UNREADABLE):
        attach(model, library, top_k=2)
    assert torch.equal(logits(model), expected)


def test_a_routed_model_can_be_offloaded(tiny_model: Make, library: Library) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = attach(tiny_model(), library, top_k=2)
    expected = logits(model)
    with routing(model, "norm"):
        other = logits(model)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert torch.equal(logits(model), expected)
    with routing(model, "norm"):
        assert torch.equal(logits(model), other)


@pytest.mark.parametrize("setting", ["arrow", "uniform", {"per": "token"}, {"per": "request"}, ["base", "norm"]])
def test_a_routed_model_survives_a_pickle_and_a_copy(tiny_model: Make, library: Library, setting: Any) -> None:
    with routing(attach(tiny_model(), library, top_k=2), setting) as model:
        expected = logits(model)
        other = pickle.loads(pickle.dumps(model))
        assert torch.equal(logits(copy.deepcopy(model)), expected)
    assert torch.equal(logits(other), expected)
    bare = logits(tiny_model())
    assert torch.equal(logits(detach(other)), bare)


def test_an_expert_that_came_live_survives_torch_save(
    tiny_model: Make, library: Library, random_adapter: Make, generator: torch.Generator
) -> None:
    model, file = attach(tiny_model(), library, top_k=2), io.BytesIO()
    add_expert(model, random_adapter(model, "live", generator))
    torch.save(model, file)
    file.seek(0)
    other = torch.load(file, weights_only=False)
    assert seating(other).live["live"].modules.keys() == seating(model).live["live"].modules.keys()
    assert torch.equal(logits(other), logits(model))


# Bad input.


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "setting",
    ["arrow", "projection", "norm", "lag", "uniform", {"top_p": 0.5, "threshold": 0.1, "null": 0.5}, {"scale": "unit"}],
)
def test_a_bad_activation_shows_in_its_token_and_in_no_other(
    tiny_model: Make, library: Library, setting: Any, bad: float
) -> None:
    model = attach(tiny_model(), library, top_k=2)
    lora = seating(model).layers["model.layers.0.self_attn.q_proj"].lora
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    spoilt = x.clone()
    spoilt[1, 3, 7] = bad
    with routing(model, setting):
        clean, found = lora(x, torch.zeros(2, 5, 32)), lora(spoilt, torch.zeros(2, 5, 32))
    is_bad = torch.zeros(2, 5, dtype=torch.bool)
    is_bad[1, 3] = True
    assert torch.equal(found[~is_bad], clean[~is_bad])
    assert not found[is_bad].isfinite().any()


def test_a_bad_activation_stays_in_its_row_when_rows_are_decided(tiny_model: Make, library: Library) -> None:
    model = attach(tiny_model(), library, top_k=2, per="request")
    embeddings = model.get_input_embeddings()(IDS)
    clean = model(inputs_embeds=embeddings).logits
    embeddings[1, 3, 7] = float("nan")
    with trace(model) as traced:
        found = model(inputs_embeds=embeddings).logits
    assert torch.equal(found[0], clean[0])
    assert found[1, 3:].isnan().all()
    assert traced.weights("model.layers.0.self_attn.q_proj")[1].isnan().any(dim=-1).all()


def test_a_layer_that_is_never_called_cannot_be_adapted() -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(32, 4)})
    with pytest.raises(AdapterError, match=r"'a': layer 'attention.out_proj' must be a linear layer\nfound: NonDynam"):
        find_linear(model, "attention.out_proj", "a", 32, 32)
