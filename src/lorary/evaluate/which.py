"""Which expert to ask: each expert alone, the base and the router, side by side on some prompts."""

import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch

from lorary.data.template import Example, Ids, make_template
from lorary.data.text_of_ids import text_of_ids
from lorary.display import Display
from lorary.evaluate.completion import check_context, complete_each, prompt_ids
from lorary.evaluate.decisions import asks_base, decide, decides_once
from lorary.evaluate.explain_trace import trace_example
from lorary.evaluate.finite import finite_logits
from lorary.evaluate.generation import stop_ids
from lorary.evaluate.loglik import answer_losses
from lorary.evaluate.prompts import Prompt, check_prompts
from lorary.evaluate.routing import as_shares
from lorary.evaluate.settings import WhichSettings
from lorary.library.opening import template_of
from lorary.library.store import Library
from lorary.model.attach import attach, detach, routing
from lorary.model.base import Base
from lorary.model.plan import constant_weights
from lorary.model.seating import seating
from lorary.route.setting import CHAT, Routing
from lorary.tabular import ResultTable, Tabular

ROUTER, BASE, EXPERT = "router", "base", "expert"
# Tokens of one batch, those of the answers counted; further experts answer in a batch of their own.
MAX_TOKENS = 8192


@dataclass(frozen=True)
class CandidateAnswer:
    """The answer of one candidate.

    Args:
        name: of the expert, of the router, or `base`.
        kind: `router`, `base` or `expert`.
        text: the answer.
        num_tokens: tokens generated, EOS counted.
        is_finished: whether it ends as the model ends an answer; else it was cut at the most tokens allowed.
        weight: mean share of the routing weight that the router gives it for the prompt, 0..1; None for the router.
        loss: nats per token of the reference, EOS counted; None without a reference.
    """

    name: str
    kind: str
    text: str
    num_tokens: int
    is_finished: bool
    weight: float | None
    loss: float | None


@dataclass(frozen=True)
class PromptAnswers:
    """All answers to one prompt.

    Args:
        prompt: the text.
        reference: the right answer; None where it was not given.
        decides: whether the router chose by what it saw.
        answers: the router's, the base's, and those of the experts by falling weight.
        seconds: that all of them took together.
        confidence: of a router that decides for the whole request: the score of the best expert.
        reason: of such a router: one sentence on what it decided.
        asks_chat: whether it lets the base answer in its own chat template.
    """

    prompt: str
    reference: str | None
    decides: bool
    answers: Sequence[CandidateAnswer]
    seconds: float
    confidence: float | None = None
    reason: str = ""
    asks_chat: bool = False

    @property
    def router(self) -> CandidateAnswer:
        """What the router answers."""
        return self.answers[0]

    @property
    def base(self) -> CandidateAnswer:
        """What the base answers."""
        return self.answers[1]

    @property
    def experts(self) -> Sequence[CandidateAnswer]:
        """What the experts answer, by falling weight."""
        return self.answers[2:]

    def agrees(self, answer: CandidateAnswer) -> bool:
        """Whether an answer is the router's, white space at its ends aside."""
        return answer.text.strip() == self.router.text.strip()

    def is_right(self, answer: CandidateAnswer) -> bool:
        """Whether an answer is the reference, white space at its ends aside."""
        return self.reference is not None and answer.text.strip() == self.reference.strip()

    @property
    def verdict(self) -> str:
        """The outcome in one sentence: whom the router follows, who else answers so, and who is right."""
        alike = sum(map(self.agrees, self.experts))
        parts = [
            self._choice(),
            f"{alike} of {len(self.experts)} experts give the same answer",
            f"the base answers {'the same' if self.agrees(self.base) else 'otherwise'}",
            *([] if self.reference is None else [self._right()]),
        ]
        return f"{'; '.join(parts)}."

    def _choice(self) -> str:
        name, strongest = self.router.name, max((self.base, *self.experts), key=lambda answer: answer.weight or 0.0)
        if self.asks_chat:
            return f"{name} finds no expert that fits and asks the base in its own chat template"
        is_uniform = len({answer.weight for answer in self.experts}) == 1 and len(self.experts) > 1
        if not self.decides and is_uniform and strongest.kind == EXPERT:
            return f"{name} weighs all experts alike, whatever the prompt"
        follows = "answers as it does" if self.agrees(strongest) else "answers otherwise"
        return f"{name} gives {100 * (strongest.weight or 0.0):.0f} % to {_called(strongest)} and {follows}"

    def _right(self) -> str:
        number = sum(map(self.is_right, self.experts))
        right = [_called(answer) for answer in (self.router, self.base) if self.is_right(answer)]
        right += [f"{number} expert{'' if number == 1 else 's'}"] if number else []
        given = f"the reference is the answer of {' and '.join(right)}" if right else "nobody gives the reference"
        best = min(self.answers, key=lambda answer: answer.loss if answer.loss is not None else math.inf)
        return f"{given}, and has its lowest loss under {_called(best)} ({best.loss:.2f} nats a token)"

    def to_json(self) -> dict[str, Any]:
        """The document of one prompt."""
        return {
            "prompt": self.prompt,
            "reference": self.reference,
            "answers": [
                {**asdict(answer), "agrees": self.agrees(answer), "is_right": self.is_right(answer)}
                for answer in self.answers
            ],
            "weights": {answer.name: answer.weight for answer in self.answers if answer.kind == EXPERT},
            "verdict": self.verdict,
            "confidence": self.confidence,
            "reason": self.reason,
            "asks_chat": self.asks_chat,
            "seconds": self.seconds,
        }


