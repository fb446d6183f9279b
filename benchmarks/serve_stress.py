"""A server under all that clients do: many at once, some that leave, some that send nonsense, adapters that change.

    python benchmarks/serve_stress.py LIB [--clients 64] [--seconds 300 | --requests 2000] [--answer 12] [--json]

A real server process answers over HTTP on this machine, from a copy of the library. An adapter is added, replaced and
removed all the while. Each complete answer is compared with what `lorary generate` gives in the states of the library
that were in force meanwhile; the beginning of an answer that a client left is compared, too. The run has three parts;
between two of them all clients rest, and the server's memory, Python objects and used places are looked at. The exit
code is 1 if an answer was wrong, a place stayed in use, memory grew, or a status was none of the documented ones.
"""

import argparse
import asyncio
import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

COUNTED_SERVER = "--counted-server"
# What runs this file.
COMMAND = (sys.executable, __file__)
PARTS = ("first third", "second third", "end")
SETTLE_S, END_S = 60.0, 90.0
# Growth from the first third to the end that counts as none: what is kept of the last requests has come to its bounds
# only then, and the allocator keeps some of what it had.
MOST_RSS, MOST_OBJECTS = 1.05, 1.05
SLACK_MIB, SLACK_OBJECTS = 32.0, 25_000
MOST_SHOWN = 12


@dataclass(frozen=True)
class Mark:
    """The server at rest.

    Args:
        when: in words.
        rss: memory, in MiB.
        objects: that Python's collector knows.
        tensors: among them.
        places: answers that wait or are made, and requests under way; 0 at rest.
    """

    when: str
    rss: float
    objects: int
    tensors: int
    places: int


