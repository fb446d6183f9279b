"""Errors of Lorary's: what they say is short, whatever was found."""

from lorary.errors import MOST_CHARACTERS, LoraryError, UsageError


def test_each_part_of_a_message_is_bounded() -> None:
    error = UsageError("r" * 5000, found="f" * 5000, remedy="m" * 5000)
    assert [len(part or "") for part in (error.rule, error.found, error.remedy)] == [MOST_CHARACTERS] * 3
    assert str(error) == f"{error.rule}\nfound: {error.found}\nremedy: {error.remedy}"
    assert error.rule.endswith("r...")


def test_a_message_that_is_short_stays_as_it_is() -> None:
    assert str(LoraryError("rule", found=3, remedy="remedy")) == "rule\nfound: 3\nremedy: remedy"
    assert LoraryError("x" * MOST_CHARACTERS).rule == "x" * MOST_CHARACTERS
