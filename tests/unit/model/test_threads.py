"""Threads and asyncio tasks that use one model at once: each has the answers that it has alone."""

import asyncio
import contextlib
import contextvars
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from typing import Any

import pytest
import torch
from torch import Tensor

from lorary.errors import UsageError
from lorary.lora import context
from lorary.lora.context import PerThread, innermost, inside, new_block
from lorary.model.attach import detach, routing
from lorary.model.live import add_expert, remove_expert, replace_expert
from lorary.model.seating import seating
from lorary.model.trace import trace

Make = Callable[..., Any]
THREADS = 8
SETTINGS: list[Any] = [
    "arrow",
    "base",
    {"experts": ["b"]},
    {"router": "lag", "top_k": 1},
    {"per": "token", "temperature": 0.1},
    {"per": "request", "temperature": 0.1},
    ["base", {"router": "norm", "per": "request"}],
    {"general": ["a"], "top_k": 1},
]
PROMPTS = torch.randint(1, 300, (THREADS, 2, 6), generator=torch.Generator().manual_seed(5))
PATIENCE_S = 60.0


@pytest.fixture
def routed(tiny_model: Make, random_adapter: Make, route: Make, generator: torch.Generator) -> Any:
    model = tiny_model()
    return route(model, [random_adapter(model, name, generator, size=2.0) for name in "abcd"], top_k=2)


@torch.no_grad()
def logits(model: Any, ids: Tensor = PROMPTS[0], **settings: Any) -> Tensor:
    found: Tensor = model(input_ids=ids, **settings).logits
    return found


