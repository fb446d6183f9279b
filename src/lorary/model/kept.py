"""Verdicts on base models, kept in the cache folder so that the trial of a model runs once."""

import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import nn

from lorary.caching import cache_folder
from lorary.reading import read_json


@dataclass(frozen=True)
class Verdict:
    """What is known of a base model.

    Args:
        fault: why it cannot be used, as the value that an error shows; empty where it can.
        rule: what does not hold then.
        dead: paths of linear layers that reach no logits, in the model's order.
        positions: how many positions its tables hold; None where it has no table.
        shift: what it adds to positions that it counts itself, and not to those that it is given.
        flat: paths of linear layers that are given the tokens of all rows along one axis, row by row.
    """

    fault: str = ""
    rule: str = ""
    dead: tuple[str, ...] = ()
    positions: int | None = None
    shift: int = 0
    flat: tuple[str, ...] = ()


def read_verdict(key: str, model: nn.Module) -> Verdict | None:
    """The kept verdict; None where there is none, or it is damaged or of another model.

    Args:
        key: what decides the verdict, as a hash.
        model: that it is about.
    """
    try:
        document = read_json(_place(key))
        fields = document["verdict"]
        dead, positions, shift, flat = fields["dead"], fields["positions"], fields["shift"], fields["flat"]
        if document["key"] != key or not isinstance(fields["fault"], str) or not isinstance(fields["rule"], str):
            return None
        paths = {path for path, _ in model.named_modules()}
        if not all(isinstance(listed, list) and paths.issuperset(listed) for listed in (dead, flat)):
            return None
        if not isinstance(shift, int) or (positions is not None and (not isinstance(positions, int) or positions < 1)):
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Verdict(fields["fault"], fields["rule"], tuple(dead), positions, shift, tuple(flat))


def write_verdict(key: str, verdict: Verdict) -> None:
    """Keep a verdict; without a cache that can be written, the next process tries again.

    Args:
        key: what decides the verdict, as a hash.
        verdict: of a trial.
    """
    place = _place(key)
    aside = place.with_name(f"{key}.{os.getpid()}.new")
    with suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(json.dumps({"key": key, "verdict": asdict(verdict)}), encoding="utf-8")
        os.replace(aside, place)


def _place(key: str) -> Path:
    return cache_folder() / "verdicts" / f"{key}.json"
