"""Hostile files by the hundred thousand: does each reader return, or raise a named error, soon and in little memory?

    python benchmarks/fuzz.py [--files 100000] [--seed 0] [--kind KIND] [--keep FOLDER] [--only NUMBER] [--json]

Whole files (adapters, libraries, remotes, rows, base models, studies) get one to three damages each, drawn from the
seed and the number of the file. Forked processes read them, and each call is measured by itself. A finding is: an error
that is none of Lorary's or does not say where; a call of more than a second or of more than 100 MB; a process that
dies; a file that is taken in and should not be, or is not what it says. The exit code is 1 if there is a finding.
"""

import argparse
import contextlib
import ctypes
import gc
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from fuzz_files import Case, write_tree
from fuzz_targets import KINDS, NAMES, Readers, Whole, WrongError, check_readers, draw, make_whole, quiet_place
from harness import report, row

from lorary.cores import usable_cores
from lorary.errors import LoraryError

MOST_S, MOST_BYTES = 1.0, 100 * 1024**2
# A process that says nothing for so long is ended.
SILENT_S = 60.0
# A process is replaced after so many files, or once it keeps more memory than this.
BLOCK, MOST_KEPT = 2000, 48 * 1024**2
# Growth after which memory that is free is given back to the system.
MUCH = 8 * 1024**2
# What a process may ask the system for, beside what it has at its start.
MOST_ADDRESSES = 8 * 1024**3
MOST_MESSAGE = 3000
# What a remote speaks of, which lies there under other names.
LIBRARY_NAMES = ("library.json", "derived/", "evaluation.jsonl")
SAY_EVERY_S = 5.0


@dataclass(frozen=True)
class Finding:
    """Something wrong.

    Args:
        number: of the file.
        kind: of the file.
        call: that went wrong.
        damages: what was done to the file.
        what: went wrong.
        where: the last lines of a traceback, where there is one.
    """

    number: int
    kind: str
    call: str
    damages: list[str]
    what: str
    where: str = ""


@dataclass
class Measured:
    """What a process tells of one file: how many calls returned and refused, the longest one, the most memory."""

    number: int
    kind: str
    returned: int = 0
    refused: int = 0
    seconds: float = 0.0
    growth: int = 0


class Meter:
    """Time and memory of this process: what the system kept it waiting for a core is no time of its own."""

    def __init__(self) -> None:
        self.seconds, self.growth = 0.0, 0
        self._status = os.open("/proc/self/status", os.O_RDONLY)
        self._waits = os.open("/proc/self/schedstat", os.O_RDONLY)
        self._peak = os.open("/proc/self/clear_refs", os.O_WRONLY)

    def resident(self) -> tuple[int, int]:
        """Memory in bytes: now, and at the most since it was last looked at from anew."""
        text = os.pread(self._status, 4096, 0)
        now, most = (int(text.partition(field)[2].split(None, 1)[0]) * 1024 for field in (b"VmRSS:", b"VmHWM:"))
        return now, most

    @contextlib.contextmanager
    def measured(self) -> Iterator[None]:
        """Measure a block; the peak of memory is counted from its start."""
        os.write(self._peak, b"5")
        (before, _), began, waited = self.resident(), time.perf_counter(), self._waited()
        try:
            yield
        finally:
            self.seconds = time.perf_counter() - began - (self._waited() - waited)
            self.growth = max(0, self.resident()[1] - before)

    def _waited(self) -> float:
        return int(os.pread(self._waits, 200, 0).split()[1]) / 1e9


def judge(case: Case, readers: Readers, meter: Meter) -> tuple[Measured, list[Finding]]:
    """Read one case by all that reads its kind."""
    measured, findings = Measured(0, case.kind), list[Finding]()

    def note(call: str, what: str, where: str = "") -> None:
        findings.append(Finding(0, case.kind, call, case.damages, what, where))

    folder = readers.write(case)
    calls = readers.calls(case, folder)
    accepted: list[str] = []
    while True:
        try:
            name, call = next(calls)
        except StopIteration:
            break
        except WrongError as error:
            note("calls", f"wrong: {error}")
            break
        try:
            with meter.measured():
                call()
            accepted.append(name)
            measured.returned += 1
        except LoraryError as error:
            measured.refused += 1
            if problem := problem_of(error, case, folder):
                note(name, problem)
        except WrongError as error:
            note(name, f"wrong: {error}")
        except BaseException as error:
            lines = "".join(traceback.format_exception(error)[-6:])
            note(name, f"{type(error).__name__}: {str(error)[:300]!r}", lines[-1500:])
        if meter.seconds > MOST_S:
            note(name, f"{meter.seconds:.1f} s")
        if meter.growth > MOST_BYTES:
            note(name, f"{meter.growth / 1024**2:.0f} MB")
        measured.seconds, measured.growth = max(measured.seconds, meter.seconds), max(measured.growth, meter.growth)
    if (
        case.must_refuse
        and "read_adapter" in accepted
        and case.where in ("adapter_config.json", "adapter_model.safetensors")
    ):
        note("read_adapter", "wrong: it was taken in")
    return measured, findings


