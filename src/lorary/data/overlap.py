"""Which training tasks overlap held-out ones: by the name of their data, and by word n-grams of their rows.

A run of 8 words is the unit. Runs of 13, as for training corpora of long documents (arXiv 2005.14165), pass over rows
of instruction tasks, which have some thirty words with their prompt around a shorter content: between 104 training
tasks and 18 held-out ones they found three of the six pairs that runs of 8 found, one of which was met by chance. Runs
that many rows of a held-out task share are its instruction, not its content, and do not count.
"""

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat

import numpy as np

from lorary.data.schema import Row, Task

NGRAM = 8
# A run of words in more rows of a held-out task than this, or in more than half of them, is no content.
MOST_ROWS = 10
# Rows of a training task that are looked up at once: bounds the memory.
CHUNK = 4096
# The splits that training sees: one to learn, one to choose the checkpoint.
SEEN = ("train", "val")

# Data sets that go by several names, each spelling without separators. A name mentions one of them where some of its
# parts, joined, are a spelling: `super_glue_boolq`, `bool_q_1_0_0`.
DATA_SETS: Mapping[str, tuple[str, ...]] = {
    "arc": ("arc", "ai2arc", "arceasy", "arcchallenge", "arce", "arcc"),
    "bbh": ("bbh", "bigbenchhard", "bigbench"),
    "boolq": ("boolq", "booleanquestions"),
    "commonsense_qa": ("commonsenseqa", "csqa"),
    "glucose": ("glucose",),
    "gsm8k": ("gsm8k", "gradeschoolmath"),
    "hellaswag": ("hellaswag",),
    "humaneval": ("humaneval",),
    "jfleg": ("jfleg",),
    "mbpp": ("mbpp", "mostlybasicpythonproblems"),
    "mmlu": ("mmlu", "hendryckstest"),
    "mnli": ("mnli", "multinli"),
    "numeric_fused_head": ("numericfusedhead",),
    "openbookqa": ("openbookqa", "obqa"),
    "piqa": ("piqa", "physicaliqa"),
    "politifact": ("politifact",),
    "qasc": ("qasc",),
    "spolin": ("spolin",),
    "tweetqa": ("tweetqa",),
    "web_nlg": ("webnlg",),
    "winogrande": ("winogrande",),
    "xlsum": ("xlsum",),
}
# Spellings that are words of their own as well: they are the whole name or none.
WORDS = frozenset({"arc"})
_BY_SPELLING = {spelling: name for name, spellings in DATA_SETS.items() for spelling in spellings}
# Letters of scripts whose words are not told apart by spaces, or hold few letters: Thai, hangul, kana, ideographs.
_SINGLE = (
    r"\u0e00-\u0e7f\u1100-\u11ff\u3005-\u3007\u3040-\u30ff\u3130-\u318f\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    r"\uac00-\ud7ff\uf900-\ufaff\uff66-\uffdc\U00020000-\U0003ffff"
)
# Marks that are part of a letter's sound in scripts of South Asia; elsewhere they are points that a text may leave out.
_MARKS = "".join(chr(code) for code in range(0x0900, 0x10A0) if unicodedata.category(chr(code)).startswith("M"))
_WORD = re.compile(rf"(?=\w)[{_SINGLE}]|(?:[^\W_{_SINGLE}]|[{_MARKS}])+")
# Combining marks of Latin, Hebrew and Arabic letters, and characters that nobody sees.
_UNSEEN = re.compile(
    "[\u00ad\u0300-\u036f\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7\u0610-\u061a\u064b-\u065f\u0670"
    "\u06d6-\u06dc\u06df-\u06e8\u06ea-\u06ed\u200b-\u200f\u2060-\u2064\ufeff]"
)


@dataclass(frozen=True)
class Overlap:
    """What a training task shares with a held-out one.

    Args:
        train: the training task.
        heldout: the held-out task.
        name: the data set that both names mention, or the name that both are; None where they share none.
        train_rows: training and validation rows that hold a run of words of the held-out task's rows.
        heldout_rows: rows of the held-out task that are found so, of all its splits.
        example: one such run.
    """

    train: str
    heldout: str
    name: str | None
    train_rows: int = 0
    heldout_rows: int = 0
    example: str | None = None


@dataclass(frozen=True)
class Overlaps:
    """All pairs that share something, and the rows that share text.

    Args:
        pairs: sorted by training task.
        rows: by training task and split, positions of the rows that share text with some held-out row.
    """

    pairs: list[Overlap]
    rows: Mapping[str, Mapping[str, list[int]]] = field(default_factory=dict)