class Server:
    """`lorary serve` in a process of its own, which counts its objects when it gets SIGUSR1.

    Args:
        library: folder of the library.
        folder: for what it writes.
        tokens: of the server, and of who changes the library.
        options: further ones of the command.
    """

    def __init__(self, library: Path, folder: Path, tokens: tuple[str, str], options: Sequence[str]) -> None:
        self._counts, self._errors = folder / "counts.json", folder / "stderr.txt"
        self._pid = 0
        secret = {"LORARY_TOKEN": tokens[0], "LORARY_ADMIN_TOKEN": tokens[1]}
        with open(self._errors, "w") as errors:
            self.process = subprocess.Popen(
                [*COMMAND, COUNTED_SERVER, str(self._counts), "serve", str(library), "--port", "0", *options],
                stdout=subprocess.PIPE, stderr=errors, text=True, env={**os.environ, **secret},
            )  # fmt: skip

    def address(self) -> str:
        """Where it listens, once it does."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if found := re.fullmatch(r"process (\d+)\n", line):
                self._pid = int(found[1])
            elif found := re.search(r"serving \S+ at (\S+)", line):
                return found[1]
        raise SystemExit(f"the server did not start:\n{self.errors()}")

    def errors(self) -> str:
        """What it wrote to stderr."""
        return self._errors.read_text(errors="replace")

    def memory(self, field: str) -> float:
        """`VmRSS`, or `VmHWM` for the most there was, in MiB."""
        status = Path(f"/proc/{self._pid}/status").read_text()
        return int(re.search(rf"{field}:\s+(\d+) kB", status)[1]) / 1024  # type: ignore[index]

    async def count(self) -> dict[str, int]:
        """Its objects."""
        self._counts.unlink(missing_ok=True)
        os.kill(self._pid, signal.SIGUSR1)
        end = time.monotonic() + SETTLE_S
        while not self._counts.exists():
            if time.monotonic() > end:
                raise SystemExit("the server did not count its objects")
            await asyncio.sleep(0.05)
        counts: dict[str, int] = json.loads(self._counts.read_text())
        return counts

    def end(self) -> int:
        """End it as an operator does; its exit code."""
        if self.process.poll() is None and self._pid:
            os.kill(self._pid, signal.SIGTERM)
        try:
            return self.process.wait(END_S)
        except subprocess.TimeoutExpired:
            os.kill(self._pid, signal.SIGKILL)
            return self.process.wait()
        finally:
            if self.process.stdout is not None:
                self.process.stdout.close()


def run_counted_server(counts: str, arguments: Sequence[str]) -> None:
    """Become `lorary` with a handler that counts objects."""
    import torch

    from lorary.cli import main as lorary

    def count(*_: object) -> None:
        gc.collect()
        kinds = [type(each) for each in gc.get_objects()]
        numbers = {"objects": len(kinds), "tensors": sum(issubclass(kind, torch.Tensor) for kind in kinds)}
        part = Path(f"{counts}.part")
        part.write_text(json.dumps(numbers))
        part.rename(counts)

    signal.signal(signal.SIGUSR1, count)
    print(f"process {os.getpid()}", flush=True)
    sys.argv = ["lorary", *arguments]
    lorary()


async def mark(when: str, server: Server, clients: Any) -> Mark:
    """Look at the server, once nothing is under way, or after a while."""
    end = time.monotonic() + SETTLE_S
    while (places := await _places(clients)) and time.monotonic() < end:
        await asyncio.sleep(0.1)
    counts = await server.count()
    return Mark(when, server.memory("VmRSS"), counts["objects"], counts["tensors"], places)


async def _places(clients: Any) -> int:
    text = (await clients.client.get("/metrics")).text
    numbers = re.findall(r"^lorary_(?:queue_waiting|queue_running|requests_under_way) (\S+)$", text, re.MULTILINE)
    assert len(numbers) == 3, text
    return int(sum(map(float, numbers)))


def limits(args: argparse.Namespace) -> list[Callable[[], bool]]:
    """For each part, whether another request is to be made."""

    def counted(number: int) -> Callable[[], bool]:
        left = iter(range(number))
        return lambda: next(left, None) is not None

    def timed(seconds: float) -> Callable[[], bool]:
        ends: list[float] = []

        def goes_on() -> bool:
            ends[:] = ends or [time.monotonic() + seconds]
            return time.monotonic() < ends[0]

        return goes_on

    if args.requests is None:
        return [timed(args.seconds / len(PARTS)) for _ in PARTS]
    return [counted(args.requests // len(PARTS) + (part < args.requests % len(PARTS))) for part in range(len(PARTS))]


async def stress(server: Server, clients: Any, args: argparse.Namespace) -> list[Mark]:
    """All parts; how the server stood at the start and behind each."""
    marks = [await mark("start", server, clients)]
    for part, goes_on in zip(PARTS, limits(args), strict=True):
        await clients.run(args.clients, f"{args.seed} {part}", goes_on)
        marks.append(await mark(part, server, clients))
    await clients.client.aclose()
    return marks


def faults(findings: Any, marks: Sequence[Mark], code: int, errors: str) -> list[str]:
    """What is wrong, in words."""
    first, last = marks[1], marks[-1]
    undocumented = {status: n for status, n in findings.statuses.items() if status >= 500 and status not in (503, 504)}
    checks = (
        (bool(findings.wrong), f"{len(findings.wrong)} requests came out wrong"),
        (bool(undocumented), f"statuses that no page tells of: {undocumented}"),
        (any(each.places for each in marks), "places stayed in use"),
        (last.rss > MOST_RSS * first.rss + SLACK_MIB, f"memory grew from {first.rss:.0f} to {last.rss:.0f} MiB"),
        (
            last.objects > MOST_OBJECTS * first.objects + SLACK_OBJECTS,
            f"objects grew from {first.objects} to {last.objects}",
        ),
        (code != 0, f"the server ended with exit code {code}"),
        ("error:" in errors, "the server wrote of errors"),
    )
    return [text for is_so, text in checks if is_so]


def quantile(values: Sequence[float], share: float) -> float | None:
    """In milliseconds; None of nothing."""
    return 1000 * sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else None


def table(result: dict[str, Any]) -> str:
    """All figures, for people."""
    outcomes = ("right", "refused", "done", "left", "busy", "503", "504", "wrong")
    lines = [" ".join([f"{'requests':<14}", *(f"{outcome:>8}" for outcome in outcomes)])]
    for kind, numbers in result["requests"].items():
        lines.append(" ".join([f"{kind:<14}", *(f"{numbers.get(outcome, 0):>8}" for outcome in outcomes)]))
    lines += ["", f"{'server':<14} {'RSS, MiB':>10} {'objects':>10} {'tensors':>10} {'places':>10}"]
    for each in result["marks"]:
        lines.append(
            f"{each['when']:<14} {each['rss']:>10.0f} {each['objects']:>10} {each['tensors']:>10} {each['places']:>10}"
        )
    lines.append(f"most memory: {result['peak']:.0f} MiB; requests: {result['number']} in {result['seconds']:.0f} s")
    for name, values in result["times"].items():
        shown = ["-" if value is None else f"{value:.0f}" for value in values]
        lines.append(f"{name}: p50 {shown[0]} ms, p95 {shown[1]} ms (wall clock)")
    lines += ["", "nothing is wrong" if not result["faults"] else "\n".join(result["faults"]), *result["examples"]]
    return "\n".join(lines)


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Compute what is right, serve, ask, and compare."""
    # The server's process imports nothing of it.
    from serve_stress_answers import expected_answers
    from serve_stress_clients import MOST_BODY, Clients

    from lorary.library.opening import base_of
    from lorary.library.store import Library
    from lorary.model.base import load_base

    library = Library.open(shutil.copytree(args.library, folder / "lib"))
    base = load_base(base_of(library, None))
    expected = expected_answers(base, library, folder, num_prompts=args.prompts, num_tokens=args.answer)
    del base
    gc.collect()
    tokens = ("secret", "root")
    server = Server(library.path, folder, tokens, ["--max-body", str(MOST_BODY), "--max-requests", str(args.places)])
    try:
        clients = Clients(server.address(), *tokens, expected, args.answer)
        begin = time.monotonic()
        marks = asyncio.run(stress(server, clients, args))
        seconds, peak = time.monotonic() - begin, server.memory("VmHWM")
    finally:
        code = server.end()
    findings = clients.findings
    kinds = dict.fromkeys(kind for kind, _ in findings.requests)
    return {
        "requests": {
            kind: {outcome: number for (other, outcome), number in findings.requests.items() if other == kind}
            for kind in kinds
        },
        "number": sum(number for (kind, _), number in findings.requests.items() if kind != "watch"),
        "statuses": {str(status): number for status, number in sorted(findings.statuses.items())},
        "marks": [asdict(each) for each in marks],
        "peak": peak,
        "seconds": seconds,
        "times": {
            "first token": [quantile(findings.first, share) for share in (0.5, 0.95)],
            "between tokens": [quantile(findings.between, share) for share in (0.5, 0.95)],
        },
        "faults": faults(findings, marks, code, server.errors()),
        "examples": [*findings.wrong[:MOST_SHOWN], *server.errors().splitlines()[:MOST_SHOWN]],
    }


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--places", type=int, default=64, help="requests that the server takes at a time")
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--requests", type=int, help="so many, in place of a time")
    parser.add_argument("--answer", type=int, default=12, help="most tokens of an answer")
    parser.add_argument("--prompts", type=int, default=6, help="prompts of different lengths")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(arguments)


def main() -> None:
    args = parsed(sys.argv[1:])
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory(prefix="lorary-stress-") as folder:
        result = measure(args, Path(folder))
    print(json.dumps(result) if args.json else table(result))
    sys.exit(1 if result["faults"] else 0)


if __name__ == "__main__":
    if sys.argv[1:2] == [COUNTED_SERVER]:
        run_counted_server(sys.argv[2], sys.argv[3:])
    else:
        main()
