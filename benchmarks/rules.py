"""How routers do on the answers of held-in and held-out tasks: mean loss per target token, nats.

    python benchmarks/rules.py LIBRARY TASKS --held-in a,b,c --held-out d,e [--rows 8] [--against uniform]
        [--settings base,uniform,arrow,preset=contrast,preset=contrast;temperature=0.5]

Each row of the table is a setting: a router, or fields FIELD=VALUE with semicolons between. Losses are means over tasks
of means over rows; intervals of the difference to `--against` come from 10,000 draws of tasks (paired, 95 %).
"""

import argparse
import json
from collections.abc import Sequence
from typing import Any

import torch

import lorary
from lorary.cli.route import route_fields
from lorary.data.tasks import load_tasks
from lorary.data.template import make_template
from lorary.evaluate.loglik import answer_losses
from lorary.model.base import load_base

SETTINGS = (
    "base,uniform,arrow,projection,preset=contrast,preset=contrast;temperature=0.5,preset=contrast;temperature=0.2"
)
DRAWS = 10_000


def parse_setting(words: str) -> Any:
    """A router's name, or the fields of a setting."""
    return route_fields(words.split(";")) if "=" in words else words


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """95 % of the means over tasks drawn with replacement."""
    own = torch.tensor(differences, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    drawn = own[torch.randint(len(own), (DRAWS, len(own)), generator=generator)].mean(dim=1)
    low, high = drawn.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def losses_of(model: Any, setting: Any, examples: dict[str, Any]) -> dict[str, float]:
    """Mean loss of each task's rows under a setting."""
    found = {}
    with lorary.routing(model, setting):
        for name, rows in examples.items():
            losses = answer_losses(model, rows)
            found[name] = sum(loss.mean for loss in losses) / len(losses)
    return found


def table(results: dict[str, dict[str, float]], groups: dict[str, list[str]], against: str) -> list[str]:
    """The lines of a Markdown table."""
    lines = [
        "| setting | " + " | ".join(f"{group} | minus {against}" for group in groups) + " |",
        "|---|" + "---|" * (2 * len(groups)),
    ]
    for setting, losses in results.items():
        cells = []
        for names in groups.values():
            mean = sum(losses[name] for name in names) / len(names)
            gaps = [losses[name] - results[against][name] for name in names]
            low, high = interval(gaps)
            gap = "" if setting == against else f"{sum(gaps) / len(gaps):+.3f} ({low:+.3f} to {high:+.3f})"
            cells += [f"{mean:.3f}", gap]
        lines.append(f"| {setting} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    """Attach the library once, and go through the settings."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("LIBRARY")
    parser.add_argument("TASKS")
    parser.add_argument("--held-in", required=True)
    parser.add_argument("--held-out", required=True)
    parser.add_argument("--rows", type=int, default=8, help="test rows of each task")
    parser.add_argument("--settings", default=SETTINGS)
    parser.add_argument("--against", default="uniform")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    groups = {"held-in": options.held_in.split(","), "held-out": options.held_out.split(",")}
    base = load_base("embedded")
    template = make_template("plain", base.tokenizer, max_length=base.most_tokens(2048))
    tasks = load_tasks(options.TASKS, names=[name for names in groups.values() for name in names])
    examples = {
        name: [template.encode(row.source, row.target) for row in task.split("test")[: options.rows]]
        for name, task in tasks.items()
    }
    lorary.attach(base.model, options.LIBRARY)
    settings = options.settings.split(",")
    if options.against not in settings:
        parser.error(f"--against must be among the settings; found: {options.against}")
    results = {words: losses_of(base.model, parse_setting(words), examples) for words in settings}
    print(json.dumps(results) if options.json else "\n".join(table(results, groups, options.against)))


if __name__ == "__main__":
    main()
