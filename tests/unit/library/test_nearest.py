"""Which adapters of a library are alike, by sketches that are kept."""

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from lorary.adapter import Adapter, LoraFactors, content_hash
from lorary.cluster.similarity import adapter_similarity
from lorary.errors import LibraryError, NoSuchAdapterError, UsageError
from lorary.formats.peft import encode_adapter, parse_adapter
from lorary.formats.peft_config import new_config
from lorary.library.nearest import Duplicate
from lorary.library.store import Library

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"
Add = Callable[..., None]


def drawn(name: str, seed: int, *, path: str = Q, mixed: float = 0.0, rank: int = 2) -> Adapter:
    """An adapter of random factors, of which a share comes from another draw."""
    draws = [torch.Generator().manual_seed(number) for number in (seed, seed + 1000)]
    d_out = 32 if path == Q else 48
    a = torch.randn(rank, 32, generator=draws[0])
    b, other = (torch.randn(d_out, rank, generator=draw) for draw in draws)
    factors = LoraFactors(a, b + mixed * other, 2.0)
    return Adapter(name, {path: factors}, new_config(None, rank=rank, alpha=2 * rank, target_modules=[path]))


@pytest.fixture
def library(tmp_path: Path, tiny_base_folder: Path) -> Library:
    library = Library.create(tmp_path / "lib", tiny_base_folder)
    for number in range(6):
        library.add_adapter(drawn(f"a{number}", number), {"tasks": []})
    return library


def entries(library: Library) -> list[str]:
    return sorted(path.name for path in (library.path / "derived").glob("sketches-*"))


def test_the_nearest_are_those_of_the_exact_cosines(library: Library) -> None:
    library.add_adapter(drawn("like-a2", 2, mixed=0.3), {"tasks": []})
    names = library.names()
    cosines = adapter_similarity(map(library.get, names))[names.index("a2")]
    expected = sorted(
        ((name, value) for name, value in zip(names, cosines.tolist(), strict=True) if name != "a2"),
        key=lambda pair: -pair[1],
    )
    assert [name for name, _ in library.nearest("a2", 3)] == [name for name, _ in expected[:3]]
    assert dict(library.nearest("a2", 99)) == pytest.approx(dict(expected))
    assert library.nearest("a2", 1)[0][0] == "like-a2"