def problem_of(error: LoraryError, case: Case, folder: Path) -> str | None:
    """What is wrong with an error: it must be short, and say of what it speaks."""
    text = str(error)
    if len(text) > MOST_MESSAGE:
        return f"a message of {len(text)} characters: {text[:200]!r}"
    parts = {part for path in case.tree for part in path.split("/")}
    names = {folder.name, *parts, *(Path(part).stem for part in parts), *NAMES, *LIBRARY_NAMES}
    if not error.rule or not any(name in text or ascii(name)[1:-1] in text for name in names if len(name) > 1):
        return f"a message that names no file: {text[:300]!r}"
    return None


def case_of(whole: Whole, seed: int, number: int, kind: str | None) -> Case:
    """The case of a number: the same in every run."""
    return draw(whole, random.Random(f"{seed}:{number}"), kind)


def work(connection: Connection, whole: Whole, numbers: list[int], args: argparse.Namespace) -> None:
    """Read cases one after the other, and tell of each before and after."""
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its processes
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + MOST_ADDRESSES
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    place = Path(tempfile.mkdtemp(dir=args.place))
    os.environ["LORARY_CACHE"] = str(place / "cache")
    readers, meter, trim = Readers(whole, place), Meter(), getattr(ctypes.CDLL(None), "malloc_trim", gc.collect)
    start, _ = meter.resident()
    for number in numbers:
        case = case_of(whole, args.seed, number, args.kind)
        connection.send(number)
        measured, findings = judge(case, readers, meter)
        if any(finding.what.endswith((" s", " MB")) for finding in findings):
            # A machine with other work to do may be slow for once.
            again, others = judge(case, readers, meter)
            repeated = {finding.call for finding in others}
            findings = [finding for finding in findings if finding.call in repeated]
            measured.seconds, measured.growth = min(measured.seconds, again.seconds), max(measured.growth, again.growth)
        measured.number = number
        if measured.growth > MUCH:
            trim(0)
        connection.send((measured, [Finding(**{**asdict(finding), "number": number}) for finding in findings]))
        if meter.resident()[0] - start > MOST_KEPT:
            break
    connection.send(None)
    shutil.rmtree(place, ignore_errors=True)


