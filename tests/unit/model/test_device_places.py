"""What a routed layer needs lies on the layer's own device, in the experts' own dtype.

The devices are two of the meta kind. PyTorch's fake tensors refuse operators that mix them, as real devices would.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lorary.model.attach import routing
from lorary.model.seating import seating

Make = Callable[..., Any]
FIRST, SECOND = "meta:0", "meta:1"
SETTINGS: dict[str, Any] = {
    "arrow": "arrow",
    "lag": "lag",
    "norm of layer-normalised inputs": {"router": "norm", "input_norm": "layer"},
    "per token": {"per": "token"},
    "uniform": "uniform",
    "rows": ["arrow", {"experts": ["b"]}],
    "general experts": {"general": ["a"]},
}
EVERY = pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)


@pytest.fixture
def routed(tiny_model: Make, random_adapter: Make, route: Make, generator: torch.Generator) -> Any:
    model = tiny_model(dtype=torch.bfloat16)
    return route(model, [random_adapter(model, name, generator, rank=2) for name in "abcdef"], top_k=2)


def moved(value: Any, device: str) -> Any:
    if isinstance(value, tuple):
        return tuple(moved(part, device) for part in value)
    return value.to(device) if isinstance(value, Tensor) else value


def put(module: nn.Module, device: str) -> None:
    """Replace all tensors of a module, seated ones included, by fake ones on a device."""
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                    tensors[name] = nn.Parameter(fake, requires_grad=False) if tensors is part._parameters else fake


def split_over_two_devices(model: Any) -> None:
    """The last block on a device of its own, with hooks that hand tensors over, as accelerate puts them."""
    last = model.model.layers[-1]
    put(model, FIRST)
    put(last, SECOND)

    def hand_over(_block: nn.Module, args: Any, kwargs: Any) -> Any:
        return moved(args, SECOND), {name: moved(value, SECOND) for name, value in kwargs.items()}

    last.register_forward_pre_hook(hand_over, with_kwargs=True)
    last.register_forward_hook(lambda _block, _args, output: moved(output, FIRST))


# Other settings look at experts' values when they are made, and the meta device has none.
@pytest.mark.parametrize("setting", [SETTINGS[name] for name in ("arrow", "lag", "per token", "rows")], ids=str)
def test_a_layer_has_its_experts_and_gates_on_its_own_device(routed: Any, setting: Any) -> None:
    routed.model.layers[1].to("meta")
    with routing(routed, setting):
        for path, layer in seating(routed).layers.items():
            expected = "meta" if ".layers.1." in path else "cpu"
            tensors = {**dict(layer.lora.in_force.named_buffers()), **dict(layer.lora.named_buffers())}
            assert {tensor.device.type for tensor in tensors.values()} == {expected}, path


@EVERY
@torch.no_grad()
def test_a_model_on_two_devices_never_mixes_them(routed: Any, setting: Any) -> None:
    with routing(routed, setting), FakeTensorMode():
        for layer in seating(routed).layers.values():
            layer.lora._lend(layer.lora.in_force)
        split_over_two_devices(routed)
        for path, layer in seating(routed).layers.items():
            put(layer.lora.in_force, SECOND if ".layers.1." in path else FIRST)
            layer.lora._lend(layer.lora.in_force)
        seen: list[torch.dtype] = []
        for layer in seating(routed).layers.values():
            if isinstance(gate := layer.lora.in_force.gate, nn.Module):
                gate.register_forward_pre_hook(lambda _gate, args: seen.append(args[0].x.dtype))
        ids = torch.ones(2, 5, dtype=torch.int64, device=FIRST)
        output = routed(input_ids=ids, use_cache=True)
        step = routed(input_ids=ids[:, :1], past_key_values=output.past_key_values, use_cache=True)
        assert {output.logits.dtype, step.logits.dtype} == {torch.bfloat16}
        assert str(step.logits.device) == FIRST
        assert set(seen) <= {torch.float32}
        assert len(seen) == (0 if setting == "uniform" else 2 * len(seating(routed).layers))


def test_fake_devices_refuse_to_be_mixed() -> None:
    with FakeTensorMode(), pytest.raises(RuntimeError, match="same device"):
        torch.ones(2, device=FIRST) + torch.ones(2, device=SECOND)
