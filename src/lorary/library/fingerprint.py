"""The fingerprint of a base model: enough to tell whether an adapter was made for it, small enough for JSON.

Architecture and shapes are compared strictly. The values are judged by a few sampled entries of a few weight
matrices, so that a fingerprint costs milliseconds on a model of any size and still tells a fine-tuned or quantised
relative (its samples correlate) from a stranger (they do not).
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lorary.errors import BaseModelError
from lorary.library.configuration import configuration_of, differing_fields
from lorary.library.layers import LayerShapes
from lorary.lora.seat import CHILD, linear_shape
from lorary.lora.targets import language_paths

NUM_MATRICES = 8
NUM_SAMPLES = 32
# Samples of unrelated weights have cosines around 0 (a mean over 8 matrices of 32 entries strays by 0.06); 4-bit
# copies and fine-tuned relatives stay above 0.9.
RELATED_COSINE = 0.5

Relation = Literal["same", "related", "unrelated", "different"]


@dataclass(frozen=True)
class Fingerprint:
    """What is recorded about a base model.

    Args:
        architecture: name of the model class.
        shapes: sha256 over the sorted names and shapes of all parameters.
        layers: its linear layers.
        dtype: dtype of the first sampled matrix; no part of the digest, since a cast up changes no value.
        samples: by name of the weight matrix, evenly spaced entries as float32.
        configuration: the fields that change what the model computes; None where an older Lorary recorded none. No
            part of the digest, which provenance of that time holds.
        language: where the language model of a multimodal one lies (`language_paths`); nothing for others. No part of
            the digest either.
    """

    architecture: str
    shapes: str
    layers: LayerShapes
    dtype: str
    samples: Mapping[str, tuple[float, ...]]
    configuration: Mapping[str, Any] | None = None
    language: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """sha256 over architecture, shapes and sampled values, as 64 hexadecimal digits."""
        values = {name: list(entries) for name, entries in self.samples.items()}
        return _sha256([self.architecture, self.shapes, values])

    def to_json(self) -> dict[str, Any]:
        """A document for library.json; floats survive JSON exactly."""
        configuration = {} if self.configuration is None else {"configuration": dict(self.configuration)}
        return {
            **configuration,
            **({"language": list(self.language)} if self.language else {}),
            "architecture": self.architecture,
            "digest": self.digest,
            "dtype": self.dtype,
            "layers": self.layers.to_json(),
            "samples": {name: list(entries) for name, entries in self.samples.items()},
            "shapes": self.shapes,
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> "Fingerprint":
        """The inverse of `to_json`.

        Raises:
            KeyError, TypeError, ValueError: if a key is missing or of the wrong kind, or the digest does not fit.
        """
        configuration = document.get("configuration")
        fingerprint = cls(
            architecture=str(document["architecture"]),
            shapes=str(document["shapes"]),
            layers=LayerShapes.from_json(document["layers"]),
            dtype=str(document["dtype"]),
            samples={name: tuple(map(float, entries)) for name, entries in document["samples"].items()},
            configuration=None if configuration is None else dict(configuration),
            language=tuple(map(str, document.get("language", ()))),
        )
        if fingerprint.digest != document["digest"]:
            raise ValueError(f"the fingerprint's digest is {document['digest']}, its content has {fingerprint.digest}")
        return fingerprint


@dataclass(frozen=True)
class Skeleton:
    """The part of a fingerprint that needs no values, so that a model on the meta device gives it too.

    Args:
        architecture: name of the model class.
        shapes: sha256 over the sorted names and shapes of all parameters.
        layers: its linear layers.
        matrices: by name, the weights to sample, in the order in which the model defines them.
        configuration: the fields that change what the model computes.
        language: as in `Fingerprint`.
    """

    architecture: str
    shapes: str
    layers: LayerShapes
    matrices: Mapping[str, Tensor]
    configuration: Mapping[str, Any] | None
    language: tuple[str, ...] = ()

    def with_samples(self, dtype: str, samples: Mapping[str, tuple[float, ...]]) -> Fingerprint:
        """The whole fingerprint.

        Raises:
            BaseModelError: if a sampled weight is no number.
        """
        for name, entries in samples.items():
            if bad := [entry for entry in entries if not math.isfinite(entry)]:
                raise BaseModelError(
                    f"weight '{name}' of the base model must be finite",
                    found=f"{bad[0]} in it",
                    remedy="another copy of the base model",
                )
        return Fingerprint(
            self.architecture, self.shapes, self.layers, dtype, samples, self.configuration, self.language
        )


def fingerprint_of_model(model: nn.Module) -> Fingerprint:
    """The fingerprint of a live model, on any device; matrices that are no floats (quantised ones) are not sampled.

    Experts seated by Lorary and adapters seated by PEFT are looked through: the model gives the fingerprint of its
    bare base.

    Args:
        model: a transformers model, or a PeftModel around one.
    """
    skeleton = skeleton_of(model)
    samples: dict[str, tuple[float, ...]] = {}
    dtype = "unknown"
    for name, weight in skeleton.matrices.items():
        if weight.is_floating_point() and weight.ndim == 2 and not weight.is_meta:
            dtype = dtype if samples else str(weight.dtype).removeprefix("torch.")
            rows, columns = sampled_positions(weight.shape[0], weight.shape[1])
            samples[name] = tuple(plain_tensor(weight)[rows, columns].float().cpu().tolist())
    return skeleton.with_samples(dtype, samples)


def plain_tensor(weight: Tensor) -> Tensor:
    """A matrix as numbers: a quantised one that looks like a tensor of floats need not let itself be indexed."""
    weight = weight.detach()
    is_packed = type(weight).dequantize is not Tensor.dequantize
    return weight.dequantize() if is_packed else weight


def skeleton_of(model: nn.Module) -> Skeleton:
    """Architecture, shapes, linear layers and the choice of matrices to sample.

    Args:
        model: on any device, the meta device too.
    """
    base: nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    linears: dict[str, tuple[int, int]] = {}
    shapes: list[tuple[str, list[int]]] = []
    weights: dict[str, Tensor] = {}
    for path, module in bare_modules(base):
        linear = linear_shape(module)
        if linear is not None:
            # A quantised layer stores its weight packed, by whatever names: what counts is what it multiplies with.
            linears[path] = linear
            shapes.append((f"{path}.weight", list(reversed(linear))))
        for name, parameter in module.named_parameters(path, recurse=False, remove_duplicate=False):
            if linear is None or name == f"{path}.bias":
                shapes.append((name, list(parameter.shape)))
            if name == f"{path}.weight" and parameter.ndim == 2:
                weights[name] = parameter
    shapes.sort()
    return Skeleton(
        architecture=type(base).__name__,
        shapes=_sha256([[name, shape] for name, shape in shapes]),
        layers=LayerShapes.of(linears),
        matrices=_chosen_matrices(weights, linears),
        configuration=configuration_of(base),
        language=language_paths(base),
    )


def _chosen_matrices(weights: Mapping[str, Tensor], linears: Mapping[str, tuple[int, int]]) -> dict[str, Tensor]:
    """The first matrix (the embedding, where there is one) and linear weights evenly spaced over the depth.

    The output layer is left out: in many models it is the embedding again, and absent from the checkpoint.
    """
    inner = [name for name in weights if name.removesuffix(".weight") in linears and "lm_head" not in name]
    first = [name for name in weights if name not in inner][:1]
    count = min(NUM_MATRICES - 1, len(inner))
    spaced = [inner[index * (len(inner) - 1) // max(count - 1, 1)] for index in range(count)]
    return {name: weights[name] for name in first + spaced}


def bare_modules(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Walk the modules of a base model by dotted path, as if neither Lorary nor PEFT had seated anything in it.

    Args:
        module: where to start.
        path: dotted path of `module`.

    Yields:
        Path and module, parents before children.
    """
    children = dict(module.named_children())
    for wrapped in ("base_layer", "original_module"):
        if wrapped in children:
            yield from bare_modules(children[wrapped], path)
            return
    yield path, module
    for name, child in children.items():
        if name != CHILD:
            yield from bare_modules(child, f"{path}.{name}" if path else name)


