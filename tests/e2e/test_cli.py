"""The command `lorary`, run as a user runs it, over a tiny base model."""

import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Run
from safetensors.torch import load_file, save_file


def write_tasks(path: Path, names: tuple[str, ...] = ("echo", "shout"), rows: int = 12) -> Path:
    """A JSONL file of tasks that a tiny model can lean towards."""
    with open(path, "w") as file:
        for name in names:
            for split, count in (("train", rows), ("val", 4), ("test", 6)):
                for i in range(count):
                    target = "up" if name == "shout" else "down"
                    options = ["up", "down"] if name == "shout" else []
                    row = {"task": name, "family": f"f-{name}", "split": split, "source": f"{name} {split} {i}:"}
                    file.write(json.dumps({**row, "target": target, "options": options}) + "\n")
    return path


QUICK = ("--steps", 6, "--rank", 2, "--evals", 2, "--batch-size", 4, "--learning-rate", 0.02)


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """Two small tasks."""
    return write_tasks(tmp_path / "tasks.jsonl")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the first test that needs a built library puts it for all."""
    return tmp_path_factory.mktemp("built") / "lib"


@pytest.fixture
def library(tmp_path: Path, tasks: Path, tiny_base_folder: Path, run: Run, built: Path) -> Path:
    """A built library of two experts, copied."""
    if not built.exists():
        outcome = run("build", tasks, "--base", tiny_base_folder, "--library", built, *QUICK)
        assert outcome.code == 0, outcome.err
    return shutil.copytree(built, tmp_path / "lib")


def tree(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by relative path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_help_answers_without_torch_in_half_a_second_of_cpu_time() -> None:
    code = (
        "import sys, resource\nsys.argv = ['lorary', '--help']\nfrom lorary.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'peft', 'datasets', 'numpy'} & set(sys.modules)\n"
        "print('HEAVY', sorted(heavy))\n"
        "usage = resource.getrusage(resource.RUSAGE_SELF)\nprint('CPU', usage.ru_utime + usage.ru_stime)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "build" in done.stdout
    assert "HEAVY []" in done.stdout
    assert float(done.stdout.rsplit("CPU ", 1)[1]) < 0.5


def test_a_build_lists_verifies_evaluates_and_generates(library: Path, tasks: Path, run: Run, tmp_path: Path) -> None:
    listed = json.loads(run("library", "ls", library, "--json").out)
    assert [row["name"] for row in listed] == ["echo", "shout"]
    assert all(set(row) >= {"name", "tasks", "rank", "num_parameters", "hash"} for row in listed)
    assert json.loads(run("library", "verify", library, "--json").out) == {"ok": True, "problems": []}

    report = tmp_path / "report.html"
    outcome = run("evaluate", library, tasks, "--rows", 4, "--report", report, "--json")
    assert outcome.code == 0, outcome.err
    cells = json.loads(outcome.out)["cells"]
    keys = {"library", "router", "task", "family", "split", "metric", "primary", "value", "low", "high", "n", "seconds"}
    assert all(set(cell) >= keys for cell in cells)
    primary = [(cell["router"], cell["task"]) for cell in cells if cell["primary"]]
    assert sorted(primary) == sorted(
        {(r, t) for r in ("base", "uniform", "arrow", "oracle") for t in ("echo", "shout")}
    )
    assert all(0 <= cell["low"] <= cell["value"] <= cell["high"] <= 1 for cell in cells if cell["primary"])
    assert {cell["split"] for cell in cells} == {"held_in"}
    assert "</html>" in report.read_text()

    answer = run("generate", library, "--router", "arrow", "--prompt", "echo test 1:", "--max-new-tokens", 3, "--json")
    assert answer.code == 0, answer.err
    assert set(json.loads(answer.out)["usage"]) == {"echo", "shout"}


def test_a_library_is_listed_without_torch_with_ranks_targets_and_tasks(library: Path) -> None:
    code = (
        f"import sys\nsys.argv = ['lorary', 'library', 'ls', {str(library)!r}]\nfrom lorary.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print('HEAVY', sorted({'torch', 'numpy', 'transformers'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heading, echo, *_ = done.stdout.splitlines()
    assert heading.split() == [
        "name", "rank", "parameters", "size", "changed", "hash", "targets", "origin", "tasks",
    ]  # fmt: skip
    assert (echo.split()[:2], echo.split()[-1]) == (["echo", "2"], "echo")
    assert "k_proj, o_proj, q_proj, v_proj" in echo
    assert "HEAVY []" in done.stdout


def test_the_library_of_a_build_is_given_once(tasks: Path, tmp_path: Path, tiny_base_folder: Path, run: Run) -> None:
    plan = ("--base", tiny_base_folder, *QUICK, "--dry-run")
    assert run("build", tasks, tmp_path / "lib", *plan).code == 0
    assert run("build", tasks, "--library", tmp_path / "lib", *plan).code == 0
    for wrong in ((), (tmp_path / "lib", "--library", tmp_path / "lib")):
        outcome = run("build", tasks, *wrong, *plan)
        assert outcome.code == 2
        assert "build needs one library" in outcome.err


def test_help_is_there_for_h_too(run: Run) -> None:
    assert run("library", "ls", "-h").out == run("library", "ls", "--help").out
    assert [line for line in run("-h").out.splitlines() if line in ("Build:", "Look:", "Use:", "Judge:", "Keep:")]


def test_training_lowers_the_validation_loss_of_every_expert(library: Path, run: Run) -> None:
    for name in ("echo", "shout"):
        metrics = json.loads(run("library", "show", library, name).out)["metrics"]
        assert metrics["val_loss"] < metrics["val_loss_base"]


def test_a_second_build_keeps_what_is_there(library: Path, tasks: Path, tiny_base_folder: Path, run: Run) -> None:
    before = tree(library / "adapters")
    outcome = run("build", tasks, "--base", tiny_base_folder, "--library", library, *QUICK, "--json")
    assert json.loads(outcome.out)["trained"] == []
    assert tree(library / "adapters") == before


def test_a_build_with_other_settings_is_refused_and_changes_nothing(
    library: Path, tasks: Path, tiny_base_folder: Path, run: Run
) -> None:
    before = tree(library)
    outcome = run("build", tasks, "--base", tiny_base_folder, "--library", library, *QUICK, "--seed", 7)
    assert outcome.code == 1
    assert "seed 0 instead of 7" in outcome.err
    assert tree(library) == before


def test_a_second_evaluation_computes_nothing_again(library: Path, tasks: Path, run: Run) -> None:
    first = json.loads(run("evaluate", library, tasks, "--rows", 4, "--json").out)
    results = (library / "results" / "evaluation.jsonl").read_bytes()
    assert json.loads(run("evaluate", library, tasks, "--rows", 4, "--json").out) == first
    assert (library / "results" / "evaluation.jsonl").read_bytes() == results


def test_a_torn_line_of_the_results_is_computed_again(library: Path, tasks: Path, run: Run) -> None:
    first = json.loads(run("evaluate", library, tasks, "--rows", 4, "--json").out)
    path = library / "results" / "evaluation.jsonl"
    path.write_bytes(path.read_bytes()[:-40])
    second = json.loads(run("evaluate", library, tasks, "--rows", 4, "--json").out)

    def values(document: dict[str, Any]) -> list[Any]:
        return [(cell["router"], cell["task"], cell["metric"], cell["value"]) for cell in document["cells"]]

    assert values(second) == values(first)


def test_a_task_without_an_expert_is_held_out(library: Path, run: Run, tmp_path: Path) -> None:
    other = write_tasks(tmp_path / "other.jsonl", ("shout", "whisper"))
    cells = json.loads(run("evaluate", library, other, "--rows", 3, "--json").out)["cells"]
    assert {cell["task"]: cell["split"] for cell in cells} == {"shout": "held_in", "whisper": "held_out"}
    oracle = next(cell for cell in cells if cell["task"] == "whisper" and cell["router"] == "oracle")
    assert oracle["expert"] in ("echo", "shout")


def test_an_adapter_is_added_verbatim_and_removed(
    library: Path, tiny_base_folder: Path, run: Run, tmp_path: Path
) -> None:
    source = library / "adapters" / "echo"
    new = tmp_path / "new"
    assert run("library", "add", new, source, "--name", "copy", "--base", tiny_base_folder).code == 0
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (new / "adapters" / "copy" / name).read_bytes() == (source / name).read_bytes()
    assert run("library", "remove", new, "copy").code == 0
    assert json.loads(run("library", "ls", new, "--json").out) == []


def break_with_nan(adapter: Path) -> None:
    """One weight that is not a number."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors[sorted(tensors)[0]][0, 0] = torch.nan
    save_file(tensors, adapter / "adapter_model.safetensors")


