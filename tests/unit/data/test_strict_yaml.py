"""YAML of strangers: bounded before it is unfolded."""

from itertools import pairwise

import pytest

from lorary.data.strict_yaml import strict_yaml
from lorary.errors import UsageError


def bomb(line: str) -> str:
    """Nine lines, each of which names the one before nine times."""
    names = "abcdefghi"
    rows = [line.format(name=name, inner=",".join(9 * [f"*{before}"])) for before, name in pairwise(names)]
    return "\n".join(["a: &a {k: 1}", *rows])


@pytest.mark.parametrize("line", ["{name}: &{name} [{inner}]", "{name}: &{name} {{<<: [{inner}]}}"])
def test_aliases_that_unfold_to_millions_are_refused_at_once(line):
    with pytest.raises(UsageError, match="more than 100,000 values"):
        strict_yaml(bomb(line), "it")


@pytest.mark.parametrize(
    "text",
    ["a: &a [*a]", "[" * 5000, "x" * 2_000_000, "a: " + "9" * 5000, '"\\ud800"', "{a: 1, a: 2}", "? [1]\n: 2",
     "a: !!python/object:os.system {}", "a: 2026-13-01", "a: b: c", "\x00"],
)  # fmt: skip
def test_what_is_no_plain_yaml_is_one_clear_error(text):
    with pytest.raises(UsageError, match=r"^it must "):
        strict_yaml(text, "it")


def test_aliases_and_many_keys_are_read():
    assert strict_yaml("a: &x {k: [1]}\nb: *x\nc: {<<: *x, l: 2}", "it") == {
        "a": {"k": [1]}, "b": {"k": [1]}, "c": {"k": [1], "l": 2},
    }  # fmt: skip
    assert len(strict_yaml("\n".join(f"k{i}: 1" for i in range(5000)), "it")) == 5000
    assert strict_yaml("", "it") is None
