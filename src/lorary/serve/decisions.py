"""The last decisions of a server, and what they add up to."""

from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

# So many can be shown again; older ones are in the log, where there is one.
MOST_KEPT = 1000


class Decisions:
    """The last decisions by id, and counts of all."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, dict[str, Any]] = OrderedDict()
        # Shadow decisions of requests whose answers are still made.
        self._ahead: OrderedDict[str, dict[str, Any]] = OrderedDict()
        self.tally = Tally()

    def add(self, entry: Mapping[str, Any]) -> None:
        """Keep an entry of the log."""
        self.tally.add(entry)
        if entry["kind"] == "shadow":
            shadow = {"shadow": {key: entry[key] for key in ("router", "winner", "agrees")}}
            (self._kept if entry["id"] in self._kept else self._ahead).setdefault(entry["id"], {}).update(shadow)
        else:
            self._kept[entry["id"]] = {**entry, **self._ahead.pop(entry["id"], {})}
        for entries in (self._kept, self._ahead):
            while len(entries) > MOST_KEPT:
                entries.popitem(last=False)

    def get(self, decision_id: str) -> dict[str, Any] | None:
        """One of them."""
        return self._kept.get(decision_id)

    def last(self, limit: int) -> list[dict[str, Any]]:
        """The last ones, the very last first."""
        return [entry for _, entry in zip(range(limit), reversed(self._kept.values()), strict=False)]


class Tally:
    """Counts of decisions: requests, those that no expert fitted, and those that each expert answered."""

    def __init__(self) -> None:
        self.requests = self.fallback = self.shadow_requests = self.shadow_agree = 0
        self.experts: Counter[str] = Counter()
        self.shadow_router: str | None = None

    def add(self, entry: Mapping[str, Any]) -> None:
        """Count an entry of the log; a dry run answers nothing."""
        if entry["kind"] == "shadow":
            self.shadow_router = entry["router"]
            self.shadow_requests += 1
            self.shadow_agree += entry["agrees"]
        elif entry["endpoint"] != "route":
            self.requests += 1
            self.fallback += entry["is_fallback"]
            self.experts.update(_names(entry["experts"]))

    def to_json(self) -> dict[str, Any]:
        """What `/v1/usage` answers with."""
        shadow = {"router": self.shadow_router, "requests": self.shadow_requests, "agree": self.shadow_agree}
        return {
            "requests": self.requests,
            "fallback": self.fallback,
            "experts": dict(self.experts.most_common()),
            "shadow": None if self.shadow_router is None else shadow,
        }


def _names(experts: Sequence[Mapping[str, Any]]) -> list[str]:
    return [str(expert["name"]) for expert in experts]
