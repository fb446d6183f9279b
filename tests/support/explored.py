"""What the page of a library shows, made up."""

from datetime import UTC, datetime

import numpy as np

from lorary.evaluate.recorded_cells import RecordedScore
from lorary.report.explore_contents import Explored, ExploredAdapter

FAMILIES = ("arithmetic", "dates", "facts", "strings")


def make_explored(number: int = 12, *, seed: int = 0) -> Explored:
    """A library of adapters in four clusters, one for each family, on a made-up map."""
    random = np.random.default_rng(seed)
    labels = [i % len(FAMILIES) for i in range(number)]
    names = [f"{FAMILIES[label]}_{i:04}" for i, label in enumerate(labels)]
    centres = np.array([[-0.6, -0.6], [0.6, -0.6], [-0.6, 0.6], [0.6, 0.6]])
    points = centres[labels] + random.normal(scale=0.12, size=(number, 2))
    nearest = {
        name: [(names[(i + step * len(FAMILIES)) % number], 0.6 - step / 10) for step in (1, 2)]
        for i, name in enumerate(names)
    }
    return Explored(
        name="lib",
        base="tiny",
        router="auto (top_k 1)",
        adapters=[
            _adapter(name, FAMILIES[label], i) for i, (name, label) in enumerate(zip(names, labels, strict=True))
        ],
        labels=labels,
        cohesion=[0.5, 0.4, 0.3, -0.1],
        cluster_note="Method delta.",
        nearest=nearest,
        points=points.round(4),
    )


def _adapter(name: str, family: str, number: int) -> ExploredAdapter:
    return ExploredAdapter(
        name=name,
        rank=4,
        alpha=16.0,
        alpha_note="",
        targets="q_proj in 2 layers, 0 to 1",
        tasks=[name],
        families=[family],
        num_parameters=256 + number,
        num_bytes=1500 + number,
        content_hash=f"{number:064x}",
        changed=datetime(2026, 1, 2, 3, 4, tzinfo=UTC),
        losses=(2.5, 0.25),
        scores=[RecordedScore(name, "em", 0.75, 0.125, 20)],
        provenance=[("method", "private"), ("seed", str(number))],
    )
