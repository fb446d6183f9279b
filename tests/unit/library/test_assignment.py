"""The assignment beside its skills: kept whole, found for these skills only."""

from collections.abc import Callable

import pytest
import torch

from lorary.adapter import Adapter
from lorary.errors import LibraryError, ShapeError
from lorary.library.assignment import Assignment, find_assignment, load_assignment, save_assignment
from lorary.library.derived import iterate_derived, save_derived
from lorary.library.store import Library

PATH = "model.layers.0.self_attn.q_proj"
MakeAdapter = Callable[..., Adapter]


def assignment_of(library: Library, names: tuple[str, ...] = ("skill_10", "skill_2"), splits: int = 2) -> Assignment:
    hashes = {name: library.provenance(name)["content_hash"] for name in names}
    logits = torch.linspace(-3, 3, 3 * splits * len(names)).view(3, splits, len(names))
    return Assignment(("c", "a", "b"), hashes, {PATH: logits, "model.layers.1.self_attn.q_proj": -logits})


@pytest.fixture
def skilled(library: Library, make_adapter: MakeAdapter) -> Library:
    """A library of two skills whose order is not that of their names."""
    for number, name in enumerate(("skill_10", "skill_2"), start=1):
        library.add_adapter(make_adapter(name, float(number)), {"tasks": ["a", "b", "c"]})
    return library


def test_what_was_saved_is_loaded(skilled: Library) -> None:
    saved = assignment_of(skilled)
    save_assignment(skilled, saved, {"settings": {"skills": 2}})
    found = load_assignment(skilled)
    assert (found.tasks, list(found.skills.items())) == (saved.tasks, list(saved.skills.items()))
    assert found.logits.keys() == saved.logits.keys()
    assert all(torch.equal(found.logits[path], saved.logits[path]) for path in saved.logits)
    assert (found.method, found.num_splits) == ("mhr", 2)
    assert assignment_of(skilled, splits=1).method == "poly"
    assert skilled.verify() == []


def test_saving_twice_keeps_one(skilled: Library) -> None:
    for _ in range(2):
        save_assignment(skilled, assignment_of(skilled), {})
    assert len(list(iterate_derived(skilled.path, "poly"))) == 1


def test_skills_that_were_replaced_have_no_assignment(skilled: Library, make_adapter: MakeAdapter) -> None:
    save_assignment(skilled, assignment_of(skilled), {})
    skilled.replace_adapter(make_adapter("skill_2", 5.0), {"tasks": []})
    assert find_assignment(skilled) is None
    with pytest.raises(LibraryError, match=r"must hold the assignment .*\nfound: one for other weights of skill_2"):
        load_assignment(skilled)
    skilled.remove("skill_2")
    assert find_assignment(skilled) is None


def test_a_library_without_one_says_how_to_make_one(library: Library) -> None:
    with pytest.raises(LibraryError, match="\nfound: none\nremedy: build it with `lorary build --method poly`"):
        load_assignment(library)


def test_two_assignments_of_the_same_skills_are_refused(skilled: Library) -> None:
    save_assignment(skilled, assignment_of(skilled), {})
    save_assignment(skilled, assignment_of(skilled, splits=1), {})
    with pytest.raises(LibraryError, match="one assignment of its skills\nfound: 2 folders poly-"):
        load_assignment(skilled)


def test_a_document_of_another_format_is_refused_by_name(skilled: Library) -> None:
    save_derived(skilled.path, "poly", {}, {"assignment.json": b"{}", "assignment.safetensors": b""})
    with pytest.raises(LibraryError, match=r"poly-[0-9a-f]{16} must hold assignment.json .*\nfound: KeyError"):
        load_assignment(skilled)


@pytest.mark.parametrize("shape", [(2, 2, 2), (3, 2, 1), (3, 1, 2), (3, 2)])
def test_logits_of_other_axes_are_refused_by_layer(skilled: Library, shape: tuple[int, ...]) -> None:
    sound = assignment_of(skilled)
    with pytest.raises(ShapeError, match="the assignment must have 3 tasks, 2 splits and 2 skills at layer 'odd'"):
        Assignment(sound.tasks, sound.skills, {**sound.logits, "odd": torch.zeros(shape)})