@dataclass(frozen=True, repr=False)
class WhichResult(Tabular):
    """Answers to some prompts.

    Args:
        library: its name.
        base_model: the base's name.
        template: how prompts were put.
        router: what it is called.
        settings: of the router, values of JSON.
        prompts: at least one.
        load_seconds: that loading base and library took; 0 where they were in memory.
    """

    library: str
    base_model: str
    template: str
    router: str
    settings: Mapping[str, Any]
    prompts: Sequence[PromptAnswers]
    load_seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """The document that `--json` prints."""
        return {
            "library": self.library,
            "base": self.base_model,
            "template": self.template,
            "router": self.router,
            "settings": dict(self.settings),
            "prompts": [prompt.to_json() for prompt in self.prompts],
            "seconds": {"load": self.load_seconds, "answer": sum(prompt.seconds for prompt in self.prompts)},
        }

    def tables(self) -> list[ResultTable]:
        """The answers to each prompt, and the verdict."""
        heads = ("who", "answer", "weight", "loss", "as the router", "right")
        return [
            ResultTable(
                f"{prompt.prompt!r}: {prompt.verdict}",
                heads,
                [
                    [f"router {answer.name}" if answer.kind == ROUTER else answer.name, answer.text, answer.weight,
                     answer.loss, "yes" if prompt.agrees(answer) else "", "yes" if prompt.is_right(answer) else ""]
                    for answer in prompt.answers
                ],
            )
            for prompt in self.prompts
        ]  # fmt: skip

    def records(self) -> list[dict[str, Any]]:
        """One for each prompt and candidate."""
        return [
            {"prompt": prompt.prompt, "reference": prompt.reference, **answer}
            for prompt in self.prompts
            for answer in prompt.to_json()["answers"]
        ]


class _Candidate(NamedTuple):
    name: str
    kind: str
    setting: Routing
    ids: Ids
    reference: Example | None


def which_library(
    base: Base,
    library: Library,
    prompts: Sequence[Prompt],
    settings: WhichSettings,
    *,
    force_base: bool = False,
    **route: Any,
) -> WhichResult:
    """Answer prompts by each expert alone, by the base and by the router, all of one prompt in one batch.

    Args:
        base: the base model; experts are seated meanwhile and gone afterwards.
        library: the library.
        prompts: at least one.
        settings: how.
        force_base: accept unrelated weights of the same shapes.
        route: router, experts, preset and fields of a routing setting, as `lorary.attach` takes them.

    Returns:
        The answers, with the router's weights, and the losses of references that were given.

    Raises:
        UsageError: if there is no prompt, or one is empty or too long.
        LoraryError: as for `lorary.attach`.
    """
    check_prompts(prompts)
    name, max_new_tokens = template_of(library, settings.template), settings.max_new_tokens
    attach(base.model, library, tokenizer=base.tokenizer, template=name, force_base=force_base, **route)
    try:
        setting, label = seating(base.model).routing, _label(seating(base.model).routing)
        encoded = [_encode(base, prompt, name, max_new_tokens) for prompt in prompts]
        with Display().bar("answering", len(prompts)) as bar:
            answers = []
            for prompt, (ids, reference) in zip(prompts, encoded, strict=True):
                answers.append(_answer_each(base, prompt, name, ids, reference, max_new_tokens))
                bar.advance()
    finally:
        detach(base.model)
    return WhichResult(library.name, base.files.name, name, label, setting.to_json(), answers)


def _encode(base: Base, prompt: Prompt, template: str, max_new_tokens: int) -> tuple[Ids, Example | None]:
    """The ids of a prompt, and of it with its reference; checked to fit the base's context."""
    ids = prompt_ids(base, prompt.text, template, max_new_tokens)
    if prompt.answer is None:
        return ids, None
    reference = make_template(template, base.tokenizer, max_length=sys.maxsize).encode(prompt.text, prompt.answer)
    check_context(base, len(reference.prompt_ids), len(reference.target_ids))
    return ids, reference


