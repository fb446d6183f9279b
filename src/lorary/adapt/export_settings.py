"""What of a library is exported as it is, without a router."""

from collections.abc import Mapping
from dataclasses import dataclass

from lorary.adapt.merge_settings import parse_weights
from lorary.errors import UsageError
from lorary.flags import check_flags, flag

PEFT, TRANSFORMERS, LLAMA_CPP = "peft", "transformers", "llama.cpp"
STATIC = (PEFT, TRANSFORMERS, LLAMA_CPP)


@dataclass(frozen=True)
class StaticSettings:
    """What is exported for peft, transformers or llama.cpp.

    Args:
        experts: not for vllm: these adapters, separated by commas; for peft all of them by default.
        weights: for transformers or llama.cpp: the sum of these adapters by a weight each.
        weights_dtype: for transformers: dtype of the merged weights: `float32`, `bfloat16`, `float16` or `float64`.
        shard_size: for transformers: most bytes of a file, such as 5GB.
    """

    experts: tuple[str, ...] | None = None
    weights: Mapping[str, float] | None = flag(None, metavar="NAME=W,...", parse=parse_weights)
    weights_dtype: str = flag("float32", choices=("float32", "bfloat16", "float16", "float64"))
    shard_size: str = "5GB"

    def __post_init__(self) -> None:
        check_flags(self)
        if self.weights is not None and self.experts is not None:
            raise UsageError("--weights names the adapters itself", found="--experts", remedy="leave it out")