def generated(model: Any, ids: Tensor) -> Tensor:
    mask = torch.ones_like(ids)
    found: Tensor = model.generate(ids, attention_mask=mask, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    return found


def in_threads(work: Callable[[int, Callable[[], Any]], Any], number: int = THREADS) -> list[Any]:
    """What each thread makes of its number; all of them wait for each other where they call what they are given."""
    barrier = threading.Barrier(number, timeout=PATIENCE_S)

    def run(thread: int) -> Any:
        try:
            return work(thread, barrier.wait)
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(number) as pool:
        futures = [pool.submit(run, thread) for thread in range(number)]
    errors = [error for future in futures if (error := future.exception()) is not None]
    for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error  # that of the thread which the others wait for in vain
    return [future.result() for future in futures]


def in_a_thread(work: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result(PATIENCE_S)


def check_nothing_is_left(model: Any) -> None:
    state = seating(model)
    assert (state.held, state.pass_handles) == ({}, [])
    assert not any(layer.lora.held or layer.lora.recorders for layer in state.layers.values())


# Settings.


def test_eight_threads_each_have_the_answers_that_they_have_alone(routed: Any) -> None:
    default, alone = logits(routed), {}
    for number, setting in enumerate(SETTINGS):
        with routing(routed, setting):
            for thread, ids in enumerate(PROMPTS):
                alone[number, thread] = logits(routed, ids)
                if number in (thread, (thread + 1) % THREADS):
                    alone[number, thread, "tokens"] = generated(routed, ids)

    def work(thread: int, meet: Callable[[], Any]) -> list[bool]:
        right = []
        for turn in range(len(SETTINGS)):
            number, ids = (thread + turn) % len(SETTINGS), PROMPTS[thread]
            with routing(routed, SETTINGS[number]):
                meet()  # every setting is in force in one of the threads
                right.append(torch.equal(logits(routed, ids), alone[number, thread]))
                if turn < 2:
                    right.append(torch.equal(generated(routed, ids), alone[number, thread, "tokens"]))
                meet()
        return right

    found = in_threads(work)
    assert [sum(right) for right in found] == [len(SETTINGS) + 2] * THREADS
    check_nothing_is_left(routed)
    assert torch.equal(logits(routed), default)


@pytest.mark.parametrize("setting", [{"per": "token", "temperature": 0.1}, {"per": "request", "temperature": 0.1}])
@pytest.mark.parametrize("is_shared", [False, True])
def test_what_is_decided_in_one_thread_is_read_by_no_other(routed: Any, setting: Any, is_shared: bool) -> None:
    local = threading.local()  # how the passes of a thread wait for those of the others, when a first layer has decided
    with routing(routed, setting):
        expected = [logits(routed, ids, use_cache=False) for ids in PROMPTS]
        shared = [contextvars.copy_context() for _ in PROMPTS]

        def hold(*_: Any) -> None:
            local.meet()

        handle = routed.model.layers[1].register_forward_pre_hook(hold)

        def passes(thread: int) -> Tensor:
            return logits(routed, PROMPTS[thread], use_cache=False)

        def work(thread: int, meet: Callable[[], Any]) -> Tensor:
            local.meet = meet
            if is_shared:  # one block, in which all threads stand
                return shared[thread].run(passes, thread)
            with routing(routed, setting):
                meet()
                found = passes(thread)
                meet()
            return found

        for found, wanted in zip(in_threads(work), expected, strict=True):
            assert torch.equal(found, wanted)
        handle.remove()


def test_a_thread_without_a_block_has_the_models_own_setting(routed: Any) -> None:
    default = logits(routed)
    with routing(routed, "base"):
        bare = logits(routed)
        assert torch.equal(in_a_thread(lambda: logits(routed)), default)
        assert in_a_thread(lambda: seating(routed).routing.router) == "arrow"
        own = contextvars.copy_context()
        assert torch.equal(in_a_thread(lambda: own.run(logits, routed)), bare)
        assert torch.equal(logits(routed), bare)
    assert not torch.equal(bare, default)
    assert torch.equal(own.run(logits, routed), default)  # the block has ended


def test_blocks_nest_and_end_with_an_error(routed: Any) -> None:
    def work(thread: int, meet: Callable[[], Any]) -> list[str]:
        seen = []

        def look() -> None:
            meet()
            seen.append(f"{seating(routed).routing.router} {seating(routed).routing.choosing.top_k}")

        with routing(routed, "base" if thread else "norm"):
            look()
            with contextlib.suppress(KeyError), routing(routed, {"top_k": 1 + thread}):
                look()
                raise KeyError("on the way")
            look()
            with pytest.raises(UsageError, match="topk"), routing(routed, {"topk": 1}):
                pass
            look()
        look()
        return seen

    assert in_threads(work, 2) == [
        ["norm 2", "norm 1", "norm 2", "norm 2", "arrow 2"],
        ["base 2", "base 2", "base 2", "base 2", "arrow 2"],
    ]
    check_nothing_is_left(routed)


def test_a_block_may_be_left_in_another_thread_and_out_of_order(routed: Any) -> None:
    default = logits(routed)
    first, second = routing(routed, "base"), routing(routed, {"router": "uniform"})
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert seating(routed).routing.router == "uniform"
    in_a_thread(lambda: second.__exit__(None, None, None))
    check_nothing_is_left(routed)
    assert torch.equal(logits(routed), default)
    in_a_thread(routing(routed, "base").__enter__)
    assert torch.equal(logits(routed), default)


def test_asyncio_tasks_each_have_their_own_setting(routed: Any) -> None:
    names = ["base", "uniform", "norm", "lag"]
    expected = {}
    for name in names:
        with routing(routed, name):
            expected[name] = logits(routed)

    async def task(name: str) -> bool:
        is_right = True
        with routing(routed, name):
            for _ in range(3):
                await asyncio.sleep(0)
                is_right &= torch.equal(logits(routed), expected[name])
                is_right &= torch.equal(await asyncio.to_thread(logits, routed), expected[name])
        return is_right

    async def together() -> list[bool]:
        return await asyncio.gather(*(task(name) for name in names))

    assert asyncio.run(together()) == [True] * len(names)
    check_nothing_is_left(routed)


def test_gates_of_a_block_follow_the_model_to_its_device(routed: Any) -> None:
    with routing(routed, {"experts": ["a", "b"]}):
        before, path = logits(routed), next(iter(seating(routed).layers))
        routed.double()
        assert torch.allclose(logits(routed), before.double(), atol=1e-4)
        routed.to("meta")
        lora = seating(routed).layers[path].lora.in_force
        assert {tensor.device.type for tensor in lora.buffers()} == {"meta"}
        assert lora.down is seating(routed).layers[path].lora.down


# Traces.


def test_each_thread_traces_its_own_passes(routed: Any) -> None:
    expected = []
    for ids in PROMPTS:
        with trace(routed) as alone:
            generated(routed, ids)
        expected.append(alone.stacked())

    def work(thread: int, meet: Callable[[], Any]) -> Tensor:
        with trace(routed) as traced:
            meet()
            generated(routed, PROMPTS[thread])
            meet()
        return traced.stacked()

    for found, wanted in zip(in_threads(work), expected, strict=True):
        assert torch.equal(found, wanted)
    with trace(routed) as traced:
        in_a_thread(lambda: logits(routed))
        assert traced.layers == []
    check_nothing_is_left(routed)


# Experts that come and go.


def test_experts_stay_while_another_thread_is_in_a_block(
    routed: Any, random_adapter: Make, tiny_model: Make, generator: torch.Generator
) -> None:
    adapter = random_adapter(tiny_model(), "late", generator)
    changes: list[Callable[[], Any]] = [
        lambda: add_expert(routed, adapter),
        lambda: remove_expert(routed, "a"),
        lambda: replace_expert(routed, adapter, "a"),
        lambda: detach(routed),
    ]
    for block in (routing(routed, "base"), trace(routed)):
        with block:
            for change in changes:
                with pytest.raises(UsageError, match="an open block, of this thread or another"):
                    in_a_thread(change)
    assert seating(routed).experts == ("a", "b", "c", "d")


def test_experts_stay_while_another_thread_is_in_a_pass(
    routed: Any, random_adapter: Make, tiny_model: Make, generator: torch.Generator
) -> None:
    adapter, expected = random_adapter(tiny_model(), "late", generator), logits(routed)
    begun, may_end = threading.Event(), threading.Event()

    def hold(*_: Any) -> None:
        begun.set()
        assert may_end.wait(PATIENCE_S)

    handle = routed.model.layers[1].mlp.register_forward_pre_hook(hold)
    with ThreadPoolExecutor(1, thread_name_prefix="answering") as pool:
        passed = pool.submit(logits, routed)
        assert begun.wait(PATIENCE_S)
        handle.remove()
        for change in (lambda: add_expert(routed, adapter), lambda: remove_expert(routed, "a"), lambda: detach(routed)):
            with pytest.raises(UsageError, match=r"no other thread computes.*\nfound: thread 'answering_0' inside"):
                change()
        may_end.set()
        assert torch.equal(passed.result(PATIENCE_S), expected)
    assert torch.equal(logits(routed), expected)
    assert not routed._forward_pre_hooks
    add_expert(routed, adapter)
    assert not torch.equal(logits(routed), expected)


def test_a_pass_that_begins_during_a_change_waits_for_its_end(
    routed: Any, random_adapter: Make, tiny_model: Make, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorary.model import live

    adapter, real, passes = random_adapter(tiny_model(), "late", generator), live._add, []
    with ThreadPoolExecutor(1) as pool:

        def slow(*args: Any) -> None:
            real(*args)
            passes.append(pool.submit(logits, routed))
            with pytest.raises(NotYet):
                passes[0].result(0.1)

        monkeypatch.setattr(live, "_add", slow)
        add_expert(routed, adapter)
        assert torch.equal(passes[0].result(PATIENCE_S), logits(routed))


# Threads of autograd's own, which compute layers anew on a GPU.


@pytest.fixture
def as_autograd(monkeypatch: pytest.MonkeyPatch) -> Callable[[contextvars.Context | None, Callable[[], Any]], Any]:
    """Run something in a thread of its own, as PyTorch does in a backward pass that was called from a context."""

    def run(caller: contextvars.Context | None, work: Callable[[], Any]) -> Any:
        def stashed() -> Any:
            torch._C._stash_obj_in_tls("context", caller)
            try:
                return work()
            finally:
                torch._C._remove_obj_from_tls("context")

        with monkeypatch.context() as patch:
            patch.setattr(context, "is_backward", lambda: True)
            return in_a_thread(stashed)

    return run


def test_a_backward_pass_in_autograds_thread_follows_the_block_it_was_called_in(as_autograd: Make) -> None:
    block = new_block()
    with inside(block):
        caller = contextvars.copy_context()
        assert as_autograd(caller, lambda: innermost({block: "held"}, "default")) == "held"
        assert as_autograd(None, lambda: innermost({block: "held"}, "default")) == "default"
        assert in_a_thread(lambda: innermost({block: "held"}, "default")) == "default"


def test_a_backward_pass_in_autograds_thread_reads_what_its_forward_pass_decided(as_autograd: Make) -> None:
    each: PerThread[threading.Event] = PerThread(threading.Event)
    context.note_thread()
    caller = contextvars.copy_context()
    assert as_autograd(caller, lambda: each.here) is each.here
    assert in_a_thread(lambda: each.here) is not each.here
    with pytest.raises(UsageError, match=r"in the thread of its forward pass\nfound: another thread"):
        as_autograd(None, lambda: each.here)


@pytest.mark.parametrize("setting", ["base", {"per": "token"}, {"per": "request"}])
def test_layers_computed_anew_are_routed_as_in_the_forward_pass(routed: Any, setting: Any) -> None:
    def gradient() -> Tensor:
        routed.zero_grad()
        with routing(routed, setting):
            routed(input_ids=PROMPTS[0], use_cache=False).logits.square().sum().backward()
        return routed.get_input_embeddings().weight.grad.clone()

    routed.get_input_embeddings().weight.requires_grad_()
    expected = gradient()
    routed.train()
    routed.activation_checkpointing_enable({"use_reentrant": False})
    assert torch.allclose(gradient(), expected, rtol=1e-4, atol=1e-3)
    assert torch.allclose(in_a_thread(gradient), expected, rtol=1e-4, atol=1e-3)
