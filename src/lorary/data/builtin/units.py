"""Units of measure: converting, shortening, and what they measure."""

from lorary.data.builtin.sampling import Dice, Item, SamplingPlan, drawn, drawn_from, words

# Unit, short form.
SHORT_FORMS = (
    ("metres", "m"),
    ("kilometres", "km"),
    ("centimetres", "cm"),
    ("millimetres", "mm"),
    ("grams", "g"),
    ("kilograms", "kg"),
    ("litres", "l"),
    ("millilitres", "ml"),
    ("seconds", "s"),
    ("hours", "h"),
    ("minutes", "min"),
    ("watts", "W"),
    ("volts", "V"),
)
# What is measured, the units that measure it.
UNITS = {
    "length": "metres kilometres centimetres millimetres miles inches feet yards",
    "weight": "grams kilograms milligrams tonnes pounds tons micrograms",
    "volume": "litres millilitres pints gallons teaspoons tablespoons quarts",
    "time": "seconds minutes hours days weeks months years decades centuries milliseconds",
}
UNIT_QUANTITIES = tuple([(unit, quantity) for unit in words(units)] for quantity, units in UNITS.items())


def _metres_to_centimetres(dice: Dice) -> Item:
    metres = dice.integer(2, 400)
    return Item(f"{metres} m", f"{100 * metres} cm")


def _kilograms_to_grams(dice: Dice) -> Item:
    kilograms = dice.integer(2, 400)
    return Item(f"{kilograms} kg", f"{1000 * kilograms} g")


def _short_form(dice: Dice) -> Item:
    number, (unit, short) = dice.integer(2, 99), dice.pick(SHORT_FORMS)
    return Item(f"{number} {unit}", f"{number} {short}")


def _quantity(dice: Dice, unit: tuple[str, str]) -> Item:
    return Item(f"{dice.integer(2, 99)} {unit[0]}", unit[1])


PLANS = (
    SamplingPlan("metres_to_centimetres", "units", "In centimetres:", drawn(_metres_to_centimetres)),
    SamplingPlan("kilograms_to_grams", "units", "In grams:", drawn(_kilograms_to_grams)),
    SamplingPlan("short_unit", "units", "Short unit:", drawn(_short_form)),
    SamplingPlan(
        "unit_quantity", "units", "Kind of measure:", drawn_from(UNIT_QUANTITIES, _quantity), options=tuple(UNITS)
    ),
)
