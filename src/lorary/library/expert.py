"""One adapter of a library, by name: what it is, without its weights."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorary.adapter import Adapter
from lorary.library.listing import origin_in, tags_in, targets_in_short
from lorary.tabular import ResultTable
from lorary.terminal import printable


@dataclass(frozen=True, repr=False)
class Expert:
    """One adapter of a library, as it was when it was asked for.

    Args:
        name: in the library.
        folder: a directory that PEFT reads, too.
        provenance: where it came from, as the library recorded it.
        targets: names of the layers that it adapts; None where its configuration does not list them.
        read: reads its weights, as they are now.
    """

    name: str
    folder: Path
    provenance: Mapping[str, Any]
    targets: tuple[str, ...] | None
    read: Callable[[], Adapter]

    @property
    def rank(self) -> int:
        """The largest of its layers."""
        return int(self.provenance["rank"])

    @property
    def num_parameters(self) -> int:
        """Numbers in its factors."""
        return int(self.provenance["num_parameters"])

    @property
    def tasks(self) -> tuple[str, ...]:
        """What it was trained on, as far as that was recorded."""
        return tuple(self.provenance["tasks"])

    def __repr__(self) -> str:
        kinds = sorted({target.rpartition(".")[2] for target in self.targets or ()})
        layers = f", layers {' '.join(kinds)}" if kinds else ""
        tasks = f", tasks {' '.join(self.tasks)}" if self.tasks else ""
        return printable(f"Expert({self.name!r}, rank {self.rank}, {self.num_parameters:,} parameters{layers}{tasks})")

    def _repr_html_(self) -> str:
        lines = [
            ("rank", str(self.rank)),
            ("parameters", f"{self.num_parameters:,}"),
            ("layers", None if self.targets is None else targets_in_short(self.targets)),
            ("tasks", ", ".join(self.tasks) or None),
            ("tags", ", ".join(tags_in(self.provenance)) or None),
            ("note", str(self.provenance.get("note") or "") or None),
            ("origin", origin_in(self.provenance)),
            ("content hash", str(self.provenance["content_hash"])),
        ]
        return ResultTable(f"Expert {self.name}", ("", "value"), lines).to_html()
