"""What a library is exported for."""

from dataclasses import dataclass

from lorary.flags import check_flags, flag

VLLM = "vllm"


@dataclass(frozen=True)
class ExportSettings:
    """What a library is exported for.

    Args:
        engine: what it is for: `vllm` (one routed adapter), `peft` (the adapters as they are), `transformers` (merged
            into the base model) or `llama.cpp` (one GGUF file).
    """

    engine: str = flag(VLLM, choices=(VLLM, "peft", "transformers", "llama.cpp"), option="--for")

    def __post_init__(self) -> None:
        check_flags(self)
