"""What a metric is: words for reports, what it needs of rows, and how it scores them in 0..1, higher is better."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorary.data.schema import Row
from lorary.evaluate.decoding import Decoding
from lorary.evaluate.sandbox import Sandbox


@dataclass(frozen=True)
class Metric:
    """A metric.

    Args:
        name: as tasks write it.
        title: as reports write it.
        meaning: of its mean over rows, as the end of a sentence; "" where the title says it.
    """

    name: str
    title: str
    meaning: str = ""

    def check(self, rows: Sequence[Row], sandbox: Sandbox | None) -> None:
        """Refuse rows of a task that could not be scored; programs run in the sandbox, or nowhere without one."""

    def judge(self, sandbox: Sandbox | None) -> Mapping[str, Any]:
        """What decides a score beside the model, the data and Lorary, as values of JSON."""
        return {}


@dataclass(frozen=True)
class AnswerMetric(Metric):
    """A metric of generated answers; here each is compared with the references of its row.

    Args:
        compare: the score of one answer against references.
        decoding: how answers are generated where a row does not say; None for the likeliest, as long as a reference.
        keep_breaks: whether line breaks before an answer are part of it.
    """

    compare: Callable[[str, Sequence[str]], float] | None = None
    decoding: Decoding | None = None
    keep_breaks: bool = False

    def references(self, row: Row) -> Sequence[str]:
        """The references of a row that count."""
        return row.references

    def score(self, row: Row, answers: Sequence[str], sandbox: Sandbox | None) -> float:
        """The score of a row from all answers that were generated for it: their mean."""
        assert self.compare is not None
        references = self.references(row)
        return sum(self.compare(answer, references) for answer in answers) / len(answers)
