"""Which expert a request is for: rules that read one vector of its prompt, without running any expert.

    python benchmarks/choosing.py TASKS [--experts a,b,c] [--unknown d,e] [--prompts 16] [--rows 20]
        [--base embedded] [--threads N] [--json]

TASKS is what `lorary evaluate` takes, such as a folder. Every task of `--experts` (by default all with training rows)
stands for an expert that was trained on it; a rule gets `--prompts` of its training prompts. Its test prompts are
requests for that expert. Test prompts of `--unknown` (by default all other tasks) fit no expert.

* `right expert`: share of requests that a rule gives to their own expert.
* `known`: the chance that a request for some expert has a higher score than one that fits none (AUC), by the score that
  the rule chooses by. 0.5 is a guess.
* `add`: processor time until the rule knows one more expert, whose prompts' vectors are there; the median of 5.
* `kept`: numbers that a library keeps of one expert.

Rules: `discriminant` and `retrieval` are those of the catalogue. `ridge`: a linear map from vectors to experts, out of
the sums over prompts of `x x^T` and `x` that each expert adds (closed form; its strength is chosen by leaving training
prompts out). `nearest K`: the K nearest training prompts vote, by their cosines.
"""

import argparse
import os
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import harness
import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot, pad

from lorary.data.tasks import load_tasks
from lorary.data.template import make_template
from lorary.model.base import load_base
from lorary.model.features import hidden_embedding, prompt_vectors
from lorary.route.discriminant import discriminant_scores, fit_discriminant
from lorary.route.retrieval import retrieval_scores

NEAREST = (1, 3, 10, 30)
# Of the mean variance of the features.
STRENGTHS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
REPEATS = 5
# (requests, features) -> (requests, experts)
Scores = Callable[[Tensor], Tensor]


def auc(known: Tensor, unknown: Tensor) -> float:
    """The chance that one of `known` is above one of `unknown`; equal ones count half."""
    above = (known[:, None] > unknown[None]).double() + 0.5 * (known[:, None] == unknown[None]).double()
    return float(above.mean())


class Ridge:
    """A linear map from prompts to experts, from sums that experts add one by one.

    Args:
        width: of the vectors.
    """

    def __init__(self, width: int) -> None:
        self.gram = torch.zeros(width + 1, width + 1, dtype=torch.float64)
        self.sums = torch.zeros(width + 1, 0, dtype=torch.float64)

    def add(self, sample: Tensor) -> None:
        """One more expert, by its prompts."""
        vectors = with_one(sample)
        self.gram += vectors.mT @ vectors
        self.sums = torch.cat([self.sums, vectors.sum(dim=0)[:, None]], dim=1)

    def inverse(self, strength: float) -> Tensor:
        """Of the sums with the strength on their diagonal."""
        level = strength * self.gram.diagonal()[:-1].mean()
        return torch.linalg.inv(self.gram + level * torch.eye(len(self.gram), dtype=torch.float64))

    def scores(self, strength: float) -> Scores:
        """The map at one strength."""
        weights = self.inverse(strength) @ self.sums
        return lambda features: with_one(features) @ weights

    def choose(self, samples: Sequence[Tensor]) -> float:
        """The strength of the lowest squared error on training prompts that are left out one at a time."""
        vectors = with_one(torch.cat(list(samples)))
        labels = torch.arange(len(samples)).repeat_interleave(torch.tensor([len(sample) for sample in samples]))
        targets = one_hot(labels, len(samples)).double()
        errors = {}
        for strength in STRENGTHS:
            inverse = self.inverse(strength)
            leverage = ((vectors @ inverse) * vectors).sum(dim=1, keepdim=True)
            errors[strength] = float((((targets - vectors @ inverse @ self.sums) / (1 - leverage)) ** 2).mean())
        return min(errors, key=lambda strength: errors[strength])


def with_one(vectors: Tensor) -> Tensor:
    """Unit vectors with a constant behind."""
    return pad(normalize(vectors.double(), dim=1), (0, 1), value=1.0)


def fit_ridge(samples: Sequence[Tensor]) -> Scores:
    """The map at its best strength."""
    ridge = Ridge(samples[0].shape[1])
    for sample in samples:
        ridge.add(sample)
    return ridge.scores(ridge.choose(samples))


def fit_nearest(samples: Sequence[Tensor], count: int) -> Scores:
    """Sums of the cosines of the nearest prompts, by expert."""
    vectors = normalize(torch.cat(list(samples)).double(), dim=1)
    owners = torch.arange(len(samples)).repeat_interleave(torch.tensor([len(sample) for sample in samples]))

    def scores(features: Tensor) -> Tensor:
        near = (normalize(features.double(), dim=1) @ vectors.mT).topk(count, dim=1)
        votes = torch.zeros(len(features), len(samples), dtype=torch.float64)
        return votes.scatter_add(1, owners[near.indices], near.values)

    return scores


