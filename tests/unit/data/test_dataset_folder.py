"""Local data folders: files of the folder alone, found by their names or by a README; everything else is refused."""

import os
import socket
from pathlib import Path

import pytest

from lorary.data.dataset_folder import data_files
from lorary.data.tasks import load_tasks
from lorary.errors import LoraryError, TaskError, UsageError

CSV = "source,target\none,eins\n"


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def folder(path: Path, *names: str, readme: str | None = None) -> Path:
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(CSV)
    path.mkdir(exist_ok=True)
    if readme is not None:
        (path / "README.md").write_text(f"---\nlicense: mit\n{readme}\n---\n# Data\n")
    return path


def splits(path: Path, config: str | None = None) -> dict[str, list[str]]:
    found = data_files(path, config).splits
    return {split: [file.relative_to(path).as_posix() for file in files] for split, files in found.items()}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a.csv", "b.csv"], {"train": ["a.csv", "b.csv"]}),
        (["train.csv", "my_test-1.csv"], {"train": ["train.csv"], "test": ["my_test-1.csv"]}),
        (["dev/a.csv", "training/b.csv"], {"train": ["training/b.csv"], "validation": ["dev/a.csv"]}),
        (
            ["data/train-00000-of-00002.csv", "data/train-00001-of-00002.csv", "data/odd-00000-of-00001-ab.csv"],
            {
                "odd": ["data/odd-00000-of-00001-ab.csv"],
                "train": ["data/train-00000-of-00002.csv", "data/train-00001-of-00002.csv"],
            },
        ),
    ],
)
def test_names_of_files_and_folders_say_the_split(tmp_path, names, expected):
    assert splits(folder(tmp_path / "d", *names)) == expected


@pytest.mark.parametrize(
    ("readme", "expected"),
    [
        ("configs:\n- config_name: default\n  data_files: x/*.csv", {"train": ["x/a.csv", "x/b.csv"]}),
        ('configs:\n- config_name: a\n  data_files: "**/a.csv"', {"train": ["a.csv", "x/a.csv"]}),
        ("configs:\n- config_name: a\n  data_files:\n    test: x/**", {"test": ["x/a.csv", "x/b.csv"]}),
        (
            "configs:\n- config_name: a\n  data_files:\n  - {split: test, path: [a.csv, x/b.csv]}",
            {"test": ["a.csv", "x/b.csv"]},
        ),
        ("configs:\n- config_name: a\n  data_dir: x", {"train": ["x/a.csv", "x/b.csv"]}),
    ],
)
def test_a_readme_says_which_files(tmp_path, readme, expected):
    assert splits(folder(tmp_path / "d", "a.csv", "x/a.csv", "x/b.csv", readme=readme)) == expected


def test_one_of_several_configurations_must_be_meant(tmp_path):
    readme = "configs:\n- {config_name: a, data_files: a.csv}\n- {config_name: b, data_files: b.csv}"
    path = folder(tmp_path / "d", "a.csv", "b.csv", readme=readme)
    assert splits(path, "b") == {"train": ["b.csv"]}
    with pytest.raises(UsageError, match="there are a, b"):
        load_tasks(path)
    folder(path, readme=readme.replace("data_files: b.csv", "data_files: b.csv, default: true"))
    assert splits(path) == {"train": ["b.csv"]}


@pytest.mark.parametrize(
    "named",
    [
        "http://127.0.0.1:9/x.csv", "https://example.com/x.csv", "hf://datasets/a/b/x.csv", "file:///etc/passwd",
        "../x.csv", "x/../../x.csv", "/etc/passwd", "~/x.csv", "zip://x.csv::../x.zip", "a\\..\\x.csv",
    ],
)  # fmt: skip
@pytest.mark.parametrize("form", ["data_files: '{}'", "data_files: {{train: ['{}']}}", "data_dir: '{}'"])
def test_files_of_elsewhere_are_refused_by_name(tmp_path, named, form):
    (tmp_path / "x.csv").write_text(CSV)
    path = folder(tmp_path / "d", "a.csv", readme=f"configs:\n- config_name: a\n  {form.format(named)}")
    with pytest.raises(TaskError, match="must be made of files of its own folder\nfound: '"):
        load_tasks(path)


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.csv.gz", "a.pt", "a.pkl", "a.py", "a.txt", "a.h5"])
def test_archives_pickled_data_and_scripts_are_refused_by_name(tmp_path, name):
    path = folder(tmp_path / "d", name, "x.csv", readme=f"configs:\n- config_name: a\n  data_files: {name}")
    with pytest.raises(TaskError, match=f"a data file must end in .*\nfound: {name}\nremedy: .* never opened"):
        load_tasks(path)
    (path / "README.md").unlink()
    with pytest.warns(UserWarning, match=rf"1 files are left out \({name}\)"):
        assert len(load_tasks(path)["d"].split("train")) == 1


