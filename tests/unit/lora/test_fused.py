"""The fused plan gives what PyTorch's plans give; it is off unless it is asked for. `make check-triton` runs all of it.

Its kernels run in Triton's interpreter here, on the CPU. They are also compiled for devices, which need not be there.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stand_in import DEVICE, StandIn
from torch import Tensor

from lorary.errors import UsageError
from lorary.lora import fused, gated, plans
from lorary.lora.gate import LayerInput
from lorary.lora.gated import GatedLora
from lorary.model.attach import routing
from lorary.model.seating import seating
from lorary.model.trace import trace
from lorary.ops.choose import Choice, Chosen, choose
from lorary.ops.native import Quick
from lorary.route.arrow import arrow_readout

Make = Callable[..., Any]
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed: make check-triton")
interpreted = pytest.mark.skipif(
    find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="Triton is not installed, or TRITON_INTERPRET is not 1: make check-triton",
)
# The interpreter computes with numpy, which warns.
NOT_NUMBERS = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOKENS = (1, 7, 64, 130)
# No edge is a multiple of a block: one that fits in a block, and one that needs several.
D_IN, D_OUT = (24, 37, 70), (20, 70)


@pytest.fixture
def kernels() -> ModuleType:
    from lorary.lora import fused_kernels

    return fused_kernels


class ArrowGate:
    """Arrow by itself, as one that compiled code could be."""

    reads_prototypes, reads_z, decided = True, False, None

    def __init__(self, alive: Tensor, top_k: int) -> None:
        self.alive, self.choice, self.most = alive, Choice(top_k=top_k), min(top_k, len(alive))
        self.quick = Quick(None, None, alive, self.most, self.most, 1.0)

    def __call__(self, inputs: LayerInput) -> Chosen:
        assert inputs.projections is not None
        assert inputs.projections.dtype == torch.float32
        return choose(arrow_readout(inputs.projections, self.alive), self.choice)


class Layer(NamedTuple):
    """A routed layer, and what it is given."""

    lora: GatedLora
    gate: ArrowGate
    x: Tensor
    output: Tensor


def integers(generator: torch.Generator, *shape: int) -> Tensor:
    """Numbers whose products and sums every dtype and order of summing holds exactly; many are equal."""
    return torch.randint(-2, 3, shape, generator=generator).float()


def make_layer(
    generator: torch.Generator, num_tokens: int, d_in: int, d_out: int, ranks: list[int], top_k: int,
    dtype: torch.dtype, dead: Tensor | None = None,
) -> Layer:  # fmt: skip
    """A layer whose scores are exact, so that equal ones are equal in every plan."""
    expert_of_rank = torch.arange(len(ranks)).repeat_interleave(torch.tensor(ranks))
    down = integers(generator, sum(ranks) + len(ranks), d_in)
    up = torch.randn(sum(ranks), d_out, generator=generator) / d_in
    alive = torch.ones(len(ranks), dtype=torch.bool) if dead is None else ~dead
    lora = GatedLora(down * torch.cat([alive[expert_of_rank], alive])[:, None], up, expert_of_rank)
    x, output = integers(generator, num_tokens, d_in), torch.randn(num_tokens, d_out, generator=generator)
    return Layer(lora, ArrowGate(alive, top_k), x.to(dtype), output.to(dtype))


@torch.no_grad()
def run(layer: Layer, *, is_fused: bool) -> tuple[Tensor, Tensor]:
    """The layer's output and the routing weights, of the fused plan or of PyTorch's."""
    lora, weights = layer.lora, list[Tensor]()
    lora.route_by(layer.gate, "outputs", is_fused=is_fused)
    lora.recorders = [weights.append]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gated, "is_native", lambda tensor: False)  # C++ may choose another of equal scores
        if is_fused:
            for name in ("dense", "gathered"):
                patch.delattr(plans, name)
        return lora(layer.x, layer.output), weights[0]


def assert_same(layer: Layer) -> None:
    """Both plans choose the same with the same weights, and give the same output but for the order of summing."""
    (ours, our_weights), (plain, plain_weights) = run(layer, is_fused=True), run(layer, is_fused=False)
    assert torch.equal(our_weights, plain_weights)
    assert bool(our_weights.isfinite().all())
    assert ours.dtype == plain.dtype == layer.output.dtype
    assert bool(ours.isfinite().all())
    # Another order of summing may round to the next number. The interpreter cuts bfloat16 off where devices round.
    steps = 2 if ours.dtype == torch.bfloat16 else 1
    sizes = plain.float().abs() + (plain.float() - layer.output.float()).abs()
    allowed = steps * torch.finfo(ours.dtype).eps * sizes + 1e-5
    assert bool(((ours.float() - plain.float()).abs() <= allowed).all())


# Rank 64 for a few experts, many experts of a few ranks, and experts of different ranks: blocks hold 32 ranks.
RANKS = st.one_of(
    st.tuples(st.integers(1, 70), st.integers(1, 2)).map(lambda sizes: [sizes[1]] * sizes[0]),
    st.tuples(st.integers(1, 2), st.sampled_from([16, 33, 64])).map(lambda sizes: [sizes[1]] * sizes[0]),
    st.lists(st.integers(1, 20), min_size=1, max_size=6),
)


@interpreted
@settings(max_examples=15)
@given(
    seed=st.integers(0, 2**20), num_tokens=st.sampled_from(TOKENS), d_in=st.sampled_from(D_IN),
    d_out=st.sampled_from(D_OUT), ranks=RANKS, top_k=st.integers(1, 4), dtype=st.sampled_from(DTYPES),
)  # fmt: skip
def test_it_gives_what_the_plain_plans_give(
    seed: int, num_tokens: int, d_in: int, d_out: int, ranks: list[int], top_k: int, dtype: torch.dtype
) -> None:
    assert_same(make_layer(torch.Generator().manual_seed(seed), num_tokens, d_in, d_out, ranks, top_k, dtype))


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_experts", "rank"), [(1, 1), (70, 1), (2, 64)])
def test_the_ends_of_experts_and_ranks_are_right(
    generator: torch.Generator, num_experts: int, rank: int, dtype: torch.dtype
) -> None:
    assert_same(make_layer(generator, 65, 40, 70, [rank] * num_experts, 4, dtype))


@interpreted
def test_of_equal_scores_it_takes_those_that_the_plain_plans_take(generator: torch.Generator) -> None:
    layer = make_layer(generator, 20, 24, 33, [2] * 12, 3, torch.bfloat16)
    prototypes = layer.lora.prototypes
    prototypes[:] = prototypes[:2].repeat(6, 1)  # each score six times
    assert_same(layer)
    assert bool((run(layer, is_fused=True)[1].count_nonzero(dim=1) == 3).all())


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_experts_that_are_zero_are_never_chosen(generator: torch.Generator, dtype: torch.dtype) -> None:
    dead = torch.tensor([True, False, True, True, False, True])
    layer = make_layer(generator, 9, 24, 33, [3] * 6, 4, dtype, dead)
    assert_same(layer)
    assert not bool(run(layer, is_fused=True)[1][:, dead].any())


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tokens_without_an_expert_keep_their_output(generator: torch.Generator, dtype: torch.dtype) -> None:
    layer = make_layer(generator, 9, 24, 33, [3] * 6, 4, dtype, torch.ones(6, dtype=torch.bool))
    found, weights = run(layer, is_fused=True)
    assert not bool(weights.any())
    assert torch.equal(found, layer.output)


@interpreted
@NOT_NUMBERS
def test_a_token_feels_no_expert_but_its_own(kernels: ModuleType, generator: torch.Generator) -> None:
    """A down-projection that is not finite reaches no token that did not choose it, and a weight of zero hides it."""
    z, up = torch.randn(3, 8, generator=generator), torch.randn(8, 5, generator=generator)
    z[:, 4:6] = torch.tensor([torch.inf, torch.nan])  # of expert 2
    output, owners = torch.randn(3, 5, generator=generator), torch.arange(4).repeat_interleave(2)
    experts = torch.tensor([[0, 2], [3, 2], [1, 3]])
    weights = torch.tensor([[0.25, 0.0], [0.0, 0.5], [1.0, -2.0]])
    found = kernels.expand(z, experts, weights, up, owners, output)
    assert torch.allclose(found[0], output[0] + 0.25 * z[0, :2] @ up[:2], atol=1e-5)
    assert torch.allclose(found[2], output[2] + z[2, 2:4] @ up[2:4] - 2 * z[2, 6:] @ up[6:], atol=1e-5)
    assert bool(found[1].isnan().all())


@interpreted
@NOT_NUMBERS
def test_a_score_that_is_not_a_number_stays_visible_in_its_token_alone(generator: torch.Generator) -> None:
    layer = make_layer(generator, 5, 24, 33, [2] * 3, 2, torch.float32)
    layer.x[3, 1] = torch.nan
    found, _ = run(layer, is_fused=True)
    assert found.isnan().any(dim=1).tolist() == [False, False, False, True, False]


@interpreted
@pytest.mark.parametrize(("num_tokens", "num_ranks"), [(0, 4), (3, 0)])
def test_no_tokens_and_no_ranks_are_no_trouble(
    kernels: ModuleType, generator: torch.Generator, num_tokens: int, num_ranks: int
) -> None:
    x, output = torch.randn(num_tokens, 6, generator=generator), torch.randn(num_tokens, 5, generator=generator)
    z = kernels.shrink(x, torch.randn(num_ranks, 6, generator=generator))
    assert z.shape == (num_tokens, num_ranks)
    experts = torch.zeros(num_tokens, 1, dtype=torch.int64)
    owners = torch.zeros(num_ranks, dtype=torch.int64)
    found = kernels.expand(z, experts, torch.ones(num_tokens, 1), torch.ones(num_ranks, 5), owners, output)
    assert torch.equal(found, output)


@interpreted
def test_tensors_that_are_not_contiguous_are_read_as_they_are(generator: torch.Generator) -> None:
    layer = make_layer(generator, 12, 24, 33, [2] * 5, 2, torch.float32)
    expected, _ = run(layer, is_fused=False)
    turned = layer._replace(x=layer.x.mT.contiguous().mT, output=layer.output.mT.contiguous().mT)
    assert torch.allclose(run(turned, is_fused=True)[0], expected, atol=2e-5)
    rows = layer._replace(x=layer.x.view(3, 4, 24), output=layer.output.view(3, 4, 33))
    assert torch.allclose(run(rows, is_fused=True)[0].view(12, 33), expected, atol=2e-5)


@pytest.fixture
def counted(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens of each call of the first kernel; the plan is switched on."""
    tokens, shrink = list[int](), kernels.shrink
    monkeypatch.setattr(kernels, "shrink", lambda x, down: (tokens.append(len(x)), shrink(x, down))[1])
    monkeypatch.setenv(fused.VARIABLE, "1")
    return tokens


