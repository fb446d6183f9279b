"""pass@k: how likely one of k generated programs passes the tests of its row."""

import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import comb
from typing import Any

from lorary.data.schema import Row, shorten
from lorary.errors import TaskError
from lorary.evaluate.decoding import Decoding, decoding_of
from lorary.evaluate.metrics.metric import AnswerMetric
from lorary.evaluate.sandbox import Sandbox

# A completion ends where the text leaves the function: all of HumanEval's own solutions stay whole. The paper's code
# ends it at a blank line, which cuts 34 of the 164 short of a right program.
STOP = ("\nclass", "\ndef", "\n#", "\n@", "\nif", "\nprint")
MAX_NEW_TOKENS = 300
# Each of the k programs of a row is generated and run: more of them would never end.
_PASS = re.compile(r"pass@([1-9][0-9]{0,3})", re.ASCII)


def parse_pass(metric: str) -> int | None:
    """The k of `pass@k`, None for any other metric.

    >>> parse_pass("pass@10"), parse_pass("pass@0"), parse_pass("em")
    (10, None, None)
    """
    match = _PASS.fullmatch(metric)
    return int(match[1]) if match else None


def pass_at_k(num_samples: int, num_passed: int, k: int) -> float:
    """Unbiased estimate that at least one of k programs passes, from n >= k programs of which c passed.

    It is 1 - C(n - c, k) / C(n, k), the share of all draws of k out of the n that hold a program that passed.
    Source: arXiv 2107.03374, equation 1.

    >>> pass_at_k(2, 1, 1), pass_at_k(2, 1, 2)
    (0.5, 1.0)
    """
    return 1.0 - comb(num_samples - num_passed, k) / comb(num_samples, k)


def program_of(row: Row, completion: str) -> str:
    """The program that decides about a completion: the prompt, the completion, the row's tests.

    `extra["test"]` is a text of statements, or a list of them, that raise an error where the program is wrong. Where
    `extra["entry_point"]` names the function, the tests define `check`, as HumanEval's do, which is called with it.

    Raises:
        TaskError: if the row has no such tests.
    """
    test, entry_point = row.extra.get("test"), row.extra.get("entry_point")
    lines = test if isinstance(test, list) else [test]
    if not lines or not all(isinstance(line, str) and line.strip() for line in lines):
        raise TaskError(
            f"a row of task '{row.task}' must give its tests in extra.test, a text or a list of texts",
            found=shorten(test),
        )
    if entry_point is not None:
        if not isinstance(entry_point, str) or not entry_point.isidentifier():
            raise TaskError(f"extra.entry_point of task '{row.task}' must name a function", found=shorten(entry_point))
        lines = [*lines, f"check({entry_point})"]
    return "\n".join([row.source + completion, *lines, ""])


@dataclass(frozen=True)
class PassMetric(AnswerMetric):
    """`pass@k`.

    Args:
        k: how many programs may try.
    """

    k: int = 1

    def check(self, rows: Sequence[Row], sandbox: Sandbox | None) -> None:
        """Refuse, before anything is generated, what could not be scored.

        Raises:
            TaskError: if programs may not be run, a row has no tests, or it asks for fewer than k sampled programs.
        """
        assert self.decoding is not None
        task = rows[0].task
        if sandbox is None:
            raise self.not_allowed(task)
        for row in rows:
            program_of(row, "")
            how = decoding_of(row, self.decoding)
            if self.k > 1 and (how.temperature == 0 or how.samples < self.k):
                raise TaskError(
                    f"{self.name} of task '{task}' needs {self.k} sampled programs or more a row",
                    found=f"{how.samples} at temperature {how.temperature}",
                    remedy="raise samples and temperature of 'generation' in extra",
                )

    def not_allowed(self, task: str) -> TaskError:
        """Why a task is not scored where generated programs may not run."""
        return TaskError(
            f"task '{task}' is scored by running what the model writes, which must be allowed",
            found=f"metric {self.name}, and no leave to run code",
            remedy="--allow-code (allow_code=True) runs it in a sandbox",
        )

    def score(self, row: Row, answers: Sequence[str], sandbox: Sandbox | None) -> float:
        """The estimate from all programs of the row.

        Raises:
            TaskError: if the sandbox runs no program at all, which must not count against this one.
        """
        assert sandbox is not None  # `check` has refused it
        outcomes = [sandbox.run(program_of(row, answer)) for answer in answers]
        broken = next((outcome for outcome in outcomes if outcome.status == "broken"), None)
        if broken is not None and not sandbox.run("").passed:
            raise TaskError("the sandbox must run programs", found=broken.detail or "it said nothing",
                            remedy="see docs/evaluation.md, Generated code")  # fmt: skip
        return pass_at_k(len(answers), sum(outcome.passed for outcome in outcomes), self.k)

    def judge(self, sandbox: Sandbox | None) -> Mapping[str, Any]:
        """What runs the programs."""
        if sandbox is None:
            return {}
        limits = asdict(sandbox.limits)
        return {"sandbox": {"isolation": sandbox.isolation, "python": platform.python_version(), **limits}}


def pass_metric(k: int) -> PassMetric:
    """`pass@k`: where a row does not say, the likeliest program is generated, or k different ones."""
    sampling = {} if k == 1 else {"samples": k, "temperature": 0.8, "top_p": 0.95}
    decoding = Decoding(MAX_NEW_TOKENS, STOP, **sampling)  # type: ignore[arg-type]
    return PassMetric(f"pass@{k}", f"pass@{k}", decoding=decoding, keep_breaks=True, k=k)
