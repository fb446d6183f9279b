"""Generated programs against the tests of their row: what `pass@k` runs."""

import warnings
from collections.abc import Mapping, Sequence

from lorary.data.schema import Row, Task, shorten
from lorary.errors import TaskError
from lorary.evaluate.decoding import Decoding, decoding_of
from lorary.evaluate.metrics.passing import parse_pass, pass_at_k
from lorary.evaluate.sandbox import Sandbox

# A completion ends where the text leaves the function: all of HumanEval's own solutions stay whole. The paper's code
# ends it at a blank line, which cuts 34 of the 164 short of a right program.
STOP = ("\nclass", "\ndef", "\n#", "\n@", "\nif", "\nprint")
MAX_NEW_TOKENS = 300


def default_decoding(k: int) -> Decoding:
    """How programs are generated where a row does not say: the likeliest one, or k different ones."""
    if k == 1:
        return Decoding(MAX_NEW_TOKENS, STOP)
    return Decoding(MAX_NEW_TOKENS, STOP, samples=k, temperature=0.8, top_p=0.95)


def check_runner(metric: str, rows: Sequence[Row], sandbox: Sandbox | None) -> None:
    """Refuse, before anything is generated, what `pass@k` could not score.

    Raises:
        TaskError: if programs may not be run, a row has no tests, or it asks for fewer than k sampled programs.
    """
    k = parse_pass(metric)
    if k is None:
        return
    task = rows[0].task
    if sandbox is None:
        raise _not_allowed(task, metric)
    for row in rows:
        program_of(row, "")
        how = decoding_of(row, default_decoding(k))
        if k > 1 and (how.temperature == 0 or how.samples < k):
            raise TaskError(
                f"{metric} of task '{task}' needs {k} sampled programs or more a row",
                found=f"{how.samples} at temperature {how.temperature}",
                remedy="raise samples and temperature of 'generation' in extra",
            )


def leave_out_code(tasks: Mapping[str, Task]) -> dict[str, Task]:
    """The tasks that can be scored without running programs; those left out are named in a warning.

    Raises:
        TaskError: if there is no other task: what was asked for cannot be done at all.
    """
    code = [name for name, task in tasks.items() if parse_pass(task.metric) is not None]
    if code and len(code) == len(tasks):
        raise _not_allowed(code[0], tasks[code[0]].metric)
    if code:
        warnings.warn(f"left out: {', '.join(code)} (running generated code needs --allow-code)", stacklevel=3)
    return {name: task for name, task in tasks.items() if name not in code}


def _not_allowed(task: str, metric: str) -> TaskError:
    return TaskError(
        f"task '{task}' is scored by running what the model writes, which must be allowed",
        found=f"metric {metric}, and no leave to run code",
        remedy="--allow-code (allow_code=True) runs it in a sandbox",
    )


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


def pass_score(row: Row, completions: Sequence[str], k: int, sandbox: Sandbox) -> float:
    """`pass@k` of one row, estimated from all its completions.

    Raises:
        TaskError: if the sandbox runs no program at all, which must not count against this one.
    """
    outcomes = [sandbox.run(program_of(row, completion)) for completion in completions]
    broken = next((outcome for outcome in outcomes if outcome.status == "broken"), None)
    if broken is not None and not sandbox.run("").passed:
        raise TaskError("the sandbox must run programs", found=broken.detail or "it said nothing",
                        remedy="see docs/evaluation.md, Generated code")  # fmt: skip
    return pass_at_k(len(completions), sum(outcome.passed for outcome in outcomes), k)
