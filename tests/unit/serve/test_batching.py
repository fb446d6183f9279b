"""The engine: whatever a request is answered beside, it gets the tokens it gets alone."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

import lorary
from lorary.errors import (
    BaseModelError,
    BusyError,
    EngineError,
    NoSuchAdapterError,
    RequestTimeoutError,
    RouterError,
    UsageError,
)
from lorary.evaluate.completion import complete
from lorary.evaluate.decisions import decide
from lorary.evaluate.sampling import Sampling
from lorary.model.attach import routing
from lorary.model.base import Base, load_base
from lorary.model.seating import seating
from lorary.route.setting import General, Routing
from lorary.serve.batching import RoutedEngine
from lorary.serve.decoder import Decoder
from lorary.serve.engine import Job, Token
from lorary.serve.sizes import Sizes

T = TypeVar("T")
SETTINGS = (
    Routing("arrow"),
    Routing("base"),
    Routing(experts=["a"]),
    Routing("uniform"),
    Routing(experts={"b": 0.5, "c": 2.0}),
    Routing.of("arrow", top_k=1),
    Routing.of("arrow", per="token", top_k=2),
    Routing.of("arrow", general=["d"], top_k=2),
    Routing(experts=["a"], general=General(["d"])),
    Routing.of("arrow", mix="factors"),
    Routing("norm"),
)
SMALL = Sizes(rows=6, chunk=16, capacity=1000, prefix_tokens=256)


@pytest.fixture
def base(
    tiny_base_folder: Path, random_adapter: Callable[..., Any], route: Callable[..., Any], generator: torch.Generator
) -> Base:
    base = load_base(str(tiny_base_folder))
    route(base.model, [random_adapter(base.model, name, generator, size=3.0) for name in "abcd"])
    return base


def ids_of(length: int, generator: torch.Generator) -> tuple[int, ...]:
    return tuple(torch.randint(1, 300, (length,), generator=generator).tolist())


def alone(base: Base, job: Job) -> list[int]:
    with routing(base.model, job.setting):
        return complete(base, job.ids, max_new_tokens=job.max_new_tokens)


def serving(base: Base, work: Callable[[RoutedEngine], Awaitable[T]], sizes: Sizes = SMALL) -> T:
    """Run some work with an engine, which holds nothing when it is over."""

    async def run() -> T:
        engine = RoutedEngine(base, sizes)
        await engine.start()
        try:
            result = await asyncio.wait_for(work(engine), timeout=300)
            if engine.is_ready:
                await idle(engine)
            return result
        finally:
            await engine.stop(drain=0)
            assert (engine.load().waiting, engine.load().running, seating(base.model).held) == (0, 0, {})

    return asyncio.run(run())


async def idle(engine: RoutedEngine) -> None:
    await engine.call(lambda _: None)  # a step has ended since
    assert engine._decoder is not None
    assert not engine._decoder.requests
    assert engine._decoder.num_bytes == 0
    assert engine.prefixes.num_tokens <= engine.sizes.prefix_tokens


async def tokens(engine: RoutedEngine, job: Job) -> list[Token]:
    return [token async for token in engine.submit(job)]


async def ids(engine: RoutedEngine, job: Job) -> list[int]:
    return [token.id for token in await tokens(engine, job)]


def mixed_jobs(number: int, generator: torch.Generator) -> list[Job]:
    lengths = torch.randint(1, 50, (number,), generator=generator).tolist()
    return [Job(ids_of(n, generator), SETTINGS[i % len(SETTINGS)], 1 + (i * 7) % 13) for i, n in enumerate(lengths)]


def test_requests_of_all_settings_get_the_tokens_of_generate_in_any_company(
    base: Base, generator: torch.Generator
) -> None:
    jobs = mixed_jobs(22, generator)
    expected = [alone(base, job) for job in jobs]
    assert len({tuple(answer) for answer in expected}) > 15

    async def work(engine: RoutedEngine) -> None:
        assert await asyncio.gather(*(ids(engine, job) for job in jobs)) == expected
        assert [await ids(engine, job) for job in jobs[:11]] == expected[:11]  # each by itself, and known by now

    serving(base, work)


def test_an_answer_ends_at_the_base_own_stops(base: Base, generator: torch.Generator) -> None:
    jobs = [Job(ids_of(9, generator), Routing("arrow"), 30) for _ in range(8)]
    stops = {alone(base, jobs[0])[4], alone(base, jobs[1])[7]}
    base.model.generation_config.eos_token_id = sorted(stops)

    async def work(engine: RoutedEngine) -> None:
        answers = await asyncio.gather(*(tokens(engine, job) for job in jobs))
        assert [[token.id for token in answer] for answer in answers] == [alone(base, job) for job in jobs]
        assert {answer[-1].finish for answer in answers[:2]} == {"stop"}
        for answer in answers:
            assert (answer[-1].id in stops) == (answer[-1].finish == "stop")
            assert all(token.finish is None for token in answer[:-1])

    serving(base, work)


def test_a_seed_draws_the_same_tokens_in_any_company(base: Base, generator: torch.Generator) -> None:
    prompt, how = ids_of(7, generator), Sampling(temperature=2.0, top_p=0.95)

    async def work(engine: RoutedEngine) -> None:
        job = Job(prompt, Routing("arrow"), 12, how, seed=5)
        first = await ids(engine, job)
        others = [Job(prompt, Routing("arrow"), 12, how, seed=seed) for seed in range(6, 10)]
        again, *rest = await asyncio.gather(
            *(ids(engine, other) for other in [job, *others, *mixed_jobs(5, generator)])
        )
        assert again == first
        assert first not in rest

    serving(base, work)


def test_log_probabilities_are_those_of_a_plain_pass(base: Base, generator: torch.Generator) -> None:
    setting = Routing("arrow")
    jobs = [
        Job(ids_of(length, generator), setting, most, num_top=3, prompt_logprobs=True)
        for length, most in ((40, 5), (3, 0), (1, 4), (5, 0))
    ]

    async def work(engine: RoutedEngine) -> None:
        streams = [engine.submit(job) for job in jobs]
        answers = [[token async for token in stream] for stream in streams]
        for job, stream, answer in zip(jobs, streams, answers, strict=True):
            assert [token.id for token in stream.prompt] == list(job.ids)
            assert len(answer) == job.max_new_tokens
            both = [*stream.prompt, *answer]
            seen = torch.tensor([[token.id for token in both]])
            expected = (await engine.call(lambda model, seen=seen: plain(model, setting, seen))).log_softmax(-1)[0]
            assert both[0].logprob is None
            for place, token in enumerate(both[1:]):
                assert token.logprob == pytest.approx(float(expected[place, token.id]), abs=1e-4)
                values, places = expected[place].topk(3)
                assert [number for number, _ in token.top] == places.tolist()
                assert [value for _, value in token.top] == pytest.approx(values.tolist(), abs=1e-4)

    serving(base, work)


def plain(model: Any, setting: Routing, seen: torch.Tensor) -> torch.Tensor:
    with routing(model, setting):
        logits: torch.Tensor = model(seen).logits
    return logits


def test_a_prompt_that_begins_like_another_is_not_read_twice(
    base: Base, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    columns: list[int] = []
    passed = Decoder._pass

    def count(self: Decoder, cache: Any, requests: Any, new: torch.Tensor, **more: Any) -> torch.Tensor:
        columns.append(new.shape[1])
        return passed(self, cache, requests, new, **more)

    monkeypatch.setattr(Decoder, "_pass", count)
    start = ids_of(40, generator)
    first, second = (Job(start + ids_of(5, generator), Routing("arrow"), 6) for _ in range(2))
    expected = [alone(base, first), alone(base, second)]

    async def work(engine: RoutedEngine) -> None:
        assert await ids(engine, first) == expected[0]
        assert sum(columns) == 45 + 5
        columns.clear()
        assert await ids(engine, second) == expected[1]
        assert sum(columns) == 45 - 32 + 5

    serving(base, work)


def test_no_setting_answers_from_what_another_computed(
    base: Base, random_adapter: Callable[..., Any], generator: torch.Generator
) -> None:
    prompt = ids_of(40, generator)
    jobs = [Job(prompt, setting, 5) for setting in SETTINGS]
    expected = [alone(base, job) for job in jobs]
    assert len({tuple(answer) for answer in expected}) > 7
    other = random_adapter(base.model, "a", generator, size=3.0)

    async def work(engine: RoutedEngine) -> None:
        for _ in range(2):
            assert [await ids(engine, job) for job in jobs] == expected
        # Nor does an expert that took the name of another.
        await engine.change(lambda model: lorary.replace_expert(model, other))
        after = [await ids(engine, job) for job in jobs]
        assert after == await engine.call(lambda _: [alone(base, job) for job in jobs])
        assert after[1] == expected[1]
        assert after[2] != expected[2]

    serving(base, work)


def test_a_request_that_is_broken_off_frees_its_place(base: Base, generator: torch.Generator) -> None:
    long = Job(ids_of(30, generator), Routing("arrow"), 200)
    jobs = mixed_jobs(8, generator)
    expected = [alone(base, job) for job in jobs]

    async def work(engine: RoutedEngine) -> None:
        streams = [engine.submit(long) for _ in range(10)]
        await anext(aiter(streams[0]))
        answers = asyncio.gather(*(ids(engine, job) for job in jobs))
        for stream in streams:
            stream.cancel()
            stream.cancel()
        assert [[token async for token in stream] for stream in streams[1:]] == [[]] * 9
        assert await answers == expected

    serving(base, work)


def test_time_that_is_up_ends_an_answer_by_name(base: Base, generator: torch.Generator) -> None:
    async def work(engine: RoutedEngine) -> None:
        begun = [engine.submit(Job(ids_of(5, generator), Routing("arrow"), 240, timeout=0.05)) for _ in range(9)]
        for stream in begun:
            with pytest.raises(RequestTimeoutError, match=r"tokens after 0\.05 s"):
                [token async for token in stream]
        assert len(await ids(engine, Job(ids_of(5, generator), Routing("base"), 3, timeout=30.0))) <= 3

    serving(base, work)


def test_an_engine_that_is_full_refuses_and_takes_more_later(base: Base, generator: torch.Generator) -> None:
    job = Job(ids_of(5, generator), Routing("base"), 100)

    async def work(engine: RoutedEngine) -> None:
        streams = [engine.submit(job) for _ in range(3)]
        with pytest.raises(BusyError, match="holds 3 requests"):
            engine.submit(job)
        assert sum((engine.load().waiting, engine.load().running)) == engine.load().capacity == 3
        streams[0].cancel()
        await ids(engine, job)
        for stream in streams:
            stream.cancel()

    serving(base, work, Sizes(rows=2, capacity=3))


def test_rows_wait_where_keys_and_values_have_no_place(base: Base, generator: torch.Generator) -> None:
    jobs = [Job(ids_of(20, generator), Routing("arrow"), 10) for _ in range(6)]
    expected = [alone(base, job) for job in jobs]

    async def work(engine: RoutedEngine) -> None:
        answers = asyncio.gather(*(ids(engine, job) for job in jobs))
        most = 0
        while not answers.done():
            most = max(most, await engine.call(lambda _: len(engine._decoder.requests) if engine._decoder else 0))
        assert answers.result() == expected
        assert most == 2

    serving(base, work, Sizes(tokens=60))


@pytest.mark.parametrize("drain", [30, 0])
def test_an_engine_that_stops_ends_what_it_accepted_or_says_so(
    base: Base, generator: torch.Generator, drain: float
) -> None:
    job = Job(ids_of(5, generator), Routing("arrow"), 40)
    expected = alone(base, job)

    async def work(engine: RoutedEngine) -> None:
        streams = [engine.submit(job) for _ in range(9)]
        stopping = asyncio.create_task(engine.stop(drain=drain))
        await asyncio.sleep(0)
        with pytest.raises(EngineError, match="no more requests"):
            engine.submit(job)
        await stopping
        for stream in streams:
            if drain:
                assert [token.id async for token in stream] == expected
            else:
                with pytest.raises(EngineError, match="has stopped"):
                    [token async for token in stream]

    serving(base, work)


def test_a_thread_that_dies_is_told_to_all_who_wait(
    base: Base, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(ids_of(5, generator), Routing("arrow"), 40)

    async def work(engine: RoutedEngine) -> None:
        await ids(engine, job)
        streams = [engine.submit(job) for _ in range(9)]
        monkeypatch.setattr(Decoder, "sweep", lambda self, waiting: 1 // 0)
        for stream in streams:
            with pytest.raises(EngineError, match="ZeroDivisionError"):
                [token async for token in stream]
        assert not engine.is_ready
        for call in (engine.decide(Routing.of("arrow", per="request"), [job.ids]), engine.call(lambda _: None)):
            with pytest.raises(EngineError, match="ZeroDivisionError"):
                await call
        with pytest.raises(EngineError, match="ZeroDivisionError"):
            engine.submit(job)

    serving(base, work)


def test_experts_come_and_go_between_answers(
    base: Base, random_adapter: Callable[..., Any], generator: torch.Generator
) -> None:
    new = random_adapter(base.model, "new", generator, size=3.0)
    begun = [Job(ids_of(10, generator), setting, 20) for setting in (Routing("arrow"), Routing(experts=["b"])) * 5]
    expected = [alone(base, job) for job in begun]
    later = [Job(ids_of(10, generator), setting, 9) for setting in (Routing("arrow"), Routing(experts=["new"]))]

    async def work(engine: RoutedEngine) -> None:
        answers = [asyncio.create_task(ids(engine, job)) for job in begun]
        while not engine.load().running:
            await asyncio.sleep(0)
        added = asyncio.create_task(engine.change(lambda model: lorary.add_expert(model, new)))
        await asyncio.sleep(0)
        waiting = [asyncio.create_task(ids(engine, job)) for job in later]
        assert [await answer for answer in answers] == expected
        assert await added == "new"
        after = [await answer for answer in waiting]
        assert after == await engine.call(lambda _: [alone(base, job) for job in later])
        await engine.change(lambda model: lorary.remove_expert(model, "new"))
        with pytest.raises(RouterError, match="must be in the library"):
            await ids(engine, later[1])
        with pytest.raises(RouterError, match="must be seated"):
            await engine.change(lambda model: lorary.remove_expert(model, "new"))
        assert [await ids(engine, job) for job in begun] == expected

    serving(base, work)


def test_the_library_own_adapters_are_seated_by_name(
    base: Base, random_adapter: Callable[..., Any], generator: torch.Generator
) -> None:
    library = seating(base.model).library
    job = Job(ids_of(10, generator), Routing(experts=["a"]), 9)
    by_all = Routing.of("arrow", per="request", top_k=2)

    async def work(engine: RoutedEngine) -> None:
        assert engine.experts == ("a", "b", "c", "d")
        before = await ids(engine, job)
        library.add_adapter(random_adapter(base.model, "e", generator), {"tasks": []})
        with pytest.raises(RouterError, match="must be in the library"):
            engine.check(Routing(experts=["e"]))
        await engine.seat("e")
        assert engine.experts == ("a", "b", "c", "d", "e")
        engine.check(Routing(experts=["e"]))
        assert dict((await engine.decide(by_all, [job.ids]))[0].weights).keys() <= set(engine.experts)
        library.replace_adapter(random_adapter(base.model, "a", generator, size=3.0), {"tasks": []})
        await engine.seat("a")
        assert await ids(engine, job) == await engine.call(lambda _: alone(base, job)) != before
        await engine.unseat("e")
        with pytest.raises(RouterError, match="must be in the library"):
            engine.check(Routing(experts=["e"]))
        with pytest.raises(NoSuchAdapterError):
            await engine.seat("nobody")
        assert engine.experts == ("a", "b", "c", "d")
        assert not seating(base.model).live

    default = seating(base.model).routing
    serving(base, work)
    assert seating(base.model).routing == default


def test_a_text_is_traced_while_others_are_answered(base: Base, generator: torch.Generator) -> None:
    text, setting = ids_of(12, generator), Routing.of("arrow", top_k=2)
    with routing(base.model, setting), lorary.trace(base.model) as expected:
        base.model(torch.tensor([text]))

    async def work(engine: RoutedEngine) -> None:
        running = [asyncio.create_task(ids(engine, job)) for job in mixed_jobs(5, generator)]
        traced = await engine.trace(setting, text)
        assert traced.layers == tuple(expected.layers)
        torch.testing.assert_close(traced.weights, expected.stacked()[:, 0])
        assert (await engine.trace(Routing("base"), text)).weights.shape == (0, 12, 4)
        await asyncio.gather(*running)

    serving(base, work)


def test_decisions_for_requests_are_those_that_are_taken_one_by_one(base: Base, generator: torch.Generator) -> None:
    settings = [Routing.of("arrow", per="request", top_k=k) for k in (1, 2)]
    prompts = [ids_of(length, generator) for length in (3, 40, 7, 12, 12, 30)]
    expected = {}
    for setting in settings:
        with routing(base.model, setting):
            expected[setting.choosing.top_k] = [decide(base.model, [prompt])[0] for prompt in prompts]

    async def work(engine: RoutedEngine) -> None:
        running = [asyncio.create_task(ids(engine, job)) for job in mixed_jobs(8, generator)]
        calls = [engine.decide(setting, [prompt]) for prompt in prompts for setting in settings]
        decided = await asyncio.gather(*calls, engine.decide(settings[0], prompts))
        for number, setting in enumerate(settings):
            for (decision,), other in zip(decided[number:-1:2], expected[setting.choosing.top_k], strict=True):
                same(decision, other)
        for decision, other in zip(decided[-1], expected[1], strict=True):
            same(decision, other)
        # What was decided answers.
        job = Job(prompts[1], decided[3][0].setting(settings[1]), 9)
        assert await ids(engine, job) == await engine.call(lambda _: alone(base, job))
        await asyncio.gather(*running)

    def same(decision: Any, other: Any) -> None:
        assert dict(decision.weights) == pytest.approx(dict(other.weights))
        assert (decision.best, decision.rule) == (other.best, other.rule)

    serving(base, work)


def test_an_expert_that_gives_no_numbers_fails_alone(base: Base, generator: torch.Generator) -> None:
    jobs = mixed_jobs(4, generator)
    expected = [alone(base, job) for job in jobs]
    layer = seating(base.model).layers["model.layers.0.self_attn.o_proj"]
    layer.lora.up[layer.lora.expert_of_rank == 3] = torch.nan
    bad = Job(ids_of(12, generator), Routing(experts=["d"]), 20)
    good = Job(ids_of(12, generator), Routing(experts=["a"]), 20)

    async def work(engine: RoutedEngine) -> None:
        for _ in range(2):
            answers = asyncio.gather(*(ids(engine, job) for job in [bad, good, *jobs[1:3]]), return_exceptions=True)
            error, *others = await answers
            assert isinstance(error, BaseModelError)
            assert "model.layers.0.self_attn.o_proj" in str(error)
            assert others[1:] == expected[1:3]
            assert others[0] == await engine.call(lambda _: alone(base, good))

    serving(base, work)


def test_what_cannot_be_answered_is_refused_at_once(base: Base, generator: torch.Generator) -> None:
    async def work(engine: RoutedEngine) -> None:
        for job, rule in (
            (Job(ids_of(200, generator), Routing("base"), 100), "fit the 256 positions"),
            (Job((1, 300), Routing("base"), 1), "ids from 1 to 300"),
            (Job((), Routing("base"), 1), "must have tokens"),
            (Job((1,), Routing("base"), 0), "a token at least"),
            (Job((1,), Routing.of("arrow", per="request"), 1), "must have decided"),
        ):
            with pytest.raises(UsageError, match=rule):
                engine.submit(job)
        with pytest.raises(UsageError, match="can be asked"):
            await engine.decide(Routing("arrow"), [(1,)])
        with pytest.raises(RouterError, match="must be in the library"):
            await ids(engine, Job((1,), Routing(experts=["nobody"]), 1))
        with pytest.raises(EngineError, match="started once"):
            await engine.start()

    serving(base, work)


def test_hundreds_of_requests_leave_nothing_behind(base: Base, generator: torch.Generator) -> None:
    jobs = [Job(ids_of(1 + i % 20, generator), SETTINGS[i % 4], 1 + i % 4) for i in range(300)]
    chance = random.Random(3)

    async def one(engine: RoutedEngine, job: Job) -> None:
        stream = engine.submit(job)
        async for _ in stream:
            if chance.random() < 0.2:
                stream.cancel()

    async def work(engine: RoutedEngine) -> None:
        await asyncio.gather(*(one(engine, job) for job in jobs))
        assert (engine.load().waiting, engine.load().running) == (0, 0)
        assert engine.prefixes.num_tokens > 0

    serving(base, work)


def test_a_model_that_is_not_routed_cannot_be_served(tiny_base_folder: Path) -> None:
    with pytest.raises(UsageError, match="routed one"):
        RoutedEngine(load_base(str(tiny_base_folder)))


@pytest.mark.slow
def test_the_embedded_base_answers_a_company_as_it_answers_each(
    embedded_cache: None, random_adapter: Callable[..., Any], route: Callable[..., Any], generator: torch.Generator
) -> None:
    base = load_base("embedded")
    route(base.model, [random_adapter(base.model, name, generator, size=0.5) for name in "abcd"])
    texts = (
        "Name the colour of the sky.",
        "Which month follows May?",
        "Write a word that rhymes with 'house'.",
        "2+2=",
    )
    prompts = [tuple(base.tokenizer(text * (1 + i % 4))["input_ids"]) for i, text in enumerate(texts * 3)]
    jobs = [Job(ids, SETTINGS[i % len(SETTINGS)], 8) for i, ids in enumerate(prompts)]
    expected = [alone(base, job) for job in jobs]

    async def work(engine: RoutedEngine) -> None:
        assert await asyncio.gather(*(ids(engine, job) for job in jobs)) == expected

    serving(base, work, Sizes(rows=8, chunk=32))
