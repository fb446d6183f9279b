"""Several replicas as one engine: who gets a job, what a death costs, and how a new version rolls over."""

import asyncio
import pickle
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from fake_engine import FakeEngine

from lorary.errors import AdapterError, BusyError, EngineError, RequestTimeoutError, RouterError
from lorary.evaluate.sampling import Sampling
from lorary.route.setting import Routing
from lorary.serve import replicas as module
from lorary.serve import versions
from lorary.serve.engine import Engine, Job
from lorary.serve.replica import Facts, Replica
from lorary.serve.replicas import Link, LostError, Replicas
from lorary.serve.sizes import Sizes

LOAD_S = 0.02
STUCK_S = 60.0  # until a token, for answers that a test breaks off


class FakeLink:
    """A replica in this process, which can be killed. What passes is pickled, as between processes."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine, self.dead = engine, asyncio.Event()
        facts = Facts(engine.experts, Routing("arrow"), 256, 300)
        self.replica = Replica(lambda: (time.sleep(LOAD_S), (engine, facts))[1])
        self.asked: list[str] = []

    async def ask(self, question: str, *arguments: Any) -> Any:
        self.asked.append(question)
        work = asyncio.ensure_future(self.replica.answer(question, *passed(arguments)))
        death = asyncio.ensure_future(self.dead.wait())
        try:
            await asyncio.wait({work, death}, return_when=asyncio.FIRST_COMPLETED)
            if self.dead.is_set():
                raise LostError("killed")
            return answered(work.result())
        finally:
            work.cancel()
            death.cancel()

    def ask_now(self, question: str, *arguments: Any) -> Any:
        if self.dead.is_set():
            raise LostError("killed")
        return answered(asyncio.run(self.replica.answer(question, *passed(arguments))))

    def end(self) -> None:
        self.dead.set()


def passed(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def answered(outcome: tuple[Any, Exception | None]) -> Any:
    result, error = passed(outcome)
    if error is not None:
        raise error
    return result


class Crew:
    """Replicas over fakes.

    Args:
        tokenizer: of the fakes.
        number: of replicas.
        capacity: of all.
        engine: fields of every fake.
    """

    def __init__(self, tokenizer: Any, number: int = 2, capacity: int = 64, **engine: Any) -> None:
        self.stamps: dict[str, object] = {"blue": 1, "june": 1}
        self.links: list[FakeLink] = []
        self.lines: list[str] = []
        self.launch_error: Exception | None = None
        self._tokenizer, self._engine = tokenizer, engine
        first = [self.launch() for _ in range(number)]
        sizes = Sizes(rows=4, capacity=capacity)
        self.replicas = Replicas(self.launch, first, sizes, lambda: dict(self.stamps), self.lines.append)

    def launch(self) -> FakeLink:
        engine = FakeEngine(self._tokenizer, list(self.stamps), **self._engine)
        link = FakeLink(engine)
        if self.launch_error is not None:
            link.replica = Replica(self._fail)
        self.links.append(link)
        return link

    def _fail(self) -> Any:
        assert self.launch_error is not None
        raise self.launch_error

    @property
    def engines(self) -> list[FakeEngine]:
        return [link.engine for link in self.links]

    def run(self, work: Callable[[], Awaitable[Any]], drain: float = 0.0) -> Any:
        async def main() -> Any:
            for link in self.links:
                await link.ask("load")
            await self.replicas.start()
            try:
                async with asyncio.timeout(20):
                    return await work()
            finally:
                await self.replicas.stop(drain=drain)

        return asyncio.run(main())

    async def text(self, session: str | None = None, **job: Any) -> str:
        ids = [token.id async for token in self.replicas.submit(make_job(session=session, **job))]
        return str(self._tokenizer.decode(ids, skip_special_tokens=True)).strip()


def make_job(expert: str = "june", **fields: Any) -> Job:
    return Job((5, 6, 7), Routing(experts=[expert]), 40, **fields)


async def until(condition: Callable[[], Any]) -> None:
    while not condition():
        await asyncio.sleep(0.002)


@pytest.fixture
def make_crew(tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Crew]:
    monkeypatch.setattr(versions, "LOOK_S", 0.01)
    monkeypatch.setattr(module, "AGAIN_S", 0.01)
    return lambda *arguments, **engine: Crew(tiny_tokenizer, *arguments, **engine)


ANSWER = "june says: Name the colour of the sky"


def test_they_are_an_engine(make_crew: Callable[..., Crew]) -> None:
    crew = make_crew()
    assert isinstance(crew.replicas, Engine)
    assert isinstance(crew.links[0], Link)
    assert not crew.replicas.is_ready
    with pytest.raises(EngineError):
        crew.replicas.submit(make_job())
    assert crew.replicas.look() == Facts(("blue", "june"), Routing("arrow"), 256, 300)
    crew.links[1].end()
    with pytest.raises(EngineError, match="must start"):
        crew.replicas.look()


def test_jobs_go_where_the_fewest_are_and_sessions_stay(make_crew: Callable[..., Crew]) -> None:
    crew = make_crew(3, pace=STUCK_S)

    async def work() -> None:
        for _ in range(9):
            crew.replicas.submit(make_job())
        await until(lambda: [len(engine.jobs) for engine in crew.engines] == [3, 3, 3])
        for _ in range(6):
            crew.replicas.submit(make_job(session="one"))
        await until(lambda: sum(len(engine.jobs) for engine in crew.engines) == 15)
        assert sorted(len(engine.jobs) for engine in crew.engines) == [3, 3, 9]
        load = crew.replicas.load()
        assert (load.running, load.waiting, load.capacity) == (3 + 3 + 4, 5, 64)

    crew.run(work)


def test_answers_prompts_and_errors_come_through(make_crew: Callable[..., Crew]) -> None:
    crew = make_crew()

    async def work() -> None:
        assert await crew.text() == ANSWER
        assert await crew.text(sampling=Sampling(), seed=7) == "june seed 7 says: Name the colour of the sky"
        stream = crew.replicas.submit(make_job(num_top=2, prompt_logprobs=True))
        tokens = [token async for token in stream]
        assert [token.id for token in stream.prompt] == [5, 6, 7]
        assert len(tokens[0].top) == 2
        for engine in crew.engines:
            engine.failure = RouterError("no such expert", found="june", remedy="another one")
        with pytest.raises(RouterError, match="no such expert") as refused:
            await crew.text()
        assert (refused.value.found, refused.value.remedy) == ("june", "another one")
        for engine in crew.engines:
            engine.failure, engine.capacity = None, 0
        with pytest.raises(BusyError):
            await crew.text()
        for engine in crew.engines:
            engine.failure, engine.capacity = ValueError("a secret of the prompt"), 64
        with pytest.raises(RuntimeError, match=r"^ValueError in a replica$"):
            await crew.text()
        assert (await crew.replicas.decide(Routing("contrast"), [(5, 6)]))[0].rule == "contrast"
        assert (await crew.replicas.trace(Routing("arrow"), (5, 6, 7))).weights.shape == (2, 3, 2)
        await asyncio.to_thread(crew.replicas.check, Routing(experts=["june"]))
        with pytest.raises(RouterError, match="must be seated"):
            await asyncio.to_thread(crew.replicas.check, Routing(experts=["nobody"]))

    crew.run(work)


def test_cancelled_answers_free_their_places(make_crew: Callable[..., Crew]) -> None:
    crew = make_crew(2, 4, pace=STUCK_S)

    async def work() -> None:
        streams = [crew.replicas.submit(make_job()) for _ in range(4)]
        with pytest.raises(BusyError):
            crew.replicas.submit(make_job())
        streams[0].cancel()  # before the replica has it
        await until(lambda: sum(len(engine.jobs) for engine in crew.engines) == 4)
        for stream in streams:
            stream.cancel()
            stream.cancel()
        await until(lambda: sum(engine.running for engine in crew.engines) == 0)
        assert crew.replicas.load().running == crew.replicas.load().waiting == 0

    crew.run(work)


def test_a_death_before_the_first_token_is_not_noticed(make_crew: Callable[..., Crew]) -> None:
    crew = make_crew(pace=STUCK_S)

    async def work() -> None:
        answers = [asyncio.create_task(crew.text(timeout=30.0)) for _ in range(4)]
        await until(lambda: [len(engine.jobs) for engine in crew.engines] == [2, 2])
        crew._engine["pace"] = crew.engines[1].pace = 0.0
        crew.links[0].end()
        await until(lambda: answers[0].done() and answers[2].done())
        assert answers[0].result() == answers[2].result() == ANSWER
        await until(lambda: len(crew.links) == 3 and crew.links[2].engine.is_started)
        assert "replica 1 is gone with 2 requests: killed" in crew.lines
        await until(lambda: "replica 1 is ready" in crew.lines)
        # The new one has nothing to do, the other still has two.
        assert await crew.text() == ANSWER
        assert len(crew.engines[2].jobs) == 1

    crew.run(work)


def test_a_death_after_the_first_token_is_an_error_of_that_answer_alone(make_crew: Callable[..., Crew]) -> None:
    crew = make_crew(pace=0.01)

    async def work() -> None:
        first, second = crew.replicas.submit(make_job()), asyncio.create_task(crew.text())
        tokens = aiter(first)
        await anext(tokens)
        crew.links[0].end()
        with pytest.raises(EngineError, match="must live until it is complete"):
            async for _ in tokens:
                pass
        assert await second == ANSWER
        assert crew.replicas.is_ready

    crew.run(work)


def test_a_job_that_kills_replicas_is_given_up(make_crew: Callable[..., Crew]) -> None:
    crew = make_crew(pace=STUCK_S)

    async def work() -> None:
        answer = asyncio.create_task(crew.text())
        for _ in range(module.MOST_TRIES):
            await until(lambda: any(link.engine.jobs and not link.dead.is_set() for link in crew.links))
            next(link for link in crew.links if link.engine.jobs and not link.dead.is_set()).end()
        with pytest.raises(EngineError, match="3 replicas are gone"):
            await answer

    crew.run(work)


def test_requests_wait_for_the_successor_of_the_only_replica(make_crew: Callable[..., Crew]) -> None:
    crew = make_crew(1)

    async def work() -> None:
        crew.links[0].end()
        await until(lambda: not crew.replicas.is_ready)
        answer, decided = crew.text(timeout=20.0), crew.replicas.decide(Routing("contrast"), [(5, 6)])
        text, decisions = await asyncio.gather(answer, decided)
        assert (text, len(decisions), len(crew.links)) == (ANSWER, 1, 2)

    crew.run(work)


def test_where_no_replica_starts_requests_fail_until_one_does(make_crew: Callable[..., Crew]) -> None:
    crew = make_crew(1)

    async def work() -> None:
        crew.launch_error = AdapterError("an adapter must be whole")
        crew.links[0].end()
        await until(lambda: not crew.replicas.is_ready)
        with pytest.raises(EngineError, match="none can be started"):
            await crew.text()
        with pytest.raises(EngineError, match="none can be started"):
            await crew.replicas.decide(Routing("contrast"), [(5, 6)])
        crew.launch_error = None
        await until(lambda: crew.replicas.is_ready)
        assert await crew.text() == ANSWER
        crew.links[-1].end()
        await until(lambda: not crew.replicas.is_ready)
        with pytest.raises(RequestTimeoutError):
            await crew.text(timeout=1e-9)

    crew.run(work)


def test_an_expert_comes_replica_by_replica_while_the_others_answer(make_crew: Callable[..., Crew]) -> None:
    crew = make_crew(3)
    changing: list[int] = []

    async def work() -> None:
        for number, engine in enumerate(crew.engines):
            slow_down(engine, lambda number=number: changing.append(number))
        texts: list[str] = []
        asking = asyncio.create_task(ask_on(crew, texts))
        crew.stamps["new"] = 1
        await crew.replicas.seat("new")
        assert changing == [0, 0, 1, 1, 2, 2]  # begun and ended, one after the other
        assert crew.replicas.experts == ("blue", "june", "new")
        await crew.replicas.unseat("new")
        assert crew.replicas.experts == ("blue", "june")
        asking.cancel()
        assert len(texts) > 10
        assert set(texts) == {ANSWER}
        # Nobody was asked while it changed: the others were free.
        assert crew.lines == []

    crew.run(work)


def slow_down(engine: FakeEngine, note: Callable[[], None]) -> None:
    seat = engine.seat

    async def slow(name: str) -> None:
        note()
        before = len(engine.jobs)
        await asyncio.sleep(0.03)
        await seat(name)
        assert len(engine.jobs) == before
        note()

    engine.seat = slow  # type: ignore[method-assign]


async def ask_on(crew: Crew, texts: list[str]) -> None:
    while True:
        texts.append(await crew.text())


def test_what_the_first_replica_refuses_changes_nothing(make_crew: Callable[..., Crew]) -> None:
    crew = make_crew()

    async def work() -> None:
        crew.engines[0].seat_error = AdapterError("an adapter must fit", found="rank 3")
        with pytest.raises(AdapterError, match="must fit"):
            await crew.replicas.seat("new")
        assert crew.replicas.experts == ("blue", "june")
        assert "new" not in crew.engines[1].names
        assert len(crew.links) == 2

    crew.run(work)


def test_a_replica_that_does_not_follow_the_first_is_replaced(make_crew: Callable[..., Crew]) -> None:
    crew = make_crew()

    async def work() -> None:
        crew.engines[1].seat_error = AdapterError("an adapter must fit")
        crew.stamps["new"] = 1
        await crew.replicas.seat("new")
        await until(lambda: "replica 2 is ready" in crew.lines)
        assert crew.links[1].dead.is_set()
        assert crew.links[2].engine.experts == crew.replicas.experts == ("blue", "june", "new")

    crew.run(work)


def test_what_other_commands_change_is_followed(make_crew: Callable[..., Crew]) -> None:
    crew = make_crew()
    looked: list[tuple[str, ...]] = []

    async def changed() -> None:
        looked.append(crew.replicas.experts)

    async def work() -> None:
        crew.replicas.versions.serve(asyncio.Lock(), changed)
        crew.stamps = {"june": 2, "new": 1}
        await until(lambda: looked)
        assert looked == [("june", "new")]
        assert all(engine.experts == ("june", "new") for engine in crew.engines)
        assert crew.lines == ["the library has changed: 2 adapters come, 1 go"]
        for engine in crew.engines:
            engine.seat_error = AdapterError("an adapter must fit")
        crew.stamps = {"june": 2, "new": 1, "bad": 1}
        await until(lambda: len(crew.lines) == 3)
        await asyncio.sleep(0.1)  # it is not tried again
        assert crew.lines[2] == "'bad' is left as it was: an adapter must fit"
        assert len(crew.lines) == 3
        assert crew.replicas.experts == ("june", "new")

    crew.run(work)


def test_the_end_waits_for_what_was_accepted_and_breaks_off_the_rest(make_crew: Callable[..., Crew]) -> None:
    crew = make_crew(pace=0.01)
    answers: list[asyncio.Task[str]] = []

    async def work() -> None:
        answers.extend(asyncio.create_task(crew.text()) for _ in range(4))
        await asyncio.sleep(0)

    async def main() -> None:
        for link in crew.links:
            await link.ask("load")
        await crew.replicas.start()
        await work()
        await crew.replicas.stop(drain=10)
        assert await asyncio.gather(*answers) == [ANSWER] * 4
        with pytest.raises(EngineError, match="stops"):
            crew.replicas.submit(make_job())
        assert all(link.dead.is_set() for link in crew.links)

    asyncio.run(main())
    crew = make_crew(pace=STUCK_S)

    async def stuck() -> asyncio.Task[str]:
        answer = asyncio.create_task(crew.text())
        await until(lambda: crew.replicas.load().running)
        return answer

    async def broken_off() -> None:
        for link in crew.links:
            await link.ask("load")
        await crew.replicas.start()
        answer = await stuck()
        await crew.replicas.stop(drain=0)
        with pytest.raises(EngineError, match="has stopped"):
            await answer

    asyncio.run(broken_off())


def test_a_death_while_draining_moves_what_had_not_begun(make_crew: Callable[..., Crew]) -> None:
    crew = make_crew(pace=STUCK_S)

    async def main() -> None:
        for link in crew.links:
            await link.ask("load")
        await crew.replicas.start()
        answer = asyncio.create_task(crew.text())
        await until(lambda: sum(len(engine.jobs) for engine in crew.engines))
        busy = next(link for link in crew.links if link.engine.jobs)
        for engine in crew.engines:
            engine.pace = 0.0
        ending = asyncio.create_task(crew.replicas.stop(drain=15))
        await asyncio.sleep(0.01)
        busy.end()
        assert await answer == ANSWER
        await ending
        assert len(crew.links) == 2

    asyncio.run(main())
