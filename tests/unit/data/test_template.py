"""Templates: the exact border between prompt and target, EOS, and cutting from the left."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from lorary.data.template import Example, make_template
from lorary.errors import TaskError, UsageError

LINES = ["Name the colour of the sky: blue", "Add one and two: three", "Which month follows May? June"] * 2
SPECIALS = ["<s>", "</s>"]
CHAT = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def byte_level(before: str = "", after: str = "", **options: object) -> PreTrainedTokenizerFast:
    """A GPT-2 like tokenizer, with `before` and `after` put around every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    return finish(tokenizer, trainer, before, after, **options)


def sentencepiece_like(is_legacy: bool = False, before: str = "<s>") -> PreTrainedTokenizerFast:
    """A Llama-2 like tokenizer: a dummy space before every text, as a normaliser (legacy) or in the splitter."""
    tokenizer = Tokenizer(models.BPE(unk_token="</s>"))
    if is_legacy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace()
    alphabet = [chr(code) for code in range(32, 127)] + ["\n", "▁"]
    trainer = trainers.BpeTrainer(
        vocab_size=200, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    return finish(tokenizer, trainer, before, "")


def finish(
    tokenizer: Tokenizer, trainer: trainers.BpeTrainer, before: str, after: str, **options: object
) -> PreTrainedTokenizerFast:
    tokenizer.train_from_iterator(LINES, trainer)
    if before or after:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*filter(None, [before]), "$A", *filter(None, [after])],
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in SPECIALS],
        )
    # Padding and EOS share one id, as in the embedded base model.
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>", **options)


TOKENIZERS = {
    "byte-level": byte_level(),
    "byte-level with BOS": byte_level(before="<s>"),
    "byte-level with BOS and EOS": byte_level(before="<s>", after="</s>"),
    "metaspace with BOS": sentencepiece_like(),
    "metaspace": sentencepiece_like(before=""),
    "prepended space with BOS": sentencepiece_like(is_legacy=True),
}
any_tokenizer = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS.keys())
texts = st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1).filter(lambda text: text.strip())


@any_tokenizer
def test_prompt_and_target_are_the_whole_text_cut_in_two(tokenizer):
    example = make_template("plain", tokenizer).encode("Add one and two:", "three")
    whole = tuple(tokenizer("Add one and two: three")["input_ids"])
    eos = (tokenizer.eos_token_id,)
    joined = example.prompt_ids + example.target_ids
    assert joined == (whole if whole[-1:] == eos else whole + eos)
    assert tokenizer.decode(example.target_ids, skip_special_tokens=True).strip() == "three"
    assert example.truncated == 0


@any_tokenizer
@settings(max_examples=60)
@given(source=texts, target=texts)
def test_the_prompt_of_a_row_is_what_generation_feeds_and_eos_ends_the_target_once(tokenizer, source, target):
    template = make_template("plain", tokenizer)
    example = template.encode(source, target)
    fed = tuple(tokenizer(source)["input_ids"])
    assert example.prompt_ids == template.encode_prompt(source)
    assert example.prompt_ids in (fed, fed[:-1])
    assert (example.prompt_ids == fed) == (fed[-1] != tokenizer.eos_token_id)
    assert example.target_ids.count(tokenizer.eos_token_id) == 1
    assert example.target_ids[-1] == tokenizer.eos_token_id


