"""How the tokens of an answer are drawn, where the likeliest ones are not taken."""

from dataclasses import dataclass

from lorary.evaluate.decoding import HIGHEST, LOWEST
from lorary.flags import check_flags, flag


@dataclass(frozen=True)
class Sampling:
    """How the tokens of an answer are drawn.

    Args:
        temperature: sampling: divides the logits; implies --sample.
        top_p: sampling: draw among the likeliest tokens that hold so much of the probability; implies --sample.

    Raises:
        UsageError: if a value is out of range.
    """

    temperature: float = flag(1.0, least=LOWEST, most=HIGHEST, option="--sampling-temperature")
    top_p: float = flag(1.0, above=0.0, most=1.0)

    def __post_init__(self) -> None:
        check_flags(self)
