"""A stand-in for the part of vLLM that the plugin wraps: slots, low-rank buffers, and what loads adapters into them.

It has vLLM's names and order of calls (0.32) and serves a transformers model, each row of a batch by an adapter of its
own. As in vLLM's CPU kernels, a token without an adapter (-1) meets the last slot's weights, times its buffer.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from lorary.formats.peft import read_adapter
from lorary.lora.seat import linear_shape


@dataclass
class LoraConfig:
    """What a server was started with."""

    max_loras: int = 4
    max_lora_rank: int = 64
    fully_sharded_loras: bool = False


def make_modules(version: str = "0.32.0", *, world_size: int = 1, platform: str = "cpu") -> dict[str, ModuleType]:
    """The modules of vLLM that the plugin imports, by name, with classes of their own."""

    class PunicaWrapper:
        def __init__(self, max_num_batched_tokens: int, device: str, **_kwargs: Any) -> None:
            self.device = device
            self._token_lora_indices = torch.full((max_num_batched_tokens,), -1)

        def add_shrink(self, y: Any, x: Tensor, lora_a_stacked: Sequence[Tensor], scale: float) -> None:
            slot = self._token_lora_indices[: len(x)]
            for buffer, lora_a in zip(y, lora_a_stacked, strict=True):
                buffer += scale * torch.einsum("td,trd->tr", x.float(), lora_a[:, 0][slot])

        def add_expand(
            self, y: Tensor, x: Any, lora_b_stacked: Sequence[Tensor], output_slices: Sequence[int], *,
            offset_start: int = 0, add_inputs: bool = True,
        ) -> None:  # fmt: skip
            assert add_inputs
            assert isinstance(x, tuple) == (platform == "cpu")
            slot, start = self._token_lora_indices[: len(y)], offset_start
            for buffer, lora_b, size in zip(x, lora_b_stacked, output_slices, strict=True):
                y[:, start : start + size] += torch.einsum("tr,tdr->td", buffer, lora_b[:, 0][slot]).to(y)
                start += size

        def add_lora_linear(
            self, y: Tensor, x: Tensor, lora_a_stacked: Sequence[Tensor], lora_b_stacked: Sequence[Tensor],
            scale: float, output_slices: Sequence[int],
        ) -> None:  # fmt: skip
            shape = (len(x), lora_b_stacked[0].shape[-1])
            buffer: Any = tuple(torch.zeros(shape) for _ in output_slices)
            buffer = buffer if platform == "cpu" else torch.stack(buffer)
            self.add_shrink(buffer, x, lora_a_stacked, scale)
            self.add_expand(y, buffer, lora_b_stacked, output_slices)

    class LoRAModelManager:
        def __init__(self, model: Any, lora_config: LoraConfig) -> None:
            self.lora_config = lora_config
            self.lora_index_to_id: list[int | None] = [None] * lora_config.max_loras
            self._registered_adapters: dict[int, Any] = {}
            wrapper = modules["vllm.lora.model_manager"].get_punica_wrapper(512, "cpu", lora_config=lora_config)
            self.punica_wrapper_mapping = {"language_model": wrapper}
            self.stacks: dict[str, tuple[Tensor, Tensor]] = {}
            for path, module in model.named_modules():
                if (shape := linear_shape(module)) is not None and path != "lm_head":
                    slots, rank = lora_config.max_loras, lora_config.max_lora_rank
                    self.stacks[path] = torch.zeros(slots, 1, rank, shape[0]), torch.zeros(slots, 1, shape[1], rank)

        def activate_adapter(self, lora_id: int) -> bool:
            if lora_id in self.lora_index_to_id:
                return False
            slot = self.lora_index_to_id.index(None)
            self.lora_index_to_id[slot] = lora_id
            modules_of = self._registered_adapters[lora_id].modules
            for path, (lora_a, lora_b) in self.stacks.items():
                lora_a[slot], lora_b[slot] = 0, 0
                if (factors := modules_of.get(path)) is not None:
                    lora_a[slot, 0, : factors.rank] = factors.lora_a
                    lora_b[slot, 0, :, : factors.rank] = factors.lora_b * factors.scaling
            return True

        def deactivate_adapter(self, lora_id: int) -> None:
            self.lora_index_to_id[self.lora_index_to_id.index(lora_id)] = None

    class WorkerLoRAManager:
        def __init__(self, lora_config: LoraConfig) -> None:
            self.lora_config = lora_config

        def _load_adapter(self, lora_request: Any) -> Any:
            adapter = read_adapter(lora_request.lora_path)
            if adapter.rank > self.lora_config.max_lora_rank:
                raise ValueError(f"LoRA rank {adapter.rank} is greater than max_lora_rank")
            return SimpleNamespace(id=lora_request.lora_int_id, rank=adapter.rank, modules=adapter.modules)

    contents: dict[str, dict[str, Any]] = {
        "vllm": {"__version__": version},
        "vllm.lora": {},
        "vllm.lora.model_manager": {"LoRAModelManager": LoRAModelManager, "get_punica_wrapper": PunicaWrapper},
        "vllm.lora.worker_manager": {"WorkerLoRAManager": WorkerLoRAManager},
        "vllm.lora.utils": {"get_adapter_absolute_path": str},
        "vllm.distributed": {"get_tensor_model_parallel_world_size": lambda: world_size},
    }
    modules: dict[str, ModuleType] = {}
    for name, content in contents.items():
        modules[name] = ModuleType(name)
        vars(modules[name]).update(content)
        above, _, last = name.rpartition(".")
        if above:
            setattr(modules[above], last, modules[name])
    return modules


class Server:
    """A model whose batches are served by adapters, row by row.

    Args:
        model: a transformers model, changed in place.
        config: as the server was started with.
    """

    def __init__(self, model: Any, config: LoraConfig | None = None) -> None:
        config = config or LoraConfig()
        self.worker = sys.modules["vllm.lora.worker_manager"].WorkerLoRAManager(config)
        self.manager = sys.modules["vllm.lora.model_manager"].LoRAModelManager(model, config)
        self.model, self.names = model, dict[str, int]()

    def load(self, name: str, path: object) -> None:
        """Load an adapter into a slot of its own."""
        number = max(self.names.values(), default=0) + 1
        request = SimpleNamespace(lora_name=name, lora_int_id=number, lora_path=str(path))
        self.manager._registered_adapters[number] = self.worker._load_adapter(request)
        self.manager.activate_adapter(number)
        self.names[name] = number

    def unload(self, name: str) -> None:
        """Free the slot of an adapter."""
        self.manager.deactivate_adapter(self.names.pop(name))

    @torch.no_grad()
    def logits(self, ids: Tensor, names: Sequence[str | None]) -> Tensor:
        """Logits of a batch, each row by the adapter of its name, or by the base."""
        with self._serving(ids, names):
            logits: Tensor = self.model(input_ids=ids).logits
        return logits

    @contextmanager
    def _serving(self, ids: Tensor, names: Sequence[str | None]) -> Iterator[None]:
        ids_to_slot = {number: slot for slot, number in enumerate(self.manager.lora_index_to_id)}
        slots = [-1 if name is None else ids_to_slot[self.names[name]] for name in names]
        wrapper = self.manager.punica_wrapper_mapping["language_model"]
        wrapper._token_lora_indices[: ids.numel()] = torch.tensor(slots).repeat_interleave(ids.shape[1])

        def add(path: str) -> Any:
            lora_a, lora_b = self.manager.stacks[path]

            def hook(_module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
                y = output.flatten(0, 1).clone()
                x = args[0].flatten(0, 1)
                wrapper.add_lora_linear(y, x, (lora_a,), (lora_b,), 1.0, (y.shape[1],))
                return y.view(output.shape)

            return hook

        handles = [self.model.get_submodule(path).register_forward_hook(add(path)) for path in self.manager.stacks]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