@any_tokenizer
@settings(max_examples=60)
@given(source=texts, target=texts)
def test_the_row_reads_as_source_space_target_whatever_the_tokenizer(tokenizer, source, target):
    example = make_template("plain", tokenizer).encode(source, target)
    text = tokenizer.decode(
        example.prompt_ids + example.target_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    assert text.strip() == f"{source} {target}".strip()


@any_tokenizer
@settings(max_examples=60)
@given(source=texts, target=texts, max_length=st.integers(3, 40))
def test_cutting_keeps_the_target_the_beginning_token_and_the_end_of_the_prompt(tokenizer, source, target, max_length):
    full = make_template("plain", tokenizer).encode(source, target)
    num_head = 1 if full.prompt_ids[0] == 0 else 0
    template = make_template("plain", tokenizer, max_length=max_length)
    if num_head + 1 + len(full.target_ids) > max_length:
        if len(full.prompt_ids) + len(full.target_ids) > max_length:
            with pytest.raises(TaskError, match=f"room for a prompt within max_length {max_length}"):
                template.encode(source, target)
        return
    example = template.encode(source, target)
    assert example.target_ids == full.target_ids
    assert len(example.prompt_ids) == min(len(full.prompt_ids), max_length - len(full.target_ids))
    assert example.prompt_ids[:num_head] == full.prompt_ids[:num_head]
    assert full.prompt_ids[num_head:][-1] == example.prompt_ids[-1]
    kept = len(example.prompt_ids) - num_head
    assert example.prompt_ids[num_head:] == full.prompt_ids[len(full.prompt_ids) - kept :]
    assert example.truncated == len(full.prompt_ids) - len(example.prompt_ids)


def test_a_border_that_melts_into_one_piece_leaves_the_prompt_as_generation_feeds_it():
    vocabulary = {piece: number for number, piece in enumerate(["</s>", "a", "b", " ", "a ", "\n"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("a", " ")]))
    tokenizer.decoder = decoders.Fuse()
    melting = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    assert melting("a b")["input_ids"] == [4, 2]
    assert make_template("plain", melting).encode("a", "b") == Example((1,), (3, 2, 0), 0)


def test_a_dummy_space_is_not_put_before_a_target_that_is_encoded_by_itself():
    vocabulary = {piece: number for number, piece in enumerate(["</s>", "▁", "a", "b", "▁▁", "\n"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("▁", "▁")]))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    spaced = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    # Behind a trailing space the border melts: the two spaces would be one piece.
    assert spaced("a ")["input_ids"] == [1, 2, 1]
    assert spaced("a  b")["input_ids"] == [1, 2, 4, 3]
    assert spaced(" b")["input_ids"] == [4, 3]
    assert make_template("plain", spaced).encode("a ", "b") == Example((1, 2, 1), (1, 3, 0), 0)


def test_a_target_alone_too_long_is_refused_with_its_length():
    template = make_template("plain", TOKENIZERS["byte-level"], max_length=6)
    with pytest.raises(TaskError, match=r"found: \d+ tokens with EOS: 'xyzxyzxyz'\nremedy: raise max_length"):
        template.encode("Add", "xyzxyzxyz")


def test_a_long_prompt_is_cut_from_the_left_for_generation_too():
    tokenizer = TOKENIZERS["byte-level with BOS"]
    ids = make_template("plain", tokenizer, max_length=5).encode_prompt("x" * 100)
    assert ids == (0, *tokenizer("xxxx", add_special_tokens=False)["input_ids"])


def chat_tokenizer() -> PreTrainedTokenizerFast:
    return byte_level(before="<s>", chat_template=CHAT)


def test_chat_feeds_what_the_bases_own_template_makes_and_learns_the_reply():
    tokenizer = chat_tokenizer()
    template = make_template("chat", tokenizer)
    messages = [{"role": "user", "content": "Add one and two:"}]
    fed = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    example = template.encode("Add one and two:", "three")
    assert example.prompt_ids == template.encode_prompt("Add one and two:") == tuple(fed)
    assert example.target_ids == (*tokenizer("three", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id)
    assert (template.name, make_template("plain", tokenizer).name) == ("chat", "plain")


def test_chat_cuts_the_message_and_never_its_header():
    tokenizer = chat_tokenizer()
    full = make_template("chat", tokenizer).encode("x" * 50, "three")
    header = tokenizer("<s>user\n", add_special_tokens=False)["input_ids"]
    length = len(full.prompt_ids) + len(full.target_ids) - 30
    cut = make_template("chat", tokenizer, max_length=length).encode("x" * 50, "three")
    assert cut.truncated == 30
    assert cut.prompt_ids == (*header, *full.prompt_ids[len(header) + 30 :])


def test_templates_that_cannot_be_made_are_refused():
    tokenizer = TOKENIZERS["byte-level"]
    with pytest.raises(UsageError, match=r"plain or chat\nfound: 'alpaca'"):
        make_template("alpaca", tokenizer)
    with pytest.raises(UsageError, match=r"max_length must be at least 2 here.*\nfound: 1"):
        make_template("plain", tokenizer, max_length=1)
    with pytest.raises(UsageError, match=r"max_length must be at least 3 here"):
        make_template("plain", TOKENIZERS["metaspace with BOS"], max_length=2)
    with pytest.raises(UsageError, match=r"has a chat template\n(.|\n)*--template plain"):
        make_template("chat", tokenizer)
    endless = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(UsageError, match="must have an EOS token"):
        make_template("plain", endless)