@pytest.fixture
def routed(tiny_model: Make, random_adapter: Make, route: Make, generator: torch.Generator) -> Any:
    model = tiny_model(num_hidden_layers=1)
    return route(model, [random_adapter(model, name, generator, rank=2) for name in "abcdef"], top_k=2)


IDS = torch.arange(14).view(2, 7) * 20 + 1


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_model_answers_as_before_when_it_is_on(
    tiny_model: Make, random_adapter: Make, route: Make, generator: torch.Generator, dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch, counted: list[int],
) -> None:  # fmt: skip
    model = tiny_model(num_hidden_layers=1, dtype=dtype)
    route(model, [random_adapter(model, name, generator, rank=2) for name in "abcdef"], top_k=2)
    with trace(model) as our_trace:
        ours = logits(model)
    assert counted == [14] * 3
    monkeypatch.setenv(fused.VARIABLE, "0")
    with routing(model, {"router": "arrow", "top_k": 2}), trace(model) as plain_trace:
        plain = logits(model)
    assert counted == [14] * 3
    assert torch.allclose(our_trace.stacked(), plain_trace.stacked(), atol=50 * torch.finfo(dtype).eps)
    scale = float(plain.float().norm())
    assert scale > 0
    assert float((ours - plain).float().norm()) <= 20 * torch.finfo(dtype).eps * scale


