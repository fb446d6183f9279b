"""The text of token ids as it is, which is more than `decode` gives.

Many tokenizers drop the space before the first word of what they decode, and some take spaces before punctuation out.
Behind the ids before them, ids have their own text.
"""

from collections.abc import Sequence
from typing import Any

# So many ids before a text are decoded with it: a word, and the bytes of a character, have fewer.
CONTEXT = 16


def text_of_ids(tokenizer: Any, ids: Sequence[int], before: Sequence[int] = (), *, special: bool = True) -> str:
    """The text of ids where they stand.

    Args:
        tokenizer: a transformers tokenizer.
        ids: of the text.
        before: ids that they follow; without them, they begin a text.
        special: whether special tokens are written out.
    """

    def decode(part: Sequence[int]) -> str:
        return str(tokenizer.decode(list(part), skip_special_tokens=not special, clean_up_tokenization_spaces=False))

    near = list(before)[-CONTEXT:]
    start = decode(near)
    if not start:  # special tokens alone
        near = list(before)
        start = decode(near)
    whole = decode([*near, *ids])
    # Where a character lies across the border, the ids have no text of their own.
    return whole[len(start) :] if whole.startswith(start) else decode(ids)


def texts_of_ids(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text of each id; a character of several ids stands at its last one, and those before are empty.

    Args:
        tokenizer: a transformers tokenizer.
        ids: of a text.
    """
    texts: list[str] = []
    first = 0
    for number in range(1, len(ids) + 1):
        text = text_of_ids(tokenizer, ids[first:number], ids[max(0, first - CONTEXT) : first])
        is_part = text.endswith("\N{REPLACEMENT CHARACTER}") and number < len(ids)
        texts.append("" if is_part else text)
        first = first if is_part else number
    return texts
