"""The learned assignment of a Poly or MHR library: which task mixes which skills, layer by layer.

It lies beside the skills, in `derived/poly-HASH/`, and names each by the hash of its content: skills that were
replaced since no longer have an assignment.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import safetensors.torch
from torch import Tensor

from lorary.errors import LibraryError, ShapeError
from lorary.formats.peft_files import load_tensors
from lorary.library.derived import DerivedEntry, derived_folder, iterate_derived, save_derived
from lorary.library.files import encode_json, sha256
from lorary.library.layout import DERIVED
from lorary.library.store import Library
from lorary.reading import parse_json

KIND = "poly"
DOCUMENT, TENSORS = "assignment.json", "assignment.safetensors"
FORMAT_VERSION = 1
RULE = "weights = sigmoid(logits) / (sum of sigmoid(logits) over skills + 1e-8)"


@dataclass(frozen=True)
class Assignment:
    """Logits over skills for every task, split and layer.

    Args:
        tasks: names of the tasks, in the order of their axis.
        skills: content hash of each skill by its name, in the order of their axis.
        logits: (tasks, splits, skills) by path of the layer.

    Raises:
        ShapeError: if a layer's logits have other axes.
    """

    tasks: tuple[str, ...]
    skills: Mapping[str, str]
    logits: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        for attribute in ("skills", "logits"):
            object.__setattr__(self, attribute, MappingProxyType(dict(getattr(self, attribute))))
        for path, logits in self.logits.items():
            if tuple(logits.shape) != (len(self.tasks), self.num_splits, len(self.skills)):
                raise ShapeError(
                    f"the assignment must have {len(self.tasks)} tasks, {self.num_splits} splits and "
                    f"{len(self.skills)} skills at layer '{path}'",
                    found=tuple(logits.shape),
                )

    @property
    def num_splits(self) -> int:
        """Blocks that a layer is cut into: 1 for Poly."""
        return next((int(logits.shape[1]) for logits in self.logits.values() if logits.ndim == 3), 0)

    @property
    def method(self) -> str:
        """`poly`, or `mhr` where there are several splits."""
        return "poly" if self.num_splits == 1 else "mhr"


def save_assignment(library: Library, assignment: Assignment, build: Mapping[str, Any]) -> None:
    """Put an assignment beside its skills, atomically; one that is there already stays untouched.

    Args:
        library: holds the skills.
        assignment: as trained.
        build: what else its builder knows (settings, hashes of the data), as values of JSON.

    Raises:
        LibraryError: if the library cannot be written.
    """
    tensors = safetensors.torch.save({path: logits.contiguous() for path, logits in assignment.logits.items()})
    document = {
        "build": dict(build),
        "format_version": FORMAT_VERSION,
        "logits_axes": ["tasks", "splits", "skills"],
        "method": assignment.method,
        "num_splits": assignment.num_splits,
        "rule": RULE,
        "skills": [{"content_hash": digest, "name": name} for name, digest in assignment.skills.items()],
        "tasks": list(assignment.tasks),
    }
    save_derived(library.path, KIND, _key(assignment, tensors), {DOCUMENT: encode_json(document), TENSORS: tensors})


def load_assignment(library: Library) -> Assignment:
    """The assignment of the skills that a library holds.

    Args:
        library: built with `--method poly` or `mhr`.

    Returns:
        The assignment, on the CPU.

    Raises:
        LibraryError: if there is none for the skills as they are now, several, or a damaged one.
    """
    assignment = find_assignment(library)
    if assignment is not None:
        return assignment
    changes = [_changed_skills(library, _parse(library, entry)) for entry in iterate_derived(library.path, KIND)]
    raise LibraryError(
        f"library {library.path} must hold the assignment of its skills",
        found=f"one for other weights of {changes[-1]}" if changes else "none",
        remedy="restore these skills, or build anew" if changes else "build it with `lorary build --method poly`",
    )


def find_assignment(library: Library) -> Assignment | None:
    """As `load_assignment`, but None where there is none for the skills as they are now.

    Raises:
        LibraryError: if there are several, or one is damaged.
    """
    stored = [_parse(library, entry) for entry in iterate_derived(library.path, KIND)]
    fitting = [assignment for assignment in stored if not _changed_skills(library, assignment)]
    if len(fitting) > 1:
        raise LibraryError(
            f"library {library.path} must hold one assignment of its skills",
            found=f"{len(fitting)} folders {KIND}-* in {library.path / DERIVED}",
            remedy="delete all but one of them",
        )
    return fitting[0] if fitting else None


def _key(assignment: Assignment, tensors: bytes) -> dict[str, Any]:
    return {"logits": sha256(tensors), "skills": list(assignment.skills.items()), "tasks": list(assignment.tasks)}


def _changed_skills(library: Library, assignment: Assignment) -> str:
    """Names of the skills that are gone or have other weights now."""
    names = set(library.names())
    return ", ".join(
        name
        for name, digest in assignment.skills.items()
        if name not in names or library.provenance(name)["content_hash"] != digest
    )


def _parse(library: Library, entry: DerivedEntry) -> Assignment:
    folder = derived_folder(library.path, KIND, entry.key)
    try:
        document = parse_json(entry.files[DOCUMENT])
        if document["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format_version is {document['format_version']!r}")
        skills = {str(skill["name"]): str(skill["content_hash"]) for skill in document["skills"]}
        logits = dict(sorted(load_tensors(entry.files[TENSORS]).items()))
        return Assignment(tuple(document["tasks"]), skills, logits)
    except (KeyError, TypeError, ValueError) as error:
        raise LibraryError(
            f"{folder} must hold {DOCUMENT} and {TENSORS} as Lorary writes them",
            found=f"{type(error).__name__}: {error}",
            remedy="restore it from a copy, or delete it and build again",
        ) from error
