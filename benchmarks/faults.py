"""Injected faults: processes that die, disks that fail or are full, in each system call of what writes to a library.

    python benchmarks/faults.py [--faults 10000] [--seed 0] [--after 0] [--operations add,pull] [--json]

Each operation runs in a forked process with one kind of fault at one of its system calls: first at calls that change
something, then errors at calls that read. The last tenth of the runs has two or three faults at random calls. After
each, a fresh reader must see the state before or after the step that was interrupted, and whatever was acknowledged.
The same work must then succeed, give the state after it, and leave nothing behind. Beside some of the faults another
process reads all the while. A run that was ended (SIGTERM) tells what it saw, and goes on with --after. The exit code
is 1 if anything was otherwise.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stderr, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from faults_calls import READING, install, kinds_for
from faults_work import ABSENT, NEEDED, Operation, make_place, operations, tiny_model

from lorary.errors import LoraryError
from lorary.library.layout import STAGING
from lorary.library.store import Library
from lorary.remote import store

DONE, REFUSED, NAMELESS = 0, 3, 4
MOST_S = 60
READER_EVERY = 10
# Whatever ends so is left over.
LEFTOVERS = (".new", ".tmp", ".part")


@dataclass
class Findings:
    """What was seen.

    Args:
        faults: number of faults that came, by operation and kind.
        ends: by operation, how the processes ended.
        wrong: what was otherwise than it has to be.
        readings: by the readers beside.
        single: how many pairs of a call and a kind of fault there are.
    """

    faults: Counter[tuple[str, str]] = field(default_factory=Counter)
    ends: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    wrong: list[str] = field(default_factory=list)
    readings: int = 0
    single: int = 0


class Bench:
    """Places to disturb operations in.

    Args:
        folder: for all files.
        findings: are added to.
    """

    def __init__(self, folder: Path, findings: Findings) -> None:
        self.folder, self.findings = folder, findings
        model = tiny_model()
        self.operations = operations(model)
        # Made where it is used, since a library remembers its remotes by their paths.
        self._start, self._place = folder / "start", folder / "place"
        make_place(self._place, model)
        shutil.copytree(self._place, self._start)
        self._states: dict[str, list[Any]] = {}
        self._calls: dict[str, list[str]] = {}

    def calls(self, operation: Operation) -> list[str]:
        """The system calls of an operation that nothing disturbs; its states are noted, too."""
        if operation.name not in self._calls:
            self._begin(operation)
            states = [operation.look(self._place)]
            for _ in operation.work(self._place):  # what is imported late is imported here
                states.append(operation.look(self._place))
            assert len({json.dumps(state, sort_keys=True) for state in states}) > 1, operation.name
            self._states[operation.name] = states
            self._begin(operation)
            read, write = os.pipe()
            child = self._fork(operation, {}, write, tell_calls=True)
            os.close(write)
            with open(read, encoding="utf-8") as pipe:
                told = pipe.read()
            assert self._wait(child) == DONE, f"{operation.name}: {told}"
            self._calls[operation.name] = [*json.loads(told.lstrip(".")), "end"]
        return self._calls[operation.name]

    def _begin(self, operation: Operation) -> None:
        shutil.rmtree(self._place, ignore_errors=True)
        self._place.mkdir()
        for name in {"lib", *NEEDED.get(operation.name, ())} - {ABSENT.get(operation.name)}:
            shutil.copytree(self._start / name, self._place / name)

    def _fork(self, operation: Operation, faults: Mapping[int, str], pipe: int, *, tell_calls: bool = False) -> int:
        child = os.fork()
        if child:
            return child
        code, story = NAMELESS, ""
        try:
            store.FIRST_WAIT_S = 0.0
            write = os.write
            calls = install(faults, str(self._place))
            try:
                for _ in operation.work(self._place):
                    write(pipe, b".")
                code = DONE
            except LoraryError:
                code = REFUSED
            if tell_calls:
                write(pipe, json.dumps(calls.names).encode())
            calls("end", lambda: None)
        except BaseException:
            story = traceback.format_exc()
        finally:
            if story:
                write(pipe, story.encode()[-3000:])
            os._exit(code)

    def _wait(self, child: int) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def disturb(self, operation: Operation, faults: Mapping[int, str], *, beside: bool = False) -> None:
        """One operation with faults at some calls, and all that must hold afterwards."""
        self._begin(operation)
        states = self._states[operation.name]
        reader = self._read_beside(operation, states) if beside else None
        read, write = os.pipe()
        child = self._fork(operation, faults, write)
        os.close(write)
        signal.alarm(MOST_S)
        with open(read, "rb") as pipe:
            told = pipe.read()
        status = self._wait(child)
        signal.alarm(0)
        acknowledged = len(told) - len(told.lstrip(b"."))
        end = {DONE: "done", REFUSED: "refused", -signal.SIGKILL: "killed"}.get(status, "nameless error")
        self.findings.ends[operation.name][end] += 1
        for kind in faults.values():
            self.findings.faults[operation.name, kind] += 1
        try:
            if end == "nameless error":
                raise AssertionError(f"ended with {status}: {told.decode(errors='replace')[-2500:]}")
            if reader is not None:
                self._stop(*reader)
            self._check(operation, states, acknowledged, is_done=status == DONE)
        except Exception as error:
            where = ", ".join(f"{kind} at {n} ({self._name(operation, n)})" for n, kind in faults.items())
            text = f"{type(error).__name__}: {error}" if not isinstance(error, AssertionError) else str(error)
            self.findings.wrong.append(f"{operation.name}: {where}: {text}")

    def _name(self, operation: Operation, number: int) -> str:
        names = self._calls[operation.name]
        return names[number] if number < len(names) else "later"

    def _check(self, operation: Operation, states: Sequence[Any], acknowledged: int, *, is_done: bool) -> None:
        allowed = [states[acknowledged]] if is_done else states[acknowledged : acknowledged + 2]
        seen = operation.look(self._place)
        if not fits(seen, allowed):
            raise AssertionError(f"after it: {difference(seen, allowed)}")
        for _ in operation.work(self._place):
            pass
        seen = operation.look(self._place)
        if not fits(seen, states[-1:]):
            raise AssertionError(f"done again: {difference(seen, states[-1:])}")
        library = Library.open(self._place / "lib")
        library.set_default_router(library.default_router)
        if left := sorted(leftovers(self._place)):
            raise AssertionError(f"left over: {left}")

    def _read_beside(self, operation: Operation, states: Sequence[Any]) -> tuple[int, int, int]:
        read, write = os.pipe()
        stopping, stop = os.pipe()
        child = os.fork()
        if child:
            os.close(write)
            os.close(stopping)
            return child, read, stop
        os.close(stop)
        os.set_blocking(stopping, False)
        code, readings = 0, 0
        try:
            while True:
                seen = operation.look(self._place)
                if not fits(seen, states):
                    raise AssertionError(f"{difference(seen, states)}")
                readings += 1
                try:
                    os.read(stopping, 1)
                    break
                except BlockingIOError:
                    time.sleep(0.001)
            os.write(write, str(readings).encode())
        except BaseException:
            os.write(write, traceback.format_exc().encode()[-3000:])
            code = 1
        os._exit(code)

    def _stop(self, child: int, read: int, stop: int) -> None:
        os.close(stop)
        with open(read, encoding="utf-8", errors="replace") as pipe:
            told = pipe.read()
        if self._wait(child):
            raise AssertionError(f"the reader beside: {told}")
        self.findings.readings += int(told)


def fits(seen: Any, allowed: Sequence[Any]) -> bool:
    """Whether a state is one of those that may be; lines of results come one by one, and none may be lost."""
    if not isinstance(seen, dict) or "results" not in seen:
        return any(seen == state for state in allowed)
    states = [state or {"results": {}} for state in allowed]
    least, most = states[0]["results"].items(), states[-1]["results"].items()
    lines = seen["results"].items()
    return least <= lines <= most and any(
        {**seen, "results": ""} == {**state, "results": ""} for state in states if "adapters" in state
    )


def difference(seen: Any, allowed: Sequence[Any]) -> str:
    """In what a state differs from the last that may be."""
    state = allowed[-1]
    if not (isinstance(seen, dict) and isinstance(state, dict)):
        return f"a reader sees {str(seen)[:300]}, not {str(state)[:300]}"
    parts = [key for key in {**seen, **state} if seen.get(key) != state.get(key)]
    return "; ".join(f"{key} is {str(seen.get(key))[:600]}, not {str(state.get(key))[:600]}" for key in parts)


def leftovers(place: Path) -> Iterator[str]:
    """What an operation that is done must not leave."""
    for path in place.rglob("*"):
        if path.name == STAGING or path.name.endswith(LEFTOVERS):
            yield str(path.relative_to(place))


def schedule(bench: Bench, chosen: Sequence[Operation], number: int, draw: random.Random) -> Iterator[tuple[Any, Any]]:
    """Operations and their faults: each kind at each call, changing ones first; several at random calls at the end.

    Those are a tenth of all at least.
    """
    each = [
        (operation, {at: kind})
        for operation in chosen
        for at, name in enumerate(bench.calls(operation))
        for kind in kinds_for(name)
    ]
    draw.shuffle(each)
    each.sort(key=lambda pair: all(bench.calls(pair[0])[at] in READING for at in pair[1]))
    bench.findings.single = len(each)
    singles = each[: number - number // 10]
    yield from singles
    for _ in range(number - len(singles)):
        operation = draw.choice(chosen)
        names = bench.calls(operation)
        places = sorted(draw.sample(range(len(names)), min(len(names), draw.choice((2, 3)))))
        yield operation, {at: draw.choice(kinds_for(names[at])) for at in places}


def measure(options: argparse.Namespace, folder: Path) -> Findings:
    """Run all of it."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    findings, draw, began = Findings(), random.Random(options.seed), time.perf_counter()
    with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):  # operations tell how they go
        say = sys.__stderr__
        bench = Bench(folder, findings)
        names = options.operations.split(",") if options.operations else None
        chosen = [operation for operation in bench.operations if names is None or operation.name in names]
        last = began
        # What was seen so far is told when somebody ends it.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with suppress(KeyboardInterrupt):
            planned = enumerate(schedule(bench, chosen, options.faults, draw), 1)
            for number, (operation, faults) in islice(planned, options.after, None):
                bench.disturb(operation, faults, beside=number % READER_EVERY == 0)
                if time.perf_counter() - last > 1 and not options.quiet:
                    last = time.perf_counter()
                    print(f"{number:,} of {options.faults:,}, {len(findings.wrong)} wrong, {last - began:.0f} s",
                          file=say, flush=True)  # fmt: skip
    return findings


