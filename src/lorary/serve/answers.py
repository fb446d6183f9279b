"""Answers of one request: jobs for the engine, their tokens as text, whole or streamed."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import ExitStack, aclosing
from dataclasses import replace
from functools import partial
from itertools import accumulate
from time import perf_counter
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from lorary.data.text_of_ids import texts_of_ids
from lorary.errors import BusyError
from lorary.serve.api_error import ApiError
from lorary.serve.choice import Choice, Delta, Echo
from lorary.serve.engine import Job, Token
from lorary.serve.gone import EventStream, unless_gone
from lorary.serve.problems import api_error, error_body, message_of
from lorary.serve.router import Asked, Routed
from lorary.serve.server import Server
from lorary.serve.shapes import Shape
from lorary.serve.wanted import Wanted


class Answers:
    """The answers of one request.

    Args:
        server: that answers.
        shape: of its endpoint.
        request_id: of the request.
        model: name that it gave.
        asked: its prompts.
        wanted: what it asks of the answers.
    """

    def __init__(
        self, server: Server, shape: Shape, request_id: str, model: str, asked: Sequence[Asked], wanted: Wanted
    ) -> None:
        self._server, self._shape, self._wanted, self._asked = server, shape, wanted, asked
        self._id, self._model = f"{shape.prefix}-{request_id}", model
        self._created, self._start = int(time.time()), perf_counter()
        self._deadline = self._start + server.settings.timeout
        self._routed: list[Routed] = []
        self._choices: list[Choice] = []
        self._has_first = self._is_recorded = False

    async def respond(self, request: Request) -> Response:
        """The response; on an error, or when the client leaves, what was begun is broken off."""
        self._check_size()
        with ExitStack() as stack:
            stack.enter_context(self._server.traffic.place())
            stack.callback(self._end)
            if not self._wanted.is_streamed:
                return await unless_gone(request, self._whole())
            deltas = self._deltas()
            # Errors before the first token have a status of their own.
            first = await unless_gone(request, self._begun(deltas))
            headers = {**self._headers(), "cache-control": "no-store"}
            # The answer itself ends in time; this is for a client that does not read it.
            timeout = max(0.0, self._deadline - perf_counter()) + self._server.settings.body_timeout
            return EventStream(self._events(first, deltas), headers, timeout, stack.pop_all().close)

    def _check_size(self) -> None:
        number, most = len(self._asked) * self._wanted.num_each, self._server.settings.max_choices
        if number > most:
            raise ApiError(400, f"a request may ask for {most} answers", found=number, param="n")
        if (self._wanted.max_new_tokens or 0) > self._server.settings.max_new_tokens:
            rule = f"max_tokens may be {self._server.settings.max_new_tokens} here"
            raise ApiError(400, rule, found=self._wanted.max_new_tokens, param="max_tokens")

    async def _submit(self) -> None:
        """Decide, and hand the jobs over: all of them, or none."""
        server, wanted = self._server, self._wanted
        for each in self._asked:
            server.prompts.check(each.ids, wanted.max_new_tokens or 1)
        async with asyncio.timeout(server.settings.timeout):
            self._routed = await server.router.route(self._asked, self._id)
        for routed in self._routed:
            if routed.ids != routed.asked.ids:  # written anew, and longer
                server.prompts.check(routed.ids, wanted.max_new_tokens or 1)
            echo = await asyncio.to_thread(self._echo, routed) if wanted.is_echoed else None
            for _ in range(wanted.num_each):
                self._choices.append(self._choice(routed, echo))
        server.shadow(self._routed)

    def _choice(self, routed: Routed, echo: Echo | None) -> Choice:
        server, wanted, index = self._server, self._wanted, len(self._choices)
        most = wanted.max_new_tokens
        job = Job(
            routed.ids,
            routed.setting,
            server.prompts.room(routed.ids, server.settings.max_new_tokens) if most is None else most,
            sampling=wanted.sampling,
            seed=None if wanted.seed is None else wanted.seed + index % wanted.num_each,
            num_top=wanted.num_top,
            prompt_logprobs=wanted.is_echoed and wanted.num_top is not None,
            timeout=max(0.001, self._deadline - perf_counter()),
            session=routed.asked.session,
        )
        try:
            stream = server.engine.submit(job)
        except BusyError as error:
            raise server.traffic.busy(error.rule) from None
        is_trimmed = self._shape.endpoint == "chat"
        tokenizer, stops = server.prompts.tokenizer, wanted.stops
        clock = partial(self._observe, _Clock())
        return Choice(index, stream, tokenizer, routed.ids, stops, is_trimmed=is_trimmed, echo=echo, on_token=clock)

    def _echo(self, routed: Routed) -> Echo:
        texts = texts_of_ids(self._server.prompts.tokenizer, routed.ids)
        return Echo("".join(texts), tuple(accumulate([len(text) for text in texts], initial=0))[:-1])

    def _observe(self, clock: "_Clock") -> None:
        now, metrics = perf_counter(), self._server.metrics
        if not self._has_first:
            metrics.first_token.observe(now - self._start)
            self._has_first = True
        if clock.last is not None:
            metrics.between_tokens.observe(now - clock.last)
        clock.last = now

    async def _deltas(self) -> AsyncGenerator[Delta, None]:
        """What the answers grow by, as they grow, all of them at the same time."""
        queue: asyncio.Queue[Delta | Exception] = asyncio.Queue()
        tasks = [asyncio.create_task(_pump(choice, queue)) for choice in self._choices]
        num_running = len(tasks)
        try:
            while num_running:
                # Not `wait_for`: in Python 3.11 it may forget that it was cancelled.
                async with asyncio.timeout(max(0.0, self._deadline - perf_counter())):
                    item = await queue.get()
                if isinstance(item, Exception):
                    raise item
                num_running -= item.finish is not None
                yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _begun(self, deltas: AsyncGenerator[Delta, None]) -> Delta:
        await self._submit()
        return await anext(deltas)

    async def _whole(self) -> Response:
        await self._submit()
        texts = [""] * len(self._choices)
        tokens: list[list[tuple[Token, int]]] = [[] for _ in self._choices]
        async with aclosing(self._deltas()) as deltas:
            async for delta in deltas:
                texts[delta.index] += delta.text
                tokens[delta.index].extend(delta.tokens)
        choices = [
            self._shape.whole_choice(
                each.index, texts[each.index], tokens[each.index] if self._has_logprobs else None, each.finish
            )
            for each in self._choices
        ]
        body = {**self._head(self._shape.whole), "choices": choices, "usage": self._usage(), **await self._finished()}
        return JSONResponse(body, headers=self._headers())

    async def _events(self, first: Delta, deltas: AsyncGenerator[Delta, None]) -> AsyncGenerator[bytes, None]:
        """The pieces of a streamed answer as server-sent events."""
        # Every piece says that there is no usage yet, where it comes at the end.
        no_usage = {"usage": None} if self._wanted.has_usage else {}
        head = self._head(self._shape.piece)
        try:
            for choice in self._choices:
                if opening := self._shape.opening(choice.index):
                    yield _event({**head, "choices": [opening], **no_usage})
            async with aclosing(deltas):
                yield _event({**head, "choices": [self._piece(first)], **no_usage})
                async for delta in deltas:
                    yield _event({**head, "choices": [self._piece(delta)], **no_usage})
            finished = await self._finished()
            if self._wanted.has_usage or finished:
                usage = {"usage": self._usage()} if self._wanted.has_usage else {}
                yield _event({**head, "choices": [], **usage, **finished})
        except Exception as error:
            # The status has been sent: the error is an event, as OpenAI's clients expect.
            known = api_error(error)
            self._record(known.code or "error")
            if known.status == 500:
                self._server.report(error)
            yield _event(error_body(known.status, message_of(known), known.param, known.code))
            return
        yield b"data: [DONE]\n\n"

    @property
    def _has_logprobs(self) -> bool:
        return self._wanted.num_top is not None

    def _piece(self, delta: Delta) -> dict[str, Any]:
        return self._shape.piece_choice(delta, has_logprobs=self._has_logprobs)

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    def _headers(self) -> dict[str, str]:
        return {"x-request-id": self._id, **self._routed[0].receipt.headers()}

    def _usage(self) -> dict[str, int]:
        prompt = sum(len(routed.ids) for routed in self._routed)
        new = sum(len(choice.new_ids) for choice in self._choices)
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}

    async def _finished(self) -> dict[str, Any]:
        """Count and keep the decisions; what the answer shows of them."""
        usage, tokens = self._usage(), self._server.metrics.tokens
        tokens.labels("prompt").inc(usage["prompt_tokens"])
        tokens.labels("completion").inc(usage["completion_tokens"])
        if self._wanted.has_trace:
            for number, routed in enumerate(self._routed):
                new_ids = self._choices[number * self._wanted.num_each].new_ids
                receipt = await self._server.router.seen(routed, new_ids)
                self._routed[number] = replace(routed, receipt=receipt)
        self._record("ok")
        receipts = [routed.receipt.to_json() for routed in self._routed]
        return {"lorary": receipts[0] if len(receipts) == 1 else receipts} if self._wanted.has_trace else {}

    def _record(self, outcome: str) -> None:
        self._is_recorded, each = True, self._wanted.num_each
        for number, routed in enumerate(self._routed):
            choices = self._choices[number * each : (number + 1) * each]
            self._server.record(
                routed,
                self._shape.endpoint,
                routed.asked.source or routed.ids,
                outcome=outcome,
                completion_tokens=sum(len(choice.new_ids) for choice in choices),
                finish=[choice.finish for choice in choices],
                seconds=round(perf_counter() - self._start, 4),
            )

    def _end(self) -> None:
        for choice in self._choices:
            choice.stream.cancel()
        if not self._is_recorded:
            self._record("broken off")


class _Clock:
    """When the last token of an answer came."""

    def __init__(self) -> None:
        self.last: float | None = None


async def _pump(choice: Choice, queue: "asyncio.Queue[Delta | Exception]") -> None:
    """Put what an answer grows by into a queue, and what goes wrong."""
    try:
        async with aclosing(choice.deltas()) as deltas:
            async for delta in deltas:
                queue.put_nowait(delta)
    except Exception as error:
        queue.put_nowait(error)


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"
