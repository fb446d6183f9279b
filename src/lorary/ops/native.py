"""The compiled half of the sparse plan: `native.cpp`, built once for this machine if it has a C++ compiler.

A routed layer of a small model takes less time than the calls that PyTorch needs to route it. One call into compiled
code does all of it. Nothing depends on it: `lorary.ops.choose` and `lorary.lora.plans` compute the same in PyTorch, and
do so on other devices, in other dtypes, where gradients are wanted, and where there is no compiler.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad

from lorary.caching import cache_folder
from lorary.errors import UsageError
from lorary.ops.choose import Chosen

SOURCE, HEADER = (Path(__file__).with_name(name) for name in ("native.cpp", "native_kernels.h"))
# Experts of a token beyond which all of them are computed: keeping so many in order costs more than it saves.
MOST_CHOSEN = 64
# Tokens of a pass that are few: one call does it all, which saves more than the better matrix product gains.
FEW_TOKENS = 8
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC")

_logger = logging.getLogger(__name__)
_POINTER, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float


class _Experts(ctypes.Structure):
    """`Experts` of native.cpp: where the rank-concatenated factors of a layer lie."""

    _fields_ = (
        ("down", _POINTER), ("up", _POINTER), ("starts", _POINTER),
        ("experts", _LONG), ("d_in", _LONG), ("d_out", _LONG),
    )  # fmt: skip


class _Router(ctypes.Structure):
    """`Router` of native.cpp: how a token finds its experts."""

    _fields_ = (
        ("score_rows", _POINTER), ("matrices", _POINTER), ("alive", _POINTER),
        ("width", _LONG), ("candidates", _LONG), ("top_k", _LONG), ("temperature", _FLOAT),
    )  # fmt: skip


class Quick(NamedTuple):
    """A gate that compiled code can be: the best `top_k` by one stage or two, softmax.

    Args:
        score_rows: (experts, d_in), scores are `|x . row|`; None for a rule without them.
        matrices: (ranks, widest rank), one (rank, rank) matrix for each expert, one below the other; scores are
            `|M_e z_e|`; None for a rule without them. Beside score_rows, of the best `candidates` by these alone.
        alive: (experts,) bool, whether each may be chosen.
        top_k: at most the number of experts.
        candidates: likewise.
        temperature: divides the scores.
    """

    score_rows: Tensor | None
    matrices: Tensor | None
    alive: Tensor
    top_k: int
    candidates: int
    temperature: float


@cache
def native() -> ctypes.CDLL | None:
    """The compiled functions; None where there is no compiler, or LORARY_NATIVE is 0."""
    if os.environ.get("LORARY_NATIVE") == "0":
        return None
    try:
        library = ctypes.CDLL(str(_built()))
    except (OSError, subprocess.SubprocessError, UsageError) as error:  # no place for it is no reason to stop
        _logger.info("routing without compiled code: %s", error)
        return None
    library.lorary_mix.argtypes = [
        _POINTER, _LONG, _POINTER, _POINTER, _LONG, _POINTER, _LONG, _POINTER, _INT, _POINTER, _POINTER
    ]  # fmt: skip
    library.lorary_route.argtypes = [
        _POINTER, _LONG, _POINTER, _POINTER, _POINTER, _INT, _POINTER, _POINTER, _POINTER, _POINTER
    ]  # fmt: skip
    library.lorary_mix.restype = library.lorary_route.restype = None
    return library


def is_native(tensor: Tensor) -> bool:
    """Whether compiled code can read a tensor: an ordinary one, float32, on the CPU, and a compiler was there."""
    return _is_readable(tensor) and native() is not None


def is_watched(*tensors: Tensor | None) -> bool:
    """Whether PyTorch follows what is done to tensors, so that compiled code must not do it unseen.

    It does for gradients, either way, and under `torch.func`, tracing and dispatch modes. Whether it compiles is for
    the caller to ask first.

    Args:
        tensors: all that take part, the layer's own output among them: its weights may be trained.
    """
    return (
        is_differentiated(*tensors)
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
    )


def is_differentiated(*tensors: Tensor | None) -> bool:
    """Whether gradients of tensors are wanted, either way, or `torch.func` transforms what is done to them.

    Args:
        tensors: all that take part.
    """
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        return True
    if torch.compiler.is_compiling():  # it knows no transforms from outside
        return False
    return forward_ad._current_level >= 0 or peek_interpreter_stack() is not None


def _is_readable(tensor: Tensor) -> bool:
    is_plain = type(tensor) is Tensor and tensor.dtype is torch.float32 and tensor.is_cpu
    return is_plain and tensor.layout is torch.strided and not tensor.is_neg()


def native_mix(
    x: Float[Tensor, "tokens d_in"],
    chosen: Chosen,
    down: Float[Tensor, "_rows d_in"],
    up: Float[Tensor, "ranks d_out"],
    starts: Int[Tensor, " starts"],
    base: Float[Tensor, "tokens d_out"],
    z: Float[Tensor, "tokens ranks"] | None = None,
) -> Float[Tensor, "tokens d_out"]:
    """The chosen experts of each token, added to `base`.

    Args:
        x: for which `is_native` holds, contiguous, as all others but z.
        chosen: its experts.
        down: rank-concatenated lora_a, and more rows behind.
        up: rank-concatenated lora_b, transposed, scalings folded in.
        starts: (experts + 1,) int64, the first rank of each expert, then the number of ranks.
        base: what they are added to; it stays as it is.
        z: the down-projections of all experts, where they are known; its rows are contiguous.

    Returns:
        The sum.
    """
    library = native()
    assert library is not None
    experts, weights, out = chosen.experts.contiguous(), chosen.weights.contiguous(), torch.empty_like(base)
    library.lorary_mix(
        x.data_ptr(), len(x), experts.data_ptr(), weights.data_ptr(), experts.shape[1],
        None if z is None else z.data_ptr(), 0 if z is None else z.stride(0),
        ctypes.byref(_experts(down, up, starts)), torch.get_num_threads(), base.data_ptr(), out.data_ptr(),
    )  # fmt: skip
    return out


class _AtOnce:
    """What keeps tensors and where they lie, since looking them up takes longer than the work of a decoding step.

    Valid while they are not replaced. A copy of it is None: whoever is copied makes another.

    Args:
        down: as for `native_mix`.
        up: likewise.
        watched: tensors besides these that take part.
    """

    __slots__ = ("_up", "_watched", "d_in", "down")

    def __init__(
        self, down: Float[Tensor, "_rows d_in"], up: Float[Tensor, "ranks d_out"], watched: Sequence[Tensor | None]
    ) -> None:
        self.down, self._up, self.d_in, self._watched = down, up, down.shape[1], tuple(watched)

    def takes(self, x: Tensor, output: Tensor, up: Tensor) -> bool:
        """Whether it can compute what a layer was given: few plain tokens, which nobody follows, for these experts."""
        return (
            up is self._up
            and _is_readable(x)
            and _is_readable(output)
            and x.numel() <= FEW_TOKENS * self.d_in
            and x.is_contiguous()
            and output.is_contiguous()
            and not is_watched(x, output, self.down, up, *self._watched)
        )

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


class NativeMix(_AtOnce):
    """Experts that were decided before the layer ran, added in one call, for few tokens.

    Args:
        chosen: of each token, contiguous.
        decided: what decided them: they are no longer right where that is another object.
        leading: axes of the tokens, (batch, seq).
        down: as for `native_mix`.
        up: likewise.
        starts: likewise.
    """

    __slots__ = ("_call", "_decided", "_kept", "_leading", "_places")

    def __init__(
        self,
        chosen: Chosen,
        decided: object,
        leading: torch.Size,
        down: Float[Tensor, "_rows d_in"],
        up: Float[Tensor, "ranks d_out"],
        starts: Int[Tensor, " starts"],
    ) -> None:
        library = native()
        assert library is not None
        super().__init__(down, up, (chosen.weights,))
        self._decided, self._leading = decided, leading
        experts = _experts(down, up, starts)
        self._call, self._kept = library.lorary_mix, (chosen, starts, experts)
        self._places = chosen.experts.data_ptr(), chosen.weights.data_ptr(), chosen.experts.shape[1]

    def is_of(self, decided: object, x: Tensor) -> bool:
        """Whether these experts are those of a decision, for tokens of the same axes."""
        return decided is self._decided and x.shape[:-1] == self._leading

    def __call__(self, x: Float[Tensor, "*batch d_in"], output: Float[Tensor, "*batch d_out"]) -> Tensor:
        """What a layer computed, with the experts of each token added; both contiguous."""
        out = torch.empty_like(output)
        self._call(
            x.data_ptr(), x.numel() // self.d_in, *self._places, None, 0, ctypes.byref(self._kept[2]),
            torch.get_num_threads(), output.data_ptr(), out.data_ptr(),
        )  # fmt: skip
        return out


class NativeRoute(_AtOnce):
    """All of a routed layer in one call: the choice and the experts; for few tokens the products it needs too.

    Args:
        quick: how a token finds its experts.
        down: as for `native_mix`.
        up: likewise.
        starts: likewise.
    """

    __slots__ = ("_call", "_kept", "_places", "_tail", "read")

    def __init__(
        self,
        quick: Quick,
        down: Float[Tensor, "_rows d_in"],
        up: Float[Tensor, "ranks d_out"],
        starts: Int[Tensor, " starts"],
    ) -> None:
        library = native()
        assert library is not None
        score_rows, matrices = quick.score_rows, quick.matrices
        is_staged = score_rows is not None and matrices is not None
        experts = _experts(down, up, starts)
        router = _Router(
            None if score_rows is None else score_rows.data_ptr(), None if matrices is None else matrices.data_ptr(),
            quick.alive.data_ptr(), 0 if matrices is None else matrices.shape[1], quick.candidates, quick.top_k,
            quick.temperature,
        )  # fmt: skip
        super().__init__(down, up, (score_rows, matrices))
        self.read = down[: len(up)] if score_rows is None else score_rows
        self._places = quick.candidates if is_staged else quick.top_k
        self._call, self._kept = library.lorary_route, (quick, starts, experts, router)
        self._tail = ctypes.byref(router), ctypes.byref(experts)

    def __call__(
        self,
        x: Float[Tensor, "*batch d_in"],
        output: Float[Tensor, "*batch d_out"],
        products: Float[Tensor, "tokens products"] | None = None,
        chosen: Chosen | None = None,
    ) -> Tensor:
        """Route some tokens.

        Args:
            x: what a layer was given, contiguous.
            output: what it computed, contiguous.
            products: `x @ read.mT`, for many tokens; None to have them computed.
            chosen: what `room` gave, to be filled with the experts of each token.

        Returns:
            What it computed, with its experts added.
        """
        out = torch.empty_like(output)
        self._call(
            x.data_ptr(), x.numel() // self.d_in, None if products is None else products.data_ptr(), *self._tail,
            torch.get_num_threads(), output.data_ptr(), out.data_ptr(),
            *((None, None) if chosen is None else (chosen.experts.data_ptr(), chosen.weights.data_ptr())),
        )  # fmt: skip
        return out

    def room(self, num_tokens: int) -> Chosen:
        """Room for the experts of some tokens."""
        # Said outright: a user's default dtype and device are not those of compiled code.
        experts = torch.empty(num_tokens, self._places, dtype=torch.int64, device="cpu")
        return Chosen(experts, torch.empty(num_tokens, self._places, dtype=torch.float32, device="cpu"))


def _experts(down: Tensor, up: Tensor, starts: Tensor) -> _Experts:
    return _Experts(
        down.data_ptr(), up.data_ptr(), starts.data_ptr(), len(starts) - 1, down.shape[1], up.shape[1]
    )  # fmt: skip


def _built() -> Path:
    """The shared library for this source, compiler and processor; compiled if the cache has none.

    Raises:
        OSError: if there is no compiler, or no room in the cache.
        subprocess.SubprocessError: if it does not compile.
    """
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        raise FileNotFoundError("no C++ compiler (c++, g++, clang++, or CXX)")
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=30).stdout
    parts = (SOURCE.read_bytes(), HEADER.read_bytes(), version, " ".join(FLAGS).encode(), _processor().encode())
    digest = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    path = cache_folder() / "native" / f"lorary-{digest}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        # Aside and renamed: two processes that compile at once each put a whole file there.
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            built = Path(folder) / path.name
            command = [compiler, *FLAGS, str(SOURCE), "-o", str(built)]
            subprocess.run(command, capture_output=True, check=True, timeout=120)
            built.replace(path)
    return path


def _processor() -> str:
    """What `-march=native` depends on: a cache may be shared by machines of several kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {platform.processor()} {flags}"
