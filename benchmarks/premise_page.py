"""The report and the picture of `premise.py`."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 760, 460, 64, 48, 44, 16


def scatter_svg(similarity: Tensor, transfer: Tensor, families: Sequence[str]) -> str:
    """All ordered pairs of tasks as points: similarity of the adapters across, transfer up; same family filled.

    Transfer is cut at -2 and 1.2, where a few pairs would squeeze all others; the axis says so.
    """
    points = [
        (float(similarity[i, j]), min(max(float(transfer[i, j]), -2.0), 1.2), families[i] == families[j])
        for i in range(len(families))
        for j in range(len(families))
        if i != j
    ]
    low = min(x for x, _, _ in points)
    high = max(x for x, _, _ in points)

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - low) / (high - low) * (WIDTH - LEFT - RIGHT)
        return across, HEIGHT - BOTTOM - (y + 2.0) / 3.2 * (HEIGHT - BOTTOM - TOP)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="12" role="img" aria-label="similarity of adapters against transfer">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
    ]
    for y in (-2.0, -1.0, 0.0, 1.0):
        x0, at = place(low, y)
        label = "≤ −2" if y == -2.0 else f"{y:g}".replace("-", "−")
        parts.append(f'<line x1="{x0:.0f}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}" stroke="#d8dce2"/>')
        parts.append(f'<text x="{x0 - 8:.0f}" y="{at + 4:.1f}" text-anchor="end" fill="#444">{label}</text>')
    for step in range(6):
        x = low + (high - low) * step / 5
        at, _ = place(x, 0)
        parts.append(f'<text x="{at:.0f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle" fill="#444">{x:.2f}</text>')
    for is_same in (False, True):
        style = 'fill="#c2410c" fill-opacity="0.85"' if is_same else 'fill="#3b6ea8" fill-opacity="0.28"'
        parts.append(f"<g {style}>")
        for x, y, same in points:
            if same is is_same:
                cx, cy = place(x, y)
                parts.append(f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="{3.2 if is_same else 2.4}"/>')
        parts.append("</g>")
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts += [
        f'<text x="{middle:.0f}" y="{HEIGHT - 10}" text-anchor="middle" fill="#222">'
        "cosine of the two adapters' updates</text>",
        f'<text x="16" y="{HEIGHT / 2:.0f}" text-anchor="middle" fill="#222" '
        f'transform="rotate(-90 16 {HEIGHT / 2:.0f})">transfer (1 = as good as the own expert)</text>',
        '<circle cx="80" cy="20" r="4" fill="#c2410c"/><text x="90" y="24" fill="#222">pairs of one family</text>',
        '<circle cx="230" cy="20" r="4" fill="#3b6ea8" fill-opacity="0.5"/>'
        '<text x="240" y="24" fill="#222">other pairs</text>',
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def write_report(found: Mapping[str, Any]) -> str:
    """The tables as Markdown."""
    lines = [
        "| init | seed | k | clusters by | adjusted Rand | normalised mutual information |",
        "|---|---|---|---|---|---|",
    ]
    for row in found["agreement"]:
        rand, information = (f"{row[key]:.3f} ± {row[key + '_sd']:.3f}" for key in ("ari", "nmi"))
        lines.append(f"| {row['init']} | {row['seed']} | {row['k']} | {row['way']} | {rand} | {information} |")
    lines += [
        "",
        "| init | similarity | held constant | tasks | Spearman's rho | p (Mantel) |",
        "|---|---|---|---|---|---|",
    ]
    for row in found["premise"]:
        lines.append(
            f"| {row['init']} | {row['method']} | {row['held']} | {row['tasks']} | {row['rho']:+.3f} | {row['p']:.4f} |"
        )
    lines += [
        "",
        "| init | adapters | clustering seed | adjusted Rand to the reference | moved |",
        "|---|---|---|---|---|",
    ]
    for row in found["moments"]:
        moved = ", ".join(row["moved"]) or "none"
        lines.append(f"| {row['init']} | {row['adapters']} | {row['seed']} | {row['ari']:.4f} | {moved} |")
    for init, names in found.get("left_out", {}).items():
        lines.append(
            f"\nLeft out of the transfer of init {init} (own expert no better than the base): {names or 'none'}."
        )
    return "\n".join(lines) + "\n"
