"""The plugin of vLLM: it gates routed adapters that `lorary export --for vllm` wrote, per token and layer.

vLLM calls `register` in each of its processes (entry point `vllm.general_plugins`). Three of its functions are wrapped:

    WorkerLoRAManager._load_adapter      reads what stands beside the adapter, and refuses what would be wrong
    LoRAModelManager.activate_adapter    tells the gate what a slot holds
    get_punica_wrapper                   puts the gate between the down-projections and `add_expand`

These are no public interfaces, so that the plugin acts under the versions that it was tested with and no others. Under
another version it says so, and routed adapters are refused; ordinary adapters are served as without the plugin.
"""

import logging
from collections.abc import Callable
from functools import wraps
from typing import Any

TESTED = ("0.32.0",)
LAYOUT, GATE = "lorary_layout", "lorary_gate"
_WRAPPED = "lorary_wrapped"

# A child of vLLM's own logger, whose handlers print it.
_logger = logging.getLogger("vllm.lorary")


def register() -> None:
    """Wrap the functions of vLLM; any number of times in a process."""
    from vllm.lora import model_manager, worker_manager

    import vllm

    if getattr(worker_manager.WorkerLoRAManager, _WRAPPED, False):
        return
    version = str(vllm.__version__).partition("+")[0]
    if version not in TESTED:
        _logger.warning(
            "lorary: routed adapters are refused, since this is vLLM %s and the plugin was tested with %s; ordinary "
            "adapters are served as usual",
            version,
            ", ".join(TESTED),
        )
        _wrap(worker_manager.WorkerLoRAManager, "_load_adapter", _refusing)
    else:
        _wrap(worker_manager.WorkerLoRAManager, "_load_adapter", _loading)
        _wrap(model_manager.LoRAModelManager, "activate_adapter", _activating)
        _wrap(model_manager, "get_punica_wrapper", _gating)
    setattr(worker_manager.WorkerLoRAManager, _WRAPPED, True)


def _wrap(owner: Any, name: str, wrapper: Callable[[Any], Any]) -> None:
    original = getattr(owner, name, None)
    if original is None:
        _logger.warning("lorary: vLLM has no %s.%s here, and routed adapters would answer nonsense", owner, name)
        return
    setattr(owner, name, wraps(original)(wrapper(original)))


def _refusing(load: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Loading of adapters, where routed ones would not be gated."""

    def load_ordinary(manager: Any, request: Any) -> Any:
        from lorary.serve.routed_layout import read_layout

        if read_layout(request.lora_path) is not None:
            raise ValueError(
                f"adapter '{request.lora_name}' is a routed one, which vLLM {', '.join(TESTED)} alone can serve: "
                "the plugin of Lorary was tested with no other version"
            )
        return load(manager, request)

    return load_ordinary


def _loading(load: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Loading of adapters, with what stands beside them."""

    def load_with_layout(manager: Any, request: Any) -> Any:
        from lorary.serve.routed_folder import read_routed_folder

        layout = read_routed_folder(_folder_of(request.lora_path))
        if layout is not None:
            _check_parallel(request.lora_name, manager.lora_config)
        lora = load(manager, request)
        setattr(lora, LAYOUT, layout)
        return lora

    return load_with_layout


def _activating(activate: Callable[[Any, int], bool]) -> Callable[[Any, int], bool]:
    """Activation of an adapter: its slot is told to the gates."""

    def activate_and_tell(manager: Any, lora_id: int) -> bool:
        is_new = activate(manager, lora_id)
        if is_new:
            slot = manager.lora_index_to_id.index(lora_id)
            layout = getattr(manager._registered_adapters[lora_id], LAYOUT, None)
            for wrapper in manager.punica_wrapper_mapping.values():
                getattr(wrapper, GATE).put(slot, layout)
        return is_new

    return activate_and_tell


def _gating(make: Callable[..., Any]) -> Callable[..., Any]:
    """Making of what computes low-rank buffers and their products, with the gate in between."""

    def make_gated(*args: Any, **kwargs: Any) -> Any:
        from lorary.serve.slot_gate import SlotGate

        wrapper, config = make(*args, **kwargs), kwargs["lora_config"]
        gate = SlotGate(config.max_loras, config.max_lora_rank, wrapper.device)
        setattr(wrapper, GATE, gate)
        wrapper.add_expand = _gated_expand(wrapper, gate, wrapper.add_expand)
        return wrapper

    return make_gated


def _gated_expand(wrapper: Any, gate: Any, expand: Callable[..., Any]) -> Callable[..., Any]:
    def add_expand(y: Any, x: Any, lora_b_stacked: Any, *args: Any, **kwargs: Any) -> Any:
        import torch

        # The tensor itself, not its length of this step: a captured graph reads it anew each time.
        slot = wrapper._token_lora_indices[: x[0].shape[0]]
        gated = [gate(z, slot, gate.alive(lora_b[:, 0])) for z, lora_b in zip(x, lora_b_stacked, strict=True)]
        return expand(
            y, torch.stack(gated) if isinstance(x, torch.Tensor) else tuple(gated), lora_b_stacked, *args, **kwargs
        )

    return add_expand


def _folder_of(path: str) -> str:
    from vllm.lora.utils import get_adapter_absolute_path

    return str(get_adapter_absolute_path(path))


def _check_parallel(name: str, config: Any) -> None:
    """Refuse to gate partial sums: without fully sharded adapters, each process has a part of the buffer."""
    from vllm.distributed import get_tensor_model_parallel_world_size

    size = get_tensor_model_parallel_world_size()
    if size > 1 and not config.fully_sharded_loras:
        raise ValueError(
            f"routed adapter '{name}' needs --fully-sharded-loras under tensor parallelism, which is {size} here: "
            "otherwise its scores would be read from partial sums"
        )
