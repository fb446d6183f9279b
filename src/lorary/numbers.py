"""Numbers from outside: of the kind that is asked for and in a range that all further work can hold, or refused."""

import math

from lorary.errors import UsageError

# What float32 can hold, with room for sums and products of a few.
MOST = 1e30
# Far more than there are rows, steps or experts; in range of all index types.
MOST_COUNT = 10**15
MOST_SEED = 2**63 - 1
# Tokens of a micro-batch in training, where nobody says and nothing measures how many fit.
MICRO_TOKENS = 1024


def is_number(value: object) -> bool:
    """Whether a value is a finite number: no bool, no text, and no whole number that no float can hold."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def check_number(
    name: str,
    value: object,
    *,
    least: float = -MOST,
    above: float | None = None,
    below: float | None = None,
    most: float = MOST,
    remedy: str | None = None,
) -> None:
    """Refuse what is no finite number in a range.

    Args:
        name: of the value, as the caller knows it.
        value: whatever was given.
        least: the smallest allowed.
        above: a bound that is itself not allowed, in place of `least`.
        below: the same at the other end, in place of `most`.
        most: the largest allowed.
        remedy: what to do about it.

    Raises:
        UsageError: naming it.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UsageError(f"{name} must be a finite number", found=shown(value), remedy=remedy)
    is_above = value >= least if above is None else value > above  # false of NaN
    is_below = value <= most if below is None else value < below
    if is_above and is_below:
        return
    bounds = [f"at least {least:g}" if above is None else f"above {above:g}"]
    bounds.append(f"at most {most:g}" if below is None else f"below {below:g}")
    rule = " and ".join(bounds)
    raise UsageError(f"{name} must be {rule}", found=shown(value), remedy=remedy)


def check_count(
    name: str,
    value: object,
    *,
    least: int = 1,
    above: int | None = None,
    most: int = MOST_COUNT,
    remedy: str | None = None,
) -> None:
    """Refuse what is no whole number in a range; arguments and error as for `check_number`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise UsageError(f"{name} must be a whole number", found=shown(value), remedy=remedy)
    if value < (least if above is None else above + 1):
        bound = f"at least {least}" if above is None else f"above {above}"
        raise UsageError(f"{name} must be {bound}", found=shown(value), remedy=remedy)
    if value > most:
        raise UsageError(f"{name} must be at most {most}", found=shown(value), remedy=remedy)


def check_seed(name: str, value: object, *, most: int = MOST_SEED) -> None:
    """Refuse what is no whole number that generators take; arguments and error as for `check_number`."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
        power = (most + 1).bit_length() - 1
        raise UsageError(f"{name} must be at least 0 and below 2**{power}", found=shown(value))


def shown(value: object) -> str:
    """A value for a message, short however long it is."""
    if isinstance(value, int) and not -MOST_SEED <= value <= MOST_SEED:
        return f"a whole number of about {round(value.bit_length() * math.log10(2))} digits"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:76]} ..."
