"""The contest of the routing benchmark: cases, and contenders who take turns at them round by round."""

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, TypeVar

import harness
import torch
from route_floor import Extras, base_count, pool_size
from route_models import MOST_PEER_EXPERTS, MOST_PEER_TOKENS, Contender, Shelf

DECODE_STEPS = 16
LEAST_ROUNDS = 2
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Case:
    """One case of the contest.

    Args:
        name: of its rows.
        tokens: of each row, in one pass.
        batch: rows.
        cached: tokens of each row that went before; with them a turn is `DECODE_STEPS` passes, and its time the
            median of all but the first.
    """

    name: str
    tokens: int
    batch: int = 1
    cached: int = 0

    @property
    def context(self) -> float:
        """Tokens that a token attends to, on average."""
        return self.cached + DECODE_STEPS / 2 if self.cached else (self.tokens + 1) / 2


CASES = (
    Case("prefill-128", 128),
    Case("prefill-512", 512),
    Case("prefill-2048", 2048),
    Case("decode-1", 1, batch=1, cached=128),
    Case("decode-8", 1, batch=8, cached=128),
)


class Work:
    """What a contender is given in a case: the same ids for all of them, behind the same cache.

    Args:
        case: the case.
        base: the bare base; its cache serves all contenders, whose time does not depend on what is in it. Only one
            that decides where a request begins makes its own, outside of the time that is taken.
    """

    @torch.no_grad()
    def __init__(self, case: Case, base: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        passes = DECODE_STEPS if case.cached else 1
        ids = torch.randint(
            0, base.config.vocab_size, (case.batch, case.cached + passes * case.tokens), generator=generator
        )
        self.passes = list(ids[:, case.cached :].split(case.tokens, dim=1))
        self.prompt = ids[:, : case.cached]
        self.cache = base(input_ids=self.prompt).past_key_values if case.cached else None

    @torch.no_grad()
    def seconds(self, model: Any, *, own_cache: bool = False) -> float:
        """Seconds of one pass."""
        cache, times = self.cache, []
        if cache is not None and own_cache:
            cache = model(input_ids=self.prompt).past_key_values
        for ids in self.passes:
            start = time.perf_counter()
            model(input_ids=ids, past_key_values=cache, use_cache=cache is not None)
            times.append(time.perf_counter() - start)
        if cache is not None and cache is self.cache:
            cache.crop(-len(self.passes))
        return median(times[1:] or times)


def takes_part(contender: Contender, case: Case, *, all_rules: bool) -> bool:
    """Whether a contender has its turn in a case: long prompts are for the base and Arrow, short ones for PEFT's."""
    if contender.is_peer and contender.name == "arrow":
        return contender.experts <= MOST_PEER_EXPERTS and case.tokens <= MOST_PEER_TOKENS
    return all_rules or case.tokens <= MOST_PEER_TOKENS or contender.name in ("bare base", "arrow")


def take_turns(turns: Mapping[Key, Callable[[], float]], seconds: float) -> dict[Key, list[float]]:
    """Give each a turn, round by round, so that what the machine does besides meets all of them.

    Args:
        turns: each returns its figure, in seconds.
        seconds: rounds are begun until then, and at least `LEAST_ROUNDS` of them.

    Returns:
        Figures of each, one for each round.
    """
    found: dict[Key, list[float]] = {key: [] for key in turns}
    start, rounds = time.perf_counter(), 0
    while rounds < LEAST_ROUNDS or time.perf_counter() - start < seconds:
        for key, turn in turns.items():
            found[key].append(turn())
        rounds += 1
    return found


def run_case(
    case: Case, shelf: Shelf, contenders: Sequence[Contender], *, seconds: float, all_rules: bool
) -> list[dict[str, Any]]:
    """Run a case.

    Args:
        case: the case.
        shelf: base and layers.
        contenders: the bare base first.
        seconds: see `take_turns`.
        all_rules: whether all have a turn at prompts of any length.

    Returns:
        Rows of the table.
    """
    sides = [one for one in contenders if takes_part(one, case, all_rules=all_rules)]
    routed = [one.routed for one in sides if one.routed is not None]
    pool = torch.randn(pool_size(routed, shelf.targets))
    work, tokens = Work(case, shelf.model), case.batch * case.tokens

    def turn(one: Contender) -> Callable[[], float]:
        def run() -> float:
            with one.turn() as model:
                return work.seconds(model, own_cache=one.decides_once)

        return run

    turns: dict[Hashable, Callable[[], float]] = {one: turn(one) for one in sides}
    for one in routed:
        turns[one] = Extras(one, shelf.targets, pool, tokens).seconds
    work.seconds(shelf.model)  # the first pass of a size finds memory for it
    return case_rows(case, shelf, sides, take_turns(turns, seconds))


def case_rows(
    case: Case, shelf: Shelf, sides: Sequence[Contender], found: Mapping[Hashable, Sequence[float]]
) -> list[dict[str, Any]]:
    """One row for each contender, PEFT's beside ours of the same name."""
    base, others = found[sides[0]], sides[1:]
    ours = {(one.name, one.experts): one for one in others if not one.is_peer}
    peers = {(one.name, one.experts): one for one in others if one.is_peer}

    def ms(key: Hashable) -> float | None:
        return None if key is None else 1e3 * median(found[key])

    rows = []
    for key in dict.fromkeys([*ours, *peers]):
        mine, theirs = ours.get(key), peers.get(key)
        extra = ms(mine.routed) if mine is not None else None
        entry = harness.row(
            f"{shelf.name} {case.name} E={key[1]}", key[0], "ms", "lower",
            ours=ms(mine), base=1e3 * median(base), peer=ms(theirs),
            floor=None if extra is None else 1e3 * median(base) + extra,
        )  # fmt: skip
        rows.append({**entry, **beside(case, shelf, key, mine, found)})
    return rows


def beside(
    case: Case, shelf: Shelf, key: tuple[str, int], mine: Contender | None, found: Mapping[Hashable, Sequence[float]]
) -> dict[str, Any]:
    """What a row says beside the figures: the floor by counting, the spread over rounds, and why PEFT is missing."""
    more: dict[str, Any] = {}
    if mine is not None and mine.routed is not None:
        bare = base_count(shelf.model, case.context)
        more["floor_ratio"] = 1 + mine.routed.count(shelf.targets) / bare
        base = next(iter(found.values()))
        ratios = [a / b for a, b in zip(found[mine], base, strict=False)]
        more["spread"] = [min(ratios), max(ratios)]
        more["rounds"] = len(ratios)
    name, experts = key
    if name == "arrow" and (experts > MOST_PEER_EXPERTS or case.tokens > MOST_PEER_TOKENS):
        more["note"] = f"PEFT not run: a pass needs {peer_bytes(case, shelf, experts) / 1e9:.2g} GB"
    return more


def peer_bytes(case: Case, shelf: Shelf, experts: int) -> int:
    """Bytes that PEFT holds at once in the widest layer: the outputs of all experts, and these once more, scaled."""
    widest = max(d_out for _, d_out in shelf.targets.values())
    return 2 * case.batch * case.tokens * experts * widest * 4
