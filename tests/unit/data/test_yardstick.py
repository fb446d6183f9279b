"""The prompts that ship with the package: how many kinds, lengths and languages, and always the same ones."""

from collections import Counter
from statistics import median

from lorary.data.yardstick import PER_KIND, measured_prompts, yardstick, yardstick_digest, yardstick_prompts


def test_there_are_many_kinds_of_about_eight_prompts_each() -> None:
    kinds = Counter(prompt.kind for prompt in yardstick())
    assert len(kinds) >= 40
    assert len(yardstick()) >= 320
    assert set(kinds.values()) <= {6, 7, 8}


def test_no_two_prompts_have_one_text_and_no_place_is_left_open() -> None:
    texts = yardstick_prompts()
    assert len(set(texts)) == len(texts)
    assert all(text.strip() and "[[" not in text for text in texts)


def test_lengths_spread_over_two_orders_of_magnitude() -> None:
    words = sorted(len(text.split()) for text in yardstick_prompts())
    assert words[0] <= 3
    assert 8 <= median(words) <= 40
    assert sum(number > 60 for number in words) >= 30
    assert 120 <= words[-1] <= 250


def test_most_are_english_and_the_others_of_many_languages_and_scripts() -> None:
    languages = Counter(prompt.language for prompt in yardstick())
    assert languages["en"] / len(yardstick()) > 0.6
    assert {"de", "fr", "es", "it", "pt", "nl", "ru", "zh", "ja", "ar", "hi"} <= set(languages)
    scripts = {"ru": "а", "zh": "的", "ja": "の", "ar": "ا", "hi": "क"}
    for language, letter in scripts.items():
        assert any(letter in prompt.text for prompt in yardstick() if prompt.language == language), language


def test_formats_that_prompts_come_in_are_there() -> None:
    texts = "\n\n".join(yardstick_prompts())
    for mark in (
        "### Input:",
        "(A)",
        "OPTIONS:",
        "___",
        "def ",
        "SELECT",
        "|---|",
        '{"',
        "Dear Sir",
        "Answer:",
        "<ul>",
    ):
        assert mark in texts, mark


def test_the_prompts_depend_on_the_seed_alone() -> None:
    assert yardstick_digest() == "88868155699cbcaa"  # of these very texts, on every machine
    assert yardstick.__wrapped__() == yardstick()
    other = yardstick_prompts(seed=1)
    assert len(other) == len(yardstick_prompts())
    assert len(set(other) & set(yardstick_prompts())) < len(other) / 2


def test_experts_are_measured_on_every_kind() -> None:
    kinds = Counter(prompt.kind for prompt in yardstick(per_kind=PER_KIND))
    assert set(kinds.values()) == {PER_KIND}
    assert set(kinds) == {prompt.kind for prompt in yardstick()}
    assert measured_prompts() == [prompt.text for prompt in yardstick(per_kind=PER_KIND)]


def test_fewer_of_each_kind_are_a_part_of_more() -> None:
    few = yardstick_prompts(per_kind=3)
    assert set(few) < set(yardstick_prompts())
    assert len(few) == 3 * len({prompt.kind for prompt in yardstick()})
