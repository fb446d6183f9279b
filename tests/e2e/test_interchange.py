"""Adapters of all shapes that PEFT makes: exact through a library and back, or refused as docs/interchange.md says."""

from pathlib import Path

import pytest
from tests.support.interchange import AGREEMENT, CASES, PAGE, Case, line_of, outcome_of


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title)
def test_an_adapter_of_peft_goes_in_is_routed_to_and_comes_out_as_the_page_says(case: Case, tmp_path: Path) -> None:
    outcome = outcome_of(case, tmp_path)
    assert line_of(case, outcome) in PAGE.read_text(encoding="utf-8").splitlines()
    if outcome.refusal is None:
        assert outcome.is_same_file
        assert max(outcome.routed, outcome.back) < AGREEMENT
        assert outcome.merged is None or outcome.merged < 10 * AGREEMENT


def test_thirty_shapes_are_exact() -> None:
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if "| exact |" in line]
    assert len([line for line in lines if any(f"| {case.title} |" in line for case in CASES)]) >= 30
