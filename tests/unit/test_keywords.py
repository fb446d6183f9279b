"""Settings classes as keyword arguments: names, defaults and sentences from one definition."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest

from lorary.errors import UsageError
from lorary.flags import OptionValues, flag
from lorary.keywords import with_settings


@dataclass(frozen=True)
class Tea:
    """How tea is made.

    Args:
        num_cups: how many cups; `kind` says of what.
        kind: `green` or `black`.
        secret: for nobody.
    """

    num_cups: int = flag(2, above=0)
    kind: str = flag("green", choices=("green", "black"))
    secret: int = 1


@with_settings(Tea, omit=("secret",), also=("sugar",))
def brew(pot: str, *, lid: bool = True, options: OptionValues, route: Mapping[str, Any]) -> Any:
    """Make tea.

    Args:
        pot: where.
        lid: whether it is closed.
        options: the settings.
        route: what goes in.

    Returns:
        What was asked for.
    """
    return pot, lid, dict(options[Tea]), dict(route)


def test_what_is_given_goes_to_its_class_and_defaults_stay_with_the_class() -> None:
    assert brew("red") == ("red", True, {}, {})
    assert brew(pot="red", lid=False, kind="black", sugar=3) == ("red", False, {"kind": "black"}, {"sugar": 3})
    assert brew("red", kind=None, sugar=None) == ("red", True, {}, {"sugar": None})


@pytest.mark.parametrize(("name", "likely"), [("knd", "kind"), ("num_cup", "num_cups"), ("pott", "pot")])
def test_an_argument_that_does_not_exist_is_refused_with_the_one_that_was_meant(name: str, likely: str) -> None:
    with pytest.raises(UsageError, match=rf"lorary\.brew must .*\nfound: {name}\nremedy: did you mean '{likely}'"):
        brew("red", **{name: 1})


@pytest.mark.parametrize("name", ["secret", "options", "route"])
def test_what_is_left_out_is_no_argument(name: str) -> None:
    with pytest.raises(UsageError, match=f"found: {name}"):
        brew("red", **{name: 1})


def test_signature_and_docstring_show_every_setting() -> None:
    signature = inspect.signature(brew)
    assert list(signature.parameters) == ["pot", "lid", "num_cups", "kind", "route"]
    assert signature.parameters["num_cups"].default == 2
    document = inspect.getdoc(brew) or ""
    assert "\n    num_cups: how many cups; `kind` says of what.\n    kind: `green` or `black`.\n" in document
    assert "secret" not in document
    assert "options:" not in document
    assert document.index("kind:") < document.index("Returns:")
