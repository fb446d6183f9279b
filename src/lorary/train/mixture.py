"""Mixtures of a library's adapters in training: a weight for each adapter and layer, and their factors where tuned."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lorary.adapter import LoraFactors
from lorary.errors import TrainError
from lorary.lora.mixture import FactorMixture, OutputMixture
from lorary.merge.layers import MixedLayer, Modules, mixed_layers
from lorary.merge.sums import check_one_rank, sum_factors, sum_updates
from lorary.train.flat import FlatParameters
from lorary.train.units import Job, Trained

Weights = Mapping[str, Tensor]  # by path, one for each adapter that has the layer: (experts,)


class MixtureStack(FlatParameters):
    """Slots for mixtures of the same adapters, each with weights of its own.

    The vector holds, slot after slot, the weights of each layer in turn; where the adapters are tuned there is one
    slot, and their factors come before its weights.

    Args:
        adapters: factors by path, of each; they may differ in layers, for mixtures of outputs also in rank.
        mix: `outputs` or `factors`.
        num_slots: mixtures at a time; 1 where the adapters are tuned.
        starts: initial weights by the job's name; a mixture that is only tried out is filled by `set_weights`.
        is_tuned: whether the factors are trained too; for mixtures of factors.
        weights_rate: learning rate of the weights as a multiple of that of the factors.
        dtype: as for `FlatParameters`.
        device: likewise.

    Raises:
        AdapterError: if the adapters have other shapes in a layer, or other ranks where factors are mixed.
    """

    def __init__(
        self,
        adapters: Sequence[Modules],
        *,
        mix: str,
        num_slots: int,
        starts: Mapping[str, Weights],
        is_tuned: bool,
        weights_rate: float,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.adapters, self.mix, self.starts = adapters, mix, starts
        self.is_tuned, self.weights_rate = is_tuned, weights_rate
        self.layers = mixed_layers(adapters)
        if mix == "factors":
            check_one_rank(self.layers)
        factors = [tuple(part.shape) for layer in self.layers.values() for part in layer.stacked()] if is_tuned else []
        weights = [(num_slots, len(layer.members)) for layer in self.layers.values()]
        super().__init__(num_slots, [*factors, *weights], dtype, device)
        self.modules = {
            path: self._seat(number, path, layer) for number, (path, layer) in enumerate(self.layers.items())
        }

    def rate_scales(self) -> list[float | None]:
        """The weights learn at a rate of their own and are not decayed."""
        num_layers = len(self.layers)
        return [*[None] * (2 * num_layers * self.is_tuned), *[self.weights_rate] * num_layers]

    def fill(self, slot: int, job: Job, seed: int, init: str, init_scale: float) -> None:
        """Put the initial weights of a job in place, and the adapters' own factors where they are tuned.

        The weights were drawn before: `seed`, `init` and `init_scale` play no part.

        Raises:
            TrainError: if no weights were given for the job.
        """
        if job.name not in self.starts:
            raise TrainError(f"the mixture '{job.name}' needs initial weights", found=f"those of {sorted(self.starts)}")
        weights = self._weights(self.parameters)
        for path, values in self.starts[job.name].items():
            weights[path][slot] = values.to(weights[path])
        if self.is_tuned:
            tensors = self.tensors(self.parameters)
            for number, layer in enumerate(self.layers.values()):
                for tensor, factor in zip(tensors[2 * number :], layer.stacked(), strict=False):
                    tensor.copy_(factor)

    def set_weights(self, slot: int, weights: Tensor) -> None:
        """Give a slot one weight for each adapter, the same in all layers.

        Args:
            slot: which.
            weights: (experts,).
        """
        by_path = self._weights(self.parameters)
        for path, layer in self.layers.items():
            by_path[path][slot] = weights[list(layer.members)].to(self.parameters)

    def result(self, slot: int, job: Job, vector: Tensor) -> Trained:
        """The mixture in a slot as one adapter, and its weights by path."""
        weights = {path: values[slot].detach().cpu().clone() for path, values in self._weights(vector).items()}
        adapters = self._tuned(vector) if self.is_tuned else self.adapters
        put_together = sum_factors if self.mix == "factors" else sum_updates
        return Trained({job.name: put_together(adapters, weights)}, weights)

    def _tuned(self, vector: Tensor) -> list[Modules]:
        """The adapters as they have become."""
        tuned: list[dict[str, LoraFactors]] = [{} for _ in self.adapters]
        tensors = [tensor.detach().cpu() for tensor in self.tensors(vector)]
        for number, (path, layer) in enumerate(self.layers.items()):
            lora_a, lora_b = tensors[2 * number : 2 * number + 2]
            for place, member in enumerate(layer.members):
                tuned[member][path] = LoraFactors(lora_a[place], lora_b[place], layer.scaling)
        return list(tuned)

    def _seat(self, number: int, path: str, layer: MixedLayer) -> nn.Module:
        weights = self.leaves[number - len(self.layers)]
        if self.mix == "factors":
            factors = self.leaves[2 * number : 2 * number + 2] if self.is_tuned else layer.stacked()
            lora_a, lora_b = (factor.to(self.parameters) for factor in factors)
            return FactorMixture(lora_a, lora_b, weights, layer.scaling, self.tags, path)
        down, up = (factor.to(self.parameters) for factor in layer.concatenated())
        sizes = torch.tensor([factors.rank for factors in layer.factors], device=weights.device)
        return OutputMixture(down, up.mT.contiguous() * layer.scaling, sizes, weights, self.tags, path)

    def _weights(self, vector: Tensor) -> dict[str, Tensor]:
        """Views (slots, experts) into the weights of a vector, by path."""
        return dict(zip(self.layers, self.tensors(vector)[-len(self.layers) :], strict=True))
