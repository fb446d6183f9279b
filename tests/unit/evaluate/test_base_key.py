"""The hash of a whole base: scores are kept by it, so that whatever changes an answer must change it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lorary
from lorary.data.schema import Task
from lorary.data.tokenizer_content import text_of
from lorary.evaluate.base_key import content_of_base, content_of_files
from lorary.evaluate.evaluate_library import evaluate_library
from lorary.evaluate.seated_base import known_base, known_unloaded
from lorary.evaluate.settings import EvaluateSettings
from lorary.formats.base import resolve_base
from lorary.library.store import Library
from lorary.model.base import Base, load_base

CHAT = "{% for m in messages %}<|end|>{{ m['content'] }}{% endfor %}:"
SETTINGS = EvaluateSettings(routers=("arrow",), top_k=1, rows=2, routing_rows=0)


@pytest.fixture
def folder(tiny_base_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny base that a test may change; its tokenizer has a chat template."""
    copy = tmp_path / "base"
    shutil.copytree(tiny_base_folder, copy)
    (copy / "chat_template.jinja").write_text(CHAT)
    return copy


def edit(file: Path, change: Callable[[Any], None]) -> None:
    document = json.loads(file.read_text()) if file.exists() else {}
    change(document)
    file.write_text(json.dumps(document))


def swap_merges(document: Any) -> None:
    merges = document["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]


CHANGES: dict[str, tuple[str, Callable[[Any], None]]] = {
    "merges": ("tokenizer.json", swap_merges),
    "normaliser": ("tokenizer.json", lambda d: d.update(normalizer={"type": "Lowercase"})),
    "prefix space": ("tokenizer.json", lambda d: d["pre_tokenizer"].update(add_prefix_space=True)),
    "added token": ("tokenizer.json", lambda d: d["added_tokens"].append({
        "id": 299, "content": "<new>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
        "special": True})),
    "eos": ("tokenizer_config.json", lambda d: d.update(eos_token="a")),
    "bos": ("tokenizer_config.json", lambda d: d.update(bos_token="b")),
    "truncation side": ("tokenizer_config.json", lambda d: d.update(truncation_side="left")),
    "generation's eos": ("generation_config.json", lambda d: d.update(eos_token_id=[0, 7])),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_tokens_or_the_end_of_an_answer_is_part_of_a_base(folder: Path, change: str) -> None:
    before = content_of_files(resolve_base(folder))
    name, edited = CHANGES[change]
    edit(folder / name, edited)
    assert content_of_files(resolve_base(folder)) != before
    assert content_of_base(load_base(folder)) != before


def test_the_hash_is_the_same_from_files_and_in_memory_wherever_they_lie(folder: Path, tmp_path: Path) -> None:
    files = content_of_files(resolve_base(folder))
    base = load_base(folder)
    base.tokenizer(["a", "longer"], padding=True)
    other = tmp_path / "elsewhere"
    shutil.copytree(folder, other)
    assert files == content_of_base(base) == content_of_files(resolve_base(other))
    assert known_unloaded(str(folder), dtype="auto", device="cpu").content == known_base(base).content


def library_over(folder: Path, path: Path, random_adapter: Callable[..., Any], generator: Any) -> Library:
    library = Library.create(path, str(folder))
    model = load_base(folder).model
    library.add_adapter(random_adapter(model, "alpha", generator), {"tasks": ["alpha"], "template": "plain"})
    return library


def rows_in(path: Path) -> str:
    rows = [{"task": "alpha", "split": "test", "source": f"Row {i}:", "target": "up"} for i in range(2)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_base_with_another_chat_template_is_scored_anew(
    folder: Path, tmp_path: Path, random_adapter: Callable[..., Any], generator: Any
) -> None:
    library = library_over(folder, tmp_path / "lib", random_adapter, generator)
    tasks = rows_in(tmp_path / "tasks.jsonl")

    def losses() -> dict[str, float]:
        found = lorary.evaluate(str(library.path), tasks, routers=["base"], rows=2)
        return {cell.template: cell.value for cell in found.cells if cell.metric == "loss"}

    before = losses()
    assert losses() == before
    (folder / "chat_template.jinja").write_text("Say it. " + CHAT)
    after = losses()
    assert after["plain"] == before["plain"]
    assert after["chat"] != before["chat"]


@pytest.fixture
def dated(folder: Path) -> Base:
    (folder / "chat_template.jinja").write_text("It is {{ strftime_now('%d %b %Y') }}. " + CHAT)
    return load_base(folder)


def test_a_chat_template_that_prints_the_date_is_told_of_and_its_text_recorded_and_scored_anew(
    dated: Base, tmp_path: Path, random_adapter: Callable[..., Any], generator: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datetime import datetime

    from transformers.utils import chat_template_utils

    from lorary.data.tasks import load_tasks

    class Later(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> "Later":
            return cls(2031, 5, 6)

    library = library_over(Path(dated.files.path), tmp_path / "lib", random_adapter, generator)
    tasks: dict[str, Task] = load_tasks(rows_in(tmp_path / "tasks.jsonl"))

    def prefixes() -> set[str]:
        with pytest.warns(UserWarning, match="chat template prints the date, .* prompts begin 'It is "):
            found = evaluate_library(dated, library, tasks, SETTINGS)
        return {cell.prefix for cell in found.cells if cell.template == "chat"}

    [today] = prefixes()
    assert today == f"It is {datetime.now():%d %b %Y}. <|end|>"
    monkeypatch.setattr(chat_template_utils, "datetime", Later)
    with pytest.warns(UserWarning, match="06 May 2031"):
        found = evaluate_library(dated, library, tasks, SETTINGS)
    assert {cell.prefix for cell in found.cells if cell.template == "chat"} == {"It is 06 May 2031. <|end|>"}
    assert text_of(dated.tokenizer, "chat")["prompt_prefix"] == "It is 06 May 2031. <|end|>"