@interpreted
@pytest.mark.parametrize(
    "setting",
    ["norm", "lag", "uniform", {"per": "token"}, {"top_p": 0.9}, {"input_norm": "unit"}, {"mix": "factors"},
     {"tie": "concat"}, {"general": ["a"]}, ["arrow", "base"]],
    ids=str,
)  # fmt: skip
def test_what_is_not_arrow_over_whole_layers_keeps_the_plain_plans(
    routed: Any, counted: list[int], setting: Any
) -> None:
    with routing(routed, setting):
        logits(routed)
    assert counted == []


@interpreted
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # forward-mode automatic differentiation's own
def test_where_gradients_are_wanted_the_plain_plans_run(routed: Any, counted: list[int]) -> None:
    embedded = torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    with routing(routed, {"router": "arrow", "top_k": 2}):
        routed(inputs_embeds=embedded).logits.square().sum().backward()
        assert counted == []
        lora = seating(routed).layers["model.layers.0.self_attn.q_proj"].lora
        x, output = embedded.detach(), torch.zeros(1, 7, 32)
        assert bool(torch.func.jvp(lambda x: lora(x, output), (x,), (x,))[1].any())
        assert counted == []
        lora(x, output)
        assert counted == [7]


@interpreted
def test_a_base_in_float64_keeps_the_plain_plans(
    tiny_model: Make, random_adapter: Make, route: Make, generator: torch.Generator, counted: list[int]
) -> None:
    model = tiny_model(num_hidden_layers=1, dtype=torch.float64)
    route(model, [random_adapter(model, name, generator) for name in "abc"], top_k=2)
    logits(model)
    assert counted == []


