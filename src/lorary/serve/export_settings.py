"""What a library is exported for."""

from dataclasses import dataclass

from lorary.flags import check_flags, flag

VLLM = "vllm"


@dataclass(frozen=True)
class ExportSettings:
    """What a library is exported for.

    Args:
        engine: server that will serve it: `vllm`.
    """

    engine: str = flag(VLLM, choices=(VLLM,), option="--for")

    def __post_init__(self) -> None:
        check_flags(self)
