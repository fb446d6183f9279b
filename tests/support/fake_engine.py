"""An engine without a model: its answers say who gave them, and it chooses the expert that the prompt names."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lorary.data.template import Ids
from lorary.errors import BusyError, RouterError
from lorary.evaluate.decisions import Decision
from lorary.route.setting import Routing
from lorary.serve.engine import Job, Load, Token, Traced


class FakeStream:
    """The tokens of a text that was known before."""

    def __init__(self, engine: "FakeEngine", job: Job) -> None:
        self.engine, self.job, self.is_cancelled = engine, job, False
        self.prompt: Sequence[Token] = ()
        if job.prompt_logprobs:
            first, *rest = job.ids
            tops = job.num_top or 0
            self.prompt = [Token(first), *(_token(id_, i, tops) for i, id_ in enumerate(rest))]

    async def __aiter__(self) -> AsyncIterator[Token]:
        engine, job = self.engine, self.job
        try:
            ids = engine.answer_ids(job)
            for number, token in enumerate(ids):
                await asyncio.sleep(engine.pace)
                if engine.failure is not None:
                    raise engine.failure
                is_last = number + 1 == len(ids)
                finish: Any = None if not is_last else "stop" if token == engine.eos else "length"
                made = _token(token, number, job.num_top)
                yield Token(made.id, made.logprob, made.top, finish)
        finally:
            self.cancel()

    def cancel(self) -> None:
        if not self.is_cancelled:
            self.is_cancelled = True
            self.engine.running -= 1


def _token(token: int, number: int, num_top: int | None) -> Token:
    if num_top is None:
        return Token(token)
    top = ((token, -0.25 * (number + 1)), (token + 1, -5.0), (token + 2, -6.0))
    return Token(token, -0.25 * (number + 1), top[:num_top])


@dataclass
class FakeEngine:
    """See the file. `text` is the answer; `{who}` in it stands for who gives it."""

    tokenizer: Any
    names: list[str]
    text: str = " {who} says: Name the colour of the sky"
    pace: float = 0.0
    capacity: int = 64
    failure: Exception | None = None
    running: int = 0
    jobs: list[Job] = field(default_factory=list)
    decided: list[Ids] = field(default_factory=list)
    is_started: bool = False
    seat_error: Exception | None = None

    @property
    def eos(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def is_ready(self) -> bool:
        return self.is_started

    @property
    def experts(self) -> tuple[str, ...]:
        return tuple(sorted(self.names))

    def answer_ids(self, job: Job) -> list[int]:
        named = job.setting.fixed
        who = "+".join(named) if named else job.setting.router
        if job.sampling is not None:
            who = f"{who} seed {job.seed}"
        ids = self.tokenizer(self.text.replace("{who}", who), add_special_tokens=False)["input_ids"]
        return [*ids, self.eos][: job.max_new_tokens]

    async def start(self) -> None:
        self.is_started = True

    async def stop(self, *, drain: float) -> None:
        self.is_started = False

    def check(self, setting: Routing) -> None:
        if missing := setting.named - set(self.names):
            raise RouterError("an expert must be seated", found=sorted(missing))
        if setting.data is not None and not setting.data.is_optional and setting.router not in ("auto", "contrast"):
            raise RouterError("its data must be prepared", found=setting.router)

    def submit(self, job: Job) -> FakeStream:
        if self.running >= self.capacity:
            raise BusyError("the engine holds no more answers", found=self.capacity)
        self.running += 1
        self.jobs.append(job)
        return FakeStream(self, job)

    async def decide(self, setting: Routing, prompts: Sequence[Ids]) -> list[Decision]:
        self.decided.extend(prompts)
        return [self._decision(setting, self.tokenizer.decode(list(ids))) for ids in prompts]

    def _decision(self, setting: Routing, text: str) -> Decision:
        allowed = [name for name in self.experts if setting.may_choose(name)]
        scores = tuple((name, 2.0 if name in text else -1.0) for name in allowed)
        best, score = max(scores, key=lambda pair: pair[1])
        is_lost = score < (setting.choosing.threshold or 0.0)
        everyone = tuple((name, 1 / len(allowed)) for name in allowed)
        weights = everyone if is_lost else ((best, 1.0),)
        return Decision(weights, best, score, is_lost, "contrast", scores)

    async def trace(self, setting: Routing, ids: Ids) -> Traced:
        weights = torch.zeros(2, len(ids), len(self.names))
        weights[0, :, 0], weights[1, :, -1] = 1.0, 0.5
        return Traced(self.experts, ("model.layers.0.q_proj", "model.layers.1.q_proj"), weights)

    async def seat(self, name: str) -> None:
        if self.seat_error is not None:
            raise self.seat_error
        if name not in self.names:
            self.names.append(name)

    async def unseat(self, name: str) -> None:
        self.names.remove(name)

    def load(self) -> Load:
        return Load(0, self.running, self.capacity)
