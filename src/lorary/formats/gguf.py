"""GGUF files: turned once into a transformers folder (float32 safetensors + tokenizer) in the user's cache.

cache folder/gguf/SHA256/            SHA256 of the GGUF file, so that a changed file is another folder
                  config.json, model.safetensors, tokenizer.json, ...
                  manifest.json      sha256, size and times of each file: what a damaged copy is recognised by
cache folder/gguf/SHA256.lock        held while one process converts
"""

import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from lorary.caching import cache_folder
from lorary.errors import BaseModelError
from lorary.formats.gguf_metadata import carry_over, check_consumed, read_metadata, refused
from lorary.formats.gguf_rope import Lost
from lorary.formats.quiet import quiet_transformers
from lorary.reading import open_regular, read_json

MAGIC = b"GGUF"
MANIFEST = "manifest.json"
MANIFEST_FORMAT = 1
# Copies of an earlier reading, which lost some of what a file said, are made again.
READING = 2


def dequantise(gguf_file: Path, *, expected_sha256: str | None = None) -> tuple[Path, str]:
    """Turn a GGUF file into a transformers folder, once; later calls only check the copy.

    Training and fingerprints need plain weights, and unpacking takes from seconds to minutes. The copy is written
    aside, synced and renamed under a lock: two processes that ask at once convert once, and a killed one leaves no
    half-written copy. A file of the copy whose size and times are as recorded is trusted, since the system itself sets
    the time of a change; otherwise its hash is computed again, and a copy that fails is rebuilt, which one line on
    stderr says.

    Args:
        gguf_file: the file.
        expected_sha256: the hash that the file must have, where it is known.

    Returns:
        The folder (config, float32 safetensors, tokenizer with its chat template), and the file's sha256.

    Raises:
        BaseModelError: if the file is no GGUF or has another hash, if transformers cannot read it, or if the cache
            cannot be written.
    """
    _check_magic(gguf_file)
    digest = _sha256(gguf_file)
    if expected_sha256 not in (None, digest):
        raise BaseModelError(
            f"the file {gguf_file} must have the sha256 {expected_sha256}",
            found=digest,
            remedy="install the package that brings it again, or name another base model",
        )
    folder = cache_folder() / "gguf" / digest
    # First without the lock: a complete copy may lie where this user cannot write.
    # Of a file whose hash is expected it is known that no reading lost anything.
    reading = READING if expected_sha256 is None else 0
    if _damage(folder, reading) is not None:
        with _cache_errors(folder), _one_at_a_time(folder):
            _convert_if_needed(gguf_file, folder, digest, reading)
    return folder, digest


def _check_magic(gguf_file: Path) -> None:
    try:
        with open_regular(gguf_file) as file:
            magic = file.read(len(MAGIC))
    except OSError as error:
        raise BaseModelError(
            f"the GGUF file {gguf_file} must be readable", found=error.strerror, remedy="check the path"
        ) from error
    if magic != MAGIC:
        raise BaseModelError(
            f"the file {gguf_file} must be a GGUF file",
            found=f"it begins with {magic!r}, not {MAGIC!r}",
            remedy="download it again, or name a transformers folder",
        )


def _sha256(path: Path) -> str:
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _cache_errors(folder: Path) -> Iterator[None]:
    """Turn what the file system says about the cache (full, read-only) into one error with its remedy."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own kind of error
        raise BaseModelError(
            f"the copy of a GGUF file must be written to {folder}",
            found=getattr(error, "strerror", None) or error,
            remedy="make room there, or set LORARY_CACHE to a folder with more space (about 4 bytes a weight)",
        ) from error


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Hold the lock of one copy; the system releases it when a process dies."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{folder}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        _say(f"another process is converting into {folder}, waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _convert_if_needed(gguf_file: Path, folder: Path, digest: str, reading: int) -> None:
    """Convert unless a complete copy is there, which the process that held the lock before may have made."""
    damage = _damage(folder, reading)
    if damage is None:
        return
    if folder.exists():
        _say(f"the cached copy of {gguf_file.name} is damaged ({damage}); making it again")
    _say(f"converting {gguf_file.name} to safetensors, once (up to a minute for 100 MB) ...")
    started = time.monotonic()
    partial = folder.with_name(f"{folder.name}.partial")
    _clear(partial)  # left by a killed process: the lock says nobody is writing it
    try:
        _convert(gguf_file, partial)
        _write_manifest(partial, digest)
        _sync(partial)
        _clear(folder)
        partial.rename(folder)
        _sync_folder(folder.parent)
    finally:
        _clear(partial)
    _say(f"converted in {time.monotonic() - started:.0f} s, kept in {folder}")


def _clear(path: Path) -> None:
    """Remove a folder, or what lies in its place: a link itself, not what it leads to."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    shutil.rmtree(path, ignore_errors=True)


