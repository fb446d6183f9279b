import errno
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file

from lorary.caching import cache_folder
from lorary.errors import BaseModelError
from lorary.formats import gguf as module
from lorary.formats.base import resolve_base
from lorary.formats.gguf import dequantise

SOURCE = Path(__file__).parents[3] / "src"
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
SHAPES = {
    "attn_norm": (32,),
    "ffn_norm": (32,),
    "attn_q": (32, 32),
    "attn_k": (16, 32),
    "attn_v": (16, 32),
    "attn_output": (32, 32),
    "ffn_gate": (48, 32),
    "ffn_up": (48, 32),
    "ffn_down": (32, 48),
}


def write_gguf(
    path: Path, *, family: str = "llama", left_out: str = "", seed: int = 0, keys: dict[str, Any] | None = None,
    more: dict[str, list[float]] | None = None,
) -> dict[str, np.ndarray]:  # fmt: skip
    """A llama of two layers over a byte-level vocabulary, in float32; returns its tensors by their GGUF names.

    Args:
        path: to write to.
        family: its architecture.
        left_out: a tensor to leave out.
        seed: of the weights.
        keys: further metadata, below the architecture's name unless they begin with a dot.
        more: further tensors.
    """
    from gguf import GGUFWriter
    from tokenizers.pre_tokenizers import ByteLevel

    words = ["<|end|>", *sorted(ByteLevel.alphabet()), "he", "ll", "hell"]
    writer = GGUFWriter(str(path), family)
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    given = {} if keys is None else keys
    if "attention.layer_norm_rms_epsilon" not in given:
        writer.add_layer_norm_rms_eps(1e-5)
    if "rope.freq_base" not in given:
        writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(words)
    writer.add_token_types([3] + [1] * (len(words) - 1))
    writer.add_token_merges(["h e", "l l", "he ll"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_chat_template(TEMPLATE)
    for key, value in given.items():
        add_key(writer, key.removeprefix(".") if key.startswith(".") else f"{family}.{key}", value)
    shapes = {"token_embd.weight": (len(words), 32), "output_norm.weight": (32,)}
    shapes |= {f"blk.{layer}.{name}.weight": shape for layer in range(2) for name, shape in SHAPES.items()}
    random = np.random.default_rng(seed)
    tensors = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    tensors.pop(left_out, None)
    tensors |= {name: np.array(values, dtype=np.float32) for name, values in (more or {}).items()}
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def add_key(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, list):
        writer.add_array(key, value)
    else:
        writer.add_string(key, value)


@pytest.fixture
def gguf_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny GGUF file, and an empty cache beside it."""
    monkeypatch.setenv("LORARY_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    return path


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_the_copy_holds_the_weights_of_the_file(tmp_path: Path, gguf_file: Path) -> None:
    tensors = write_gguf(tmp_path / "again.gguf")
    folder, digest = dequantise(gguf_file)
    weights = load_file(folder / "model.safetensors")
    assert digest == hashlib.sha256(gguf_file.read_bytes()).hexdigest()
    assert folder.name == digest
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    pairs = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.layers.1.mlp.down_proj.weight": "blk.1.ffn_down.weight",
        "model.layers.0.self_attn.o_proj.weight": "blk.0.attn_output.weight",
    }
    for ours, theirs in pairs.items():
        assert torch.equal(weights[ours], torch.from_numpy(tensors[theirs]))


def test_the_copy_has_the_tokenizer_and_chat_template_of_the_file(gguf_file: Path) -> None:
    from transformers import AutoTokenizer

    direct = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    copied = AutoTokenizer.from_pretrained(dequantise(gguf_file)[0])
    assert copied.chat_template == direct.chat_template == TEMPLATE
    assert copied.get_vocab() == direct.get_vocab()
    assert copied.special_tokens_map == direct.special_tokens_map
    for text in ("hello", "shell hell", " two  spaces\n", "é<|end|>"):
        assert copied(text).input_ids == direct(text).input_ids


def test_a_second_call_converts_nothing_and_says_nothing(gguf_file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder, _ = dequantise(gguf_file)
    first = capfd.readouterr().err
    written = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert dequantise(gguf_file)[0] == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == written
    assert capfd.readouterr().err == ""
    # And the first one: what happens and that it is done, with none of transformers' bars.
    assert [line.split()[:2] for line in first.splitlines()] == [["lorary:", "converting"], ["lorary:", "converted"]]


def test_a_file_that_changed_gets_another_copy(gguf_file: Path) -> None:
    before, _ = dequantise(gguf_file)
    write_gguf(gguf_file, seed=1)
    after, _ = dequantise(gguf_file)
    assert before != after


def cut_off(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(1000)


def flip_a_byte(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def lose_the_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def scribble_on_the_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("{")


def forget_a_file_in_the_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"format": 1}')


def name_no_files_in_the_manifest(folder: Path) -> None:
    edit_manifest(folder, files={})


def name_no_weights_in_the_manifest(folder: Path) -> None:
    files = json.loads((folder / "manifest.json").read_text())["files"]
    edit_manifest(folder, files={name: entry for name, entry in files.items() if not name.endswith("safetensors")})
    (folder / "model.safetensors").write_bytes(b"half")


def take_the_manifest_of_another_file(folder: Path) -> None:
    edit_manifest(folder, source_sha256="0" * 64)


def edit_manifest(folder: Path, **changes: Any) -> None:
    document = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**document, **changes}))


def flip_a_byte_and_keep_the_time(folder: Path) -> None:
    stat = (folder / "model.safetensors").stat()
    flip_a_byte(folder)
    os.utime(folder / "model.safetensors", ns=(stat.st_atime_ns, stat.st_mtime_ns))


def edit_the_config_and_keep_the_time(folder: Path) -> None:
    stat, text = (folder / "config.json").stat(), (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace("1", "2", 1))
    os.utime(folder / "config.json", ns=(stat.st_atime_ns, stat.st_mtime_ns))


def add_an_adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


def add_a_word_to_the_tokenizer(folder: Path) -> None:
    (folder / "added_tokens.json").write_text('{"hello": 5}')


def add_a_chat_template_of_another_name(folder: Path) -> None:
    (folder / "chat_templates").mkdir()
    (folder / "chat_templates" / "tool_use.jinja").write_text("another")


def change_a_template_that_the_manifest_forgot(folder: Path) -> None:
    files = json.loads((folder / "manifest.json").read_text())["files"]
    edit_manifest(folder, files={name: entry for name, entry in files.items() if not name.endswith("jinja")})
    (folder / "chat_template.jinja").write_text("another")


def put_a_file_in_its_place(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("no folder")


def put_a_link_to_a_damaged_copy_in_its_place(folder: Path) -> None:
    folder.rename(folder.parent.parent / "elsewhere")
    folder.symlink_to(folder.parent.parent / "elsewhere")
    cut_off(folder)


def put_a_fifo(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    os.mkfifo(folder / "manifest.json")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (name_no_files_in_the_manifest, r"manifest\.json names no config\.json"),
        (name_no_weights_in_the_manifest, r"manifest\.json names no weights"),
        (take_the_manifest_of_another_file, r"manifest\.json is of another file"),
        (flip_a_byte_and_keep_the_time, r"model\.safetensors has another sha256"),
        (edit_the_config_and_keep_the_time, r"config\.json has another sha256"),
        (add_an_adapter, r"adapter_config\.json does not belong to it"),
        (add_a_word_to_the_tokenizer, r"added_tokens\.json does not belong to it"),
        (add_a_chat_template_of_another_name, r"chat_templates does not belong to it"),
        (change_a_template_that_the_manifest_forgot, r"chat_template\.jinja does not belong to it"),
        (put_a_file_in_its_place, r"manifest\.json: Not a directory"),
        (put_a_link_to_a_damaged_copy_in_its_place, r"model\.safetensors has 1000 bytes"),
        (put_a_fifo, r"manifest\.json: it is not a regular file"),
        (cut_off, r"model\.safetensors has 1000 bytes"),
        (flip_a_byte, r"model\.safetensors has another sha256"),
        (lose_the_tokenizer, r"tokenizer\.json: No such file"),
        (scribble_on_the_manifest, r"manifest\.json cannot be read"),
        (forget_a_file_in_the_manifest, r"manifest\.json cannot be read"),
    ],
)
def test_a_damaged_copy_is_made_again_and_one_line_says_so(
    damage: Callable[[Path], None], said: str, gguf_file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, _ = dequantise(gguf_file)
    good = {name: digest for name, digest in hashes(folder).items() if name != "manifest.json"}
    capfd.readouterr()
    damage(folder)
    assert dequantise(gguf_file)[0] == folder
    lines = [line for line in capfd.readouterr().err.splitlines() if "is damaged" in line]
    assert len(lines) == 1
    assert re.search(said, lines[0])
    assert {name: digest for name, digest in hashes(folder).items() if name != "manifest.json"} == good


def test_a_copy_that_was_only_touched_is_kept(gguf_file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder, _ = dequantise(gguf_file)
    capfd.readouterr()
    os.utime(folder / "model.safetensors", (1, 1))
    dequantise(gguf_file)
    recorded = json.loads((folder / "manifest.json").read_text())["files"]["model.safetensors"]
    assert recorded["mtime_ns"] == 10**9  # so that its hash is not computed again the next time
    assert capfd.readouterr().err == ""
    assert (folder / "model.safetensors").stat().st_mtime == 1


def test_what_a_killed_process_left_is_swept_away(gguf_file: Path) -> None:
    digest = hashlib.sha256(gguf_file.read_bytes()).hexdigest()
    partial = cache_folder() / "gguf" / f"{digest}.partial"
    partial.mkdir(parents=True)
    (partial / "model.safetensors").write_bytes(b"half")
    folder, _ = dequantise(gguf_file)
    assert not partial.exists()
    assert set(json.loads((folder / "manifest.json").read_text())["files"]) == set(hashes(folder)) - {"manifest.json"}


def test_nothing_is_written_through_a_link_in_place_of_an_unfinished_copy(gguf_file: Path, tmp_path: Path) -> None:
    digest = hashlib.sha256(gguf_file.read_bytes()).hexdigest()
    (tmp_path / "victim").mkdir()
    (cache_folder() / "gguf").mkdir(parents=True)
    (cache_folder() / "gguf" / f"{digest}.partial").symlink_to(tmp_path / "victim")
    folder, _ = dequantise(gguf_file)
    assert not folder.is_symlink()
    assert list((tmp_path / "victim").iterdir()) == []


def test_two_processes_that_ask_at_once_convert_once(gguf_file: Path) -> None:
    digest = hashlib.sha256(gguf_file.read_bytes()).hexdigest()
    parent = cache_folder() / "gguf"
    parent.mkdir(parents=True)
    code = f"from pathlib import Path; from lorary.formats.gguf import dequantise; dequantise(Path({str(gguf_file)!r}))"
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}
    # Both are made to wait before either may start, so that they do ask at once.
    with FileLock(f"{parent / digest}.lock"):
        asking = [
            subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, env=environment)
            for _ in range(2)
        ]
        first_lines = [process.stderr.readline() for process in asking if process.stderr]
    said = [process.communicate(timeout=60)[1] for process in asking]
    assert [process.returncode for process in asking] == [0, 0]
    assert all("another process is converting" in line for line in first_lines)
    assert sorted(text.count("converting tiny.gguf") for text in said) == [0, 1]
    assert sorted(path.name for path in parent.iterdir()) == [digest, f"{digest}.lock"]


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("No space left on device")]
)
def test_a_full_disk_is_one_error_and_leaves_nothing_behind(
    error: Exception, gguf_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill_the_disk(source: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
        raise error

    monkeypatch.setattr(module, "_convert", fill_the_disk)
    with pytest.raises(BaseModelError, match=r"No space left on device\nremedy: make room there, or set LORARY_CACHE"):
        dequantise(gguf_file)
    assert [path.suffix for path in (cache_folder() / "gguf").iterdir()] == [".lock"]


def test_a_cache_that_cannot_be_written_is_one_error(gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORARY_CACHE", str(gguf_file))
    with pytest.raises(BaseModelError, match="set LORARY_CACHE"):
        dequantise(gguf_file)


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.gguf"
    path.write_bytes(b"PK\x03\x04 pickled weights")
    with pytest.raises(BaseModelError, match=r"weights\.gguf must be a GGUF file\nfound: it begins with b'PK"):
        dequantise(path)


def test_a_missing_gguf_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match=r"nowhere\.gguf must be readable\nfound: No such file"):
        resolve_base(tmp_path / "nowhere.gguf")


def break_off(path: Path) -> None:
    write_gguf(path)
    path.write_bytes(path.read_bytes()[:3000])


def of_a_family_nobody_knows(path: Path) -> None:
    write_gguf(path, family="quetzal")


def with_a_weight_missing(path: Path) -> None:
    write_gguf(path, left_out="blk.1.ffn_up.weight")


@pytest.mark.parametrize(
    ("make", "found"),
    [(break_off, ""), (of_a_family_nobody_knows, "quetzal"), (with_a_weight_missing, "up_proj")],
)
def test_a_gguf_file_that_transformers_cannot_turn_is_refused(
    make: Callable[[Path], Any], found: str, gguf_file: Path
) -> None:
    make(gguf_file)
    with pytest.raises(BaseModelError, match=rf"tiny\.gguf must hold a causal language model.*\nfound: .*{found}"):
        dequantise(gguf_file)
    assert [path.suffix for path in (cache_folder() / "gguf").iterdir()] == [".lock"]


def test_a_file_with_another_hash_than_expected_is_refused(gguf_file: Path) -> None:
    with pytest.raises(BaseModelError, match="must have the sha256 0000"):
        dequantise(gguf_file, expected_sha256="0" * 64)
    assert not cache_folder().exists()


def test_the_cache_folder_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LORARY_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("LORARY_CACHE")
    assert cache_folder() == tmp_path / "xdg" / "lorary"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == tmp_path / "home" / ".cache" / "lorary"


# --- what a file says of its model beside the weights


IDS = torch.arange(1, 61)[None]
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


@torch.no_grad()
def logits_of(folder: Path, **changes: Any) -> torch.Tensor:
    """Logits of a converted file, or of its weights under a configuration that is changed here."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    for name, value in changes.items():
        setattr(config, name, value)
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float64)
    found: torch.Tensor = model(input_ids=IDS).logits
    return found


def factors_of(parameters: dict[str, Any]) -> list[float]:
    """By how much a kind of rotary scaling divides each frequency, as converters write it into a file."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(hidden_size=32, num_attention_heads=4, rope_parameters=dict(parameters))
    scaled, _ = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, device=torch.device("cpu"))
    plain = 1.0 / 10000.0 ** (torch.arange(0, 8, 2) / 8)
    factors: list[float] = (plain / scaled).tolist()
    return factors


YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
ODD = [1.0, 1.5, 2.5, 7.0]


@pytest.mark.parametrize(
    ("keys", "more", "changes"),
    [
        ({"rope.scaling.type": "none"}, {}, {}),
        (
            {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
            {},
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
        ),
        (
            {"rope.scale_linear": 2.0},
            {},
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
        ),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16,
             "rope.scaling.finetuned": True},
            {},
            {"rope_parameters": YARN},
        ),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16,
             "rope.scaling.yarn_beta_fast": 4.0, "rope.scaling.yarn_beta_slow": 2.0},
            {},
            {"rope_parameters": {**YARN, "beta_fast": 4.0, "beta_slow": 2.0}},
        ),
        ({}, {"rope_freqs.weight": [1.0] * 4}, {}),
        ({}, {"rope_freqs.weight": factors_of(LLAMA3)}, {"rope_parameters": LLAMA3}),
        (
            {},
            {"rope_freqs.weight": ODD},
            {"rope_parameters": {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": ODD,
                                 "long_factor": ODD, "attention_factor": 1.0,
                                 "original_max_position_embeddings": 64}},
        ),
        ({"rope.dimension_count": 8, "attention.key_length": 8, "attention.value_length": 8}, {}, {}),
        ({"attention.layer_norm_rms_epsilon": 0.25}, {}, {"rms_norm_eps": 0.25}),
        ({"rope.freq_base": 50.0}, {}, {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}}),
        ({"logit_scale": 1.0, "attention.causal": True, ".mradermacher.quantized_by": "x", "pooling_type": 0}, {}, {}),
        ({"attention.sliding_window": 4096, "attention.scale": 8**-0.5}, {}, {}),
    ],
)  # fmt: skip
def test_what_a_file_says_of_its_model_reaches_the_copy(
    keys: dict[str, Any], more: dict[str, list[float]], changes: dict[str, Any], tmp_path: Path, gguf_file: Path
) -> None:
    plain, _ = dequantise(gguf_file)
    write_gguf(tmp_path / "other.gguf", keys=keys, more=more)
    folder, _ = dequantise(tmp_path / "other.gguf")
    expected = logits_of(plain, **changes)
    torch.testing.assert_close(logits_of(folder), expected, rtol=0, atol=1e-4 * float(expected.std()))
    assert torch.equal(expected, logits_of(plain)) == (not changes)


@pytest.mark.parametrize(
    ("keys", "more", "found"),
    [
        ({"rope.scaling.type": "longrope", "rope.scaling.attn_factor": 1.2}, {}, "longrope"),
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}, {}, r"llama\.rope\.scaling\.type = yarn"),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16,
             "rope.scaling.yarn_log_multiplier": 0.1}, {}, r"llama\.rope\.scaling\.yarn_log_multiplier",
        ),
        ({"rope.scaling.type": "linear", "rope.scaling.attn_factor": 2.0}, {}, r"rope\.scaling\.attn_factor"),
        ({}, {"rope_freqs.weight": [1.0] * 3}, r"rope_freqs\.weight"),
        ({}, {"rope_freqs.weight": [0.0] * 4}, r"rope_freqs\.weight"),
        ({}, {"rope_factors_long.weight": [1.0] * 4}, r"rope_factors_long\.weight"),
        ({"rope.dimension_count": 4}, {}, r"llama\.rope\.dimension_count = 4"),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": -2.0}, {}, r"llama\.rope\.scaling\.factor = -2\.0"),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": math.nan}, {}, r"llama\.rope\.scaling\.factor = nan"),
        ({"rope.freq_base": 0.0}, {}, r"llama\.rope\.freq_base = 0\.0"),
        ({"rope.freq_base": math.inf}, {}, r"llama\.rope\.freq_base = inf"),
        ({"attention.layer_norm_rms_epsilon": math.nan}, {}, r"llama\.attention\.layer_norm_rms_epsilon = nan"),
        ({"attention.layer_norm_rms_epsilon": -1.0}, {}, r"llama\.attention\.layer_norm_rms_epsilon = -1\.0"),
        ({"logit_scale": 0.5}, {}, r"llama\.logit_scale = 0\.5"),
        ({"residual_scale": 2.0}, {}, r"llama\.residual_scale"),
        ({"embedding_scale": 12.0}, {}, r"llama\.embedding_scale"),
        ({"attention.scale": 0.5}, {}, r"llama\.attention\.scale"),
        ({"attention.causal": False}, {}, r"llama\.attention\.causal"),
        ({"attention.sliding_window": 8}, {}, r"llama\.attention\.sliding_window = 8"),
        ({"attention.clamp_kqv": 8.0}, {}, r"llama\.attention\.clamp_kqv"),
        ({"attn_logit_softcapping": 50.0}, {}, r"llama\.attn_logit_softcapping"),
        ({"final_logit_softcapping": 30.0}, {}, r"llama\.final_logit_softcapping"),
        ({"attention.value_length": 16}, {}, r"llama\.attention\.value_length"),
        ({"expert_count": 4, "expert_used_count": 2}, {}, r"llama\.expert_count"),
        ({"attention.temperature_scale": 0.1}, {}, r"llama\.attention\.temperature_scale"),
        ({"key_of_tomorrow": 1}, {}, r"llama\.key_of_tomorrow"),
        ({".general.type": "adapter"}, {}, r"general\.type is adapter"),
        ({}, {"blk.0.attn_q.bias": [1.0] * 32}, r"it has no place for blk\.0\.attn_q\.bias"),
        ({}, {"blk.1.attn_q_norm.weight": [1.0] * 8}, r"it has no place for blk\.1\.attn_q_norm\.weight"),
    ],
)  # fmt: skip
def test_what_the_copy_would_lose_of_a_file_is_refused_by_name(
    keys: dict[str, Any], more: dict[str, list[float]], found: str, gguf_file: Path
) -> None:
    write_gguf(gguf_file, keys=keys, more=more)
    with pytest.raises(BaseModelError, match=rf"tiny\.gguf.*\nfound: .*{found}"):
        dequantise(gguf_file)
    assert [path.suffix for path in (cache_folder() / "gguf").iterdir()] == [".lock"]


def test_files_beside_a_gguf_file_are_not_looked_at(gguf_file: Path) -> None:
    plain, _ = dequantise(gguf_file)
    expected, written = logits_of(plain), hashes(plain)
    elsewhere = gguf_file.parent / "elsewhere"
    elsewhere.mkdir()
    gguf_file.rename(elsewhere / "tiny.gguf")
    for name in ("adapter_config.json", "config.json", "generation_config.json", "tokenizer_config.json"):
        (elsewhere / name).write_text('{"base_model_name_or_path": "some/where", "eos_token": "!", "r": 4}')
    (elsewhere / "chat_template.jinja").write_text("another")
    (elsewhere / "adapter_model.safetensors").write_bytes(b"")
    for path in plain.iterdir():
        path.unlink()
    folder, _ = dequantise(elsewhere / "tiny.gguf")
    assert torch.equal(logits_of(folder), expected)
    assert {**hashes(folder), "manifest.json": ""} == {**written, "manifest.json": ""}


def test_a_copy_of_an_earlier_reading_is_made_again(gguf_file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder, digest = dequantise(gguf_file)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["reading"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    capfd.readouterr()
    # One whose hash is expected is known to have lost nothing.
    dequantise(gguf_file, expected_sha256=digest)
    assert capfd.readouterr().err == ""
    dequantise(gguf_file)
    assert "an earlier Lorary made it" in capfd.readouterr().err
    assert json.loads((folder / "manifest.json").read_text())["reading"] == module.READING


def test_a_gguf_file_that_is_no_regular_one_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(BaseModelError, match=r"pipe\.gguf must be readable\nfound: it is not a regular file"):
        resolve_base(tmp_path / "pipe.gguf")
