"""Dates and times of day."""

from lorary.data.builtin.sampling import Dice, Item, SamplingPlan, drawn, words

MONTHS = words("January February March April May June July August September October November December")
WEEKDAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
DAYS_IN_EVERY_MONTH = 28
HALVES = ("morning", "afternoon")
DAY_KINDS = ("weekday", "weekend")


def _month_of_date(dice: Dice) -> Item:
    month, day = dice.integer(1, 12), dice.integer(1, DAYS_IN_EVERY_MONTH)
    return Item(f"{day:02d}/{month:02d}", MONTHS[month - 1])


def _year_of_date(dice: Dice) -> Item:
    year = str(dice.integer(1950, 2029))
    return Item(f"{dice.integer(1, DAYS_IN_EVERY_MONTH)} {dice.pick(MONTHS)} {year}", year)


def _day_of_date(dice: Dice) -> Item:
    day = str(dice.integer(1, DAYS_IN_EVERY_MONTH))
    return Item(f"{day} {dice.pick(MONTHS)} {dice.integer(1950, 2029)}", day)


def _half_of_day(dice: Dice) -> Item:
    half = dice.integer(0, 1)
    return Item(f"{dice.integer(6, 11) + 6 * half:02d}:{dice.integer(0, 59):02d}", HALVES[half])


def _weekday_or_weekend(dice: Dice) -> Item:
    kind = dice.integer(0, 1)
    weekday = dice.pick(WEEKDAYS[5:] if kind else WEEKDAYS[:5])
    return Item(f"{weekday} {dice.integer(1, DAYS_IN_EVERY_MONTH)} {dice.pick(MONTHS)}", DAY_KINDS[kind])


PLANS = (
    SamplingPlan("month_of_date", "dates", "Month in:", drawn(_month_of_date)),
    SamplingPlan("year_of_date", "dates", "Year of:", drawn(_year_of_date)),
    SamplingPlan("half_of_day", "dates", "Time of day:", drawn(_half_of_day), options=HALVES),
    SamplingPlan("weekday_or_weekend", "dates", "Weekday or weekend:", drawn(_weekday_or_weekend), options=DAY_KINDS),
    SamplingPlan("day_of_date", "dates", "Day of:", drawn(_day_of_date), role="heldout"),
)
