"""The base model of a library: what is recorded of it, and whether a model or an adapter belongs to it."""

import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import nn

from lorary.adapter import Adapter
from lorary.errors import BaseModelError
from lorary.formats.base import EMBEDDED, EMBEDDED_HUB_ID, resolve_base
from lorary.library.configuration import differing_fields, in_words
from lorary.library.fingerprint import Fingerprint, compare, fingerprint_of_model, rounded_to
from lorary.library.fingerprint_folder import fingerprint_of_folder
from lorary.library.fit import check_base_copies, check_whole, misfit
from lorary.library.origin import HUB_ID, is_file
from lorary.library.placing import placed_layers
from lorary.lora.targets import is_language


@dataclass(frozen=True)
class BaseRecord:
    """What library.json says about the base model.

    Args:
        name: 'embedded', a path, a Hub id, or whatever name a live model was given.
        revision: the commit or checksum it was resolved to, None where there is none.
        fingerprint: of the model.
    """

    name: str
    revision: str | None
    fingerprint: Fingerprint

    def to_json(self) -> dict[str, Any]:
        """A document for library.json."""
        return {"name": self.name, "revision": self.revision, "fingerprint": self.fingerprint.to_json()}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> "BaseRecord":
        """The inverse of `to_json`; raises KeyError, TypeError or ValueError on a damaged document."""
        return cls(str(document["name"]), document["revision"], Fingerprint.from_json(document["fingerprint"]))


def record_of(base: str | Path | nn.Module, base_name: str | None = None) -> BaseRecord:
    """Resolve a base model and take its fingerprint.

    Args:
        base: 'embedded', a transformers folder, a GGUF file, a Hub id, or a live model.
        base_name: the name to record instead of the model's own.

    Raises:
        BaseModelError: if it cannot be found or is not a model that transformers can build.
    """
    if isinstance(base, nn.Module):
        own_name = str(getattr(base, "name_or_path", "") or type(base).__name__)
        return BaseRecord(base_name or own_name, None, fingerprint_of_model(base))
    files = resolve_base(base)
    return BaseRecord(base_name or files.name, files.revision, fingerprint_of_folder(files.path))


def check_same_base(record: BaseRecord, current: Fingerprint, label: str, *, force_base: bool) -> None:
    """Check that a model is the base of a library, or close enough to it.

    Args:
        record: the library's base.
        current: fingerprint of the model at hand.
        label: the model at hand, in words.
        force_base: let a model of other, unrelated weights pass with a warning.

    Raises:
        BaseModelError: if architecture or shapes differ, or the weights are unrelated and not forced.
    """
    recorded = record.fingerprint
    relation = compare(recorded, current)
    if relation == "different":
        raise BaseModelError(
            f"{label} must have the architecture and shapes of the library's base model '{record.name}'",
            found=f"{_in_words(current)}, the library's base is {_in_words(recorded)}",
            remedy=f"use '{record.name}', or make a library for the other model",
        )
    if relation == "unrelated" and not force_base:
        raise BaseModelError(
            f"{label} must have the weights of the library's base model '{record.name}'",
            found="the same shapes, but unrelated values",
            remedy=f"use '{record.name}', or force it (--force-base) if you know that they belong together",
        )
    if relation == "related" and (dtype := rounded_to(recorded, current)) is not None:
        warnings.warn(
            f"{label} is the library's base model '{record.name}' with weights rounded to {dtype}: nothing is wrong, "
            "and results differ by rounding",
            stacklevel=3,
        )
    elif relation != "same":
        kind = "related to" if relation == "related" else "unrelated to"
        difference = _difference(recorded, current)
        warnings.warn(
            f"{label} is {kind} the library's base model '{record.name}', not equal to it: {difference}", stacklevel=3
        )


def _difference(recorded: Fingerprint, current: Fingerprint) -> str:
    differing = differing_fields(recorded.configuration, current.configuration)
    fields = f"its configuration has other values ({in_words(differing)})"
    common = recorded.samples.keys() & current.samples.keys()
    effect = "Results will differ from those the adapters were trained for."
    if all(recorded.samples[name] == current.samples[name] for name in common):
        if recorded.samples == current.samples:
            return f"{fields}. {effect}"
        unread = "not all of its weights can be read, since they are quantised or offloaded"
        return f"{unread}, and {fields}. {effect}" if differing else f"{unread}."
    dtypes = "" if recorded.dtype == current.dtype else f" (dtype from {recorded.dtype} to {current.dtype})"
    weights = f"its weights have other values{dtypes}"
    return f"{weights}, and {fields}. {effect}" if differing else f"{weights}. {effect}"


def _in_words(fingerprint: Fingerprint) -> str:
    num_layers = len(list(fingerprint.layers))
    return f"{fingerprint.architecture} with {num_layers} linear layers, shapes {fingerprint.shapes[:8]}"


