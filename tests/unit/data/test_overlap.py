"""What training and held-out tasks share: names of data, and runs of words, against a plain search."""

import pytest
import torch

from lorary.data.overlap import Overlap, find_overlaps, shared_name
from lorary.data.schema import Row, Task, make_task

FACT = "the slow brown tortoise was seen walking over nine frozen hills"


def task(name: str, *texts: str, split: str = "train", **more: tuple[str, ...]) -> Task:
    rows = [Row(name, own, text, "yes") for own, texts in {split: texts, **more}.items() for text in texts]
    return make_task(name, rows, "here")


def named(*tasks: Task) -> dict[str, Task]:
    return {one.name: one for one in tasks}


@pytest.mark.parametrize(
    ("one", "other", "name"),
    [
        ("ai2_arc_ARC_Easy_1_0_0", "arc_easy", "arc"),
        ("ai2_arc_ARC_Challenge_1_0_0", "arc_challenge", "arc"),
        ("bool_q_1_0_0", "boolq", "boolq"),
        ("super_glue/boolq:1.0.2", "BoolQ", "boolq"),
        ("openbookqa_0_1_0", "obqa", "openbookqa"),
        ("winogrande_1_1_0", "task035_winogrande_question_modification_person", "winogrande"),
        ("glue_mnli_2_0_0", "task202_mnli_contradiction_classification", "mnli"),
        ("gem_web_nlg_en_1_1_0", "task1728_web_nlg_data_to_text", "web_nlg"),
        ("drop_2_0_0", "drop", "drop"),
        ("task12_reading", "reading", "reading"),
        ("MBPP-sanitized", "mbpp", "mbpp"),
        ("social_i_qa_Generate_answer", "piqa", None),
        ("swag_context", "hellaswag", None),
        ("search_results", "arc_easy", None),
        ("add_numbers", "subtract_numbers", None),
        ("1", "2", None),
        ("topic_1", "topic_9", None),
        ("resume_arc", "arc_easy", None),
        ("arc", "arc_easy", "arc"),
        ("\u7ffb\u8bd1", "\u7ffb\u8bd1", "\u7ffb\u8bd1"),
    ],
)
def test_names_are_the_same_where_they_name_the_same_data(one: str, other: str, name: str | None) -> None:
    assert shared_name(one, other) == shared_name(other, one) == name


def test_tasks_that_share_a_name_overlap_without_a_common_word() -> None:
    found = find_overlaps(named(task("bool_q_1_0_0", "one two")), named(task("boolq", "three four", split="test")))
    assert found.pairs == [Overlap("bool_q_1_0_0", "boolq", "boolq")]
    assert found.rows == {}


def test_a_run_of_words_is_found_wherever_it_stands_and_however_it_is_written() -> None:
    train = task("a", f"Question: is it true that {FACT.upper()}?", "another row of no interest to anybody at all here")
    held = task("b", f"{FACT}, or so they say.", split="test")
    found = find_overlaps(named(train), named(held))
    [pair] = found.pairs
    assert (pair.train, pair.heldout, pair.name, pair.train_rows, pair.heldout_rows) == ("a", "b", None, 1, 1)
    assert pair.example is not None
    assert pair.example in FACT
    assert len(pair.example.split()) == 8
    assert found.rows == {"a": {"train": [0]}}


def test_validation_rows_count_and_test_rows_of_the_training_task_do_not() -> None:
    train = task("a", "nothing", val=("nothing", FACT), test=(FACT,))
    found = find_overlaps(named(train), named(task("b", FACT, split="test")))
    assert found.rows == {"a": {"val": [1]}}


def test_seven_words_in_common_are_too_few_and_eight_are_not() -> None:
    held = named(task("b", FACT, split="test"))
    words = FACT.split()
    for number, rows in ((7, {}), (8, {"a": {"train": [0]}})):
        text = " ".join(["before", *words[1 : 1 + number], "after", "the", "end"])
        assert find_overlaps(named(task("a", text)), held).rows == rows


def test_a_run_does_not_go_over_the_end_of_a_row() -> None:
    words = FACT.split()
    train = task("a", " ".join(words[:6]), " ".join(words[6:]))
    assert find_overlaps(named(train), named(task("b", FACT, split="test"))).pairs == []


def test_the_instruction_of_a_held_out_task_is_no_content() -> None:
    instruction = "Say whether the following sentence about animals is true or false please"
    facts = [f"{instruction}: number {i} of them" for i in range(12)]
    held = named(task("b", *facts, split="test"))
    assert find_overlaps(named(task("a", f"{instruction}: cats can fly to the moon and back")), held).pairs == []
    assert find_overlaps(named(task("a", facts[3])), held).pairs[0].heldout_rows == 1


def test_rows_shorter_than_a_run_count_where_the_whole_row_is_equal() -> None:
    held = named(task("b", "Fire is", split="test"))
    found = find_overlaps(named(task("a", "fire is", "the fire is")), held)
    assert found.rows == {"a": {"train": [0]}}
    assert found.pairs[0].example == "fire is yes"


