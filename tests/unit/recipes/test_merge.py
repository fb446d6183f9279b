"""`lorary merge` through the recipe: files that PEFT reads, what they compute, and what is refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lorary.adapt.merge_settings import MERGES
from lorary.adapter import Adapter
from lorary.errors import AdapterError, LibraryError, TaskError, UsageError
from lorary.formats.peft import read_adapter
from lorary.library.store import Library
from lorary.merge.catalogue import METHODS, OnUpdates
from lorary.model.base import Base
from lorary.recipes.merge import run_merge


@pytest.fixture
def adapters(
    base: Base, library: Library, random_adapter: Callable[..., Any], generator: torch.Generator
) -> list[Adapter]:
    """Three adapters of rank 3, in the library."""
    made = [random_adapter(base.model, name, generator) for name in ("one", "three", "two")]
    for adapter in made:
        library.add_adapter(adapter, {"tasks": [adapter.name]})
    return made


@pytest.mark.parametrize("method", MERGES)
def test_a_merge_comes_back_from_its_files_and_into_a_library(
    method: str, adapters: list[Adapter], library: Library, tmp_path: Path
) -> None:
    result = run_merge(str(library.path), str(tmp_path / "merged"), method)
    assert result.parents == ["one", "three", "two"]
    is_truncated = isinstance(METHODS[method], OnUpdates)
    assert (result.error > 1e-3) if is_truncated else (result.error == pytest.approx(0.0, abs=1e-7))
    assert result.rank == (3 if method in ("mu", "linear", "ties-factors") else 9)
    assert read_adapter(tmp_path / "merged").rank == result.rank
    library.add(tmp_path / "merged")
    known = library.provenance("merged")
    assert known["method"] == f"merge-{method}"
    assert known["parents"] == [library.provenance(adapter.name)["content_hash"] for adapter in adapters]


def test_the_mean_is_that_of_the_updates_and_weights_take_its_place(
    adapters: list[Adapter], library: Library, tmp_path: Path
) -> None:
    run_merge(str(library.path), str(tmp_path / "mean"), "mean", experts=["two", "one"])
    run_merge(str(library.path), str(tmp_path / "weighed"), "mean", weights={"two": -1.0, "one": 0.5})
    one, _, two = adapters
    for path, factors in read_adapter(tmp_path / "mean"):
        wanted = (one.modules[path].delta() + two.modules[path].delta()) / 2
        assert torch.allclose(factors.delta(), wanted, atol=1e-6)
    for path, factors in read_adapter(tmp_path / "weighed"):
        wanted = 0.5 * one.modules[path].delta() - two.modules[path].delta()
        assert torch.allclose(factors.delta(), wanted, atol=1e-6)


@pytest.mark.parametrize("scalings", [(2.0, 0.3), (-3.0, 1.0), (0.0, 0.0), (-2.0, -2.0)])
@pytest.mark.parametrize(
    "weights", [(1.0, 0.5), (-1.0, 0.5), (-1.0, -2.0), (0.0, 0.0), (0.0, -1.0), (1e6, 1e-6), (1e6, 1e6)]
)
@pytest.mark.parametrize("method", ["mean", "concat", "mu"])
def test_weights_of_any_sign_and_size_give_the_dense_update_or_are_refused(
    method: str, weights: tuple[float, float], scalings: tuple[float, float], base: Base, library: Library,
    random_adapter: Callable[..., Any], generator: torch.Generator, tmp_path: Path,
) -> None:  # fmt: skip
    made = [random_adapter(base.model, name, generator, rank=3 if method == "mu" else 2 + len(name)) for name in "ab"]
    for number, (adapter, scaling) in enumerate(zip(made, scalings, strict=True)):
        modules = {path: replace(own, scaling=scaling) for path, own in adapter.modules.items()}
        made[number] = replace(
            adapter, modules=modules, config={**adapter.config, "lora_alpha": scaling * adapter.rank}
        )
        library.add_adapter(made[number], {"tasks": []})
    by_name = dict(zip("ab", weights, strict=True))
    if method == "mu" and min(weights) < 0 < max(weights):
        with pytest.raises(
            UsageError, match=r"--weights of mu must be of one sign.*\nfound: a=-1, b=0.5\nremedy: .*mean"
        ):
            run_merge(str(library.path), str(tmp_path / "merged"), method, weights=by_name)
        assert not (tmp_path / "merged").exists()
        return
    run_merge(str(library.path), str(tmp_path / "merged"), method, weights=by_name)
    merged = read_adapter(tmp_path / "merged").modules
    for path in made[0].modules:
        parts = [adapter.modules[path] for adapter in made]
        total = sum(weights) or 1.0
        if method == "mu":
            mean_a = sum(w / total * own.lora_a.double() for w, own in zip(weights, parts, strict=True))
            shared = scalings[0] == scalings[1]
            ups = [own.lora_b.double() * (1.0 if shared else own.scaling) for own in parts]
            mean_b = sum(w / total * up for w, up in zip(weights, ups, strict=True))
            wanted = (scalings[0] if shared else 1.0) * total * (mean_b @ mean_a)
        else:
            wanted = sum(
                w * own.scaling * own.lora_b.double() @ own.lora_a.double()
                for w, own in zip(weights, parts, strict=True)
            )
        error = (merged[path].delta().double() - wanted).norm()
        assert error <= 1e-5 * sum(abs(w * s) for w, s in zip(weights, scalings, strict=True)) * max(
            own.lora_a.norm() * own.lora_b.norm() for own in parts
        )


@pytest.mark.parametrize("weight", [-1.0, 2.0, -0.5, 0.0])
@pytest.mark.parametrize("method", ["mean", "concat", "mu"])
def test_one_adapter_by_a_weight_is_its_update_by_the_weight(
    method: str, weight: float, adapters: list[Adapter], library: Library, tmp_path: Path
) -> None:
    run_merge(str(library.path), str(tmp_path / "merged"), method, weights={"two": weight})
    for path, factors in read_adapter(tmp_path / "merged"):
        assert torch.allclose(factors.delta(), weight * adapters[2].modules[path].delta(), atol=1e-6)


def test_a_smaller_rank_says_what_it_leaves_out(adapters: list[Adapter], library: Library, tmp_path: Path) -> None:
    result = run_merge(str(library.path), str(tmp_path / "small"), "mean", rank=2)
    assert (result.rank, read_adapter(tmp_path / "small").rank) == (2, 2)
    lost = total = 0.0
    for path, factors in read_adapter(tmp_path / "small"):
        whole = sum((a.modules[path].delta() for a in adapters[1:]), adapters[0].modules[path].delta()) / 3
        lost += float((factors.delta() - whole).square().sum())
        total += float(whole.square().sum())
    assert result.error == pytest.approx((lost / total) ** 0.5, rel=1e-3)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"method": "soup"}, UsageError, "--method must be one of mean, concat, mu, linear"),
        ({"method": "ties-factors", "weights": {"one": 1.0}}, UsageError, "ties-factors has no weights"),
        ({"experts": ["one"], "weights": {"one": 1.0}}, UsageError, "--weights names the adapters itself"),
        ({"method": "mean", "density": 0.5}, UsageError, "--density needs --method ties or"),
        ({"method": "ties", "density": 0.0}, UsageError, "--density must be above 0"),
        ({"method": "iso-cts", "common": 1.5}, UsageError, "--common must be"),
        ({"scale": float("nan")}, UsageError, "--scale must be a number"),
        ({"rank": 0}, UsageError, "--rank must be above 0"),
        ({"experts": ["one", "four"]}, LibraryError, "no adapter 'four'"),
        ({"experts": ["one", "one"]}, UsageError, "--experts must name different adapters"),
    ],
)
def test_what_makes_no_sense_is_refused(
    options: dict[str, Any], error: type[Exception], message: str, adapters: list[Adapter], library: Library,
    tmp_path: Path,
) -> None:  # fmt: skip
    with pytest.raises(error, match=message):
        run_merge(str(library.path), str(tmp_path / "merged"), **options)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), 1e39])
def test_weights_that_are_no_numbers_are_refused(
    weight: float, adapters: list[Adapter], library: Library, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"--weights must be numbers.*\nfound: one="):
        run_merge(str(library.path), str(tmp_path / "merged"), "mean", weights={"one": weight, "two": 1.0})
    assert not (tmp_path / "merged").exists()


def test_a_merge_says_how_it_was_made(adapters: list[Adapter], library: Library, tmp_path: Path) -> None:
    run_merge(str(library.path), str(tmp_path / "merged"), "mean", weights={"one": 0.9, "two": -0.3}, rank=1)
    result = run_merge(str(library.path), str(tmp_path / "dare"), "dare", rank=2, seed=5)
    told = [json.loads((tmp_path / name / "provenance.json").read_text()) for name in ("merged", "dare")]
    common = {"scale": 1.0, "layers_that_adapters_lack": {}}
    assert told[0]["merge"] == {"weights": {"one": 0.9, "two": -0.3}, "rank": 1, **common}
    assert told[1]["merge"] == {"weights": None, "rank": 2, "density": 0.2, "seed": 5, **common}
    assert told[1]["metrics"] == {"truncation_error": result.error, "truncation_errors": dict(result.errors)}
    assert set(result.errors) == set(adapters[0].modules)
    assert all(0 < error < 1 for error in result.errors.values())


@pytest.mark.parametrize("method", MERGES)
def test_a_scale_multiplies_the_update(method: str, adapters: list[Adapter], library: Library, tmp_path: Path) -> None:
    for name, scale in (("one", 1.0), ("scaled", -0.5)):
        run_merge(str(library.path), str(tmp_path / name), method, scale=scale)
    scaled = read_adapter(tmp_path / "scaled").modules
    for path, factors in read_adapter(tmp_path / "one"):
        assert torch.allclose(scaled[path].delta(), -0.5 * factors.delta(), atol=1e-6)


def test_layers_that_an_adapter_lacks_are_said(
    adapters: list[Adapter], base: Base, library: Library, random_adapter: Any, generator: torch.Generator,
    tmp_path: Path,
) -> None:  # fmt: skip
    narrow = random_adapter(base.model, "q", generator, rank=2, targets=("q_proj",))
    library.add_adapter(narrow, {"tasks": []})
    result = run_merge(str(library.path), str(tmp_path / "merged"), "mean", weights={"one": 1.0, "q": 2.0})
    assert result.partial == {"q": len(adapters[0].modules) - len(narrow.modules)}
    for path, factors in read_adapter(tmp_path / "merged"):
        wanted = adapters[0].modules[path].delta()
        if path in narrow.modules:
            wanted = wanted + 2 * narrow.modules[path].delta()
        assert torch.allclose(factors.delta(), wanted, atol=1e-5)


def test_a_merge_that_is_killed_leaves_its_place_free(
    adapters: list[Adapter], library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("lorary.recipes.merge.os.rename", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run_merge(str(library.path), str(tmp_path / "merged"), "mean")
    assert not (tmp_path / "merged").exists()
    run_merge(str(library.path), str(tmp_path / "merged"), "mean")
    assert [path.name for path in tmp_path.iterdir() if "merged" in path.name] == ["merged"]


@pytest.mark.parametrize("alpha", [0.0, -6.0])
def test_an_adapter_whose_alpha_is_not_above_zero_is_merged_for_what_it_does(
    alpha: float, base: Base, library: Library, random_adapter: Callable[..., Any], generator: torch.Generator,
    tmp_path: Path,
) -> None:  # fmt: skip
    one, two = (random_adapter(base.model, name, generator) for name in ("one", "two"))
    one, two = (
        replace(
            adapter,
            modules={path: replace(own, scaling=alpha / own.rank) for path, own in adapter.modules.items()},
            config={**adapter.config, "lora_alpha": alpha},
        )
        for adapter in (one, two)
    )
    for adapter in (one, two):
        library.add_adapter(adapter, {"tasks": [adapter.name]})
    run_merge(str(library.path), str(tmp_path / "mean"), "mean", rank=4)
    for path, factors in read_adapter(tmp_path / "mean"):
        wanted = (one.modules[path].delta() + two.modules[path].delta()).double() / 2
        left, values, right = torch.linalg.svd(wanted)
        assert torch.allclose(factors.delta().double(), left[:, :4] * values[:4] @ right[:4], atol=1e-5)


def test_nothing_is_overwritten(adapters: list[Adapter], library: Library, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--out must be a new folder\nfound: .* exists"):
        run_merge(str(library.path), str(tmp_path))


def test_ties_on_factors_needs_adapters_of_the_same_layers(
    adapters: list[Adapter],
    base: Base,
    library: Library,
    random_adapter: Any,
    generator: torch.Generator,
    tmp_path: Path,
) -> None:
    library.add_adapter(random_adapter(base.model, "q", generator, targets=("q_proj",)), {"tasks": []})
    with pytest.raises(AdapterError, match="TIES on factors needs adapters of the same layers"):
        run_merge(str(library.path), str(tmp_path / "merged"), "ties-factors")


def test_the_templates_of_the_merged_adapters_alone_must_agree(
    adapters: list[Adapter],
    base: Base,
    library: Library,
    random_adapter: Any,
    generator: torch.Generator,
    tmp_path: Path,
) -> None:
    for name, template in (("a", "chat"), ("b", "chat"), ("c", "plain")):
        library.add_adapter(random_adapter(base.model, name, generator), {"tasks": [name], "template": template})
    run_merge(str(library.path), str(tmp_path / "merged"), experts=["a", "b"])
    library.add(tmp_path / "merged")
    assert library.provenance("merged")["template"] == "chat"
    with pytest.raises(LibraryError, match=r"found: 'a' with chat, 'c' with plain\nremedy: .* --experts or --weights"):
        run_merge(str(library.path), str(tmp_path / "other"), experts=["a", "c"])
    assert not (tmp_path / "other").exists()


@pytest.fixture
def task_file(tmp_path: Path) -> Path:
    """Test rows of a task of one of the adapters, and of one of none."""
    rows = [
        {"task": name, "split": split, "source": f"{name} {split} {i}:", "target": ["up", "down"][i % 2]}
        for name in ("one", "other")
        for split in ("val", "test")
        for i in range(2)
    ]
    path = tmp_path / "tasks.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_merge_is_judged_beside_base_uniform_and_oracle(
    adapters: list[Adapter], library: Library, task_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from lorary.cli.app import app

    arguments = ["merge", str(library.path), "--evaluate", str(task_file), "--rows", "2", "--rank", "4"]
    app([*arguments, "--out", str(tmp_path / "judged"), "--json"], standalone_mode=False)
    means = json.loads(capsys.readouterr().out)["means"]
    assert {(mean["way"], mean["split"], mean["tasks"]) for mean in means} == {
        (way, split, 1) for way in ("base", "uniform", "oracle", "merged") for split in ("held_in", "held_out")
    }
    judgement = json.loads((tmp_path / "judged" / "provenance.json").read_text())["metrics"]["judgement"]
    assert judgement == {"rows": 2, "means": means}
    app([*arguments, "--out", str(tmp_path / "again"), "--tasks", "one"], standalone_mode=False)
    shown = capsys.readouterr().out
    assert "merged     held_in" in shown
    assert "held_out" not in shown
    assert "layers.0.self_attn.q_proj" in shown
    assert [path.name for path in (library.path / "adapters").iterdir()] != ["merged"]


def test_options_of_judging_need_tasks(adapters: list[Adapter], library: Library, tmp_path: Path) -> None:
    from lorary.cli.app import app

    with pytest.raises(UsageError, match="--tasks needs --evaluate"):
        app(["merge", str(library.path), "--out", str(tmp_path / "x"), "--tasks", "one"], standalone_mode=False)
    empty = tmp_path / "empty.jsonl"
    empty.write_text(json.dumps({"task": "a", "split": "train", "source": "a", "target": "b"}) + "\n")
    with pytest.raises(TaskError, match="test rows"):
        run_merge(str(library.path), str(tmp_path / "x"), tasks=str(empty))
    assert not (tmp_path / "x").exists()
