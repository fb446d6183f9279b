"""Strings: picking, joining and reordering words."""

from lorary.data.builtin.sampling import Dice, Item, SamplingPlan, drawn, words

WORDS = words(
    """lamp river stone chair apple bread cloud dream eagle field glass horse island jacket kitchen lemon market
    needle ocean paper queen rabbit shadow table uncle valley window yellow zebra anchor basket candle desert engine
    forest garden hammer insect jungle kettle ladder mirror nature orange pencil quarter ribbon silver ticket umbrella
    village winter yard button camera dinner energy finger guitar honey iron judge king leaf moon night oven plate
    road salt train voice water bridge coffee doctor flower grass hotel milk nose office piano rain school tower
    wheel bottle circle dance evening farmer gift hill idea jewel knife letter music number owner party rope
    sugar tiger vase wall box cup door egg fire gold hat ice jar key"""
)
FIRST_NAMES = words(
    """Anna Ben Clara David Emma Frank Grace Henry Iris Jack Karen Leo Maria Nora Oscar Paul Rosa Sam Tina Victor
    Alice Bruno Diana Eric Helen Ivan Julia Kevin Laura Mark Nina Peter Ruth Simon Tom"""
)
SURNAMES = words(
    """Berg Clark Davis Evans Fox Green Hill Jones King Lake Moore North Owen Price Reed Stone Taylor West Young
    Adams Baker Carter Dean Ellis Ford Gray Hunt Lane Mason Page Rose Shaw Turner Wood"""
)


def _first_word(dice: Dice) -> Item:
    chosen = dice.several(WORDS, 3)
    return Item(" ".join(chosen), chosen[0])


def _second_word(dice: Dice) -> Item:
    chosen = dice.several(WORDS, 3)
    return Item(" ".join(chosen), chosen[1])


def _last_word(dice: Dice) -> Item:
    chosen = dice.several(WORDS, 3)
    return Item(" ".join(chosen), chosen[2])


def _hyphenate(dice: Dice) -> Item:
    chosen = dice.several(WORDS, 2)
    return Item(" ".join(chosen), "-".join(chosen))


def _surname_first(dice: Dice) -> Item:
    first, last = dice.pick(FIRST_NAMES), dice.pick(SURNAMES)
    return Item(f"{first} {last}", f"{last}, {first}")


def _initials(dice: Dice) -> Item:
    first, last = dice.pick(FIRST_NAMES), dice.pick(SURNAMES)
    return Item(f"{first} {last}", f"{first[0]}.{last[0]}.")


PLANS = (
    SamplingPlan("first_word", "strings", "First word of:", drawn(_first_word)),
    SamplingPlan("last_word", "strings", "Last word of:", drawn(_last_word)),
    SamplingPlan("hyphenate", "strings", "Join with a hyphen:", drawn(_hyphenate)),
    SamplingPlan("surname_first", "strings", "Surname first:", drawn(_surname_first)),
    SamplingPlan("initials", "strings", "Initials of:", drawn(_initials)),
    SamplingPlan("second_word", "strings", "Second word of:", drawn(_second_word), role="heldout"),
)
