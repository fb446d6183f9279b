"""What routers know from data, in a library: found for the very weights it was computed for, and for no others."""

import shutil
from collections.abc import Callable

import pytest
import torch

from lorary.adapter import Adapter
from lorary.errors import LibraryError
from lorary.library.derived import derived_folder
from lorary.library.prepared import (
    Prepared,
    expert_key,
    group_key,
    load_prepared,
    prepared_hashes,
    save_prepared,
    was_prepared_before,
)
from lorary.library.store import Library

ONE = Prepared({"layer": torch.arange(3.0)}, {"rows": 3, "data": {"t": "12"}}, {"losses": [1.0]})


@pytest.fixture
def filled(library: Library, make_adapter: Callable[..., Adapter]) -> Library:
    for number, name in enumerate("ab"):
        library.add_adapter(make_adapter(name, 1.0 + number), {"tasks": []})
    return library


def test_what_was_stored_is_read(filled: Library) -> None:
    key = expert_key(filled, "a")
    assert load_prepared(filled, "centroid", key) is None
    assert prepared_hashes(filled, "centroid", key) == {}
    save_prepared(filled, "centroid", key, ONE)
    found = load_prepared(filled, "centroid", key)
    assert found is not None
    assert torch.equal(found.tensors["layer"], ONE.tensors["layer"])
    assert (found.made_of, found.notes) == (ONE.made_of, ONE.notes)
    before = prepared_hashes(filled, "centroid", key)
    save_prepared(filled, "centroid", key, Prepared({"layer": torch.ones(3)}, {}, {}))
    assert set(before) == {"prepared.safetensors", "made.json"}
    assert prepared_hashes(filled, "centroid", key) != before
    assert filled.verify() == []


def test_other_weights_other_experts_and_other_kinds_find_nothing(
    filled: Library, make_adapter: Callable[..., Adapter]
) -> None:
    save_prepared(filled, "centroid", expert_key(filled, "a"), ONE)
    together = group_key(filled, filled.names())
    save_prepared(filled, "predictor", together, ONE)
    assert group_key(filled, filled.names()[::-1]) == together
    assert load_prepared(filled, "centroid", expert_key(filled, "b")) is None
    assert load_prepared(filled, "phatgoose", expert_key(filled, "a")) is None
    filled.replace_adapter(make_adapter("a", 5.0), {"tasks": []})
    assert load_prepared(filled, "centroid", expert_key(filled, "a")) is None
    assert load_prepared(filled, "predictor", group_key(filled, filled.names())) is None
    for kind, name in (("centroid", "a"), ("predictor", "a"), ("predictor", "b")):
        assert was_prepared_before(filled, kind, name)
    assert not was_prepared_before(filled, "centroid", "b")


def test_foreign_and_damaged_data_is_refused_by_name(filled: Library) -> None:
    folder = save_prepared(filled, "centroid", expert_key(filled, "a"), ONE)
    other = derived_folder(filled.path, "centroid", expert_key(filled, "b"))
    shutil.copytree(folder, other)
    with pytest.raises(LibraryError, match=f"{other.name} must hold .*\nfound: .*derived from something else"):
        load_prepared(filled, "centroid", expert_key(filled, "b"))
    (folder / "prepared.safetensors").write_bytes(b"x")
    with pytest.raises(LibraryError, match=r"prepared.safetensors has sha256"):
        load_prepared(filled, "centroid", expert_key(filled, "a"))