def break_by_cutting(adapter: Path) -> None:
    """Half a file."""
    data = (adapter / "adapter_model.safetensors").read_bytes()
    (adapter / "adapter_model.safetensors").write_bytes(data[: len(data) // 2])


def break_into_pickle(adapter: Path) -> None:
    """Weights as a pickle only."""
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")


def break_shapes(adapter: Path) -> None:
    """Factors of a wider model."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    key = next(k for k in sorted(tensors) if "lora_A" in k)
    tensors[key] = torch.zeros(tensors[key].shape[0], tensors[key].shape[1] + 8)
    save_file(tensors, adapter / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (break_with_nan, "finite"),
        (break_by_cutting, "safetensors"),
        (break_into_pickle, "pickle"),
        (break_shapes, "d_in"),
    ],
)
def test_a_broken_adapter_is_refused_by_name_and_leaves_nothing(
    damage: Callable[[Path], None], words: str, library: Path, tmp_path: Path, run: Run
) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(library / "adapters" / "echo", bad)
    (bad / "provenance.json").unlink()
    damage(bad)
    before = tree(library / "adapters")
    outcome = run("library", "add", library, bad)
    assert outcome.code == 1
    assert words in outcome.err
    assert "bad" in outcome.err
    assert len(outcome.err.strip().splitlines()) <= 3
    assert tree(library / "adapters") == before


def test_a_damaged_adapter_is_found_by_verify(library: Path, run: Run) -> None:
    break_by_cutting(library / "adapters" / "shout")
    outcome = run("library", "verify", library, "--json")
    assert outcome.code == 1
    problems = json.loads(outcome.out)["problems"]
    assert {problem["adapter"] for problem in problems} == {"shout"}
    assert all(problem["rule"] and problem["found"] and problem["remedy"] for problem in problems)


@pytest.mark.parametrize(
    ("command", "code", "words"),
    [
        (("library", "ls", "{missing}"), 1, "nothing is there"),
        (("library", "ls", "{tasks}"), 1, "it is a file"),
        (("library", "add", "{library}", "{missing}"), 2, "folder"),
        (("library", "add", "{library}", "{library}/adapters/echo", "--name", "../x"), 2, "../x"),
        (("library", "add", "{library}", "{library}/adapters/echo"), 1, "echo"),
        (("library", "remove", "{library}", "nobody"), 1, "nobody"),
        (("build", "{missing}", "--base", "{base}", "--library", "{library}"), 2, "missing"),
        (("build", "{tasks}", "--base", "{missing}", "--library", "{new}"), 1, "missing"),
        (("build", "{tasks}", "--base", "{base}", "--library", "{new}", "--steps", "0"), 2, "--steps"),
        (("build", "{tasks}", "--base", "{base}", "--library", "{new}", "--tasks", "ehco"), 2, "echo"),
        (
            ("build", "{tasks}", "--base", "{base}", "--library", "{new}", "--steps", "2", "--epochs", "1"),
            2,
            "together",
        ),
        (("build", "{tasks}", "--base", "{base}", "--library", "{new}", "--epochs", "nan"), 2, "--epochs"),
        (("build", "{tasks}", "--base", "{base}", "--library", "{new}", "--target-modules", ","), 2, "q_proj"),
        (("build", "{tasks}", "--base", "{base}", "--library", "{new}", "--max-tokens", "-5"), 2, "--max-tokens"),
        (("build", "{tasks}", "--base", "{base}", "--library", "{new}", "--max-length", "3"), 1, "max_length"),
        (("evaluate", "{library}", "{tasks}", "--report", "{missing}/r.html"), 2, "report"),
        (("generate", "{library}", "--prompt", "x", "--experts", "echo,echo"), 1, "different names"),
        (("build", "{tasks}", "--base", "{base}", "--library", "{new}", "--target-modules", "nope"), 2, "q_proj"),
        (("build", "{tasks}", "--base", "{base}", "--library", "{tasks}"), 1, "it is a file"),
        (("evaluate", "{library}", "{tasks}", "--routers", "arow"), 1, "arow"),
        (("evaluate", "{library}", "{tasks}", "--top-k", "0"), 2, "top_k"),
        (("evaluate", "{library}", "{tasks}", "--template", "chat"), 1, "--template plain"),
        (("generate", "{library}", "--prompt", "x", "--top-k", "0"), 2, "top_k"),
        (("generate", "{library}", "--prompt", "x", "--temperature", "0"), 2, "temperature"),
        (("generate", "{library}", "--prompt", "x", "--experts", "nobody"), 1, "nobody"),
        (("generate", "{library}", "--prompt", " "), 2, "--prompt"),
        (("generate", "{library}", "--prompt", "x", "--top-p", "0"), 2, "--top-p"),
        (("generate", "{library}", "--prompt", "x", "--sampling-temperature", "0"), 2, "--sampling-temperature"),
        (("which", "{library}"), 2, "--prompt TEXT or --prompts FILE"),
        (("which", "{library}", "--prompt", "x", "--prompts", "{tasks}"), 2, "one of them"),
        (("which", "{library}", "--prompts", "{tasks}", "--answer", "x"), 2, "--answer goes with --prompt"),
        (("which", "{library}", "--prompt", "x", "--router", "arow"), 1, "did you mean 'arrow'"),
        (("library", "add", "{library}", "{library}", "--name", "x"), 2, "--name is for one adapter"),
        (("library", "add", "{library}", "{library}/adapters/echo", "--tasks", "echo"), 2, "--tasks must be NAME=TASK"),
        (("library", "add", "{library}", "{missing}/*"), 2, "a pattern must match"),
        (("build", "{tasks}", "--base", "{base}", "--library", "{new}", "--columns", "a"), 2, "--columns"),
        (("evaluate", "{library}", "builtin", "--columns", "source=a,target=b"), 2, "--columns is for"),
        (("nonsense",), 2, "nonsense"),
    ],
)
def test_wrong_input_is_one_clear_error(
    command: tuple[str, ...],
    code: int,
    words: str,
    library: Path,
    tasks: Path,
    tiny_base_folder: Path,
    tmp_path: Path,
    run: Run,
) -> None:
    places = {
        "library": library, "tasks": tasks, "base": tiny_base_folder,
        "missing": tmp_path / "missing", "new": tmp_path / "new",
    }  # fmt: skip
    before = tree(library / "adapters")
    outcome = run(*(part.format(**places) for part in command))
    assert outcome.code == code, outcome
    assert words in outcome.err
    assert "Traceback" not in outcome.err
    assert tree(library / "adapters") == before
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("content", ['{"task": "a"', '{"task": "a", "split": "train", "source": "x"}'])
def test_a_broken_line_of_tasks_is_named_by_its_number(
    content: str, tmp_path: Path, tiny_base_folder: Path, run: Run
) -> None:
    path = write_tasks(tmp_path / "t.jsonl")
    lines = path.read_text().splitlines()
    lines[4] = content
    path.write_text("\n".join(lines))
    outcome = run("build", path, "--base", tiny_base_folder, "--library", tmp_path / "new", *QUICK)
    assert outcome.code == 1
    assert "t.jsonl:5" in outcome.err
    assert not (tmp_path / "new").exists()


def test_a_library_is_refused_for_another_base(
    library: Path, run: Run, tmp_path: Path, tiny_model: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    from lorary.formats.quiet import quiet_transformers

    for name, settings in (("other-weights", {"seed": 5}), ("other-shapes", {"hidden_size": 64})):
        with quiet_transformers():
            tiny_model(**settings).save_pretrained(tmp_path / name)
            tiny_tokenizer.save_pretrained(tmp_path / name)
        outcome = run("generate", library, "--prompt", "x", "--base", tmp_path / name)
        assert outcome.code == 1, name
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        forced = run("generate", library, "--prompt", "x", "--base", tmp_path / "other-weights", "--force-base")
    assert forced.code == 0, forced.err
    assert "warning: " in forced.err
    assert "unrelated" in forced.err


def test_the_base_is_scored_under_its_chat_template_too_and_the_better_one_counts(
    tasks: Path, run: Run, tmp_path: Path, tiny_model: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    import copy

    from lorary.formats.quiet import quiet_transformers

    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = "{% for m in messages %}user: {{ m['content'] }}\n{% endfor %}answer: "
    with quiet_transformers():
        tiny_model().save_pretrained(tmp_path / "base")
        tokenizer.save_pretrained(tmp_path / "base")
    library = tmp_path / "chatty"
    assert run("build", tasks, "--base", tmp_path / "base", "--library", library, *QUICK).code == 0
    outcome = run("evaluate", library, tasks, "--rows", 6, "--routers", "base,arrow", "--json")
    cells = [cell for cell in json.loads(outcome.out)["cells"] if cell["router"] == "base"]
    for task in ("echo", "shout"):
        scored = {cell["template"]: cell for cell in cells if cell["task"] == task and cell["metric"] != "loss"}
        assert set(scored) == {"plain", "chat"}
        (primary,) = [cell for cell in scored.values() if cell["primary"]]
        assert primary["value"] == max(cell["value"] for cell in scored.values())


@pytest.mark.parametrize("is_folder_there", [False, True])
def test_a_refused_adapter_leaves_no_new_library_behind(
    is_folder_there: bool, library: Path, tiny_base_folder: Path, run: Run, tmp_path: Path
) -> None:
    new = tmp_path / "new"
    if is_folder_there:
        new.mkdir()
    outcome = run("library", "add", new, library / "adapters" / "echo", "--name", "../x", "--base", tiny_base_folder)
    assert outcome.code == 2
    assert new.exists() == is_folder_there
    assert not is_folder_there or not list(new.iterdir())


def test_a_refused_adapter_leaves_a_library_that_was_there(library: Path, tiny_base_folder: Path, run: Run) -> None:
    before = tree(library)
    run("library", "remove", library, "echo")
    run("library", "remove", library, "shout")
    assert run("library", "add", library, library, "--base", tiny_base_folder).code == 1
    assert (library / "library.json").read_bytes() == before["library.json"]


@pytest.mark.parametrize(
    "command", [("nonsense",), ("build",), ("library", "nope"), ("generate", "lib", "--prompt", "x", "--top-k", "many")]
)
def test_wrong_usage_is_told_in_three_lines_at_most(command: tuple[str, ...], run: Run) -> None:
    outcome = run(*command)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("error: ")
    assert "--help" in outcome.err
    assert len(outcome.err.strip().splitlines()) <= 3


def test_a_command_without_its_subcommand_gets_the_help(run: Run) -> None:
    outcome = run("library")
    assert outcome.code == 2
    assert "verify" in outcome.err


def test_an_interruption_is_told_with_what_to_do(library: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lorary.library.listing.list_library", interrupt)
    outcome = run("library", "ls", library)
    assert outcome.code == 130
    assert "interrupted" in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1


def test_names_of_tasks_are_printed_as_they_are(library: Path, run: Run, tmp_path: Path) -> None:
    names = ("[/b] x", "[bold]y", "🙂")
    outcome = run("evaluate", library, write_tasks(tmp_path / "odd.jsonl", names), "--rows", 2, "--routers", "uniform")
    assert outcome.code == 0, outcome.err
    assert all(name in outcome.out for name in names)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--prompt", "a" * 300), "256 positions"),
        (("--prompt", "x", "--max-new-tokens", 400), "256 positions"),
        (("--prompt", "a\udcffb"), "Unicode"),
        (("--prompt", "x", "--experts", ","), "--experts"),
        (("--prompt", "x", "--seed", 2**70), "--seed"),
    ],
)
def test_generation_refuses_what_it_could_not_honour(
    options: tuple[object, ...], words: str, library: Path, run: Run
) -> None:
    outcome = run("generate", library, *options)
    assert outcome.code == 2
    assert words in outcome.err
    assert outcome.out == ""


def test_a_cached_score_follows_the_task_from_held_in_to_held_out(
    library: Path, tasks: Path, run: Run, tmp_path: Path
) -> None:
    run("evaluate", library, tasks, "--rows", 2, "--routers", "uniform")
    clean = tmp_path / "clean" / "echo"
    shutil.copytree(library / "adapters" / "echo", clean)
    (clean / "provenance.json").unlink()
    assert run("library", "remove", library, "echo").code == 0
    assert run("library", "add", library, clean, "--name", "other").code == 0  # its own name would say its task
    cells = json.loads(run("evaluate", library, tasks, "--rows", 2, "--routers", "uniform", "--json").out)["cells"]
    assert {cell["task"]: cell["split"] for cell in cells} == {"echo": "held_out", "shout": "held_in"}


def test_prompts_longer_than_the_base_can_read_are_cut_with_a_warning(
    tmp_path: Path, run: Run, tiny_model: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    from lorary.formats.quiet import quiet_transformers

    with quiet_transformers():
        tiny_model(max_position_embeddings=16).save_pretrained(tmp_path / "short")
        tiny_tokenizer.save_pretrained(tmp_path / "short")
    path = tmp_path / "long.jsonl"
    with open(path, "w") as file:
        for split in ("train", "val", "test"):
            for i in range(4):
                row = {"task": "long", "split": split, "source": f"{i} {split} " + "word " * 40, "target": "up"}
                file.write(json.dumps(row) + "\n")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        built = run("build", path, "--base", tmp_path / "short", "--library", tmp_path / "lib", *QUICK)
        scored = run("evaluate", tmp_path / "lib", path, "--rows", 2, "--routers", "arrow")
    assert built.code == scored.code == 0, built.err + scored.err
    assert "task 'long': the prompts of 8 of 8 rows were too long" in built.err
    assert "task 'long': the prompts of 2 of 2 rows were too long" in scored.err


def test_another_base_by_force_is_scored_anew(
    library: Path, tasks: Path, run: Run, tmp_path: Path, tiny_model: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    from lorary.formats.quiet import quiet_transformers

    with quiet_transformers():
        tiny_model(seed=5).save_pretrained(tmp_path / "other")
        tiny_tokenizer.save_pretrained(tmp_path / "other")
    command = ("evaluate", library, tasks, "--rows", 2, "--routers", "arrow", "--json")
    own = json.loads(run(*command).out)["cells"]
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        forced = json.loads(run(*command, "--base", tmp_path / "other", "--force-base").out)["cells"]
    losses = [[cell["value"] for cell in cells if cell["metric"] == "loss"] for cells in (own, forced)]
    assert all(a != b for a, b in zip(*losses, strict=True))


@pytest.mark.parametrize(
    ("method", "options", "experts"),
    [
        ("joint", ("--sampling", "uniform"), ["joint"]),
        ("mbc", ("--k", 2, "--private-steps", 2, "--cluster-seed", 1), ["cluster_0", "cluster_1"]),
        ("mbc", ("--k", 2, "--cluster-by", "family", "--patience", 1), ["cluster_0", "cluster_1"]),
        ("mhr", ("--skills", 2, "--splits", 2, "--mu"), ["mu", "skill_0", "skill_1"]),
    ],
)
def test_every_method_builds_a_library_that_can_be_evaluated(
    method: str, options: tuple[object, ...], experts: list[str], tasks: Path, tiny_base_folder: Path, run: Run,
    tmp_path: Path,
) -> None:  # fmt: skip
    path = tmp_path / "lib"
    command = ("build", tasks, "--base", tiny_base_folder, "--library", path, *QUICK, "--method", method, *options)
    outcome = run(*command)
    assert outcome.code == 0, outcome.err
    assert all(name in outcome.out for name in experts)
    assert [row["name"] for row in json.loads(run("library", "ls", path, "--json").out)] == experts
    assert run("library", "verify", path).code == 0
    cells = json.loads(run("evaluate", path, tasks, "--rows", 2, "--routers", "uniform", "--json").out)["cells"]
    assert {cell["split"] for cell in cells} == {"held_in"}
    again = json.loads(run(*command, "--json").out)
    assert (again["method"], again["trained"], sorted(again["kept"])) == (method, [], experts)


def test_a_dry_run_of_a_build_writes_nothing(tasks: Path, tiny_base_folder: Path, run: Run, tmp_path: Path) -> None:
    command = ("build", tasks, "--base", tiny_base_folder, "--library", tmp_path / "lib", *QUICK, "--dry-run")
    said, document = run(*command), json.loads(run(*command, "--json").out)
    assert said.code == 0, said.err
    assert "time: about" in said.out
    assert [row["name"] for row in document["experts"]] == ["echo", "shout"]
    assert document["steps"] == 12
    assert set(document["memory"]) == {"base", "experts", "activations", "reordered weights"}
    assert not (tmp_path / "lib").exists()


def test_single_experts_are_overridden_from_a_file(
    tasks: Path, tiny_base_folder: Path, run: Run, tmp_path: Path
) -> None:
    (tmp_path / "o.json").write_text('{"echo": {"rank": 3, "steps": 2}}')
    command = ("build", tasks, "--base", tiny_base_folder, "--library", tmp_path / "lib", *QUICK)
    assert run(*command, "--overrides", tmp_path / "o.json").code == 0
    rows = json.loads(run("library", "ls", tmp_path / "lib", "--json").out)
    assert {row["name"]: row["rank"] for row in rows} == {"echo": 3, "shout": 2}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--method", "best"), "--method must be one of"),
        (("--k", "3"), "--k needs --method mbc"),
        (("--cluster-by", "text"), "--cluster-by needs --method mbc"),
        (("--workers", 0), "--workers must be at least 1"),
        (("--sampling", "uniform"), "--sampling needs --method joint"),
        (("--method", "mbc", "--mu"), "--mu needs --method poly or mhr"),
        (("--method", "mbc", "--k", "few"), "--k"),
        (("--method", "mbc", "--k", "3"), "between 1 and 2"),
        (("--method", "poly", "--splits", "2"), "--splits"),
        (("--sampling", "hot"), "--sampling"),
        (("--log", "paper"), "--log"),
        (("--overrides", "{missing}"), "--overrides"),
        (("--executor", "cloud"), "--executor"),
    ],
)
def test_a_build_refuses_options_that_it_could_not_honour(
    options: tuple[str, ...], words: str, tasks: Path, tiny_base_folder: Path, run: Run, tmp_path: Path
) -> None:
    filled = [str(option).format(missing=tmp_path / "missing") for option in options]
    outcome = run("build", tasks, "--base", tiny_base_folder, "--library", tmp_path / "lib", *QUICK, *filled)
    assert outcome.code == 2
    assert words in outcome.err
    assert not (tmp_path / "lib").exists()


def test_programs_run_where_they_are_allowed_to_and_are_left_out_elsewhere(
    tmp_path: Path, library: Path, tasks: Path, run: Run
) -> None:
    row = {"task": "code", "split": "test", "source": "def f():", "target": " pass", "extra": {"test": "assert f()"}}
    row["extra"]["generation"] = {"max_new_tokens": 2}
    (tmp_path / "code.jsonl").write_text(json.dumps(row) + "\n")
    entries = [{"task": "code", "file": "code.jsonl", "metric": "pass@1"}]
    entries += [{"task": name, "file": "tasks.jsonl"} for name in ("echo", "shout")]
    (tmp_path / "manifest.json").write_text(json.dumps({"tasks": entries}))
    evaluate = ("evaluate", library, tmp_path, "--routers", "base", "--rows", 1, "--json")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        outcome = run(*evaluate)
    assert "warning: left out: code (running generated code needs --allow-code)" in outcome.err
    assert {cell["task"] for cell in json.loads(outcome.out)["cells"]} == {"echo", "shout"}
    refused = run(*evaluate, "--tasks", "code")
    assert (refused.code, "--allow-code" in refused.err) == (1, True)
    assert run(*evaluate, "--unsafe-code").code == 2
    outcome = run(*evaluate, "--tasks", "code", "--allow-code")
    if "may only run isolated" in outcome.err:
        pytest.skip("nothing isolates programs here")
    metrics = {(cell["metric"], cell["primary"]): cell["value"] for cell in json.loads(outcome.out)["cells"]}
    assert metrics["pass@1", True] == 0.0
    assert metrics["perplexity", False] > 1.0


def test_tasks_that_overlap_held_out_ones_are_left_out_of_a_build(
    tmp_path: Path, tiny_base_folder: Path, run: Run
) -> None:
    tasks = write_tasks(tmp_path / "tasks.jsonl")
    held_out = write_tasks(tmp_path / "held.jsonl", names=("shout",))
    build = ("build", tasks, "--base", tiny_base_folder, "--library", tmp_path / "lib", *QUICK, "--held-out", held_out)
    planned = run(*build, "--overlap", "drop", "--dry-run")
    assert "shout and shout: both name shout" in planned.err
    assert "echo" in planned.out
    assert "shout" not in planned.out
    built = run(*build, "--overlap", "drop", "--json")
    assert built.code == 0, built.err
    result = json.loads(built.out)
    assert (result["trained"], result["overlap"]["dropped"]) == (["echo"], ["shout"])
    assert run(*build, "--overlap", "some").code == 2


def test_sampling_has_options_of_its_own_beside_the_routers(library: Path, run: Run) -> None:
    def answer(*options: object) -> dict[str, object]:
        outcome = run("generate", library, "--prompt", "echo 1:", "--max-new-tokens", 12, "--json", *options)
        assert outcome.code == 0, outcome
        return dict(json.loads(outcome.out))

    greedy = answer()["text"]
    assert answer("--top-p", 1e-6)["text"] == greedy  # the likeliest token alone is left
    assert answer("--sampling-temperature", 0.001)["text"] == greedy
    drawn = {answer("--sampling-temperature", 5, "--seed", seed)["text"] for seed in range(3)}
    assert len(drawn) == 3
    assert answer("--sample", "--seed", 1) == answer("--sampling-temperature", 1, "--seed", 1)
    # The router's own temperature does not draw anything.
    assert answer("--temperature", 5, "--seed", 1) == answer("--temperature", 5, "--seed", 2)
    shown = run("generate", "--help").out
    assert "router: divides its scores" in " ".join(shown.split())
    assert "sampling: divides the logits" in " ".join(shown.split())


def test_which_shows_all_answers_and_a_verdict(library: Path, run: Run, tmp_path: Path) -> None:
    outcome = run("which", library, "--prompt", "echo 1:", "--answer", "1", "--max-new-tokens", 3, "--router", "arrow")
    assert outcome.code == 0, outcome
    for word in ("router arrow", "base", "echo", "shout", "of 2 experts give the same answer", "loaded in"):
        assert word in " ".join(outcome.out.split())
    (tmp_path / "prompts.txt").write_text("echo 1:\nshout 2:\n")
    asked = run("which", library, "--prompts", tmp_path / "prompts.txt", "--max-new-tokens", 2, "--json")
    assert [prompt["prompt"] for prompt in json.loads(asked.out)["prompts"]] == ["echo 1:", "shout 2:"]


def test_imports_count_as_trained_on_the_tasks_that_they_are_called_as(
    library: Path, tasks: Path, tiny_base_folder: Path, run: Run, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    for name, copy in (("echo", "echo"), ("shout", "other")):
        (bare / copy).mkdir(parents=True)
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            (bare / copy / file).write_bytes((library / "adapters" / name / file).read_bytes())
    new = tmp_path / "new"
    added = run("library", "add", new, bare, "--base", tiny_base_folder, "--tasks", "other=shout", "--json")
    assert (added.code, json.loads(added.out)["added"]) == (0, ["echo", "other"])
    page, markdown = tmp_path / "page.html", tmp_path / "page.md"
    command = ("evaluate", new, tasks, "--routers", "oracle", "--rows", 2)
    shown = run(*command, "--report", page, "--markdown", markdown)
    assert shown.code == 0, shown
    sentence = "No task is recorded for echo: each counts as trained on the task that has its name"
    assert " ".join(shown.out.split()).count(sentence) == 1
    assert page.read_text().count(sentence) == 1
    assert markdown.read_text().count(sentence) == 1
    document = json.loads(run(*command, "--json").out)
    assert document["tasks_by_name"] == {"new": ["echo"]}
    experts = {
        cell["task"]: (cell["split"], cell["expert"]) for cell in document["cells"] if cell["router"] == "oracle"
    }
    assert experts["echo"] == ("held_in", "echo")
    assert experts["shout"] == ("held_in", "other")


@pytest.mark.filterwarnings("default:.*nothing says a split")
def test_own_data_is_built_from_and_evaluated_as_it_is(tiny_base_folder: Path, run: Run, tmp_path: Path) -> None:
    rows = [{"frage": f"echo {i}:", "antwort": str(i)} for i in range(12)]
    data = tmp_path / "mine.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = ("--columns", "source=frage,target=antwort")
    lib = tmp_path / "lib"
    refused = run("build", data, lib, "--base", tiny_base_folder, "--steps", 1)
    assert refused.code == 1
    assert "among antwort, frage" in refused.err
    assert "--columns source=COLUMN" in refused.err
    built = run("build", data, lib, "--base", tiny_base_folder, "--steps", 1, "--evals", 1, *columns)
    assert built.code == 0, built
    assert "10 train, 1 val, 1 test" in built.err
    evaluated = run("evaluate", lib, data, "--routers", "base", "--json", *columns)
    assert evaluated.code == 0, evaluated
    assert {cell["task"] for cell in json.loads(evaluated.out)["cells"]} == {"mine"}
    prepared = run("library", "prepare", lib, "--router", "centroid", "--tasks", data, *columns)
    assert prepared.code == 0, prepared
    adapted = run("adapt", lib, data, "--steps", 1, "--evals", 1, *columns)
    assert adapted.code == 0, adapted
