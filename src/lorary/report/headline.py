"""The top of the page: the result in one sentence, its paired differences, failed cells, and the base guard."""

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from lorary.report.markup import left_out_words
from lorary.report.shell import part
from lorary.report.table_model import BASE, SPLITS, ScoreTable, TableMean, is_told

# So many named tasks are shown at once; more are folded, router by router.
OPEN_ENTRIES = 24
# So many other columns are named in a sentence.
MOST_NAMED = 5
# Class and words of each verdict.
VERDICTS = {"ahead": ("up", "better"), "behind": ("down", "worse"), "level": ("even", "no clear difference")}


def headline(table: ScoreTable, example: Markup | None = None) -> Markup:
    """The result as HTML: a sentence per split about its best router, a picture, and that router's paired differences.

    Args:
        table: the evaluation.
        example: what stands behind the picture, if anything does.
    """
    sentences = filter(None, (_sentence(table, split) for split in table.splits))
    splits = [SPLITS[split] for split in table.splits]
    return part("evaluation.html", "headline", list(sentences), example or "", splits, _differences(table))


def _sentence(table: ScoreTable, split: str) -> dict[str, Any] | None:
    means = {router: mean for router in table.routers if (mean := table.mean(router, split))}
    first = table.best(split) or next(iter(means), None)
    if first is None:
        return None
    base, mean = means.get(BASE), means[first]
    return {
        "split": SPLITS[split],
        "router": first,
        "value": mean.value,
        "tasks": mean.tasks,
        "others": [(name, means[name].value) for name in _named(means, first)],
        "is_behind": base is not None and first != BASE and base.value > mean.value,
    }


def _named(means: Mapping[str, TableMean], first: str) -> list[str]:
    """The columns that the sentence names beside its subject: all, or where they are many base, best and oracle."""
    columns = [name for name in means if name != first]
    if len(columns) <= MOST_NAMED:
        return columns
    library = first.rpartition(": ")[0]
    best = max((name for name in columns if not is_told(name)), key=lambda name: means[name].value)
    oracle = [name for name in columns if is_told(name) and name.rpartition(": ")[0] == library]
    return [name for name in columns if name in (BASE, best, *oracle)]


def _differences(table: ScoreTable) -> list[tuple[str, str, list[dict[str, Any] | None]]]:
    """The best router of each split minus every other one, on all splits."""
    differences, shown = [], set[frozenset[str]]()
    for best in dict.fromkeys(filter(None, (table.best(split) or table.main for split in table.splits))):
        for router in table.routers:
            means = [table.difference(best, router, split) for split in table.splits]
            if router != best and not is_told(router) and any(means) and {best, router} not in shown:
                shown.add(frozenset({best, router}))
                differences.append((best, router, [_difference(mean) for mean in means]))
    return differences


def _difference(mean: TableMean | None) -> dict[str, Any] | None:
    if mean is None:
        return None
    kind, words = VERDICTS[mean.verdict]
    where = "" if mean.is_wider or mean.verdict == "level" else " on these tasks"
    return {"mean": mean, "kind": kind, "words": words + where}


def guard_box(table: ScoreTable) -> Markup:
    """The base guard as HTML: each task on which the base beats a router, by name; or that there is none."""
    if BASE not in table.routers:
        return part("evaluation.html", "guard_without_base")
    if not table.guard:
        return part("evaluation.html", "guard_clear")
    order = sorted(table.routers, key=lambda router: (router != table.main, table.routers.index(router)))
    ranked = sorted(table.guard, key=lambda entry: (entry["value"] - entry["base"], entry["task"]))
    entries = {router: [_guarded(entry) for entry in ranked if entry["router"] == router] for router in order}
    unfolded = len(table.guard) <= OPEN_ENTRIES
    groups = [
        {"router": router, "entries": tasks, "is_open": unfolded or router == table.main}
        for router, tasks in entries.items()
        if tasks
    ]
    free = [router for router, tasks in entries.items() if not tasks and router != BASE]
    num_guarded = len({entry["task"] for entry in table.guard})
    return part("evaluation.html", "guard", num_guarded, len(table.tasks), groups, free)


def _guarded(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {"verdict": None, **entry, "split": SPLITS.get(entry["split"], entry["split"])}


def failure_box(table: ScoreTable) -> Markup:
    """The cells that could not be scored, as HTML; nothing where there are none."""
    if not table.failures:
        return Markup("")
    left_out = left_out_words([(entry["task"], entry["router"]) for entry in table.left_out])
    return part("evaluation.html", "failures", table, left_out, len(table.failures) <= OPEN_ENTRIES)
