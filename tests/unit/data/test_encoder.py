"""Vectors of tasks out of a sentence encoder: a tiny random one, and the packaged one where it is installed."""

import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorary.data import encoder
from lorary.data.encoder import ENCODER_PACKAGE, embed_tasks, embed_texts
from lorary.data.schema import Row, Task, make_task
from lorary.data.tasks import load_tasks
from lorary.errors import BaseModelError, MissingExtraError, TaskError, UsageError

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "add", "name", "the", "colour", "of", "sky", "one", "two", "and")


@pytest.fixture(scope="module")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformers folder with a random BERT of a few thousand weights."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("encoder") / "tiny"
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(WORDS), max_position_embeddings=32, **shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BertModel(config, add_pooling_layer=False)
    model.config.save_pretrained(folder)
    save_file(model.state_dict(), folder / "model.safetensors")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizerFast(vocab={word: i for i, word in enumerate(WORDS)}).save_pretrained(folder)
    return folder


def task_of(name: str, sources: list[str]) -> Task:
    return make_task(name, [Row(name, "train", source, "yes") for source in sources], "here")


def test_a_task_is_the_normalised_mean_of_its_first_prompts(tiny_encoder: Path) -> None:
    prompts = ["add one and two", "name the colour", "sky"]
    tasks = {"b": task_of("b", prompts), "a": task_of("a", ["the sky"])}
    found = embed_tasks(tasks, 2, encoder=tiny_encoder)
    expected = embed_texts(prompts[:2], encoder=tiny_encoder).mean(dim=0)
    torch.testing.assert_close(found[0], expected / expected.norm())
    torch.testing.assert_close(found[1], embed_texts(["the sky"], encoder=tiny_encoder)[0])


def test_a_text_has_the_same_vector_in_any_company(tiny_encoder: Path) -> None:
    texts = ["sky", "name the colour of the sky and add one and two", "two", "the one"] * 20
    together = embed_texts(texts, encoder=tiny_encoder)
    alone = torch.cat([embed_texts([text], encoder=tiny_encoder) for text in texts[:4]])
    torch.testing.assert_close(together[:4], alone, atol=1e-6, rtol=0)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(len(texts)))


def test_of_a_text_that_is_too_long_the_beginning_counts(tiny_encoder: Path) -> None:
    long = "add one " * 100
    torch.testing.assert_close(
        embed_texts([long], encoder=tiny_encoder), embed_texts([f"{long} sky"], encoder=tiny_encoder)
    )


def test_embedding_leaves_the_random_state_and_the_output_alone(
    tiny_encoder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = torch.get_rng_state()
    embed_texts(["sky"], encoder=tiny_encoder)
    assert torch.equal(torch.get_rng_state(), before)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("change", ["missing", "left over", "truncated", "no weights", "no config"])
def test_a_folder_that_is_no_whole_encoder_is_refused_by_name(tiny_encoder: Path, tmp_path: Path, change: str) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(tiny_encoder, folder)
    file, weights = folder / "model.safetensors", load_file(tiny_encoder / "model.safetensors")
    if change == "missing":
        del weights["embeddings.word_embeddings.weight"]
        save_file(weights, file)
    elif change == "left over":
        save_file({**weights, "classifier.weight": torch.ones(2)}, file)
    elif change == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    else:
        (file if change == "no weights" else folder / "config.json").unlink()
    with pytest.raises(BaseModelError, match="broken must hold a text encoder"):
        embed_texts(["sky"], encoder=folder)


def test_tasks_that_cannot_be_embedded_are_refused(tiny_encoder: Path) -> None:
    empty = make_task("empty", [Row("empty", "test", "sky", "yes")], "here")
    with pytest.raises(TaskError, match="'empty' must have training rows"):
        embed_tasks({"empty": empty}, encoder=tiny_encoder)
    with pytest.raises(UsageError, match="at least 1"):
        embed_tasks({"a": task_of("a", ["sky"])}, 0, encoder=tiny_encoder)
    with pytest.raises(UsageError, match="must be tasks"):
        embed_tasks({}, encoder=tiny_encoder)


def test_without_the_package_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder, "ENCODER_PACKAGE", "no_such_package")
    with pytest.raises(MissingExtraError, match=r"lorary\[encoder\]"):
        embed_texts(["sky"])


@pytest.mark.skipif(find_spec(ENCODER_PACKAGE) is None, reason="the packaged encoder is not installed (extra encoder)")
def test_the_packaged_encoder_finds_tasks_about_the_same_thing() -> None:
    names = ["first_word", "second_word", "capital_city", "continent"]
    found = embed_tasks(load_tasks("builtin", names=names), 4)
    order = list(load_tasks("builtin", names=names))
    cosine = found @ found.T - 2 * torch.eye(4)
    nearest = {name: order[int(cosine[i].argmax())] for i, name in enumerate(order)}
    pairs = {"first_word": "second_word", "capital_city": "continent"}
    assert nearest == pairs | {other: name for name, other in pairs.items()}