def check_fit(adapter: Adapter, record: BaseRecord) -> None:
    """Check that each adapted layer exists in the base model with fitting sizes, and that none of them is absent.

    Raises:
        AdapterError: naming adapter, layer and both shapes; or the layer that is targeted and has no factors; or the
            weight of the base that the adapter would change; or as `placed_layers` raises it.
    """
    base = record.fingerprint
    check_base_copies(adapter, record.name, record.revision, base)
    placed = placed_layers(adapter.name, adapter.modules, base)
    for path, factors in placed.items():
        expected = base.layers.shape(path)
        if expected != (factors.d_in, factors.d_out):
            raise misfit(adapter.name, factors, path, expected, record.name, base.layers)
    check_whole(adapter, [path for path in base.layers if is_language(path, base.language)], placed)


def check_origin(adapter: Adapter, provenance: Mapping[str, Any], record: BaseRecord, *, force_base: bool) -> None:
    """Check what an adapter from elsewhere says about the base model that it was trained on.

    Args:
        adapter: as read.
        provenance: the provenance.json that lies beside it, or an empty mapping.
        record: the library's base.
        force_base: let other weights of the same shapes pass.

    Raises:
        BaseModelError: if it can be told that it was trained on other weights, and they are not forced.
    """
    label, digest = f"the base model of adapter '{adapter.name}'", record.fingerprint.digest
    recorded = provenance.get("base")
    origin_digest = recorded.get("fingerprint") if isinstance(recorded, Mapping) else None
    named = adapter.config.get("base_model_name_or_path")
    if origin_digest is None and (named in (None, "") or _is_called(record, str(named))):
        return
    if origin_digest == digest:
        _warn_of_configuration(str(recorded.get("name")) if isinstance(recorded, Mapping) else "", record, label)
        return
    if origin_digest is not None:
        if not force_base:
            raise BaseModelError(
                f"{label} must be the library's, '{record.name}'",
                found=f"its provenance names '{recorded and recorded.get('name')}', with another fingerprint",
                remedy="add it to a library of that model, or force it (--force-base)",
            )
    elif is_file(Path(str(named)) / "config.json"):
        _compare_with_folder(str(named), record, f"{label}, {named},", force_base=force_base)
    elif (copy := _copy_of(str(named))) is not None:
        check_same_base(record, copy, f"{label}, {named} by its copy here,", force_base=force_base)
    else:
        warnings.warn(
            f"{label} is '{str(named)[:200]}' by its configuration, and that cannot be compared with the library's "
            f"base '{record.name}' by name; its shapes fit, so it is taken.",
            stacklevel=5,
        )


def _is_called(record: BaseRecord, name: str) -> bool:
    """Whether a name is one of the library's base; the Hub does not tell upper case from lower."""
    names = {record.name, *({EMBEDDED_HUB_ID} if record.name == EMBEDDED else ())}
    return name in names or name.casefold() in {known.casefold() for known in names if HUB_ID.fullmatch(known)}


@lru_cache(maxsize=16)
def _copy_of(name: str) -> Fingerprint | None:
    """The fingerprint of a model of the Hub by its copy in the cache; None where none lies there whole."""
    if not HUB_ID.fullmatch(name):
        return None
    from huggingface_hub import try_to_load_from_cache  # few adapters name a Hub id that is not the library's base

    try:
        config = try_to_load_from_cache(name, "config.json")
        return fingerprint_of_folder(Path(config).parent) if isinstance(config, str) else None
    except Exception:  # whatever a copy that is not whole comes to: it is then not compared
        return None


def _warn_of_configuration(source: str, record: BaseRecord, label: str) -> None:
    """Warn where the weights that an adapter was trained on are the library's, but under another configuration."""
    if source == record.name or not is_file(Path(source) / "config.json"):
        return
    with suppress(BaseModelError):  # what lies there now need not be what lay there then
        current = fingerprint_of_folder(source)
        if current.digest == record.fingerprint.digest:
            check_same_base(record, current, f"{label}, {source},", force_base=False)


def _compare_with_folder(folder: str, record: BaseRecord, label: str, *, force_base: bool) -> None:
    """Compare the library's base with a model on disk; one that cannot be read passes by force, with a warning."""
    try:
        current = fingerprint_of_folder(folder)
    except Exception as error:  # transformers lets through whatever a configuration without sense comes to
        if not force_base:
            raise BaseModelError(
                f"{label} must be readable to be compared with the library's, '{record.name}'",
                found=(error.found if isinstance(error, BaseModelError) else None)
                or f"{type(error).__name__}: {' '.join(str(error).split())[:200]}",
                remedy="restore that model, or force it (--force-base) if you know that it is the library's",
            ) from error
        warnings.warn(
            f"{label} cannot be read, and so not be compared with the library's, '{record.name}': taken by force.",
            stacklevel=6,
        )
        return
    check_same_base(record, current, label, force_base=force_base)
