"""The training benchmark compares like with like, on a random tiny model."""

from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


class FakeBase(NamedTuple):
    """What the benchmark asks of a base model."""

    model: Any
    tokenizer: Any


class Scripts(NamedTuple):
    """The scripts of the benchmark."""

    train: ModuleType
    peer: ModuleType
    rows: ModuleType


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Scripts:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the benchmarks read memory from /proc, which this system does not have")
    monkeypatch.syspath_prepend(BENCHMARKS)
    import train
    import train_peer
    import train_rows

    return Scripts(train, train_peer, train_rows)


@pytest.fixture
def base(tiny_model: Any, tiny_tokenizer: Any) -> FakeBase:
    return FakeBase(tiny_model(), tiny_tokenizer)


def test_both_sides_have_the_same_losses_on_the_same_batches(
    scripts: Scripts, base: FakeBase, random_examples: Any, generator: torch.Generator
) -> None:
    tasks = [
        scripts.rows.TaskRows(name, random_examples(16, generator), random_examples(4, generator)) for name in "abc"
    ]
    case = scripts.train.Case(
        "tiny", 3, num_steps=4, block=2, adapters=2, peer_steps=2, target_modules=("q_proj", "down_proj"),
        same_batches=True,
    )  # fmt: skip
    recipe = scripts.peer.Recipe(batch_size=4, learning_rate=0.1, clip=10.0)
    weights = {name: value.clone() for name, value in base.model.state_dict().items()}
    table = {(row["case"], row["figure"]): row for row in scripts.train.Contest(case, base.model, tasks, recipe).run()}
    assert table["tiny-same-batches", "first 10 losses, furthest apart"]["ours"] < 1e-4
    val_loss = table["tiny-same-batches", "validation loss after the last step"]
    assert val_loss["ratio_to_peer"] == pytest.approx(1.0, abs=1e-4)
    for figure in ("examples", "tokens"):
        assert table["tiny", figure]["ratio_to_peer"] > 0
        assert table["tiny", figure]["floor"] > 0
    after = base.model.state_dict()
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[name], weights[name]) for name in weights)


def test_a_twin_shares_weights_but_no_modules(scripts: Scripts, base: FakeBase) -> None:
    twin = scripts.peer.twin(base.model)
    for mine, other in zip(base.model.parameters(), twin.parameters(), strict=True):
        assert mine is other
    assert not {*base.model.modules()} & {*twin.modules()}


def test_builtin_rows_are_filled_towards_the_length_asked_for(scripts: Scripts, base: FakeBase) -> None:
    from lorary.data.tasks import load_tasks
    from lorary.data.template import make_template

    template = make_template("plain", base.tokenizer)
    task = load_tasks("builtin", names=["first_word"])["first_word"]
    bare, filled = (scripts.rows.encode_task(task, template, fill=fill) for fill in (0, 150))
    assert bare.mean_tokens < 60
    assert filled.mean_tokens == pytest.approx(150, rel=0.1)
    # The solved rows differ from row to row: all that is shared is the instruction.
    assert filled.shared_tokens <= bare.shared_tokens


def test_a_prefix_is_shared_by_all_rows_of_a_task(scripts: Scripts, base: FakeBase) -> None:
    from lorary.data.tasks import load_tasks
    from lorary.data.template import make_template

    template = make_template("plain", base.tokenizer)
    task = load_tasks("builtin", names=["first_word"])["first_word"]
    bare, behind = (scripts.rows.encode_task(task, template, prefix=prefix) for prefix in ("", "Mind it well.\n"))
    added = len(base.tokenizer("Mind it well.\n")["input_ids"])
    assert behind.shared_tokens == bare.shared_tokens + added
    assert behind.mean_tokens == pytest.approx(bare.mean_tokens + added)


def test_every_turn_of_the_peer_has_rows_of_the_average_length(scripts: Scripts) -> None:
    from lorary.data.template import Example

    tasks = [
        scripts.rows.TaskRows(f"task-{i}", [Example((1,) * (30 + i), (2,), 0)], []) for i in (3, 7, 0, 1, 5, 2, 6, 4)
    ]
    lengths = [task.mean_tokens for task in scripts.train.from_the_middle(tasks)]
    assert sorted(lengths) == [31.0 + i for i in range(8)]
    for first, second in zip(lengths[::2], lengths[1::2], strict=True):
        assert first + second == 69.0


def test_figures_are_medians_over_blocks(scripts: Scripts) -> None:
    work = scripts.peer.Work
    ours = [work(1.0, 10, 400), work(2.0, 10, 400), work(1.0, 12, 400)]
    peer = [work(2.0, 10, 400), work(2.0, 10, 400), work(2.0, 10, 400)]
    rows = scripts.train.speed_rows("case", ours, peer, [0.5, 1.5, 0.7], (30.0, 60.0))
    examples, _, share, memory = rows
    assert (examples["ours"], examples["peer"], examples["ratio_to_peer"]) == (10.0, 5.0, 2.0)
    assert examples["spread"] == [1.0, 2.4]
    assert share["ours"] == 0.7
    assert memory["ratio_to_peer"] == 0.5
