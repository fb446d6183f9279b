"""Arithmetic on whole numbers below 200."""

from lorary.data.builtin.sampling import Dice, Item, SamplingPlan, drawn

PARITIES = ("even", "odd")


def _add(dice: Dice) -> Item:
    left, right = dice.integer(10, 89), dice.integer(2, 9)
    return Item(f"{left} and {right}", str(left + right))


def _subtract(dice: Dice) -> Item:
    left, right = dice.integer(12, 99), dice.integer(2, 9)
    return Item(f"{right} from {left}", str(left - right))


def _larger(dice: Dice) -> Item:
    left, right = dice.several(range(10, 100), 2)
    return Item(f"{left} or {right}", str(max(left, right)))


def _next_number(dice: Dice) -> Item:
    start = dice.integer(10, 300)
    return Item(f"{start} {start + 1} {start + 2}", str(start + 3))


def _parity(dice: Dice) -> Item:
    parity = dice.integer(0, 1)
    return Item(str(2 * dice.integer(5, 499) + parity), PARITIES[parity])


def _double(dice: Dice) -> Item:
    number = dice.integer(10, 300)
    return Item(str(number), str(2 * number))


PLANS = (
    SamplingPlan("add_numbers", "arithmetic", "Add:", drawn(_add)),
    SamplingPlan("subtract_numbers", "arithmetic", "Subtract:", drawn(_subtract)),
    SamplingPlan("larger_number", "arithmetic", "Larger:", drawn(_larger)),
    SamplingPlan("next_number", "arithmetic", "Count on:", drawn(_next_number)),
    SamplingPlan("odd_or_even", "arithmetic", "Odd or even:", drawn(_parity), options=PARITIES),
    SamplingPlan("double_number", "arithmetic", "Double:", drawn(_double), role="heldout"),
)
