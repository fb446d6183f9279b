"""The compiled half of the sparse plan: `native.cpp`, built once for this machine where it has a C++ compiler.

A routed layer of a small model takes less time than the calls that PyTorch needs to route it. One call into compiled
code does all of it. Nothing depends on it: `lorary.ops.choose` and `lorary.ops.mix` compute the same in PyTorch, and
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
from functools import cache
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lorary.caching import cache_folder
from lorary.ops.choose import Chosen

SOURCE = Path(__file__).with_name("native.cpp")
# As in native.cpp.
MOST_CHOSEN = 64
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC")

_logger = logging.getLogger(__name__)
_POINTER, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float


class _Experts(ctypes.Structure):
    """`Experts` of native.cpp: where the rank-concatenated factors of a layer lie."""

    _fields_ = (
        ("down", _POINTER), ("up", _POINTER), ("starts", _POINTER),
        ("experts", _LONG), ("d_in", _LONG), ("d_out", _LONG),
    )  # fmt: skip


@cache
def native() -> ctypes.CDLL | None:
    """The compiled functions; None where there is no compiler, or LORARY_NATIVE is 0."""
    if os.environ.get("LORARY_NATIVE") == "0":
        return None
    try:
        library = ctypes.CDLL(str(_built()))
    except (OSError, subprocess.SubprocessError) as error:
        _logger.info("routing without compiled code: %s", error)
        return None
    library.lorary_choose.argtypes = [
        _POINTER, _POINTER, _LONG, _LONG, _LONG, _FLOAT, _INT, _INT, _POINTER, _POINTER
    ]  # fmt: skip
    library.lorary_mix.argtypes = [_POINTER, _LONG, _POINTER, _POINTER, _LONG, _POINTER, _INT, _POINTER]
    library.lorary_route.argtypes = [
        _POINTER, _LONG, _POINTER, _POINTER, _LONG, _FLOAT, _POINTER, _INT, _POINTER
    ]  # fmt: skip
    for function in (library.lorary_choose, library.lorary_mix, library.lorary_route):
        function.restype = None
    return library


def is_native(tensor: Tensor) -> bool:
    """Whether compiled code can read a tensor: an ordinary one, float32, on the CPU, and a compiler was there."""
    return type(tensor) is Tensor and tensor.dtype == torch.float32 and tensor.is_cpu and native() is not None


def native_choose(
    scores: Float[Tensor, "tokens experts"], alive: Bool[Tensor, " experts"], top_k: int, temperature: float
) -> Chosen:
    """`choose` with top-k and softmax, of the magnitudes of scores.

    Args:
        scores: for which `is_native` holds, contiguous.
        alive: whether each expert may be chosen.
        top_k: at most `MOST_CHOSEN` and the number of experts.
        temperature: divides the scores.

    Returns:
        The experts of each token.
    """
    library = native()
    assert library is not None
    num_tokens, num_experts = scores.shape
    experts = torch.empty(num_tokens, top_k, dtype=torch.int64)
    weights = torch.empty(num_tokens, top_k)
    library.lorary_choose(
        scores.data_ptr(), alive.data_ptr(), num_tokens, num_experts, top_k, temperature, 1, torch.get_num_threads(),
        experts.data_ptr(), weights.data_ptr(),
    )  # fmt: skip
    return Chosen(experts, weights)


def native_mix(
    x: Float[Tensor, "tokens d_in"],
    chosen: Chosen,
    down: Float[Tensor, "_rows d_in"],
    up: Float[Tensor, "ranks d_out"],
    starts: Int[Tensor, " starts"],
    out: Float[Tensor, "tokens d_out"],
) -> None:
    """Add the chosen experts of each token to `out`, in place.

    Args:
        x: for which `is_native` holds, contiguous, as all others.
        chosen: its experts.
        down: rank-concatenated lora_a, and more rows behind.
        up: rank-concatenated lora_b, transposed, scalings folded in.
        starts: (experts + 1,) int64, the first rank of each expert, then the number of ranks.
        out: what they are added to.
    """
    library = native()
    assert library is not None
    experts, weights = chosen.experts.contiguous(), chosen.weights.contiguous()
    library.lorary_mix(
        x.data_ptr(), len(x), experts.data_ptr(), weights.data_ptr(), experts.shape[1],
        ctypes.byref(_experts(down, up, starts)), torch.get_num_threads(), out.data_ptr(),
    )  # fmt: skip


def native_route(
    x: Float[Tensor, "tokens d_in"],
    rows: Float[Tensor, "experts d_in"],
    alive: Bool[Tensor, " experts"],
    top_k: int,
    temperature: float,
    down: Float[Tensor, "_rows d_in"],
    up: Float[Tensor, "ranks d_out"],
    starts: Int[Tensor, " starts"],
    out: Float[Tensor, "tokens d_out"],
) -> None:
    """All of a routed layer in one call, for a few tokens: products with `rows`, the choice, the experts.

    Args as for `native_choose` and `native_mix`.
    """
    library = native()
    assert library is not None
    library.lorary_route(
        x.data_ptr(), len(x), rows.data_ptr(), alive.data_ptr(), top_k, temperature,
        ctypes.byref(_experts(down, up, starts)), torch.get_num_threads(), out.data_ptr(),
    )  # fmt: skip


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
    parts = (SOURCE.read_bytes(), version, " ".join(FLAGS).encode(), _processor().encode())
    digest = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    path = cache_folder() / "native" / f"lorary-{digest}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        # Aside and renamed: two processes that compile at once each put a whole file there.
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / path.name
            command = [compiler, *FLAGS, str(SOURCE), "-o", str(made)]
            subprocess.run(command, capture_output=True, check=True, timeout=120)
            made.replace(path)
    return path


def _processor() -> str:
    """What `-march=native` depends on: a cache may be shared by machines of several kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {platform.processor()} {flags}"