def table(findings: Findings) -> str:
    """What was seen, for people."""
    kinds = sorted({kind for _, kind in findings.faults})
    ends = ("done", "refused", "killed", "nameless error")
    lines = [f"{'operation':<14}{'faults':>8}" + "".join(f"{end:>16}" for end in ends)]
    for name, counter in findings.ends.items():
        number = sum(count for (operation, _), count in findings.faults.items() if operation == name)
        lines.append(f"{name:<14}{number:>8}" + "".join(f"{counter[end]:>16}" for end in ends))
    lines.append("")
    lines += [f"{kind:<28}{sum(n for (_, k), n in findings.faults.items() if k == kind):>8}" for kind in kinds]
    lines.append(
        f"\n{findings.single:,} pairs of a call and a kind; {sum(findings.faults.values()):,} faults; "
        f"{findings.readings:,} readings beside; {len(findings.wrong)} wrong"
    )
    return "\n".join(lines)


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=10_000, help="runs of an operation, each with at least one fault")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--after", type=int, default=0, help="go on after so many, of a run that was ended")
    parser.add_argument("--operations", help="only these, separated by commas")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quiet", action="store_true", help="do not tell how it goes")
    return parser.parse_args(arguments)


def main() -> int:
    options = parsed()
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        findings = measure(options, Path(folder))
    if options.json:
        rows = [{"case": name, "figure": kind, "unit": "faults", "ours": count, "better": "higher"}
                for (name, kind), count in sorted(findings.faults.items())]  # fmt: skip
        print(json.dumps({"rows": rows, "wrong": findings.wrong, "readings": findings.readings}))
    else:
        print(table(findings))
        for text in findings.wrong[:40]:
            print(f"wrong: {text}")
    return 1 if findings.wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