def find_overlaps(train: Mapping[str, Task], heldout: Mapping[str, Task], *, ngram: int = NGRAM) -> Overlaps:
    """Compare every training task with every held-out one.

    Args:
        train: tasks to train on, by name; their training and validation rows count.
        heldout: tasks to keep apart, by name; their rows of every split count.
        ngram: words of a run. Rows that are equal as a whole count whatever their length.
    """
    index = _Index(list(heldout.values()), ngram)
    pairs, rows = [], {}
    for task in train.values():
        matches = index.find(task)
        if matches.rows:
            rows[task.name] = matches.rows
        for place, heldout_name in enumerate(heldout):
            name, shared = shared_name(task.name, heldout_name), matches.by_task.get(place)
            if shared is not None:
                pairs.append(Overlap(task.name, heldout_name, name, *shared))
            elif name is not None:
                pairs.append(Overlap(task.name, heldout_name, name))
    return Overlaps(sorted(pairs, key=lambda pair: (pair.train, pair.heldout)), rows)


def shared_name(first: str, second: str) -> str | None:
    """The data set that two names of tasks mention, or the name that both are; None where there is none.

    >>> shared_name("ai2_arc_ARC_Easy_1_0_0", "arc_easy")
    'arc'
    >>> shared_name("drop_2_0_0", "task123_drop")
    'drop'
    """
    common = _data_sets(first) & _data_sets(second)
    if common:
        return min(common)
    first_parts, second_parts = _name_parts(first), _name_parts(second)
    return "_".join(first_parts) if first_parts and first_parts == second_parts else None


def _name_parts(name: str) -> list[str]:
    """Parts of a name in lower case, without the number of a task in front and a version (1_0_0) behind."""
    parts = re.findall(r"[^\W_]+", _folded(name))
    if len(parts) > 1 and re.fullmatch(r"task\d+", parts[0]):
        parts = parts[1:]
    return parts[:-3] if len(parts) > 3 and all(part.isdigit() for part in parts[-3:]) else parts


def _data_sets(name: str) -> set[str]:
    parts = _name_parts(name)
    runs = ("".join(parts[i:j]) for i in range(len(parts)) for j in range(i + 1, len(parts) + 1))
    return {_BY_SPELLING[run] for run in runs if run in _BY_SPELLING and (run not in WORDS or [run] == parts)}


def _words(row: Row) -> list[str]:
    """The words of a row, or all its text as one where it has none: such rows are not alike for that."""
    text = _folded(f"{row.source} {row.target}")
    return _WORD.findall(text) or [text.strip()]


def _folded(text: str) -> str:
    """A text in one of the forms that Unicode has for it, in lower case."""
    return text.lower() if text.isascii() else _UNSEEN.sub("", unicodedata.normalize("NFKC", text).casefold())


@dataclass(frozen=True)
class _Matches:
    by_task: Mapping[int, tuple[int, int, str]]
    rows: Mapping[str, list[int]]


