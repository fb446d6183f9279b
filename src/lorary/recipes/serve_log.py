"""`lorary serve log`: decisions of a server shown again, without a model."""

from dataclasses import dataclass
from typing import Any

from lorary.errors import UsageError
from lorary.serve.decision_log import read_log
from lorary.serve.decisions import Tally


@dataclass(frozen=True)
class ServeLog:
    """Decisions as a server wrote them.

    Args:
        entries: those that were asked for, in the order in which they were made.
        usage: what all entries of the log add up to, as `/v1/usage` tells it.
    """

    entries: list[dict[str, Any]]
    usage: dict[str, Any]


def run_serve_log(path: str, *, decision_id: str | None = None, last: int | None = None) -> ServeLog:
    """Read a log of decisions.

    Args:
        path: of the log.
        decision_id: only this decision, with that of the shadow router beside it.
        last: only so many entries from the end.

    Raises:
        UsageError: if the file is no log, or has no such decision.
    """
    tally, entries = Tally(), []
    for entry in read_log(path):
        tally.add(entry)
        if decision_id is None or entry["id"] == decision_id:
            entries.append(entry)
    if decision_id is not None and not entries:
        raise UsageError("--id must be that of a decision in the log", found=decision_id)
    return ServeLog(entries if last is None else entries[-last:], tally.to_json())