def sampled_positions(num_rows: int, num_columns: int) -> tuple[Tensor, Tensor]:
    """Rows and columns of the sampled entries of a matrix: evenly spaced over its flattened form, ends included."""
    last, count = num_rows * num_columns - 1, min(NUM_SAMPLES, num_rows * num_columns)
    flat = [index * last // max(count - 1, 1) for index in range(count)]
    return torch.tensor([at // num_columns for at in flat]), torch.tensor([at % num_columns for at in flat])


def compare(recorded: Fingerprint, current: Fingerprint) -> Relation:
    """How the base model at hand relates to the recorded one.

    Args:
        recorded: of the base that the library or the adapter was made for.
        current: of the base at hand.

    Returns:
        "same": equal shapes, sampled values and configuration. "related": equal shapes, other values that correlate
        (another dtype, quantised, fine-tuned), values that cannot be read, or the same weights under another
        configuration. "unrelated": equal shapes, values that do not correlate. "different": another architecture or
        other shapes.
    """
    if (recorded.architecture, recorded.shapes) != (current.architecture, current.shapes):
        return "different"
    if recorded.samples == current.samples:
        return "related" if differing_fields(recorded.configuration, current.configuration) else "same"
    common = sorted(set(recorded.samples) & set(current.samples))
    if not common:
        return "related"
    cosines = [_cosine(recorded.samples[name], current.samples[name]) for name in common]
    return "related" if sum(cosines) / len(cosines) >= RELATED_COSINE else "unrelated"


def rounded_to(recorded: Fingerprint, current: Fingerprint) -> str | None:
    """The half precision in which one of two models has the other's weights, and else is the same.

    Args:
        recorded: of the base that the library or the adapter was made for.
        current: of the base at hand.

    Returns:
        Its name; None where they differ by more.
    """
    is_comparable = recorded.samples and recorded.samples.keys() == current.samples.keys()
    if not is_comparable or differing_fields(recorded.configuration, current.configuration):
        return None
    pairs = [(torch.tensor(recorded.samples[name]), torch.tensor(current.samples[name])) for name in recorded.samples]
    for dtype in (torch.bfloat16, torch.float16):
        is_new_rounded = all(torch.equal(old.to(dtype).float(), new) for old, new in pairs)
        if is_new_rounded or all(torch.equal(old, new.to(dtype).float()) for old, new in pairs):
            return str(dtype).removeprefix("torch.")
    return None


def _cosine(left: tuple[float, ...], right: tuple[float, ...]) -> float:
    if left == right:
        return 1.0
    norms = math.hypot(*left) * math.hypot(*right)
    return sum(a * b for a, b in zip(left, right, strict=True)) / norms if norms else 0.0


def _sha256(document: object) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
