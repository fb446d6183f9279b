"""Settings as options: one definition gives default, range, option, help and refusal."""

from dataclasses import dataclass
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from lorary.cli.flags import CommandOptions, OptionValues, with_options
from lorary.errors import UsageError, did_you_mean
from lorary.flags import check_flags, check_methods, flag, helps_of, option_of


@dataclass(frozen=True)
class Tea:
    """How tea is made.

    Args:
        num_cups: how many cups; see `kind`,
            which says more.
        kind: `green` or `black`.
        sugar_g: grams of sugar.
        names: who drinks it.
        secret: not for the command line.
    """

    num_cups: int = flag(2, above=0)
    kind: str = flag("green", choices=("green", "black"))
    sugar_g: float | None = flag(None, least=0.0, option="--sugar", methods=("black",))
    names: tuple[str, ...] = ()
    secret: int = flag(1, option="")

    def __post_init__(self) -> None:
        check_flags(self)
        check_methods(self, self.kind)


def test_a_class_becomes_options_and_gives_what_was_given() -> None:
    got: list[OptionValues] = []
    app = typer.Typer(rich_markup_mode=None)

    @app.command()
    @with_options
    def tea(given: Annotated[OptionValues, CommandOptions((Tea,))]) -> None:
        got.append(given)

    assert CliRunner().invoke(app, ["--num-cups", "3", "--names", "a, b", "--sugar", "1.5"]).exit_code == 0
    assert got == [{Tea: {"num_cups": 3, "names": ("a", "b"), "sugar_g": 1.5}}]
    text = CliRunner().invoke(app, ["--help"]).output
    assert "how many cups; see --kind, which says more  [default: 2]" in " ".join(text.split()).replace(" [", "  [")
    assert "black: grams of sugar" in text
    assert "secret" not in text


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_cups": 0}, "--num-cups must be above 0"),
        ({"num_cups": 1.5}, "--num-cups must be a whole number"),
        ({"kind": "black", "sugar_g": -1.0}, "--sugar must be at least 0"),
        ({"kind": "blak"}, r"--kind must be one of green, black\nfound: blak\nremedy: did you mean 'black'\?"),
        ({"sugar_g": 1.0}, r"--sugar needs --method black\nfound: --method green"),
    ],
)
def test_a_value_is_refused_by_its_option(values: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Tea(**values)  # type: ignore[arg-type]


def test_a_field_without_an_option_goes_by_its_name() -> None:
    assert (option_of(Tea, "secret"), option_of(Tea, "sugar_g")) == ("secret", "--sugar")
    assert helps_of(Tea)["kind"] == "green or black"


def test_a_name_that_is_like_none_gets_no_guess() -> None:
    assert did_you_mean("zzz", ["arrow"]) is None
    assert did_you_mean("zzz", ["arrow"], remedy="one of a") == "one of a"
