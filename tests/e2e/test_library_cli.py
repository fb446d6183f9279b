"""`lorary library` over libraries that are damaged or named oddly: what is bad is named, and the rest is shown."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Run
from tests.support.adapters import write_adapter

from lorary.adapter import Adapter, LoraFactors
from lorary.errors import LibraryError, LoraryError
from lorary.formats.peft_config import new_config
from lorary.library.store import Library


def adapter_of(name: str) -> Adapter:
    factors = LoraFactors(torch.ones(2, 32), torch.ones(32, 2), 2.0)
    config = new_config(None, rank=2, alpha=4, target_modules=["model.layers.0.self_attn.q_proj"])
    return Adapter(name, {"model.layers.0.self_attn.q_proj": factors}, config)


@pytest.fixture
def filled(tmp_path: Path, tiny_base_folder: Path) -> Library:
    library = Library.create(tmp_path / "lib", tiny_base_folder)
    for name in ("a", "b", "c"):
        library.add_adapter(adapter_of(name), {"tasks": [name]})
    return library


def edit(library: Library, name: str, **changes: Any) -> None:
    path = library.path / "adapters" / name / "provenance.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


BAD: dict[str, Any] = {
    "tasks of numbers": {"tasks": [7]},
    "no tasks": {"tasks": None},
    "a rank that is none": {"rank": True},
    "a rank of many digits": {"rank": 10**400},
    "a negative count": {"num_parameters": -1},
    "a hash that is none": {"content_hash": 3},
}


def damage_text(text: str) -> Callable[[Library, str], None]:
    return lambda library, name: (library.path / "adapters" / name / "provenance.json").write_text(text) and None


def link_that_loops(library: Library, name: str) -> None:
    shutil.rmtree(library.path / "adapters" / name)
    (library.path / "adapters" / name).symlink_to(name)


def lose_provenance(library: Library, name: str) -> None:
    (library.path / "adapters" / name / "provenance.json").unlink()


DAMAGES: dict[str, Callable[[Library, str], None]] = {
    **{kind: (lambda library, name, changes=changes: edit(library, name, **changes)) for kind, changes in BAD.items()},
    "half a document": damage_text("{"),
    "a list": damage_text("[]"),
    "deep": damage_text("[" * 100_000),
    "many digits": damage_text('{"rank": ' + "9" * 5000 + "}"),
    "half a character": damage_text('{"tasks": ["\\ud800"]}'),
    "a link that loops": link_that_loops,
    "no provenance": lose_provenance,
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_bad_adapter_is_named_and_the_others_are_shown(filled: Library, run: Run, kind: str) -> None:
    DAMAGES[kind](filled, "b")
    listed = run("library", "ls", filled.path, "--json")
    assert listed.code == 1
    assert [row["name"] for row in json.loads(listed.out)] == ["a", "c"]
    assert "'b'" in listed.err
    shown = run("library", "ls", filled.path)
    assert shown.code == 1
    assert "2 adapters, 1 more" in shown.out
    assert "'b'" in shown.err
    verified = run("library", "verify", filled.path, "--json")
    assert verified.code == 1
    assert {problem["adapter"] for problem in json.loads(verified.out)["problems"]} == {"b"}
    one = run("library", "show", filled.path, "b")
    assert (one.code, run("library", "show", filled.path, "a").code) == (1, 0)
    assert "Traceback" not in one.err + listed.err + verified.err
    with pytest.raises(LibraryError, match=r"'b'|adapters/b"):
        filled.describe()


def test_control_characters_of_a_library_do_not_reach_the_terminal(filled: Library, run: Run) -> None:
    edit(filled, "b", tasks=["\x1b[2Jcleared\nforged"], content_hash="\x1b[31m")
    out = run("library", "ls", filled.path).out
    assert "\x1b" not in out
    assert "\\x1b[2Jcleared" in out
    assert json.loads(run("library", "ls", filled.path, "--json").out)[1]["tasks"] == ["\x1b[2Jcleared\nforged"]


@pytest.mark.parametrize("name", ["x" * 300, "\udcff", "a\x1b[2J", "a\nb", "ü" * 100])
def test_a_name_or_path_that_cannot_be_is_refused_by_name(filled: Library, run: Run, name: str, tmp_path: Path) -> None:
    for act in (
        lambda: filled.get(name),
        lambda: filled.remove(name),
        lambda: filled.add(name),
        lambda: filled.add_adapter(adapter_of(name), {}),
        lambda: Library.open(tmp_path / name),
    ):
        with pytest.raises(LoraryError):
            act()
    for arguments in (("show", filled.path, name), ("add", filled.path, name), ("ls", tmp_path / name)):
        outcome = run("library", *arguments)
        assert outcome.code in (1, 2)
        assert "Error:" not in outcome.err


def test_a_library_with_a_path_of_odd_bytes_can_be_used(tmp_path: Path, tiny_base_folder: Path, run: Run) -> None:
    path = Path(os.fsdecode(bytes(tmp_path) + b"/li\xffb"))
    library = Library.create(path, tiny_base_folder)
    odd = Path(os.fsdecode(bytes(tmp_path) + b"/so\xffurce"))
    write_adapter(adapter_of("x"), odd)
    added = run("library", "add", path, odd, "--name", "x")
    assert added.code == 0, added.err
    assert library.provenance("x")["source"] == "so\ufffdurce"
    assert json.loads(run("library", "ls", path, "--json").out)[0]["name"] == "x"
    (path / "adapters" / os.fsdecode(b"st\xffray")).mkdir()
    verified = run("library", "verify", path, "--json")
    assert [problem["adapter"] for problem in json.loads(verified.out)["problems"]] == ["st\\udcffray"]
    assert run("library", "verify", path).code == 1


def test_a_listing_is_filtered_searched_and_ordered(filled: Library, run: Run) -> None:
    assert run("library", "tag", filled.path, "b", "+good", "+team/x", "-hot").out == "good team/x\n"
    assert json.loads(run("library", "tag", filled.path, "b", "--json").out) == ["good", "team/x"]
    assert run("library", "note", filled.path, "b", "keep this").code == 0
    assert run("library", "note", filled.path, "b").out == "keep this\n"
    rows = json.loads(run("library", "ls", filled.path, "--tag", "good", "--json").out)
    assert [(row["name"], row["tags"], row["note"]) for row in rows] == [("b", ["good", "team/x"], "keep this")]
    shown = run("library", "ls", filled.path, "--filter", "task=[bc]", "--sort", "name", "--reverse").out.splitlines()
    assert [line.split()[0] for line in shown] == ["name", "c", "b", "2"]
    assert shown[-1] == "2 of 3 adapters"
    assert "good team/x" in shown[2]
    assert json.loads(run("library", "ls", filled.path, "--search", "nothing", "--json").out) == []
    refused = run("library", "ls", filled.path, "--filter", "rnk=2")
    assert (refused.code, "did you mean 'rank'" in refused.err) == (2, True)
    assert run("library", "tag", filled.path, "b", "x").code == 2


def test_duplicates_and_the_nearest_are_named(filled: Library, run: Run) -> None:
    lines = run("library", "ls", filled.path, "--duplicates").out.splitlines()
    assert lines == [
        "b  same weights as 'a'",
        "c  same weights as 'a'",
        "2 adapters with the weights of an earlier one, 0 with nearly its direction",
    ]
    found = json.loads(run("library", "ls", filled.path, "--duplicates", "--json").out)
    assert found[0] == {"name": "b", "other": "a", "cosine": 1.0, "is_same": True}
    assert run("library", "ls", filled.path, "--duplicates", "--sort", "rank").code == 2
    assert run("library", "nearest", filled.path, "a", "--k", 1).out == "b  +1.0000\n"
    assert len(json.loads(run("library", "nearest", filled.path, "a", "--json").out)) == 2
    refused = run("library", "nearest", filled.path, "q")
    assert (refused.code, "no adapter 'q'" in refused.err) == (1, True)


def test_a_name_is_changed(filled: Library, run: Run) -> None:
    assert run("library", "rename", filled.path, "a", "first").out == f"'a' is 'first' now: {filled.path}\n"
    assert filled.names() == ["b", "c", "first"]
    assert run("library", "rename", filled.path, "b", "c").code == 1


def test_a_list_of_adapters_is_checked_then_added_and_each_bad_line_is_named(
    tmp_path: Path, tiny_base_folder: Path, run: Run
) -> None:
    for name in ("x", "y"):
        write_adapter(adapter_of(name), tmp_path / name)
    listed = tmp_path / "list"
    lines = ["# two of a run", "", str(tmp_path / "x"), f"{tmp_path}/none",
             json.dumps({"path": str(tmp_path / "y"), "name": "other", "tasks": ["sst2"]})]  # fmt: skip
    listed.write_text("\n".join(lines) + "\n")
    arguments = ("library", "add", tmp_path / "new", "--from", listed, "--base", tiny_base_folder)
    checked = run(*arguments, "--check")
    assert (checked.code, (tmp_path / "new").exists()) == (1, False)
    shown = "rank 2, 128 parameters, q_proj in 1 layers, 0 to 0"
    assert checked.out.splitlines() == [
        f"x: {shown}",
        f"other: {shown}; same weights as 'x'",
        f"2 adapters would be added, 1 not: {tmp_path / 'new'}",
    ]
    added = run(*arguments)
    assert (added.code, added.out.splitlines()) == (
        1, ["other: same weights as 'x'", f"2 adapters added, 1 not: {tmp_path / 'new'}"],
    )  # fmt: skip
    assert f"{tmp_path}/none" in added.err
    assert Library.open(tmp_path / "new").provenance("other")["tasks"] == ["sst2"]
    again = json.loads(run(*arguments, "--check", "--json").out)
    assert (len(again["failed"]), again["checked"], again["added"]) == (3, [], [])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must list adapters"),
        ('{"path": 3}', "line 1 must have a path"),
        ('a\n{"path": "b", "nmae": "c"}', "line 2 must have a path"),
        ("{", "line 1 must be a path or one JSON object"),
    ],
)
def test_a_list_that_is_none_is_refused(
    tmp_path: Path, tiny_base_folder: Path, run: Run, text: str, message: str
) -> None:
    (tmp_path / "list").write_text(text)
    outcome = run("library", "add", tmp_path / "new", "--from", tmp_path / "list", "--base", tiny_base_folder)
    assert (outcome.code, message in outcome.err, (tmp_path / "new").exists()) == (2, True, False)


def test_nothing_to_add_is_refused(filled: Library, run: Run) -> None:
    assert "--from FILE" in run("library", "add", filled.path).err
    assert run("library", "add", filled.path, "--from", "nowhere").code == 2
