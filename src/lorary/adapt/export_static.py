"""Adapters of a library for other tools: byte for byte, merged into the base model, or as a GGUF file."""

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lorary.adapt.export_settings import LLAMA_CPP, PEFT, TRANSFORMERS, StaticSettings
from lorary.adapt.merge_library import merge_library
from lorary.adapt.merge_settings import MergeSettings
from lorary.adapter import Adapter
from lorary.errors import LibraryError, UsageError, did_you_mean
from lorary.formats.base import resolve_base
from lorary.formats.gguf_lora import write_gguf_lora
from lorary.formats.peft import CONFIG_FILE, WEIGHTS_FILE, read_files
from lorary.formats.quiet import quiet_transformers
from lorary.library.files import reported, write_folder
from lorary.library.readers import read_stable
from lorary.library.store import Library
from lorary.model.attach import attach, detach
from lorary.model.base import DTYPES, load_base, load_tokenizer
from lorary.model.merged import add_to_weights, check_merged, probe_logits, relative_difference

# Tokens of the two rows on which a merged model is compared with the routed one.
_PROBE = (2, 16)


@dataclass(frozen=True)
class StaticExport:
    """What an export without a router made.

    Args:
        path: folder or file of the result.
        engine: that it is for.
        experts: adapters that went into it.
        rank: the largest over its layers; None for several adapters.
        difference: for a merged model in float32: largest difference of its logits to the routed model's, relative to
            the effect of the adapter.
        rounding: the same in the dtype that was written.
    """

    path: str
    engine: str
    experts: tuple[str, ...]
    rank: int | None = None
    difference: float | None = None
    rounding: float | None = None


def export_static(library: Library, out: Path, engine: str, settings: StaticSettings, base: str) -> StaticExport:
    """Export adapters of a library for another tool; whole or not at all.

    Args:
        library: that holds them.
        out: for peft a folder with one folder for each adapter; for transformers the folder of the merged model; for
            llama.cpp the file. Nothing may be there.
        engine: one of `STATIC`.
        settings: which adapters, and how.
        base: reference of the base model, for transformers.

    Raises:
        UsageError: if something is at `out`, or a setting does not go with the engine.
        LibraryError: if there is no such adapter, or `out` cannot be written.
        AdapterError: if the adapter cannot be exported so.
        BaseModelError: if the base cannot be loaded.
    """
    if os.path.lexists(out):
        raise UsageError("the result of an export must be new", found=f"{out} exists", remedy="name another one")
    _check(engine, settings)
    if engine == PEFT:
        return _as_they_are(library, out, settings.experts)
    merged = _one_adapter(library, settings, out)
    names = tuple(settings.weights or settings.experts or ())
    if engine == LLAMA_CPP:
        configuration = library.base.fingerprint.configuration or {}
        _aside(out, lambda part: write_gguf_lora(part, merged, configuration))
        return StaticExport(str(out), engine, names, merged.rank)
    difference, rounding = _merged_model(library, out, merged, settings, base)
    return StaticExport(str(out), engine, names, merged.rank, difference, rounding)


def _check(engine: str, settings: StaticSettings) -> None:
    if engine == PEFT and settings.weights is not None:
        raise UsageError(
            "--weights must be merged to be exported for peft",
            found="--for peft --weights",
            remedy="lorary merge LIB --method concat --weights ... makes one exact adapter",
        )
    if engine != PEFT and settings.weights is None and len(settings.experts or ()) != 1:
        raise UsageError(
            f"--for {engine} must export one adapter, or a sum of adapters by weights",
            found=f"{len(settings.experts or ())} adapters",
            remedy="give --experts NAME, or --weights NAME=W,...",
        )
    given = [
        f"--{name.replace('_', '-')}"
        for name in ("weights_dtype", "shard_size")
        if getattr(settings, name) != getattr(StaticSettings, name)
    ]
    if engine != TRANSFORMERS and given:
        raise UsageError(f"{given[0]} needs --for {TRANSFORMERS}", found=f"--for {engine}", remedy="leave it out")


def _as_they_are(library: Library, out: Path, experts: Sequence[str] | None) -> StaticExport:
    """PEFT's two files of each adapter, byte for byte."""
    names = library.names()
    chosen = list(names if experts is None else experts)
    if missing := [name for name in chosen if name not in names]:
        raise LibraryError(
            f"library '{library.path}' must hold the adapters that are exported",
            found=f"no adapter '{missing[0]}'",
            remedy=did_you_mean(missing[0], names, remedy=f"it has {', '.join(names[:10]) or 'none'}"),
        )

    def write(part: Path) -> None:
        part.mkdir()
        for name in chosen:
            library.get(name)  # what PEFT could not read is not handed on
            files = read_stable(library.path, name, partial(read_files, name=name))
            write_folder(part / name, {file: files[file] for file in (CONFIG_FILE, WEIGHTS_FILE)})

    _aside(out, write)
    return StaticExport(str(out), PEFT, tuple(chosen))


def _one_adapter(library: Library, settings: StaticSettings, out: Path) -> Adapter:
    weights = dict(settings.weights or dict.fromkeys(settings.experts or (), 1.0))
    return merge_library(library, MergeSettings("concat", weights=weights), name=out.stem).adapter


def _merged_model(
    library: Library, out: Path, adapter: Adapter, settings: StaticSettings, reference: str
) -> tuple[float, float]:
    files = resolve_base(reference)
    dtype = DTYPES[settings.weights_dtype]
    model: Any = load_base(files, dtype="float64" if dtype == torch.float64 else "float32", device="cpu").model
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.get_input_embeddings().weight.shape[0], _PROBE, generator=generator)
    tokens = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    bare = probe_logits(model, tokens)
    attach(model, library, experts=settings.weights or list(settings.experts or ()))
    routed = probe_logits(model, tokens)
    detach(model)
    add_to_weights(model, adapter)
    difference = relative_difference(probe_logits(model, tokens), routed, bare)
    check_merged(adapter.name, difference)
    model.to(dtype)
    rounding = relative_difference(probe_logits(model, tokens), routed, bare)
    tokenizer = load_tokenizer(files)

    def write(part: Path) -> None:
        with quiet_transformers():
            model.save_pretrained(part, max_shard_size=settings.shard_size)
            tokenizer.save_pretrained(part)

    _aside(out, write)
    return difference, rounding


def _aside(out: Path, write: Callable[[Path], None]) -> None:
    """Write under another name, and rename: a kill leaves that other name at most, and the next try begins anew."""
    part = out.with_name(f".{out.name}.part")
    with reported(out.parent):
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(part, ignore_errors=True)
        part.unlink(missing_ok=True)
        try:
            write(part)
            os.rename(part, out)
        finally:
            shutil.rmtree(part, ignore_errors=True)
            part.unlink(missing_ok=True)
