"""The text of ids: nothing is taken out of it, wherever the ids stand."""

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lorary.data.text_of_ids import text_of_ids, texts_of_ids

WORDS = ["<s>", "</s>", "<unk>", "def", "f", "yes", ",", ".", "no", "!", "it", "'s"]


def word_level() -> Any:
    """Joins words by spaces, and would take those before punctuation out."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return fast(tokenizer)


def unigram() -> Any:
    """As sentencepiece: a space begins each word, and the first one goes where a text is decoded."""
    tokenizer = Tokenizer(
        models.Unigram([(word if i < 3 else f"▁{word}", -float(i)) for i, word in enumerate(WORDS)], 2)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return fast(tokenizer)


def llama() -> Any:
    """As Llama 2: byte fallback, and one space stripped from the left."""
    pieces = [word if i < 3 else f"▁{word}" for i, word in enumerate(WORDS)] + ["▁", "\n"]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    return fast(tokenizer)


def fast(tokenizer: Tokenizer) -> Any:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        clean_up_tokenization_spaces=True,
    )  # fmt: skip


@pytest.mark.parametrize("make", [word_level, unigram, llama])
def test_an_answer_has_the_text_of_its_own_ids_behind_its_prompt(make: Any) -> None:
    tokenizer = make()
    prompt, answer = [0, 3, 4], [5, 6, 8, 7, 10, 11, 9, 1]
    assert text_of_ids(tokenizer, answer, prompt, special=False) == " yes , no . it 's !"
    assert text_of_ids(tokenizer, [5, 6, 8], special=False) == "yes , no"
    assert text_of_ids(tokenizer, [], prompt) == ""


@pytest.mark.parametrize("make", [word_level, unigram, llama])
def test_the_texts_of_all_ids_joined_are_the_text(make: Any) -> None:
    tokenizer = make()
    ids = [3, 4, 5, 6, 8, 7]
    assert texts_of_ids(tokenizer, ids) == ["def", " f", " yes", " ,", " no", " ."]


def test_a_space_that_stands_behind_another_at_the_beginning_is_kept() -> None:
    tokenizer = llama()
    assert "".join(texts_of_ids(tokenizer, [12, 12, 5])) == text_of_ids(tokenizer, [12, 12, 5]) == "  yes"


def test_indentation_of_a_continued_program_is_kept() -> None:
    assert text_of_ids(llama(), [12, 12, 12, 12, 5], [0, 3, 4, 13], special=False) == "     yes"


def test_a_character_across_the_border_is_decoded_by_itself(tiny_tokenizer: Any) -> None:
    ids = tiny_tokenizer("a 😀 b")["input_ids"]
    assert text_of_ids(tiny_tokenizer, ids[3:], ids[:3]).endswith(" b")
    assert text_of_ids(tiny_tokenizer, ids[1:], ids[:1]) == " 😀 b"
