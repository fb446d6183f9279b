"""One prompt, answered by a routed model."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import GenerationConfig, TextStreamer

from lorary.data.template import Ids, make_template
from lorary.data.text_of_ids import text_of_ids
from lorary.errors import UsageError
from lorary.evaluate.decisions import asks_base, decide, decides_once
from lorary.evaluate.finite import finite_logits
from lorary.evaluate.generation import left_pad, plain_generation, stop_ids
from lorary.evaluate.sampling import Sampling
from lorary.model.attach import routing
from lorary.model.base import Base
from lorary.model.seating import seating
from lorary.model.trace import trace
from lorary.route.setting import CHAT


@dataclass(frozen=True)
class Answer:
    """An answer and what it was made with.

    Args:
        text: the answer.
        prompt: the prompt.
        router: name of the router, or `fixed` where experts were named.
        num_tokens: tokens generated, EOS counted.
        usage: mean routing weight of each expert over layers and tokens of prompt and answer; empty for routers that
            do not look at tokens.
        confidence: for a router that decides for the whole request: the score of the best expert, in units of the rule.
        reason: for such a router: one sentence on what it decided.
    """

    text: str
    prompt: str
    router: str
    num_tokens: int
    usage: dict[str, float]
    confidence: float | None = None
    reason: str = ""


def check_text(value: str, where: str) -> None:
    """Refuse a text that holds nothing, or no text.

    Args:
        value: the text.
        where: the option or the place in a file that it comes from.

    Raises:
        UsageError: naming the place.
    """
    if not value.strip():
        raise UsageError(f"{where} must hold text", found=repr(value))
    try:
        value.encode()
    except UnicodeEncodeError:  # what a shell passes on of bytes that are no UTF-8
        raise UsageError(f"{where} must be valid Unicode", found=ascii(value), remedy="save it as UTF-8") from None


def answer(
    base: Base,
    prompt: str,
    template: str,
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stream: bool = False,
) -> Answer:
    """Answer one prompt with a routed model; see `run_generate`."""
    ids = prompt_ids(base, prompt, template, max_new_tokens)
    router, decision = seating(base.model).routing, None
    if decides_once(base.model):
        (decision,) = decide(base.model, [ids])
        if asks_base(router, decision) and base.tokenizer.chat_template:
            decision = decision.of_base()
            ids = ids if template == CHAT else prompt_ids(base, prompt, CHAT, max_new_tokens)
    acting = router if decision is None else decision.setting(router)
    with routing(base.model, acting), trace(base.model) as traced:
        new = complete(base, ids, max_new_tokens=max_new_tokens, sampling=sampling, stream=stream)
    text = text_of_ids(base.tokenizer, new, ids, special=False).strip()
    label = "fixed" if router.fixed is not None else router.router
    if decision is not None:
        usage = dict.fromkeys(seating(base.model).experts, 0.0) | dict(decision.weights)
        return Answer(text, prompt, label, len(new), usage, decision.confidence, decision.sentence(router))
    return Answer(text, prompt, label, len(new), traced.usage() if traced.layers else {})


def prompt_ids(base: Base, prompt: str, template: str, max_new_tokens: int) -> Ids:
    """The ids of a whole prompt, checked to fit the base's context with the answer.

    Raises:
        UsageError: if they do not.
    """
    # No prompt is cut here: whoever asks must know what was answered.
    ids = make_template(template, base.tokenizer, max_length=sys.maxsize).encode_prompt(prompt)
    check_context(base, len(ids), max_new_tokens)
    return ids


def check_context(base: Base, num_prompt: int, num_answer: int) -> None:
    """Refuse a prompt and an answer that do not fit the base's context.

    Raises:
        UsageError: with the numbers of tokens.
    """
    context = base.most_tokens(sys.maxsize)
    if num_prompt + num_answer > context:
        raise UsageError(
            f"prompt and answer must fit the {context} positions of the base model",
            found=f"{num_prompt} tokens of prompt and {num_answer} of answer",
            remedy="shorten the prompt, or lower --max-new-tokens",
        )


def complete(
    base: Base, ids: Ids, *, max_new_tokens: int, sampling: Sampling | None = None, stream: bool = False
) -> list[int]:
    """Token ids that the model puts behind a prompt, the one that ends the answer counted."""
    return complete_each(base, [ids], max_new_tokens=max_new_tokens, sampling=sampling, stream=stream)[0]


def complete_each(
    base: Base, prompts: Sequence[Ids], *, max_new_tokens: int, sampling: Sampling | None = None, stream: bool = False
) -> list[list[int]]:
    """Token ids that the model puts behind each row of one batch, the one that ends an answer counted.

    Args:
        base: the model; where each row has a setting of its own (`lorary.routing` with a list), in that order.
        prompts: ids of each row.
        max_new_tokens: most tokens of an answer.
        sampling: how tokens are drawn; the likeliest ones are taken where None.
        stream: print the answer on stdout while it is made, of one row alone.
    """
    input_ids, mask = (t.to(base.model.device) for t in left_pad(prompts, base.tokenizer.pad_token_id))
    stops = stop_ids(base.model, base.tokenizer)
    # All of the distribution: transformers' own default would leave out what is not among the likeliest 50 tokens.
    drawn = {} if sampling is None else {"temperature": sampling.temperature, "top_k": 0, "top_p": sampling.top_p}
    config = GenerationConfig(
        do_sample=sampling is not None,
        **drawn,
        max_new_tokens=max_new_tokens,
        eos_token_id=stops,
        pad_token_id=base.tokenizer.pad_token_id,
    )
    shown = {"skip_prompt": True, "skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    streamer = TextStreamer(base.tokenizer, **shown) if stream else None
    with (
        torch.no_grad(),
        plain_generation(base.model, base.tokenizer),
        finite_logits(base.model, at_once=True),
    ):
        output = base.model.generate(
            input_ids=input_ids, attention_mask=mask, generation_config=config, streamer=streamer
        )
    return [_until_stop(row, stops) for row in output[:, input_ids.shape[1] :].tolist()]


def _until_stop(ids: list[int], stops: Sequence[int]) -> list[int]:
    """An answer without the padding that fills its row up behind the token that ends it."""
    end = next((place for place, token in enumerate(ids, start=1) if token in stops), len(ids))
    return ids[:end]