def _answer_each(
    base: Base, prompt: Prompt, template: str, ids: Ids, reference: Example | None, max_new_tokens: int
) -> PromptAnswers:
    """All answers to one prompt, by the router in force and those that it is compared with."""
    started = time.perf_counter()
    state = seating(base.model)
    router, names, decision, asks_chat = state.routing, state.experts, None, False
    acting, routed_ids, routed_reference = router, ids, reference
    if decides_once(base.model):
        (decision,) = decide(base.model, [ids])
        asks_chat = asks_base(router, decision) and bool(base.tokenizer.chat_template)
        if asks_chat:
            decision = decision.of_base()
            routed_ids, routed_reference = _encode(base, prompt, CHAT, max_new_tokens)
        acting = decision.setting(router)
    # The same mix for all, which a batch must share; of one expert it makes no difference.
    candidates = [_Candidate(BASE, BASE, Routing(BASE, mix=router.mix), ids, reference)]
    candidates += [_Candidate(name, EXPERT, Routing(experts=[name], mix=router.mix), ids, reference) for name in names]
    routed = _Candidate(_label(router), ROUTER, acting, routed_ids, routed_reference)
    # Where general experts are taken from the others, they are from the router's alone.
    is_apart = asks_chat or router.general.experts is not None or acting.mix != router.mix
    groups = [[routed], candidates] if is_apart else [[routed, *candidates]]
    shares = _shares(base, ids) if decision is None else _as_named(names, decision.weights)
    answers = [
        answer
        for group in groups
        for batch in _batches(group, max_new_tokens)
        for answer in _answer_batch(base, batch, max_new_tokens, shares)
    ]
    answers[2:] = sorted(answers[2:], key=lambda answer: (-(answer.weight or 0.0), answer.name))
    decides = constant_weights(router, names) is None
    confidence, reason = (None, "") if decision is None else (decision.confidence, decision.sentence(router))
    seconds = time.perf_counter() - started
    return PromptAnswers(prompt.text, prompt.answer, decides, answers, seconds, confidence, reason, asks_chat)


def _batches(candidates: Sequence[_Candidate], max_new_tokens: int) -> list[Sequence[_Candidate]]:
    lengths = [len(each.ids) + max_new_tokens for each in candidates]
    lengths += [len((*each.reference.prompt_ids, *each.reference.target_ids)) for each in candidates if each.reference]
    size = max(1, MAX_TOKENS // max(lengths))
    return [candidates[start : start + size] for start in range(0, len(candidates), size)]


def _answer_batch(
    base: Base, candidates: Sequence[_Candidate], max_new_tokens: int, shares: Mapping[str, float]
) -> list[CandidateAnswer]:
    """The answers of some candidates, one row each, all prefilled and generated together."""
    losses: list[float | None] = [None] * len(candidates)
    references = [candidate.reference for candidate in candidates if candidate.reference is not None]
    with routing(base.model, [candidate.setting for candidate in candidates]):
        rows = complete_each(base, [candidate.ids for candidate in candidates], max_new_tokens=max_new_tokens)
        if references:
            with finite_logits(base.model):
                losses = [loss.mean for loss in answer_losses(base.model, references)]
    stops = stop_ids(base.model, base.tokenizer)
    return [
        CandidateAnswer(
            candidate.name,
            candidate.kind,
            text_of_ids(base.tokenizer, row, candidate.ids, special=False).strip(),
            len(row),
            row[-1] in stops,
            None if candidate.kind == ROUTER else shares["" if candidate.kind == BASE else candidate.name],
            loss,
        )
        for candidate, row, loss in zip(candidates, rows, losses, strict=True)
    ]


def _shares(base: Base, ids: Ids) -> dict[str, float]:
    """Mean share of each expert in the routing of a prompt, and under the empty name that of the base.

    Attention sinks are left out, as in `lorary explain`, where there are other tokens.
    """
    state = seating(base.model)
    weights = constant_weights(state.routing, state.experts)
    if weights is None:
        _, traced, left_out = trace_example(base, Example(ids, (0,), 0))
        assert traced is not None
        counted = torch.tensor([not why for why in left_out])
        weights = traced[:, counted if bool(counted.any()) else slice(None)]
    shares = as_shares(weights).flatten(0, -2).mean(dim=0) if weights.dim() > 1 else as_shares(weights)
    return dict(zip((*state.experts, ""), shares.tolist(), strict=True))


def _as_named(names: Sequence[str], weights: Sequence[tuple[str, float]]) -> dict[str, float]:
    """The shares of a decision for the whole request, as `_shares` gives them."""
    by_name = dict(weights)
    shares = as_shares(torch.tensor([by_name.get(name, 0.0) for name in names]))
    return dict(zip((*names, ""), shares.tolist(), strict=True))


def _label(setting: Routing) -> str:
    return "fixed" if setting.fixed is not None else setting.router


def _called(answer: CandidateAnswer) -> str:
    return f"'{answer.name}'" if answer.kind == EXPERT else f"the {answer.kind}"