@pytest.mark.parametrize(
    "text",
    [
        "昨天下午有一只乌龟慢慢地走过了九座冰冻的小山", "きのうカメがこおったおかをゆっくりこえていった",
        "어제오후에거북이한마리가언덕을천천히넘어갔다", "เต่าตัวหนึ่งเดินข้ามเนินเขาที่เป็นน้ำแข็ง",
    ],
)  # fmt: skip
def test_text_without_spaces_is_found_inside_another_one(text: str) -> None:
    held = named(task("b", f"x{text}y", split="test"))
    found = find_overlaps(named(task("a", f"0、{text}。"), task("c", text[:7])), held)
    assert [(pair.train, pair.train_rows) for pair in found.pairs] == [("a", 1)]


def test_rows_without_words_overlap_where_their_text_is_equal() -> None:
    rows = [Row("b", "test", "( [ {", "} ] )")]
    held = named(make_task("b", rows, "here"))
    other = [Row("a", "train", "( (", ") )"), Row("a", "train", " ( [ {", "} ] ) ")]
    assert find_overlaps(named(make_task("a", other, "here")), held).rows == {"a": {"train": [1]}}


def test_each_held_out_task_and_row_is_told_apart() -> None:
    other = "quite another sentence that has more than eight words in it"
    held = named(task("b", FACT, other, split="test"), task("c", other, split="test"))
    found = find_overlaps(named(task("a", FACT, other, f"{FACT} {other}"), task("d", "no")), held)
    assert [(p.train, p.heldout, p.train_rows, p.heldout_rows) for p in found.pairs] == [
        ("a", "b", 3, 2), ("a", "c", 2, 1)
    ]  # fmt: skip


def test_equal_rows_count_whatever_their_length_and_however_often_they_come() -> None:
    row = "nine words that stand in one row alone here"
    held = task("b", row, split="test", val=(row,))
    [pair] = find_overlaps(named(task("a", row)), named(held)).pairs
    assert (pair.train_rows, pair.heldout_rows) == (1, 2)
    # All runs of the row stand in most rows, like an instruction: it is a row of the task all the same.
    passage = "a passage of more than eight words which all of the questions are about"
    asked = [passage, *(f"{number} {passage}" for number in range(6))]
    [pair] = find_overlaps(named(task("a", passage)), named(task("b", *asked, split="test"))).pairs
    assert (pair.train_rows, pair.heldout_rows) == (1, 1)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("caf\u00e9 d\u00e9j\u00e0 vu r\u00f4le na\u00efve \u00e9t\u00e9 for\u00eat h\u00f4tel",
         "cafe\u0301 de\u0301ja\u0300 vu ro\u0302le nai\u0308ve e\u0301te\u0301 fore\u0302t ho\u0302tel"),
        ("\u0643\u062a\u0628 " * 8, "\u0643\u064e\u062a\u064e\u0628\u064e " * 8),
        ("brown foxes jump over very lazy dogs today", "brown fox\u00ades jump over\u200b very lazy dogs today"),
        ("brown foxes jump over very lazy dogs today", "_brown_ _foxes_ jump over very lazy dogs today"),
        ("STRASSE one two three four five six seven", "stra\u00dfe one two three four five six seven"),
    ],
    ids=["composed", "vowel points", "unseen", "underscores", "folded"],
)  # fmt: skip
def test_the_forms_that_unicode_has_for_a_text_are_one(one: str, other: str) -> None:
    assert find_overlaps(named(task("a", f"x {one}")), named(task("b", f"y {other}", split="test"))).pairs


def test_vowel_signs_of_hindi_end_no_word() -> None:
    four = "\u092e\u0941\u091d\u0947 \u0915\u093f\u0924\u093e\u092c \u092a\u0922\u093c\u0928\u093e \u0939\u0948"
    train, held = task("a", f"{four} one"), task("b", f"{four} two", split="test")
    assert not find_overlaps(named(train), named(held)).pairs


def test_nothing_to_compare_is_no_overlap() -> None:
    empty = Task("b", "none", "heldout", "em", {})
    assert find_overlaps(named(task("a", FACT)), named(empty)).pairs == []
    assert find_overlaps(named(task("a", FACT)), {}).pairs == []
    assert find_overlaps({}, named(task("b", FACT))).pairs == []


def test_random_texts_agree_with_a_plain_search(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorary.data.overlap.CHUNK", 7)

    def texts(number: int) -> list[str]:
        lengths = torch.randint(1, 12, (number,), generator=generator).tolist()
        return [" ".join(f"w{i}" for i in torch.randint(0, 4, (n,), generator=generator)) for n in lengths]

    train, held = task("a", *texts(60)), task("b", *texts(9), split="test")
    n = 4

    def runs(row: Row) -> set[tuple[str, ...]]:
        words = [*row.source.split(), row.target]
        return {tuple(words)} if len(words) < n else {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}

    held_runs = [runs(row) for row in held.split("test")]
    counts = {run: sum(run in own for own in held_runs) for own in held_runs for run in own}
    content = {run for run, count in counts.items() if count <= 4 or len(run) < n}
    expected = [i for i, row in enumerate(train.split("train")) if runs(row) & content]
    assert 3 < len(expected) < 57
    found = find_overlaps(named(train), named(held), ngram=n)
    assert found.rows == {"a": {"train": expected}}
    seen = {run for row in train.split("train") for run in runs(row)}
    assert found.pairs[0].heldout_rows == sum(bool(own & content & seen) for own in held_runs)
