"""The tables of settings in docs, made from the settings classes and the options that commands make of them.

Run from the top folder: `python -m tests.support.settings_tables --write`. Without `--write` it names the pages whose
tables are not as they are to be, and exits with 1.
"""

import inspect
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from lorary.adapt.settings import AdaptSettings
from lorary.build.cluster_settings import ClusterSettings
from lorary.build.methods import MethodSettings, PolySettings
from lorary.build.settings import PRESETS, BuildSettings, BuildSource, RunSettings
from lorary.cli.adapt import AdaptCommand, adapt
from lorary.cli.build import BuildCommand, build
from lorary.cli.cluster import cluster
from lorary.cli.evaluate import evaluate
from lorary.cli.explain import explain
from lorary.cli.flags import CommandOptions
from lorary.cli.merge import merge
from lorary.cli.serve import serve
from lorary.cli.which import which
from lorary.evaluate.settings import HarnessSettings
from lorary.flags import defaults_of, flags_of, helps_of, option_of
from lorary.serve.settings import ServeSettings
from lorary.serve.upstream_settings import UpstreamSettings

DOCS = Path(__file__).parents[2] / "docs"
BEGIN, END = "<!-- settings {}: made by python -m tests.support.settings_tables --write -->", "<!-- settings: end -->"
PAPER = "paper-2024"


def options(command: Callable[..., None], *only: type) -> list[str]:
    """The options that a command makes of its settings classes, of some of these or of all."""
    signature = inspect.signature(inspect.unwrap(command))
    annotations = (getattr(each.annotation, "__metadata__", ()) for each in signature.parameters.values())
    group = next(mark for marks in annotations for mark in marks if isinstance(mark, CommandOptions))
    lines = []
    for kind, each, _ in group.parameters().values():
        if not only or kind in only:
            rules = flags_of(kind)[each.name]
            spelled = " ".join(filter(None, (option_of(kind, each.name), rules.metavar)))
            methods = group.methods.get(each.name, rules.methods)
            sentence = f"{', '.join(methods)}: " if methods else ""
            default = group.defaults.get(each.name, shown(defaults_of(kind)[each.name])) or "off"
            lines.append([f"`{spelled}`", default, sentence + helps_of(kind, mark="`")[each.name]])
    return table(("option", "default", "meaning"), lines)


def build_settings() -> list[str]:
    """Every field of `BuildSettings`, with the preset of the paper; some have no option."""
    defaults, helps, preset = defaults_of(BuildSettings), helps_of(BuildSettings, mark="`"), PRESETS[PAPER]
    lines = []
    for each in fields(BuildSettings):
        option = option_of(BuildSettings, each.name)
        paper = shown(preset[each.name]) if each.name in preset else ""
        spelled = f"`{option}`" if option.startswith("--") else ""
        lines.append([spelled, f"`{each.name}`", shown(defaults[each.name]), paper, helps[each.name]])
    return table(("option", "in `BuildSettings`", "default", f"`{PAPER}`", "meaning"), lines)


# By name of the table: the page that holds it, and what makes it.
TABLES: dict[str, tuple[str, Callable[[], list[str]]]] = {
    "of lorary evaluate": ("evaluation.md", lambda: options(evaluate)),
    "of lorary evaluate --harness": ("harness.md", lambda: options(evaluate, HarnessSettings)),
    "of lorary explain": ("explain.md", lambda: options(explain)),
    "of lorary which": ("which.md", lambda: options(which)),
    "of lorary serve": ("serving.md", lambda: options(serve, ServeSettings)),
    "of lorary serve --upstream": ("serving-engines.md", lambda: options(serve, UpstreamSettings)),
    "of lorary cluster": ("clusters.md", lambda: options(cluster)),
    "of lorary merge": ("merging.md", lambda: options(merge)),
    "of lorary adapt": ("adapt.md", lambda: options(adapt, AdaptCommand, AdaptSettings)),
    "of an expert": ("training.md", build_settings),
    "of a build": ("training.md", lambda: options(build, BuildCommand, BuildSource, RunSettings)),
    "of methods": ("training.md", lambda: options(build, MethodSettings, ClusterSettings, PolySettings)),
}


def shown(value: Any) -> str:
    """A default as a cell."""
    if value is None or value in ("", ()):
        return "–"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        return f"`{value:.4g}`"
    return f"`{','.join(map(str, value)) if isinstance(value, tuple) else value}`"


def table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    """A table of Markdown."""
    cells = [heads, ["---"] * len(heads), *([cell.replace("|", "\\|") for cell in line] for line in lines)]
    return [re.sub(r"\|  (?=\|)", "| ", f"| {' | '.join(line)} |").replace(" --- ", "---") for line in cells]


def written(name: str, page: str) -> str:
    """The page with one of its tables made anew."""
    begin = BEGIN.format(name)
    before, mark, rest = page.partition(begin)
    if not mark or END not in rest:
        raise ValueError(f"docs/{TABLES[name][0]} must have the lines '{begin}' and '{END}'")
    return "\n".join([before + begin, "", *TABLES[name][1](), "", END]) + rest.partition(END)[2]


def pages() -> Iterator[tuple[Path, str]]:
    """Every page that holds such tables, as it is to be."""
    for page in dict.fromkeys(page for page, _ in TABLES.values()):
        text = (DOCS / page).read_text(encoding="utf-8")
        for name, (holder, _) in TABLES.items():
            if holder == page:
                text = written(name, text)
        yield DOCS / page, text


if __name__ == "__main__":
    stale = [(path, text) for path, text in pages() if path.read_text(encoding="utf-8") != text]
    for path, text in stale:
        if "--write" in sys.argv:
            path.write_text(text, encoding="utf-8")
        print(path.name)
    sys.exit(1 if stale and "--write" not in sys.argv else 0)