def _convert(gguf_file: Path, folder: Path) -> None:
    """Let transformers unpack the file and save the result; its own bars go nowhere."""
    # One of transformers' bars is plain tqdm and ignores its switch, hence the redirection.
    with quiet_transformers(), redirect_stderr(StringIO()):
        try:
            tokenizer, model, report = _unpack(gguf_file)
        except Lost as error:
            raise refused(gguf_file, error) from error
        except Exception as error:  # transformers and gguf raise all kinds over a file they cannot read
            raise _unreadable(gguf_file, str(error) or type(error).__name__) from error
        # Transformers fills what is missing with random numbers and only mentions it.
        if missing := sorted(report["missing_keys"]):
            raise _unreadable(gguf_file, f"{len(missing)} weights missing, the first {missing[0]}")
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _unpack(gguf_file: Path) -> tuple[Any, Any, dict[str, Any]]:
    """Tokenizer, float32 model, and transformers' account of missing weights.

    Raises:
        Lost: if the file says more than the model would.
    """
    # Imported here: they take seconds, and a copy that is already there needs neither.
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

    metadata = read_metadata(gguf_file)
    # Alone in a folder: transformers would take an adapter, or settings of a tokenizer, that lie beside it.
    with TemporaryDirectory(prefix="lorary-gguf-") as where:
        (Path(where) / "model.gguf").symlink_to(gguf_file.resolve())
        alone: dict[str, Any] = {"gguf_file": "model.gguf", "local_files_only": True}
        config = AutoConfig.from_pretrained(where, **alone)
        carry_over(metadata, config)
        tokenizer = AutoTokenizer.from_pretrained(where, **alone)
        model, report = AutoModelForCausalLM.from_pretrained(
            where,
            config=config,
            dtype=torch.float32,
            # Without this the weights stay packed: such a model can be neither saved nor trained.
            quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True,
            **alone,
        )
    if not report["missing_keys"]:
        check_consumed(metadata, model)
    return tokenizer, model, report


def _unreadable(gguf_file: Path, finding: str) -> BaseModelError:
    return BaseModelError(
        f"the GGUF file {gguf_file} must hold a causal language model of a family that transformers can convert",
        found=finding.strip().splitlines()[0][:300],
        remedy="download the file again if it may be cut off, or name the model's transformers folder or Hub id",
    )


def _write_manifest(folder: Path, source_sha256: str) -> None:
    files = {path.name: _recorded(path) for path in sorted(folder.iterdir()) if path.name != MANIFEST}
    manifest = {"format": MANIFEST_FORMAT, "reading": READING, "source_sha256": source_sha256, "files": files}
    _save_manifest(folder, manifest)


def _save_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    aside = folder / f"{MANIFEST}.{os.getpid()}"
    aside.write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    aside.replace(folder / MANIFEST)


def _recorded(path: Path) -> dict[str, Any]:
    return {"sha256": _sha256(path), **_stamp(path)}


def _stamp(path: Path) -> dict[str, int]:
    """Size and times. Whoever edits a file may set the time of its content back, but not that of the change."""
    stat = path.stat()
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "ctime_ns": stat.st_ctime_ns}


def _damage(folder: Path, reading: int) -> str | None:
    """What is wrong with a copy, in a few words; None for a good one."""
    try:
        manifest = read_json(folder / MANIFEST)
        if manifest["format"] != MANIFEST_FORMAT:
            return f"{MANIFEST} has format {manifest['format']}"
        if manifest["source_sha256"] != folder.name:
            return f"{MANIFEST} is of another file"
        if manifest.get("reading", 1) < reading:
            return "an earlier Lorary made it, which read less of the file"
        return _missing(manifest["files"]) or _stray(folder, manifest["files"]) or _changed(folder, manifest)
    except OSError as error:
        return f"{Path(str(error.filename)).name}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"


def _missing(names: Collection[str]) -> str | None:
    """A manifest vouches for no file that it does not name."""
    if "config.json" not in names:
        return f"{MANIFEST} names no config.json"
    if not any(name.endswith(".safetensors") for name in names):
        return f"{MANIFEST} names no weights"
    if not any(name.startswith("tokenizer") for name in names):
        return f"{MANIFEST} names no tokenizer"
    return None


def _stray(folder: Path, names: Collection[str]) -> str | None:
    """What transformers might load with the copy, or instead of it: any file of no known origin."""
    strays = sorted(path.name for path in folder.iterdir() if not path.name.startswith((".", MANIFEST)))
    strays = [name for name in strays if name not in names]
    return f"{strays[0]} does not belong to it" if strays else None


def _changed(folder: Path, manifest: dict[str, Any]) -> str | None:
    was_touched = False
    for name, recorded in manifest["files"].items():
        stamp = _stamp(folder / name)
        if stamp["size"] != recorded["size"]:
            return f"{name} has {stamp['size']} bytes, not {recorded['size']}"
        # Reading half a gigabyte costs a second and more, so an untouched file is believed.
        if any(recorded.get(key) != value for key, value in stamp.items()):
            if _sha256(folder / name) != recorded["sha256"]:
                return f"{name} has another sha256"
            recorded.update(stamp)
            was_touched = True
    if was_touched:
        with suppress(OSError):  # where nobody may write, the hashes are computed each time
            _save_manifest(folder, manifest)
    return None


def _sync(folder: Path) -> None:
    """Ask the disk to keep every file before the rename makes them visible."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _say(line: str) -> None:
    print(f"lorary: {line}", file=sys.stderr, flush=True)
