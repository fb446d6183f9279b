"""Clients that ask a server for answers, and clients that do what no good client does."""

import asyncio
import json
import random
import socket
import struct
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import httpx
from serve_stress_answers import FIRST, LIVE, SECOND, WITHOUT, Expected, Timeline

MOST_BODY = 65_536
# Refusals that the documentation tells of: no such model, router or expert now, and no place.
REFUSED, BUSY = (400, 404), 429
# Other statuses of the server that it tells of: it ends, has lost what answered, or took too long.
DOCUMENTED = (503, 504)
# Of one request, with all that it waits for.
TIMEOUT_S = 330.0


@dataclass
class Findings:
    """What was seen.

    Args:
        requests: by kind and outcome.
        statuses: of all responses that were read as such.
        wrong: what should not be, in words.
        first: seconds from a request to its first token.
        between: seconds from one event of an answer to the next.
    """

    requests: Counter[tuple[str, str]] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)

    def count(self, kind: str, outcome: str) -> None:
        """Count a request."""
        self.requests[kind, outcome] += 1

    def note(self, kind: str, found: str) -> None:
        """Count a request that came out wrong, and say how."""
        self.requests[kind, "wrong"] += 1
        self.wrong.append(f"{kind}: {found}")


class Clients:
    """All clients of one run.

    Args:
        url: of the server.
        token: of the server.
        admin: token of who changes the library.
        expected: what is right.
        num_tokens: most of an answer.
    """

    def __init__(self, url: str, token: str, admin: str, expected: Expected, num_tokens: int) -> None:
        self.url, self.token, self.admin = url, token, admin
        self.expected, self.num_tokens = expected, num_tokens
        self.findings, self.timeline = Findings(), Timeline()
        self.host, port = url.removeprefix("http://").split(":")
        self.port = int(port)
        self.client = httpx.AsyncClient(
            base_url=url,
            headers={"authorization": f"Bearer {token}"},
            timeout=TIMEOUT_S,
            # The server closes idle connections later, so that none is closed while a request is on its way.
            limits=httpx.Limits(max_connections=None, keepalive_expiry=5),
            event_hooks={"response": [self._count_status]},
        )

    async def _count_status(self, response: httpx.Response) -> None:
        self.findings.statuses[response.status_code] += 1

    async def run(self, number: int, seed: str, goes_on: Callable[[], bool]) -> None:
        """One client: requests of all kinds, one after the other, and the library is changed beside them.

        Args:
            number: of clients.
            seed: of what they ask.
            goes_on: whether another request is to be made.
        """
        is_over = False
        changing = asyncio.create_task(self._change(random.Random(f"{seed} admin"), lambda: not is_over))
        watching = asyncio.create_task(self._watch(lambda: not is_over))
        await asyncio.gather(*(self._ask_on(random.Random(f"{seed} {i}"), goes_on) for i in range(number)))
        is_over = True
        await asyncio.gather(changing, watching)

    async def _ask_on(self, rng: random.Random, goes_on: Callable[[], bool]) -> None:
        kinds = list(self._kinds)
        weights = [self._kinds[kind][0] for kind in kinds]
        while goes_on():
            (kind,) = rng.choices(kinds, weights)
            try:
                async with asyncio.timeout(TIMEOUT_S):
                    await self._kinds[kind][1](self, kind, rng)
            except (httpx.HTTPError, OSError, TimeoutError, ValueError, KeyError) as error:
                self.findings.note(kind, f"{type(error).__name__}: {error}")

    # Requests that are answered.

    def _question(self, rng: random.Random) -> tuple[str, int, int]:
        """A name, the number of a prompt, and the most tokens of its answer."""
        name = rng.choice(self.expected.names)
        return name, rng.randrange(len(self.expected.prompts)), rng.randint(1, self.num_tokens)

    def _body(self, name: str, number: int, most: int, **more: Any) -> dict[str, Any]:
        return {"model": name, "prompt": self.expected.prompts[number], "max_tokens": most, **more}

    async def _whole(self, kind: str, rng: random.Random) -> None:
        name, number, most = self._question(rng)
        begin = time.monotonic()
        response = await self.client.post("/v1/completions", json=self._body(name, number, most))
        choices = response.json()["choices"] if response.status_code == 200 else []
        self._judge(kind, name, number, most, begin, response, [choice["text"] for choice in choices])

    async def _several(self, kind: str, rng: random.Random) -> None:
        """Two equal prompts in one request."""
        name, number, most = self._question(rng)
        begin, body = time.monotonic(), self._body(name, number, most)
        response = await self.client.post("/v1/completions", json={**body, "prompt": [body["prompt"]] * 2})
        choices = response.json()["choices"] if response.status_code == 200 else []
        self._judge(kind, name, number, most, begin, response, [choice["text"] for choice in choices])

    async def _chat(self, kind: str, rng: random.Random) -> None:
        name, number, most = self._question(rng)
        messages = [{"role": "user", "content": self.expected.prompts[number]}]
        body = {"model": name, "messages": messages, "max_tokens": most, "template": "plain"}
        begin = time.monotonic()
        response = await self.client.post("/v1/chat/completions", json=body)
        choices = response.json()["choices"] if response.status_code == 200 else []
        texts = [choice["message"]["content"] for choice in choices]
        self._judge(kind, name, number, most, begin, response, texts, is_trimmed=True)

    async def _streamed(self, kind: str, rng: random.Random) -> None:
        name, number, most = self._question(rng)
        begin = last = time.monotonic()
        text, is_done, error = "", False, None
        async with self.client.stream("POST", "/v1/completions", json=self._body(name, number, most, stream=True)) as r:
            if r.status_code != 200:
                await r.aread()
                return self._judge(kind, name, number, most, begin, r, [])
            async for event in _events(r):
                now = time.monotonic()
                if event is None:
                    is_done = True
                elif "error" in event:
                    error = event["error"]
                elif event["choices"]:
                    (self.findings.between if text else self.findings.first).append(now - last)
                    last, text = now, text + event["choices"][0]["text"]
        if error is not None or not is_done:
            return self.findings.note(kind, f"{name}: the stream ended with {error}, done: {is_done}")
        self._judge(kind, name, number, most, begin, r, [text])

    def _judge(
        self, kind: str, name: str, number: int, most: int, begin: float, response: httpx.Response, texts: list[str],
        *, is_trimmed: bool = False,
    ) -> None:  # fmt: skip
        """Compare an answer with those that are right, and a refusal with what is documented."""
        states = self.timeline.during(begin, time.monotonic())
        right = self.expected.admitted(name, number, states, most)
        if is_trimmed:
            right = {answer and answer.lstrip() for answer in right}
        status = response.status_code
        is_right = bool(texts) and set(texts) <= right if status == 200 else status in REFUSED and None in right
        if is_right:
            self.findings.count(kind, "right" if status == 200 else "refused")
        elif status == BUSY and "retry-after" in response.headers:
            self.findings.count(kind, "busy")
        elif status in DOCUMENTED:
            self.findings.count(kind, str(status))
        else:
            found = texts if status == 200 else f"{status} {response.text[:200]}"
            asked = f"{name}, prompt {number}, {most} tokens, {'/'.join(sorted(states))}"
            self.findings.note(kind, f"{asked}: {found!r} is none of {sorted(map(repr, right))}")

    # Clients that leave.

    async def _left(self, kind: str, rng: random.Random) -> None:
        """Leave a stream half-way."""
        name, number, most = self._question(rng)
        text, left_after = "", rng.randint(1, self.num_tokens)
        begin = time.monotonic()
        async with self.client.stream("POST", "/v1/completions", json=self._body(name, number, most, stream=True)) as r:
            if r.status_code != 200:
                await r.aread()
                return self._judge(kind, name, number, most, begin, r, [])
            async with aclosing(_events(r)) as events:
                async for event in events:
                    if event is None:
                        break
                    if "error" in event:
                        return self.findings.note(kind, f"{name}: {event['error']}")
                    text += event["choices"][0]["text"] if event["choices"] else ""
                    left_after -= 1
                    if not left_after:
                        break
        states = self.timeline.during(begin, time.monotonic())
        right = self.expected.admitted(name, number, states, most)
        if any(answer is not None and answer.startswith(text) for answer in right):
            self.findings.count(kind, "left")
        else:
            self.findings.note(kind, f"{name}, prompt {number}: {text!r} begins none of {sorted(map(repr, right))}")

    async def _cancelled(self, kind: str, rng: random.Random) -> None:
        """Give a whole answer up before it comes."""
        asking = asyncio.create_task(self._whole(kind, rng))
        await asyncio.wait({asking}, timeout=rng.expovariate(2))
        if asking.done():
            return await asking
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        self.findings.count(kind, "left")

    async def _killed(self, kind: str, rng: random.Random) -> None:
        """Reset a connection: within the head, within the body, or while the answer is made."""
        name, number, most = self._question(rng)
        data = self._post(self._body(name, number, most, stream=rng.random() < 0.5))
        part = rng.choice((rng.randrange(len(data)), len(data)))
        reader, writer = await asyncio.open_connection(self.host, self.port)
        writer.write(data[:part])
        await writer.drain()
        if part == len(data) and rng.random() < 0.5:
            async with asyncio.timeout(TIMEOUT_S):
                await reader.read(20)  # of the answer
        else:
            await asyncio.sleep(rng.expovariate(10))
        connection = writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
        self.findings.count(kind, "left")

    # Requests that are none.

    async def _garbage(self, kind: str, rng: random.Random) -> None:
        name, number, most = self._question(rng)
        good = json.dumps(self._body(name, number, most)).encode()
        data = rng.choice((
            good[: rng.randrange(len(good))], b"[" * 5000, rng.randbytes(200), b"null", b"", b'{"model": "\xff"}',
            json.dumps({**self._body(name, number, most), "max_tokens": "many"}).encode(),
            json.dumps({**self._body(name, number, most), "prompt": {"a": [1]}}).encode(),
            good[:-1] + b', "temperature": NaN}',
        ))  # fmt: skip
        self._expect(kind, await self.client.post("/v1/completions", content=data, headers=JSON), 400)

    async def _oversized(self, kind: str, rng: random.Random) -> None:
        name, _, most = self._question(rng)
        if rng.random() < 0.5:
            ids = [5] * (self.expected.context + rng.randint(1, 100))
            response = await self.client.post("/v1/completions", json={**self._body(name, 0, most), "prompt": ids})
            return self._expect(kind, response, *REFUSED)
        data = self._post({"model": name, "prompt": "x" * (2 * MOST_BODY)})
        reader, writer = await asyncio.open_connection(self.host, self.port)
        try:
            writer.write(data)
            line = await reader.readline()
        finally:
            writer.transport.abort()
        self._expect_status(kind, int(line.split()[1]) if line else 0, line.decode(), (413,))

    async def _unwelcome(self, kind: str, rng: random.Random) -> None:
        """A wrong token, none, or one that may not change the library."""
        body = self._body(*self._question(rng))
        case = rng.randrange(4)
        if case == 0:
            response = await self.client.post("/v1/completions", json=body, headers={"authorization": "Bearer wrong"})
        elif case == 1:
            response = await self.client.get("/v1/models", headers={"authorization": ""})
        elif case == 2:
            response = await self.client.delete(f"/v1/adapters/{LIVE}")
            return self._expect(kind, response, 403)
        else:
            files = self.expected.files[FIRST]
            response = await self._upload("POST", "/v1/adapters", files, "Bearer wrong", name="intruder")
        self._expect(kind, response, 401)

    async def _unknown(self, kind: str, rng: random.Random) -> None:
        body = self._body(*self._question(rng))
        body["model"] = rng.choice(("nobody", f"{body['model']}x", "lib@nobody", "lib:nobody", "x" * 500))
        self._expect(kind, await self.client.post("/v1/completions", json=body), 404)

    def _expect(self, kind: str, response: httpx.Response, *statuses: int) -> None:
        text = response.text
        if response.status_code in statuses and not _is_error(response):
            return self.findings.note(kind, f"{response.status_code} without an error in OpenAI's shape: {text[:200]}")
        self._expect_status(kind, response.status_code, text, statuses)

    def _expect_status(self, kind: str, status: int, text: str, statuses: tuple[int, ...]) -> None:
        if status in statuses:
            self.findings.count(kind, "refused")
        elif status in (BUSY, *DOCUMENTED):
            self.findings.count(kind, str(status))
        else:
            self.findings.note(kind, f"{status} is none of {statuses}: {text[:200]}")

    def _post(self, body: Mapping[str, Any]) -> bytes:
        data = json.dumps(body).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: {self.host}\r\nAuthorization: Bearer {self.token}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        return head.encode() + data

    # Who changes the library, and who looks.

    async def _change(self, rng: random.Random, goes_on: Callable[[], bool]) -> None:
        """Add, replace and remove the live adapter, one change after the other; it is gone in the end."""
        while goes_on():
            states = {WITHOUT: (FIRST, SECOND), FIRST: (SECOND, WITHOUT), SECOND: (FIRST, WITHOUT)}
            await self._bring_to(rng.choice(states[self.timeline.state]))
            await asyncio.sleep(rng.uniform(0.2, 1.0))
        if self.timeline.state != WITHOUT:
            await self._bring_to(WITHOUT)

    async def _bring_to(self, state: str) -> None:
        before, authorization = self.timeline.state, f"Bearer {self.admin}"
        self.timeline.begin(state)
        if state == WITHOUT:
            kind, right = "remove", 200
            headers = {"authorization": authorization}
            response = await self.client.delete(f"/v1/adapters/{LIVE}", headers=headers)
        elif before == WITHOUT:
            kind, right, files = "add", 201, self.expected.files[state]
            response = await self._upload("POST", "/v1/adapters", files, authorization, name=LIVE)
        else:
            kind, right, files = "replace", 200, self.expected.files[state]
            response = await self._upload("PUT", f"/v1/adapters/{LIVE}", files, authorization)
        self.timeline.end()
        if response.status_code == right:
            return self.findings.count(kind, "done")
        self.findings.note(kind, f"{response.status_code} {response.text[:300]}")
        self.timeline.begin(before)
        self.timeline.end()

    async def _upload(
        self, method: str, path: str, files: Mapping[str, bytes], authorization: str, **fields: str
    ) -> httpx.Response:
        config, weights = files["adapter_config.json"], files["adapter_model.safetensors"]
        return await self.client.request(
            method, path, data=fields, files={"config": config, "weights": weights},
            headers={"authorization": authorization},
        )  # fmt: skip

    async def _watch(self, goes_on: Callable[[], bool]) -> None:
        paths = ("/health", "/ready", "/metrics", "/v1/models", "/v1/adapters", "/v1/usage", "/v1/decisions?limit=50")
        while goes_on():
            for path in paths:
                response = await self.client.get(path)
                if response.status_code == 200:
                    self.findings.count("watch", "right")
                else:
                    self.findings.note("watch", f"{path}: {response.status_code} {response.text[:200]}")
            await asyncio.sleep(0.5)

    _kinds: Mapping[str, tuple[int, Callable[["Clients", str, random.Random], Awaitable[None]]]] = {
        "whole": (30, _whole),
        "streamed": (30, _streamed),
        "chat": (5, _chat),
        "two prompts": (4, _several),
        "left half-way": (8, _left),
        "cancelled": (6, _cancelled),
        "killed": (5, _killed),
        "garbage": (4, _garbage),
        "oversized": (3, _oversized),
        "wrong token": (3, _unwelcome),
        "unknown name": (2, _unknown),
    }


JSON = {"content-type": "application/json"}


async def _events(response: httpx.Response) -> AsyncIterator[dict[str, Any] | None]:
    """The events of a stream; None for the one that says it is done."""
    async for line in response.aiter_lines():
        if line == "data: [DONE]":
            yield None
        elif line:
            event: dict[str, Any] = json.loads(line.removeprefix("data: "))
            yield event


def _is_error(response: httpx.Response) -> bool:
    try:
        return set(response.json()["error"]) == {"message", "type", "param", "code"}
    except (ValueError, KeyError, TypeError):
        return False