def fit_own(samples: Sequence[Tensor]) -> Scores:
    """The catalogue's discriminant; prompts of an expert are of one task here."""
    fitted = fit_discriminant(list(samples), [torch.zeros(len(sample), dtype=torch.int64) for sample in samples])
    return lambda features: discriminant_scores(features, fitted)


def fit_means(samples: Sequence[Tensor]) -> Scores:
    """The catalogue's retrieval."""
    means = torch.stack([normalize(sample, dim=1).mean(dim=0) for sample in samples])
    return lambda features: retrieval_scores(features, means).double()


def rules_for(samples: Sequence[Tensor]) -> dict[str, tuple[Callable[[Sequence[Tensor]], Scores], int]]:
    """Every rule by its name: how it is fitted, and the numbers that are kept of one expert."""
    prompts, width = samples[0].shape
    rules: dict[str, tuple[Callable[[Sequence[Tensor]], Scores], int]] = {
        "discriminant": (fit_own, prompts * width),
        "ridge": (fit_ridge, (width + 1) * (width + 2) // 2 + width + 1),
        "retrieval": (fit_means, width),
    }
    for count in NEAREST:
        rules[f"nearest {count}"] = (lambda given, number=count: fit_nearest(given, number), prompts * width)
    return rules


def seconds_to_add(samples: Sequence[Tensor], name: str, fit: Callable[[Sequence[Tensor]], Scores]) -> float:
    """Processor time until a rule knows the last expert too; sums that ridge has of the others are there."""
    times = []
    for _ in range(REPEATS):
        ridge = Ridge(samples[0].shape[1])
        for sample in samples[:-1] if name == "ridge" else ():
            ridge.add(sample)
        started = time.process_time()
        if name == "ridge":
            ridge.add(samples[-1])
            ridge.scores(STRENGTHS[0])
        else:
            fit(samples)
        times.append(time.process_time() - started)
    return median(times)


def measure(samples: Sequence[Tensor], requests: Sequence[Tensor], unknown: Tensor) -> list[dict[str, Any]]:
    """The rows of all rules.

    Args:
        samples: (prompts, features) training prompts of each expert.
        requests: (requests, features) test prompts of each.
        unknown: (requests, features) prompts that fit none.
    """
    owners = torch.arange(len(samples)).repeat_interleave(torch.tensor([len(own) for own in requests]))
    asked, rows = torch.cat(list(requests)), []
    for name, (fit, kept) in rules_for(samples).items():
        scores = fit(samples)
        of_known, of_unknown = scores(asked), scores(unknown)
        right = float((of_known.argmax(dim=1) == owners).double().mean())
        known = auc(of_known.amax(dim=1), of_unknown.amax(dim=1))
        add = seconds_to_add(samples, name, fit)
        for figure, unit, better, value in (
            ("right expert", "share", "higher", right), ("known", "auc", "higher", known),
            ("add", "ms", "lower", 1000 * add), ("kept", "numbers", "lower", float(kept)),
        ):  # fmt: skip
            rows.append(harness.row(name, figure, unit, better, ours=value))
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The lines of a Markdown table, a rule each."""
    by_rule: dict[str, dict[str, float]] = {}
    for row in rows:
        by_rule.setdefault(row["case"], {})[row["figure"]] = row["ours"]
    head = ["| rule | right expert | known against unknown (AUC) | add one expert, ms | numbers kept per expert |",
            "|---|---|---|---|---|"]  # fmt: skip
    return head + [
        f"| {name} | {own['right expert']:.3f} | {own['known']:.3f} | {own['add']:.1f} | {own['kept']:,.0f} |"
        for name, own in by_rule.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks")
    parser.add_argument("--experts", help="names of the experts' tasks, with commas between")
    parser.add_argument("--unknown", help="names of the tasks that fit no expert")
    parser.add_argument("--prompts", type=int, default=16, help="training prompts of each expert")
    parser.add_argument("--rows", type=int, default=20, help="test prompts of each task")
    parser.add_argument("--base", default="embedded")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    base, tasks = load_base(args.base), load_tasks(args.tasks)
    template = make_template("plain", base.tokenizer)
    experts = args.experts.split(",") if args.experts else [n for n, t in tasks.items() if t.split("train")]
    unknown = args.unknown.split(",") if args.unknown else [name for name in tasks if name not in experts]

    def vectors(name: str, split: str, count: int) -> Tensor:
        prompts = [template.encode_prompt(row.prompt) for row in tasks[name].split(split)[:count]]
        return prompt_vectors(base.model, hidden_embedding, prompts)

    samples = [vectors(name, "train", args.prompts) for name in experts]
    requests = [vectors(name, "test", args.rows) for name in experts]
    rows = measure(samples, requests, torch.cat([vectors(name, "test", args.rows) for name in unknown]))
    if args.json:
        harness.report(rows, as_json=True)
        return
    print(
        f"{len(experts)} experts, {args.prompts} prompts each; {len(unknown)} tasks that fit none; {args.rows} rows\n"
    )
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
