"""`lorary merge` and `lorary.merge`: adapters of a library become one, in a folder of its own or in memory."""

import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lorary.adapt.judge_merge import JudgedMean, judge_merge
from lorary.adapt.merge_library import MergedAdapter, merge_library
from lorary.adapt.merge_settings import MEAN, MergeSettings
from lorary.adapter import Adapter
from lorary.errors import LibraryError, UsageError
from lorary.evaluate.metrics import scorable_tasks
from lorary.evaluate.settings import EvaluateSettings
from lorary.flags import OptionValues
from lorary.formats.peft import encode_adapter
from lorary.keywords import with_settings
from lorary.library.files import encode_json, reported, write_folder
from lorary.library.layout import PROVENANCE_FILE
from lorary.library.provenance import new_provenance
from lorary.library.store import Library
from lorary.model.base import Base
from lorary.recipes.base_options import BaseOptions
from lorary.recipes.inputs import TaskSource, library_of, listed, tasks_with_rows, unloaded_base


@dataclass(frozen=True)
class MergeResult:
    """What a merge made.

    Args:
        adapter: the folder it lies in.
        method: one of `MERGES`.
        parents: names of the adapters that went into it.
        rank: the largest rank over its layers.
        error: what truncation left out, relative to the whole update, in the Frobenius norm.
        errors: the same for each layer, by its path; 0 where nothing was left out.
        partial: by name of an adapter, how many of the merged layers it lacks: its update there counts as zero.
        means: of the merge and of what stands beside it, where it was judged.
    """

    adapter: str
    method: str
    parents: list[str]
    rank: int
    error: float
    errors: Mapping[str, float]
    partial: Mapping[str, int]
    means: tuple[JudgedMean, ...] = ()


@with_settings(MergeSettings)
def merge(library: Library | str | Path, *, name: str = "merged", options: OptionValues) -> Adapter:
    """Make one adapter of several, without data, in memory.

    `Library.add_adapter` commits it to a library; `lorary merge` writes a folder with the merge's history.

    Args:
        library: the library, or the path of its folder.
        name: of the result.
        options: the settings.

    Returns:
        The adapter. It shows its layers as a table.

    Raises:
        UsageError: if an argument does not exist or is out of range.
        LibraryError: if an adapter is not in the library, or adapters were trained with different templates.
        AdapterError: if the adapters do not fit each other.
    """
    return merge_library(library_of(library), _settings(options[MergeSettings]), name=name).adapter


def run_merge(
    library_path: str,
    out: str,
    method: str = MEAN,
    *,
    tasks: TaskSource | None = None,
    names: str | Iterable[str] | None = None,
    rows: int = EvaluateSettings.rows,
    base: Base | str | None = None,
    load: BaseOptions | None = None,
    **fields: Any,
) -> MergeResult:
    """Merge adapters of a library into a folder, and judge the merge where tasks are given.

    Args:
        library_path: folder of the library.
        out: folder of the result, which must not exist.
        method: one of `MERGES`.
        tasks: on which to judge the merge before it is written; not judged where None.
        names: of them, all with test rows where None.
        rows: test rows of each task, at most.
        base: the base model, loaded or by reference; the library's own where None.
        load: how it is loaded.
        fields: others of `MergeSettings`.

    Returns:
        Where the result lies, and what was left out of it.

    Raises:
        UsageError: if an option makes no sense, or something is in the folder's place.
        LibraryError: as for `merge`.
        AdapterError: as for `merge`.
        TaskError: if no task has test rows.
    """
    settings, folder = _settings({"method": method, **fields}), Path(out)
    if folder.exists():
        raise UsageError("--out must be a new folder", found=f"{out} exists", remedy="name another one")
    library = Library.open(library_path)
    merged = merge_library(library, settings, name=folder.name)
    means: tuple[JudgedMean, ...] = ()
    if tasks is not None:
        load = load or BaseOptions()
        judging = EvaluateSettings(rows=rows, template=str(merged.provenance["template"]))
        with_rows = scorable_tasks(tasks_with_rows(tasks, listed(names)), allow_code=False)
        judgement = judge_merge(
            unloaded_base(library, base, load), library, merged, with_rows, judging, force_base=load.force_base
        )
        means = judgement.means
        metrics = {**merged.provenance["metrics"], "judgement": judgement.to_json()}
        merged = replace(merged, provenance={**merged.provenance, "metrics": metrics})
    _write(folder, merged, library)
    return MergeResult(
        str(folder), settings.method, list(merged.parents), merged.rank, merged.error, merged.errors, merged.partial,
        means,
    )  # fmt: skip


def _settings(fields: Any) -> MergeSettings:
    experts = listed(fields.get("experts"))
    return MergeSettings(**{**fields, "experts": None if experts is None else tuple(experts)})


def _write(folder: Path, merged: MergedAdapter, library: Library) -> None:
    """The folder as a library would hold it, so that `lorary library add` takes its history along; whole or not."""
    files = encode_adapter(merged.adapter)
    base = {"name": library.base.name, "fingerprint": library.base.fingerprint.digest}
    provenance = new_provenance(merged.adapter, files, base, merged.provenance)
    try:
        with reported(folder.parent):
            # A kill leaves the other name at most, and the next try begins anew.
            part = folder.with_name(f".{folder.name}.part")
            shutil.rmtree(part, ignore_errors=True)
            write_folder(part, {**files, PROVENANCE_FILE: encode_json(provenance)})
            os.rename(part, folder)
    except LibraryError as failed:
        raise UsageError(f"--out must be a folder that can be made: {folder}", found=failed.found) from failed