@interpreted
def test_on_a_device_the_host_never_waits_for_it(routed: Any, counted: list[int]) -> None:
    with routing(routed, {"router": "arrow", "top_k": 2}):
        routed.to(DEVICE)
        with StandIn() as mode, torch.no_grad():
            routed(input_ids=IDS.to(DEVICE), use_cache=False)
    assert [event for event in mode.events if event.is_ours] == []
    assert len(counted) == 3


@interpreted
def test_without_the_interpreter_tensors_of_the_cpu_are_refused(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, routed: Any, counted: list[int]
) -> None:
    monkeypatch.setattr(kernels, "JITFunction", type(kernels._shrink))
    with (
        routing(routed, "arrow"),
        pytest.raises(UsageError, match=r"a device that Triton compiles for\nfound: tensors on cpu\nremedy: leave"),
    ):
        logits(routed)


# What a launch on such a device compiles; none need be there.
COMPILE = """
import warnings
warnings.simplefilter("ignore")
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lorary.lora import fused_kernels as ours

def compiled(kernel, types, blocks):
    names = [name for name in kernel.arg_names if name not in blocks]
    signature = dict(zip(names, types, strict=True)) | dict.fromkeys(blocks, "constexpr")
    return triton.compile(ASTSource(kernel, signature, blocks), target=target)

for kind, architecture, warp, dtype, tokens, precision in {cases}:
    target = GPUTarget(kind, architecture, warp)
    shrink = compiled(
        ours._shrink, ["*" + dtype, "*fp32", "*fp32", "i32", "i32", "i32"],
        dict(TOKENS=tokens, ROWS=ours.MANY_ROWS, IN=ours.IN_BLOCK, PRECISION=precision),
    )
    expand = compiled(
        ours._expand,
        ["*fp32", "*i64", "*fp32", "*fp32", "*i64", "*" + dtype, "*" + dtype, "i32", "i32", "i32", "i32", "i32"],
        dict(TOKENS=tokens, RANKS=ours.RANK_BLOCK, OUT=ours.OUT_BLOCK, PRECISION=precision),
    )
    for kernel in (shrink, expand):
        print(*(part for part in kernel.asm if part in ("cubin", "hsaco")), kernel.metadata.shared)
"""
CASES = [
    ("cuda", 80, 32, "fp32", 64, "tf32"),
    ("cuda", 90, 32, "bf16", 16, "ieee"),
    ("hip", "gfx942", 64, "bf16", 16, "ieee"),
]


@needs_triton
def test_the_kernels_compile_for_devices(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", COMPILE.format(cases=CASES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [made for made, _ in lines] == ["cubin"] * 4 + ["hsaco"] * 2
    # What a program may use of the memory that its threads share, on the smallest of them.
    assert all(0 < int(shared) <= 64 * 1024 for _, shared in lines)


def test_it_is_off_unless_it_is_asked_for(monkeypatch: pytest.MonkeyPatch, routed: Any) -> None:
    assert not any(layer.lora.is_fused for layer in seating(routed).layers.values())
    monkeypatch.setattr(fused, "find_spec", lambda name: True)
    for value, expected in (("0", False), ("1", True)):
        monkeypatch.setenv(fused.VARIABLE, value)
        with routing(routed, "arrow"):
            assert {layer.lora.in_force.is_fused for layer in seating(routed).layers.values()} == {expected}


@pytest.mark.parametrize(
    ("value", "message"), [("1", "needs the package 'triton', which is not installed"), ("yes", "must be 0 or 1")]
)
def test_what_cannot_be_is_refused_before_anything_changes(
    monkeypatch: pytest.MonkeyPatch, routed: Any, value: str, message: str
) -> None:
    expected = logits(routed)
    monkeypatch.setenv(fused.VARIABLE, value)
    monkeypatch.setattr(fused, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=message), routing(routed, {"router": "arrow", "top_k": 1}):
        pass
    assert torch.equal(logits(routed), expected)
