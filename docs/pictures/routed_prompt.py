"""The picture in README.md: which expert acts most on each token of a prompt, in each transformer layer.

`make demo`, then `.venv/bin/python docs/pictures/routed_prompt.py demo/library > docs/pictures/routed_prompt.svg`.
Arrow routes with the library's defaults. A cell averages the routing weights of the layer's adapted projections.
"""

import argparse
import re
from html import escape

import torch

import lorary
from lorary.evaluate.routed_prompt import RoutedPrompt, trace_prompt

PROMPT = "Month in: 12/04\nAnswer:"
# The colours of Okabe and Ito, which stay apart for most kinds of colour blindness; the last is for all other experts.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#8a8a8a")
LEFT, TOP, CELL_WIDTH, CELL_HEIGHT, WIDTH = 72, 78, 39, 16, 804

SOFT, SMALL = "fill-opacity:0.7", "font-size:11px;fill-opacity:0.7"


def strongest(traced: RoutedPrompt) -> tuple[list[int], torch.Tensor]:
    """The transformer layers that are routed, and the mean weights in each: (layers, tokens, experts)."""
    numbers = [int(re.findall(r"\.(\d+)\.", path)[0]) for path in traced.layers]
    depths = sorted(set(numbers))
    means = [traced.weights[[i for i, number in enumerate(numbers) if number == depth]].mean(0) for depth in depths]
    return depths, torch.stack(means)


def label(x: float, y: float, words: str, **style: object) -> str:
    """A line of text."""
    attributes = "".join(f' {key.replace("_", "-")}="{value}"' for key, value in style.items())
    return f'<text x="{x:g}" y="{y:g}"{attributes}>{escape(words)}</text>'


def picture(traced: RoutedPrompt) -> str:
    """The SVG document."""
    depths, means = strongest(traced)
    # The first token is an attention sink: its choices say nothing of the prompt, so it does not count in the shares.
    shares = means[:, 1:-1].mean((0, 1))
    order = shares.argsort(descending=True).tolist()
    colour = {expert: COLOURS[min(place, len(COLOURS) - 1)] for place, expert in enumerate(order)}
    parts = [
        label(14, 26, "Each layer sends each token to the experts that fit it", style="font-size:15px;font-weight:600"),
        label(14, 46, f"Arrow over {len(traced.experts)} experts, top 4. Colour: the expert with the largest weight; "
              "the fuller, the larger.", style=SOFT),
    ]  # fmt: skip
    # The last token ends the answer: nothing is predicted from it.
    tokens = traced.tokens[:-1]
    for column, token in enumerate(tokens):
        x = LEFT + column * CELL_WIDTH
        shown = token.replace("\n", "↵").strip(" ") or "␣"
        parts.append(label(x + CELL_WIDTH / 2, TOP - 8, shown, text_anchor="middle", style="font-size:12px"))
        for row in range(len(depths)):
            weight, expert = means[row, column].max(0)
            opacity = 0.15 if column == 0 else 0.35 + 0.65 * min(1.0, float(weight) / 0.6)
            parts.append(
                f'<rect x="{x + 1}" y="{TOP + row * CELL_HEIGHT + 1}" width="{CELL_WIDTH - 2}" '
                f'height="{CELL_HEIGHT - 2}" rx="2" fill="{colour[int(expert)]}" fill-opacity="{opacity:.2f}"/>'
            )
    for row, depth in enumerate(depths):
        if row % 2 == 0:
            y = TOP + row * CELL_HEIGHT + 12
            parts.append(label(LEFT - 8, y, f"layer {depth}", text_anchor="end", style=SMALL))
    x = LEFT + len(tokens) * CELL_WIDTH + 16
    parts.append(label(x, TOP + 10, "mean weight", style=SMALL))
    listed = order[: len(COLOURS) - 1]
    others = len(order) - len(listed)
    lines = [(traced.experts[expert], float(shares[expert]), colour[expert]) for expert in listed]
    lines.append((f"{others} others", float(shares.sum() - shares[listed].sum()), COLOURS[-1]))
    for number, (name, share, fill) in enumerate(lines):
        y = TOP + 34 + 24 * number
        parts.append(f'<rect x="{x}" y="{y - 11}" width="13" height="13" rx="2" fill="{fill}"/>')
        parts.append(label(x + 20, y, f"{share:.2f} {name}"))
    height = TOP + len(depths) * CELL_HEIGHT + 34
    parts.append(
        label(14, height - 12, "The first token is pale: models rest their attention on it, whatever the text says.",
              style=SMALL)
    )  # fmt: skip
    style = (
        "text{font:13px system-ui,sans-serif;fill:#1f2328}.card{fill:#fff;stroke:#d1d9e0}"
        "@media(prefers-color-scheme:dark){text{fill:#f0f6fc}.card{fill:#0d1117;stroke:#3d444d}}"
    )
    body = "\n".join(parts)
    title = f"Arrow routes the prompt {traced.prompt!r}; the model answers {traced.answer!r}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'role="img"><title>{escape(title)}</title><style>{style}</style>\n'
        f'<rect class="card" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="8"/>\n{body}\n</svg>\n'
    )


def main() -> None:
    """Trace the prompt and print the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("library")
    parser.add_argument("--prompt", default=PROMPT)
    chosen = parser.parse_args()
    base = lorary.load_base("embedded")
    lorary.attach(base.model, chosen.library, router="arrow")
    print(picture(trace_prompt(base, chosen.prompt, "plain", "arrow", max_new_tokens=8)), end="")


if __name__ == "__main__":
    main()
