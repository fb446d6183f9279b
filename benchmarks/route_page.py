"""The report of `route.py`: tables, and for each base two pictures of the ratio to the base against E."""

import datetime
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import harness

PLOTTED = ("prefill-512", "decode-1")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 400, 60, 190, 36, 46
LEAST_GAP = 16  # pixels, so that the lowest labels stay apart
COLOURS = (
    "#c2410c", "#444444", "#3b6ea8", "#0f766e", "#7c3aed", "#a16207", "#be185d", "#4d7c0f", "#0e7490",
    "#1e3a8a", "#e0a100",
)  # fmt: skip
TICKS = (1, 1.1, 1.25, 1.5, 2, 3, 5, 10, 20, 50, 100)
HEAD = ("case", "contender", "ours", "base", "PEFT", "unit", "x base", "floor x base", "PEFT x base", "x PEFT", "notes")
Row = dict[str, Any]
Series = Mapping[str, Sequence[tuple[int, float]]]


def save_report(rows: Sequence[Row], path: Path, *, command: str, load: float) -> None:
    """Write the report, and its pictures beside it.

    Args:
        rows: of the benchmark.
        path: of the Markdown file.
        command: that gave them.
        load: of the machine before the run, as the kernel counts it.
    """
    parts = [f"# Routing over a library, {datetime.date.today().isoformat()}", "", *preface(command, load)]
    for base in dict.fromkeys(row["case"].split()[0] for row in rows):
        own = [row for row in rows if row["case"].startswith(f"{base} ")]
        parts += ["", f"## {base}", "", *table(own)]
        for case in PLOTTED:
            if series := series_of(own, f"{base} {case} "):
                picture = path.with_name(f"{path.stem}_{base}_{case}.svg")
                picture.write_text(ratio_svg(f"{base}, {case}", series), encoding="utf-8")
                parts += ["", f"![{base}, {case}: ratio to the base against E]({picture.name})"]
    path.write_text("\n".join(parts) + "\n", encoding="utf-8")


def preface(command: str, load: float) -> list[str]:
    """Machine, versions, command and what the columns mean."""
    machine, versions = harness.machine(), harness.versions()
    return [
        f"Machine: {machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads used, no device; load "
        f"{load:.1f} before the run and {os.getloadavg()[0]:.1f} after it. "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + ". What is measured, and how: the head of `benchmarks/route.py`.",
        "",
        "```bash",
        command,
        "```",
        "",
        "*x base*: ours over the bare base of the same rounds; in brackets the least and the largest of a round, and "
        "their number. *floor x base*: the same for base and bare matrix products; in brackets by counting "
        "multiply-adds.",
    ]


def table(rows: Iterable[Row]) -> list[str]:
    """The rows of one base as Markdown."""
    lines = ["| " + " | ".join(HEAD) + " |", "|---" * len(HEAD) + "|"]
    return lines + ["| " + " | ".join(cells(row)) + " |" for row in rows]


def cells(row: Row) -> list[str]:
    """One row of the table."""
    spread, counted = row.get("spread"), row.get("floor_ratio")
    ratio = number(row["ratio_to_base"])
    if spread:
        ratio += f" ({number(spread[0])} to {number(spread[1])}, {row['rounds']})"
    floor = number(over_base(row, "floor")) + (f" ({number(counted)})" if counted else "")
    return [
        row["case"].split(" ", 1)[1], row["figure"], *(number(row[key]) for key in ("ours", "base", "peer")),
        row["unit"], ratio, floor, number(over_base(row, "peer")), number(row["ratio_to_peer"]), row.get("note", ""),
    ]  # fmt: skip


def number(value: float | None) -> str:
    """Three digits, or a dash."""
    return "-" if value is None else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def over_base(row: Row, key: str) -> float | None:
    """Another figure of the row over the base's."""
    return None if row[key] is None or not row["base"] else row[key] / row["base"]


def series_of(rows: Iterable[Row], start: str) -> dict[str, list[tuple[int, float]]]:
    """(E, ratio to the base) of every contender, the floor of Arrow and PEFT, of the rows whose case begins so."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if not row["case"].startswith(start):
            continue
        experts, name = int(row["case"].rsplit("=", 1)[1]), row["figure"]
        points = {name: row["ratio_to_base"], f"PEFT {name}": over_base(row, "peer")}
        if name == "arrow":
            points["floor of arrow"] = over_base(row, "floor")
        for label, ratio in points.items():
            if ratio is not None:
                found.setdefault(label, []).append((experts, ratio))
    return found


def ratio_svg(title: str, series: Series) -> str:
    """Lines over E, both axes logarithmic; a contender at one E is a point."""
    points = [point for line in series.values() for point in line]
    sizes, top = sorted({experts for experts, _ in points}), max(ratio for _, ratio in points)
    ceiling = next((tick for tick in TICKS if tick >= top * 1.02), top)
    floor = min(1.0, *(ratio for _, ratio in points))
    span = max(math.log(sizes[-1] / sizes[0]), 1e-9)

    def place(experts: int, ratio: float) -> tuple[float, float]:
        across = LEFT + math.log(experts / sizes[0]) / span * (WIDTH - LEFT - RIGHT)
        return across, HEIGHT - BOTTOM - math.log(ratio / floor) / math.log(ceiling / floor) * (HEIGHT - BOTTOM - TOP)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="12" role="img" aria-label="{title}: ratio to the base against E">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        f'<text x="{LEFT}" y="20" fill="#222">{title}: time over the bare base</text>',
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 8}" text-anchor="middle" fill="#222">experts</text>',
    ]
    heights = [(tick, place(sizes[0], tick)[1]) for tick in TICKS if floor <= tick <= ceiling]
    parts += [_grid_line(tick, y) for tick, y in heights if tick == 1 or heights[0][1] - y > LEAST_GAP]
    parts += [
        f'<text x="{place(size, 1)[0]:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle" fill="#444">{size}</text>'
        for size in sizes
    ]
    for index, (name, line) in enumerate(series.items()):
        parts += _line(index, name, [place(*point) for point in line])
    return "\n".join([*parts, "</svg>"]) + "\n"


def _grid_line(tick: float, y: float) -> str:
    return (
        f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#d8dce2"/>'
        f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end" fill="#444">{tick:g}</text>'
    )


def _line(index: int, name: str, places: Sequence[tuple[float, float]]) -> list[str]:
    """One contender: its line, its points and its entry in the legend."""
    colour, legend = COLOURS[index % len(COLOURS)], TOP + 8 + 20 * index
    dash = ' stroke-dasharray="5 4"' if index >= len(COLOURS) or name.startswith("floor") else ""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    return [
        f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>',
        *(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.2" fill="{colour}"/>' for x, y in places),
        f'<circle cx="{WIDTH - RIGHT + 20}" cy="{legend}" r="4" fill="{colour}"/>'
        f'<text x="{WIDTH - RIGHT + 30}" y="{legend + 4}" fill="#222">{name}</text>',
    ]
