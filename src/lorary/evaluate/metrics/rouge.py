"""ROUGE-L: how much of the longest common subsequence of words answer and reference share."""

import hashlib
import re
import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from lorary.data.schema import Row
from lorary.errors import MissingExtraError

_WORD = re.compile("[a-z0-9]")


def rouge_l(answer: str, references: Sequence[str]) -> float:
    """Largest ROUGE-L F-measure over the references, words stemmed, by the package rouge-score.

    Raises:
        MissingExtraError: if rouge-score is not installed.
    """
    scorer = _rouge_scorer()
    return max(float(scorer.score(reference, answer)["rougeL"].fmeasure) for reference in references)


def warn_of_silence(task: str, references: Sequence[Sequence[str]]) -> None:
    """Say how many rows have references without a word that rouge-score knows: it reads a to z and digits alone.

    Args:
        task: its name.
        references: of each row.
    """
    silent = sum(not any(_WORD.search(text.lower()) for text in own) for own in references)
    if silent:
        message = (
            f"task '{task}': ROUGE-L finds no word (a to z, 0 to 9) in the references of {silent} rows, which score 0"
        )
        warnings.warn(message, stacklevel=2)


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
