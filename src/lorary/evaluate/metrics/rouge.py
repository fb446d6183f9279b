"""ROUGE-L: how much of the longest common subsequence of words answer and reference share."""

import hashlib
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

from lorary.data.schema import Row
from lorary.errors import MissingExtraError
from lorary.evaluate.metrics.metric import AnswerMetric
from lorary.evaluate.sandbox import Sandbox

_WORD = re.compile("[a-z0-9]")


def rouge_l(answer: str, references: Sequence[str]) -> float:
    """Largest ROUGE-L F-measure over the references, words stemmed, by the package rouge-score.

    Raises:
        MissingExtraError: if rouge-score is not installed.
    """
    scorer = _rouge_scorer()
    return max(float(scorer.score(reference, answer)["rougeL"].fmeasure) for reference in references)


def single_reference(row: Row) -> str:
    """One reference of a row, drawn by the row's content: the same at every time and in every order of rows.

    The paper's code scores its held-out instructions against one reference drawn at random, not the best of all.
    """
    digest = hashlib.sha256(row.canonical_json().encode()).digest()
    return row.references[int.from_bytes(digest[:8], "big") % len(row.references)]


@lru_cache(maxsize=1)
def _rouge_scorer() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise MissingExtraError("rouge-score", "eval") from error
    return RougeScorer(["rougeL"], use_stemmer=True)


@dataclass(frozen=True)
class RougeMetric(AnswerMetric):
    """ROUGE-L over all references of a row, or over one of them.

    Args:
        is_single: whether one reference counts, which `single_reference` draws.
    """

    is_single: bool = False

    def references(self, row: Row) -> Sequence[str]:
        """The references of a row that count."""
        return (single_reference(row),) if self.is_single else row.references

    def check(self, rows: Sequence[Row], sandbox: Sandbox | None) -> None:
        """Warn of rows whose references have no word that rouge-score knows: it reads a to z and digits alone."""
        silent = sum(not any(_WORD.search(text.lower()) for text in self.references(row)) for row in rows)
        if silent:
            message = f"ROUGE-L finds no word (a to z, 0 to 9) in the references of {silent} rows, which score 0"
            warnings.warn(f"task '{rows[0].task}': {message}", stacklevel=3)

    def judge(self, sandbox: Sandbox | None) -> Mapping[str, Any]:
        """The version of rouge-score."""
        return {"judge": version("rouge-score")} if find_spec("rouge_score") else {}


_MEANING = "how much of a reference's word order the generated answer keeps (F-measure)"
ROUGE_L = RougeMetric("rougeL", "ROUGE-L", _MEANING, compare=rouge_l)
ROUGE_L_SINGLE = RougeMetric("rougeL_single", "rougeL_single", compare=rouge_l, is_single=True)