def test_sketches_are_kept_and_an_adapter_that_changed_gets_another(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    library.nearest("a0")
    assert len(entries(library)) == 1
    read: list[str] = []
    whole = Library.get
    monkeypatch.setattr(Library, "get", lambda self, name: read.append(name) or whole(self, name))
    monkeypatch.setattr("lorary.library.nearest.CANDIDATES", 2)
    monkeypatch.setattr("lorary.library.nearest.TIMES", 1)
    library.nearest("a0", 1)
    assert len(read) == 3  # itself and two candidates
    library.replace_adapter(drawn("a5", 0, mixed=0.1), {"tasks": []})
    assert library.nearest("a0", 1)[0][0] == "a5"
    assert len(entries(library)) == 2


def test_many_entries_become_one_of_those_that_are_there(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorary.library.sketches.MOST_ENTRIES", 2)
    before = library.nearest("a0", 9)
    for number in (1, 2):
        library.remove(f"a{number}")
        library.add_adapter(drawn(f"b{number}", 10 + number), {"tasks": []})
        library.nearest("a0")
    assert len(entries(library)) == 1
    kept = dict(library.nearest("a0", 9))
    assert {name: kept[name] for name in ("a3", "a4", "a5")} == {
        name: dict(before)[name] for name in ("a3", "a4", "a5")
    }


def test_duplicates_name_the_earlier_one_and_only_compare_equal_layers(library: Library) -> None:
    assert library.duplicates() == []
    library.add_adapter(drawn("z-copy", 3), {"tasks": []})
    library.add_adapter(drawn("z-near", 4, mixed=0.05), {"tasks": []})
    library.add_adapter(drawn("z-far", 5, mixed=0.3), {"tasks": []})
    library.add_adapter(drawn("z-other", 5, path=V), {"tasks": []})
    copy, near = library.duplicates()
    assert copy == Duplicate("z-copy", "a3", 1.0, is_same=True)
    assert (near.name, near.other, near.is_same) == ("z-near", "a4", False)
    assert near.cosine == pytest.approx(float(adapter_similarity(map(library.get, ["a4", "z-near"]))[0, 1]))
    assert library.duplicates_of(["a3"]) == ([Duplicate("a3", "z-copy", 1.0, is_same=True)], 0)
    assert library.duplicates_of(["a3", "z-copy"])[0] == [copy]


def test_adapters_that_were_never_sketched_are_left_out_beyond_a_number(library: Library) -> None:
    assert library.duplicates_of(["a0"], most_read=5) == ([], 5)
    library.add_adapter(drawn("a0-copy", 0), {"tasks": []})
    assert library.duplicates_of(["a0-copy"], most_read=1) == ([Duplicate("a0-copy", "a0", 1.0, is_same=True)], 5)
    library.remove("a0-copy")
    assert library.duplicates_of(["a0"], most_read=5) == ([], 0)
    library.add_adapter(drawn("z", 0), {"tasks": []})
    assert library.duplicates_of(["z"], most_read=1) == ([Duplicate("z", "a0", 1.0, is_same=True)], 0)


def test_candidates_that_are_not_in_the_library_are_compared_and_not_kept(library: Library) -> None:
    candidates = {a.name: a for a in (drawn("new", 2), drawn("near", 3, mixed=0.05), drawn("twin", 9), drawn("u", 9))}
    pairs = [(content_hash(a.config, encoded(a)), a) for a in candidates.values()]
    for most_read, unread, expected in ((0, 6, ["new", "u"]), (6, 0, ["new", "near", "u"])):
        found, left = library.duplicates_beside(pairs, candidates.__getitem__, most_read=most_read)
        assert (sorted(each.name for each in found), left) == (sorted(expected), unread)
        others = {each.name: (each.other, each.is_same) for each in found}
        assert others["new"] == ("a2", True)
        assert others["u"] == ("twin", True)
    assert others["near"] == ("a3", False)
    assert library.names() == [f"a{number}" for number in range(6)]
    assert len(entries(library)) == 1


def encoded(adapter: Adapter) -> Mapping[str, torch.Tensor]:
    """The tensors as they lie on disk."""
    return parse_adapter(adapter.name, encode_adapter(adapter)).tensors


def test_adapters_that_compute_nothing_are_like_none_but_the_same(library: Library) -> None:
    zero = drawn("z0", 1)
    nothing = LoraFactors(zero.modules[Q].lora_a, torch.zeros(32, 2), 2.0)
    for name in ("z0", "z1"):
        library.add_adapter(Adapter(name, {Q: nothing}, zero.config), {"tasks": []})
    assert library.nearest("z0") == []
    assert {name for name, _ in library.nearest("a0", 9)} == {f"a{number}" for number in range(1, 6)}
    assert library.duplicates() == [Duplicate("z1", "z0", 1.0, is_same=True)]


def test_what_is_not_there_is_refused_by_name(library: Library) -> None:
    with pytest.raises(NoSuchAdapterError, match="did you mean 'a1'"):
        library.nearest("a11")
    with pytest.raises(UsageError, match="k = 0"):
        library.nearest("a1", 0)


def test_a_sketch_is_never_kept_of_weights_that_came_meanwhile(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Library.get

    def replaced(self: Library, name: str) -> Adapter:
        if name == "a3":
            self.replace_adapter(drawn("a3", 33), {"tasks": []})
        return whole(self, name)

    monkeypatch.setattr(Library, "get", replaced)
    with pytest.raises(LibraryError, match="'a3' was replaced"):
        library.nearest("a0")
    assert entries(library) == []


def test_damaged_sketches_are_named(library: Library) -> None:
    library.nearest("a0")
    path = library.path / "derived" / entries(library)[0] / "sketches.safetensors"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(LibraryError, match="delete the folder"):
        library.nearest("a0")


def test_a_library_that_is_only_read_gets_its_answer(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: object) -> None:
        raise LibraryError("it must be writable", found="it is not")

    expected = library.nearest("a0")
    for path in (library.path / "derived").iterdir():
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    monkeypatch.setattr("lorary.library.sketches.save_derived", refuse)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert library.nearest("a0") == expected
    assert "not stored" in str(caught[0].message)
