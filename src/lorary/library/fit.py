"""Whether an adapter has what its configuration says, and why it does not fit a base model."""

import warnings
from collections.abc import Container, Iterable

import torch

from lorary.adapter import Adapter, LoraFactors
from lorary.errors import AdapterError
from lorary.formats.peft_copies import check_copied_shape, check_copies, copies_of, other_values
from lorary.formats.peft_selection import Selection
from lorary.library.base_weights import base_folder, base_weights
from lorary.library.fingerprint import Fingerprint, sampled_positions


def check_whole(adapter: Adapter, layers: Iterable[str], present: Container[str]) -> None:
    """Check that an adapter has factors for each layer of the base that its configuration targets.

    PEFT warns of absent ones and leaves these layers as they were initialised, so that a damaged adapter answers.

    Args:
        adapter: with a configuration of PEFT's.
        layers: dotted paths of the base model's linear layers that can be adapted.
        present: the layers of the base that it has factors for.

    Raises:
        AdapterError: naming the first layer without factors.
    """
    config = dict(adapter.config)
    if config.get("target_modules") is None:
        # PEFT chooses by the architecture, from a table of names that hold in every block.
        config["target_modules"] = sorted({path.rpartition(".")[2] for path in adapter.modules})
    selection = Selection(adapter.name, config)
    # `all-linear` leaves the head out, which stands outside of the numbered layers.
    chosen = (path for path in layers if selection.targets != "all-linear" or any(map(str.isdigit, path.split("."))))
    absent = [path for path in chosen if path not in present and selection.has(path)]
    if absent:
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        raise AdapterError(
            f"adapter '{adapter.name}' must hold factors for each layer that its adapter_config.json targets",
            found=f"none for {absent[0]}{more}; it has {len(adapter.modules)} layers",
            remedy="copy the adapter again; if only some layers were trained, give these in target_modules",
        )


def misfit(
    name: str, factors: LoraFactors, path: str, expected: tuple[int, int] | None, base: str, layers: Iterable[str]
) -> AdapterError:
    """The error for factors that do not fit the base at a layer, with the likeliest reason.

    Args:
        name: of the adapter.
        factors: that it has for the layer.
        path: of the layer.
        expected: (d_in, d_out) of the base's layer, None where it has none there.
        base: what to call the base.
        layers: dotted paths of the base model's linear layers.
    """
    shape = (factors.d_in, factors.d_out)
    remedy = "add it to a library of the base model that it was trained on"
    if expected is None:
        description = "has no linear layer there"
        match = next((layer for layer in layers if layer.endswith(f".{path}") or path.endswith(f".{layer}")), None)
        if match is not None:
            description += f", but one at {match}"
            remedy = (
                "its keys lack or repeat a part of the path: save it from the model that PEFT knows, without wrappers"
            )
        elif ".experts." in path:
            description += ": its experts may be bare parameters in this version of transformers"
            remedy = "train it on this base with the transformers of now, on layers that are modules"
    else:
        description = f"has (d_in, d_out) {expected}"
        if factors.d_in == expected[0] and not any(map(str.isdigit, path.split("."))):
            try:
                check_copied_shape(name, path, (factors.d_out, factors.d_in), expected[::-1], base)
            except AdapterError as error:
                return error
    return AdapterError(
        f"adapter '{name}' must fit the base model '{base}' at {path[:200]}",
        found=f"the adapter has (d_in, d_out) {shape}, the base {description}",
        remedy=remedy,
    )


def check_base_copies(adapter: Adapter, base: str, revision: str | None, fingerprint: Fingerprint) -> None:
    """Check the weights of the base that an adapter brings against the base on disk, or against its fingerprint.

    Args:
        adapter: as read.
        base: name of the library's base.
        revision: of a Hub id.
        fingerprint: of the base, for one that is not on this machine.

    Raises:
        AdapterError: if they differ.
        BaseModelError: if the base's folder cannot be read.
    """
    copies = copies_of(adapter)
    if not copies:
        return
    folder = base_folder(base, revision)
    if folder is not None:
        check_copies(adapter, copies, base_weights(folder, list(copies)), base)
        return
    for name, copy in copies.items():
        layer = fingerprint.layers.shape(name.removesuffix(".weight"))
        if layer is not None and name.endswith(".weight"):
            check_copied_shape(adapter.name, name, tuple(copy.shape), layer[::-1], base)
        entries = fingerprint.samples.get(name)
        if entries is not None and copy.ndim == 2:
            rows, columns = sampled_positions(copy.shape[0], copy.shape[1])
            if not torch.equal(copy[rows, columns].float(), torch.tensor(entries).to(copy.dtype).float()):
                raise other_values(adapter.name, name, base)
    warnings.warn(
        f"adapter '{adapter.name}' brings {', '.join(copies)} of the base model '{base}', which is not on this "
        "machine: they are compared when it is attached.",
        stacklevel=5,
    )
