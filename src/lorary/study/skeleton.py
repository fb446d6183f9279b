"""A base model without weights: enough to know its layers, from its folder or from numbers that a study writes down."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from transformers import AutoConfig, AutoModelForCausalLM

from lorary.build.settings import BuildSettings
from lorary.errors import BaseModelError, LoraryError, UsageError
from lorary.formats.base import EMBEDDED, resolve_base
from lorary.formats.quiet import quiet_transformers
from lorary.lora.targets import find_targets, num_layers


@dataclass(frozen=True)
class BaseSkeleton:
    """A base model on the meta device.

    Args:
        model: of its own architecture and full size, without values.
        is_assumed: whether its configuration is what the study says, since the base is not on this machine.
    """

    model: Any
    is_assumed: bool

    @property
    def parameters(self) -> int:
        """How many the base has."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def hidden(self) -> int:
        """Width of the residual stream."""
        return int(self.model.config.hidden_size)

    @property
    def layers(self) -> int:
        """Transformer layers."""
        return num_layers(self.model)

    def targets(self, settings: BuildSettings) -> dict[str, tuple[int, int]]:
        """(d_in, d_out) of each layer that a build adapts, by path.

        Raises:
            UsageError: if a target module or so many upper layers are not in the base.
        """
        upper = settings.upper_layers
        if upper is not None and upper > self.layers:
            raise UsageError(f"upper_layers must be at most {self.layers}, the base's layers", found=upper)
        numbers = None if upper is None else list(range(self.layers - upper, self.layers))
        return find_targets(self.model, settings.target_modules, numbers)

    def adapter_parameters(self, settings: BuildSettings) -> int:
        """How many one expert has."""
        return sum(settings.rank * (d_in + d_out) for d_in, d_out in self.targets(settings).values())


def skeleton_for(base: str, assumed: Mapping[str, Any] | None) -> BaseSkeleton:
    """The skeleton of a base model, without the network.

    Args:
        base: the base model; its own configuration counts where it is on this machine.
        assumed: fields of its configuration, `model_type` among them, for where it is not.

    Raises:
        BaseModelError: if it is neither here nor described.
        UsageError: if the description is not one that transformers knows.
    """
    with quiet_transformers():
        folder = _folder_here(base)
        if folder is None and assumed is None:
            raise BaseModelError(
                "the base of a dry run must be on this machine, or described by the study",
                found=f"neither, for '{base}'",
                remedy="download it, or give its configuration under assume: {model: ...}",
            )
        config = _described(dict(assumed or {})) if folder is None else AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    return BaseSkeleton(model, folder is None)


def _folder_here(base: str) -> Path | None:
    """Folder of a base's configuration, as far as it is there without the network; None where it is not."""
    if base == EMBEDDED or Path(base).expanduser().exists():
        return Path(resolve_base(base).path)
    repository, _, revision = base.partition("@")
    try:
        cached = try_to_load_from_cache(repository, "config.json", revision=revision or None)
    except HFValidationError:  # no Hub id: a path that leads nowhere
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def _described(fields: dict[str, Any]) -> Any:
    try:
        return AutoConfig.for_model(fields.pop("model_type"), **fields)
    except (KeyError, ValueError, TypeError) as error:
        if isinstance(error, LoraryError):
            raise
        raise UsageError("assume.model must be a configuration that transformers knows", found=str(error)[:200],
                         remedy="give model_type and the fields of its config.json") from error  # fmt: skip