class _Index:
    """Runs of words of the held-out rows, as 64-bit hashes; words that no held-out row has are not told apart."""

    def __init__(self, tasks: Sequence[Task], ngram: int) -> None:
        self._ngram = ngram
        self._ids: dict[str, int] = {}
        self._whole: dict[bytes, list[tuple[int, int]]] = {}
        self._texts = [[_words(row) for row in _rows(task, task.rows)] for task in tasks]
        for text in (text for texts in self._texts for text in texts):
            for word in text:
                self._ids.setdefault(word, len(self._ids) + 1)
        # One number for each word, drawn once: what a run hashes to is the same in every process.
        self._values = np.random.default_rng(0).integers(1, 1 << 63, len(self._ids) + 1, dtype=np.uint64) | np.uint64(1)
        parts = [self._task_runs(place, texts) for place, texts in enumerate(self._texts)]
        table = np.concatenate([part for part in parts if len(part)] or [np.empty(0, _RUN)])
        self._table = table[np.argsort(table["hash"], kind="stable")]
        self._hashes = np.unique(self._table["hash"])

    def _task_runs(self, place: int, texts: Sequence[list[str]]) -> np.ndarray:
        """(hash, task, row, word) of each run of a held-out task that is content, the first of each row."""
        first_rows: dict[bytes, int] = {}
        for row, text in enumerate(texts):
            self._whole.setdefault(_key(text), []).append((place, row))
            first_rows.setdefault(_key(text), row)
        hashes, rows, starts = self._runs(texts)
        runs = np.empty(len(hashes), _RUN)
        runs["hash"], runs["task"], runs["row"], runs["start"] = hashes, place, rows, starts
        runs = runs[np.lexsort((starts, rows, hashes))]
        is_first = np.ones(len(runs), bool)
        is_first[1:] = (runs["hash"][1:] != runs["hash"][:-1]) | (runs["row"][1:] != runs["row"][:-1])
        runs = runs[is_first]
        # A row that comes again says nothing about what is an instruction.
        is_new = np.zeros(len(texts), bool)
        is_new[list(first_rows.values())] = True
        _, inverse = np.unique(runs["hash"], return_inverse=True)
        counts = np.bincount(inverse, weights=is_new[runs["row"]], minlength=0)
        most = min(MOST_ROWS, max(len(first_rows) // 2, 1))
        return runs[counts[inverse] <= most]

    def _runs(self, texts: Sequence[list[str]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Hash, row and first word of each run of known words."""
        n = self._ngram
        # A word that is not known ends a run, and so does the end of a row: 0 stands for both.
        listed: list[int] = []
        for text in texts:
            listed.extend(map(self._ids.get, text, repeat(0)))
            listed.append(0)
        ids = np.array(listed, dtype=np.int64)
        lengths = np.array([len(text) + 1 for text in texts], dtype=np.int64)
        if len(ids) < n:
            return np.empty(0, np.uint64), np.empty(0, np.int64), np.empty(0, np.int64)
        rows = np.repeat(np.arange(len(texts)), lengths)
        starts = np.arange(len(ids)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        breaks = np.concatenate([[0], np.cumsum(ids == 0)])
        places = np.flatnonzero(breaks[n:] == breaks[:-n])
        values, hashes = self._values[ids], np.zeros(len(places), np.uint64)
        for step in range(n):
            hashes = hashes * _FACTOR + values[places + step]
        return hashes, rows[places], starts[places]

    def find(self, task: Task) -> _Matches:
        """What a training task shares with the held-out tasks."""
        train_rows: dict[int, set[tuple[str, int]]] = {}
        heldout_rows: dict[int, set[int]] = {}
        example: dict[int, str] = {}
        for split in SEEN:
            for start, texts in _chunks(task.split(split)):
                for row, heldout_task, heldout_row, words in self._shared(texts):
                    train_rows.setdefault(heldout_task, set()).add((split, start + row))
                    heldout_rows.setdefault(heldout_task, set()).add(heldout_row)
                    example.setdefault(heldout_task, " ".join(words))
        marked = set().union(*train_rows.values()) if train_rows else set()
        by_split = {split: sorted(row for row_split, row in marked if row_split == split) for split in SEEN}
        return _Matches(
            {place: (len(rows), len(heldout_rows[place]), example[place]) for place, rows in train_rows.items()},
            {split: rows for split, rows in by_split.items() if rows},
        )

    def _shared(self, texts: Sequence[list[str]]) -> Iterator[tuple[int, int, int, Sequence[str]]]:
        """Row, held-out task, its row, and the words, of all that is shared."""
        hashes, rows, _ = self._runs(texts)
        if len(self._hashes):
            place = np.minimum(np.searchsorted(self._hashes, hashes), len(self._hashes) - 1)
            hit = self._hashes[place] == hashes
            bounds = (np.searchsorted(self._table["hash"], hashes[hit], side).tolist() for side in ("left", "right"))
            for row, left, right in zip(rows[hit].tolist(), *bounds, strict=True):
                for _, heldout_task, heldout_row, start in self._table[left:right].tolist():
                    words = self._texts[heldout_task][heldout_row][start : start + self._ngram]
                    yield row, heldout_task, heldout_row, words
        for row, text in enumerate(texts):
            for heldout_task, heldout_row in self._whole.get(_key(text), ()):
                yield row, heldout_task, heldout_row, text[: self._ngram]


def _key(text: Sequence[str]) -> bytes:
    return hashlib.blake2b("\n".join(text).encode("utf-8", "surrogatepass"), digest_size=16).digest()


_RUN = np.dtype([("hash", np.uint64), ("task", np.int64), ("row", np.int64), ("start", np.int64)])
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no word of a run is lost


def _rows(task: Task, splits: Iterable[str]) -> Iterator[Row]:
    for split in splits:
        yield from task.split(split)


def _chunks(rows: Sequence[Row]) -> Iterator[tuple[int, list[list[str]]]]:
    for start in range(0, len(rows), CHUNK):
        yield start, [_words(row) for row in rows[start : start + CHUNK]]