def test_a_link_out_of_the_folder_is_refused_and_one_inside_is_read(tmp_path):
    (tmp_path / "x.csv").write_text(CSV)
    path = folder(tmp_path / "d", "train.csv")
    (path / "test.csv").symlink_to("train.csv")
    assert list(splits(path)) == ["train", "test"]
    (path / "dev.csv").symlink_to(tmp_path / "x.csv")
    with pytest.raises(TaskError, match=r"dev\.csv: a link in a data folder must stay inside it"):
        load_tasks(path)


def test_a_link_that_leads_to_itself_or_nowhere_is_refused_by_name(tmp_path):
    path = folder(tmp_path / "d", "train.csv")
    (path / "test.csv").symlink_to("test.csv")
    with pytest.raises(TaskError, match=r"test\.csv: a link in a data folder must stay inside it\nfound: a link that"):
        load_tasks(path)
    (path / "test.csv").unlink()
    (path / "test.csv").symlink_to("gone.csv")
    with pytest.raises(TaskError, match=r"test\.csv: a data file must be a regular file\nfound: a link that leads no"):
        load_tasks(path)
    (path / "test.csv").unlink()
    os.mkfifo(path / "test.csv")
    with pytest.raises(TaskError, match=r"test\.csv: a data file must be a regular file\nfound: a pipe"):
        load_tasks(path)


def test_files_of_rows_lie_in_their_folder_too(tmp_path):
    row = '{"task": "t", "split": "test", "source": "a", "target": "b"}\n'
    (tmp_path / "x.jsonl").write_text(row)
    path = tmp_path / "d"
    path.mkdir()
    (path / "real.jsonl").write_text(row)
    (path / "manifest.json").write_text('{"tasks": [{"task": "t", "file": "real.jsonl"}]}')
    assert list(load_tasks(path)) == ["t"]
    (path / "manifest.json").write_text('{"tasks": [{"task": "t", "file": "../x.jsonl"}]}')
    with pytest.raises(TaskError, match=r"x\.jsonl: a file of a data folder must lie inside it"):
        load_tasks(path)
    (path / "below").symlink_to(tmp_path)
    (path / "manifest.json").write_text('{"tasks": [{"task": "t", "file": "below/x.jsonl"}]}')
    with pytest.raises(TaskError, match=r"x\.jsonl: a file of a data folder must lie inside it"):
        load_tasks(path)
    (path / "manifest.json").unlink()
    (path / "below").unlink()
    (path / "link.jsonl").symlink_to(tmp_path / "x.jsonl")
    with pytest.raises(TaskError, match=r"link\.jsonl: a link in a data folder must stay inside it"):
        load_tasks(path)


def test_a_snapshot_in_the_cache_of_the_hub_is_made_of_links_and_read(tmp_path):
    blob = tmp_path / "datasets--a--b" / "blobs" / "123"
    blob.parent.mkdir(parents=True)
    blob.write_text(CSV)
    path = tmp_path / "datasets--a--b" / "snapshots" / "rev"
    path.mkdir(parents=True)
    (path / "train.csv").symlink_to("../../blobs/123")
    assert len(load_tasks(path)["rev"].split("train")) == 1


def test_a_pipe_is_no_data_file_and_no_task_file(tmp_path):
    path = folder(tmp_path / "d", "train.csv")
    for place in (path / "train.csv", tmp_path / "rows.jsonl", tmp_path / "one.csv", tmp_path / "one.json"):
        place.unlink(missing_ok=True)
        os.mkfifo(place)
        with pytest.raises(LoraryError, match=r"regular file|must hold"):
            load_tasks(place.parent if place.parent == path else place)
    (path / "manifest.json").symlink_to("/dev/zero")
    with pytest.raises(LoraryError):
        load_tasks(path)


@pytest.mark.parametrize(
    "head",
    ["configs: 3", "configs:\n- 3", "configs: [{config_name: a, data_files: 3}]", "a: 1\na: 2\nconfigs: []", "a: [",
     "configs: [{config_name: a, data_files: none.csv}]", "configs: [{config_name: a, data_files: a.csv, names: [x]}]",
     "configs: [{config_name: a, data_files: [{split: 3, path: a.csv}]}]"],
)  # fmt: skip
def test_a_head_that_says_nothing_sensible_is_refused(tmp_path, head):
    with pytest.raises(LoraryError, match="README"):
        load_tasks(folder(tmp_path / "d", "a.csv", readme=head))