class Worker:
    """A forked process and the numbers that it still has to read."""

    def __init__(self, whole: Whole, numbers: list[int], args: argparse.Namespace) -> None:
        self.left, self.current, self.spoke = list(numbers), -1, time.monotonic()
        context = multiprocessing.get_context("fork")
        self.connection, theirs = context.Pipe(duplex=False)
        self.process = context.Process(target=work, args=(theirs, whole, numbers, args), daemon=True)
        self.process.start()
        theirs.close()

    def end(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.join()
        self.connection.close()


class Run:
    """All files, read by several processes."""

    def __init__(self, whole: Whole, args: argparse.Namespace) -> None:
        self.whole, self.args = whole, args
        self.measured: list[Measured] = []
        self.findings: list[Finding] = []
        self._blocks = [list(range(at, min(at + BLOCK, args.files))) for at in range(0, args.files, BLOCK)][::-1]
        self._began = self._said = time.monotonic()

    def run(self) -> None:
        """Read them all."""
        workers = [self._next() for _ in range(min(self.args.processes, len(self._blocks)))]
        try:
            self._listen(workers)
        except KeyboardInterrupt:  # what was read is told of
            for worker in workers:
                worker.end()
        self._say(is_last=True)

    def _listen(self, workers: list["Worker"]) -> None:
        while workers:
            ready = wait([worker.connection for worker in workers], timeout=1.0)
            for worker in list(workers):
                if worker.connection in ready and not self._heard(worker):
                    workers.remove(worker)
                    self._replace(worker, workers)
                elif time.monotonic() - worker.spoke > SILENT_S:
                    self._blame(worker, f"no end after {SILENT_S:.0f} s")
                    workers.remove(worker)
                    self._replace(worker, workers)
            self._say()

    def _next(self) -> Worker:
        return Worker(self.whole, self._blocks.pop(), self.args)

    def _replace(self, worker: Worker, workers: list[Worker]) -> None:
        worker.end()
        if worker.left:
            self._blocks.append(worker.left)
        if self._blocks:
            workers.append(self._next())

    def _heard(self, worker: Worker) -> bool:
        """Take a message; whether there may be more."""
        try:
            message = worker.connection.recv()
        except EOFError:
            worker.process.join()
            self._blame(worker, f"the process died: exit code {worker.process.exitcode}")
            return False
        worker.spoke = time.monotonic()
        if message is None:
            return False
        if isinstance(message, int):
            worker.current = message
            return True
        measured, findings = message
        worker.left.remove(measured.number)
        self.measured.append(measured)
        for finding in findings:
            self._found(finding)
        return True

    def _blame(self, worker: Worker, what: str) -> None:
        if worker.current in worker.left:
            worker.left.remove(worker.current)
            case = case_of(self.whole, self.args.seed, worker.current, self.args.kind)
            self.measured.append(Measured(worker.current, case.kind))
            self._found(Finding(worker.current, case.kind, "", case.damages, what))
        else:  # before a file was there: it could not be drawn, and another process goes on with the next
            print(f"file {worker.left.pop(0)} was not drawn: {what}", file=sys.stderr, flush=True)

    def _found(self, finding: Finding) -> None:
        self.findings.append(finding)
        print(f"finding: {show(finding)}", file=sys.stderr, flush=True)
        if self.args.keep is not None:
            case = case_of(self.whole, self.args.seed, finding.number, self.args.kind)
            folder = Path(self.args.keep) / str(finding.number)
            shutil.rmtree(folder, ignore_errors=True)
            write_tree(case.tree, folder / "files")
            (folder / "finding.json").write_text(json.dumps(asdict(finding), indent=1))

    def _say(self, *, is_last: bool = False) -> None:
        now = time.monotonic()
        if is_last or now - self._said > (1.0 if self._said == self._began else SAY_EVERY_S):
            self._said = now
            done, seconds = len(self.measured), now - self._began
            left = (self.args.files - done) * seconds / max(done, 1)
            print(f"{done} of {self.args.files} files, {len(self.findings)} findings, {seconds:.0f} s, "
                  f"about {left:.0f} s left", file=sys.stderr, flush=True)  # fmt: skip


def show(finding: Finding) -> str:
    """In a few lines."""
    lines = [
        f"file {finding.number} ({finding.kind}; {'; '.join(finding.damages)[:300]!a}), {finding.call}: {finding.what}"
    ]
    return "\n".join([*lines, *([finding.where] if finding.where else [])])


def rows_of(run: Run) -> list[dict[str, Any]]:
    """What was measured, by kind of file."""
    by_kind: dict[str, list[Measured]] = defaultdict(list)
    for each in run.measured:
        by_kind[each.kind].append(each)
    wrong = Counter(finding.kind for finding in run.findings)
    rows = []
    for kind in [kind for kind in KINDS if kind in by_kind] + ["all"]:
        group = run.measured if kind == "all" else by_kind[kind]
        figures = (
            ("files", "files", "higher", len(group)),
            ("calls that refused", "calls", "higher", sum(each.refused for each in group)),
            ("calls that returned", "calls", "higher", sum(each.returned for each in group)),
            ("longest call", "s", "lower", max(each.seconds for each in group)),
            ("most memory", "MB", "lower", max(each.growth for each in group) / 1024**2),
            ("findings", "findings", "lower", len(run.findings) if kind == "all" else wrong[kind]),
        )
        rows.extend(row(kind, figure, unit, better, ours=value) for figure, unit, better, value in figures)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=list(KINDS), help="one kind of file only")
    parser.add_argument("--processes", type=int, default=len(usable_cores()))
    parser.add_argument("--keep", metavar="FOLDER", help="where files with findings are kept")
    parser.add_argument("--only", type=int, metavar="NUMBER", help="one file, in this process, with its errors")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell lets what runs behind it ignore the first
        signal.signal(number, signal.default_int_handler)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory(dir=quiet_place(), prefix="lorary-fuzz-", ignore_cleanup_errors=True) as place:
        args.place = place
        whole = make_whole(Path(place) / "whole")
        check_readers(whole, Path(tempfile.mkdtemp(dir=place)))
        if args.only is not None:
            case = case_of(whole, args.seed, args.only, args.kind)
            measured, findings = judge(case, Readers(whole, Path(tempfile.mkdtemp(dir=place))), Meter())
            print(f"{case.kind}: {case.damages}\n{measured}", *map(show, findings), sep="\n")
            return bool(findings)
        gc.freeze()  # what is shared with the processes is not touched by each
        run = Run(whole, args)
        run.run()
    report(rows_of(run), args.json)
    return bool(run.findings)


if __name__ == "__main__":
    sys.exit(main())
