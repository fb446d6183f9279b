"""The adapters that an adaptation has to adapt from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lorary.adapt.settings import JOINT, LORA, AdaptSettings
from lorary.adapter import LoraFactors, check_low_rank
from lorary.errors import LibraryError, UsageError, did_you_mean
from lorary.library.store import Library
from lorary.train.units import Factors

# Marks adapters that were adapted from others: they are results, and no part of the next pool.
ADAPTATION = "adaptation"


@dataclass(frozen=True)
class Pool:
    """Adapters of one library.

    Args:
        library: that holds them.
        hashes: content hash of each by name, in the library's order.
        tasks: tasks that each was trained on, by name.
    """

    library: Library
    hashes: Mapping[str, str]
    tasks: Mapping[str, Sequence[str]]

    @property
    def names(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(self.hashes)

    def get(self, name: str) -> Factors:
        """The factors of one of them, by path; where alpha is not above 0, lora_b holds it and the scaling is 1.

        Raises:
            AdapterError: if it is more than a plain LoRA.
        """
        modules = self.whole(name)
        check_low_rank(name, modules, "be adapted from", remedy="name others with --experts, or route to it as it is")
        return modules

    def whole(self, name: str) -> Factors:
        """The same with a bias or a magnitude, where it has one."""
        modules = self.library.get(name).modules
        return {
            path: factors if factors.scaling > 0 else _with_scaling_one(factors) for path, factors in modules.items()
        }

    def is_of(self, name: str, task: str) -> bool:
        """Whether one of them is the adapter of a task: trained on it and on nothing else."""
        return list(self.tasks[name]) == [task]

    def hashes_of(self, names: Sequence[str]) -> dict[str, str]:
        """Content hashes of some of them."""
        return {name: self.hashes[name] for name in names}


def _with_scaling_one(factors: LoraFactors) -> LoraFactors:
    bias = None if factors.bias is None else factors.bias * factors.scaling
    return LoraFactors(factors.lora_a, factors.lora_b * factors.scaling, 1.0, bias, factors.magnitude)


def pool_of(library: Library, settings: AdaptSettings) -> Pool:
    """The adapters that a method may use: those that are named, else all that are not results of adaptations.

    Args:
        library: to adapt from.
        settings: the method, and which adapters it names.

    Raises:
        LibraryError: if there is none, or one that is named is not there.
        UsageError: if one is named twice.
    """
    if settings.method == LORA:
        return Pool(library, {}, {})
    if settings.start_library is not None:
        library = Library.open(settings.start_library)
    named = (settings.start or JOINT,) if settings.method == JOINT else settings.experts
    records = {name: library.provenance(name) for name in _checked(library, named, settings.method)}
    if named is None:
        records = {name: record for name, record in records.items() if ADAPTATION not in record}
    if not records:
        raise LibraryError(
            f"library '{library.path}' must hold adapters",
            found="none",
            remedy="lorary build, or lorary library add; lorary adapt --method lora needs none",
        )
    hashes = {name: str(record["content_hash"]) for name, record in records.items()}
    return Pool(library, hashes, {name: list(record["tasks"]) for name, record in records.items()})


def _checked(library: Library, named: Sequence[str] | None, method: str) -> Sequence[str]:
    names = library.names()
    if named is None:
        return names
    if missing := [name for name in named if name not in names]:
        option = "--start" if method == JOINT else "--experts"
        suggestion = f"name others with {option}: it has {', '.join(names[:10]) or 'none'}"
        raise LibraryError(
            f"library '{library.path}' must hold the adapters that are named",
            found=f"no adapter '{missing[0]}'",
            remedy=did_you_mean(missing[0], names, remedy=suggestion),
        )
    if not named or len(set(named)) != len(named):
        raise UsageError("--experts must name different adapters, at least one", found=list(named))
    return sorted(named)
