"""What a router must know of one expert, made from rows of its own data; and what it must know of all together."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from lorary.data.encoder import ENCODER_PACKAGE, encoder_folder
from lorary.data.template import Example, Template, warn_of_cuts
from lorary.data.tokenizer_content import text_of
from lorary.errors import BaseModelError, RouterError
from lorary.library.configuration import differing_fields
from lorary.library.fingerprint import fingerprint_of_model
from lorary.library.prepared import Prepared, expert_key, group_key, load_prepared, save_prepared
from lorary.library.store import Library
from lorary.model.base import Base
from lorary.model.features import embedding, prompt_vectors
from lorary.model.finite import finite_layers
from lorary.model.prepared import JOINT, REQUEST, kind_of
from lorary.numbers import check_count, check_seed
from lorary.ops.logistic import fit_logistic
from lorary.prepare.contrast import pooled_moments
from lorary.prepare.data import OwnData
from lorary.prepare.gates import GateSettings, train_gates
from lorary.prepare.statistics import layer_centroids, norm_statistics
from lorary.route import ROUTERS
from lorary.route.rule import Features
from lorary.route.setting import Routing

NORM, CONTRAST = "norm", "contrast"
# Training rows of each task where nobody says: means of one expert settle slowly, those of all together soon.
NUM_ROWS, NUM_POOLED_ROWS = 100, 16
BY_DATA = (NORM, *(name for name, rule in ROUTERS.items() if rule.needs == "prepared"))


@dataclass(frozen=True)
class PrepareSettings:
    """What to prepare, and from how much data.

    Args:
        router: one of `BY_DATA`; `norm` for its calibration.
        features: for a router that looks at whole requests: `hidden` or `text`.
        rows: training rows of each task, at most; None for 100, or 16 for contrast, which pools them.
        seed: of the rows that are drawn, and of the order in which gates meet them.
        max_length: tokens of a row; longer prompts lose their start.
        steps: phatgoose: optimiser steps of an expert's gates.
        batch_size: phatgoose: rows per step.
        learning_rate: phatgoose: peak of the schedule.
    """

    router: str
    features: Features = "hidden"
    rows: int | None = None
    seed: int = 0
    max_length: int = 1024
    steps: int = 100
    batch_size: int = 4
    learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        if self.router not in BY_DATA:
            raise RouterError("the router must be one that needs data", found=self.router, remedy=f"one of {BY_DATA}")
        check_count("--rows", self.num_rows)
        check_count("--max-length", self.max_length)
        check_seed("--seed", self.seed)
        # What these refuse is refused here.
        _ = self.routing, self.gates

    @property
    def num_rows(self) -> int:
        """Training rows of each task, at most."""
        if self.rows is not None:
            return self.rows
        return NUM_POOLED_ROWS if self.router == CONTRAST else NUM_ROWS

    @property
    def routing(self) -> Routing:
        """The setting that can be used afterwards."""
        return Routing(self.router, features=self.features, calibrated=self.router == NORM)

    @property
    def gates(self) -> GateSettings:
        """How gates are trained."""
        return GateSettings(self.steps, self.batch_size, self.learning_rate, self.seed)

    @property
    def expert_kind(self) -> str:
        """Under which kind goes what is made of each expert."""
        is_sampled = self.router in JOINT and self.router != CONTRAST
        return f"samples_{self.features}" if is_sampled else self.kind

    @property
    def kind(self) -> str:
        """Under which kind goes what the router reads."""
        kind = kind_of(self.routing)
        assert kind is not None
        return kind


@dataclass(frozen=True)
class Preparer:
    """Makes what a router needs, and keeps it in the library.

    Args:
        base: the bare base model.
        library: the library.
        settings: what to prepare.
        template: how rows become prompts.
    """

    base: Base
    library: Library
    settings: PrepareSettings
    template: Template

    def prepare(self, name: str, own: OwnData) -> bool:
        """Make and store what must be known of one expert; False where that was there, made of the same."""
        key, kind = expert_key(self.library, name), self.settings.expert_kind
        made_of = self._made_of(own)
        stored = load_prepared(self.library, kind, key)
        if stored is not None and stored.made_of == made_of:
            return False
        with finite_layers(self.base.model):
            tensors, notes = self._make(name, self._examples(own))
        _check_finite(self.settings.router, {f"{name}/{path}": tensor for path, tensor in tensors.items()})
        save_prepared(self.library, kind, key, Prepared(tensors, made_of, notes))
        return True

    def fit(self) -> None:
        """Fit and store the classifier over all experts, unless it is there, made of the same samples."""
        names, samples = self.library.names(), []
        for name in names:
            stored = load_prepared(self.library, self.settings.expert_kind, expert_key(self.library, name))
            if stored is None:
                raise self.unknown(name)
            samples.append(stored)
        made_of = {name: stored.made_of for name, stored in zip(names, samples, strict=True)}
        self._store_joint(made_of, lambda: self._classifier(names, samples))

    def pool(self, data: Mapping[str, OwnData]) -> bool:
        """Make and store what all experts score on all their prompts; False where it was there, made of the same.

        No sample of one expert can be kept for the next time: another adapter scores other things on the same prompts,
        and prompts themselves do not belong into a library that may be handed on.
        """
        names = self.library.names()
        return self._store_joint({name: self._made_of(data[name]) for name in names}, lambda: self._pooled(names, data))

    def _store_joint(self, made_of: Mapping[str, Any], make: Callable[[], dict[str, Tensor]]) -> bool:
        key = group_key(self.library, list(made_of))
        before = load_prepared(self.library, self.settings.kind, key)
        if before is not None and before.made_of == made_of:
            return False
        with finite_layers(self.base.model):
            tensors = make()
        _check_finite(self.settings.router, tensors)
        save_prepared(self.library, self.settings.kind, key, Prepared(tensors, made_of, {}))
        return True

    def _pooled(self, names: Sequence[str], data: Mapping[str, OwnData]) -> dict[str, Tensor]:
        prompts = [example.prompt_ids for name in names for example in self._examples(data[name])]
        found = pooled_moments(self.base.model, self.library, prompts)
        return {f"{name}/{path}": own for name, by_path in found.items() for path, own in by_path.items()}

    def _examples(self, own: OwnData) -> list[Example]:
        examples = [self.template.encode(row.source, row.target) for row in own.rows]
        warn_of_cuts(", ".join(own.hashes), examples)
        return examples

    def _classifier(self, names: Sequence[str], samples: Sequence[Prepared]) -> dict[str, Tensor]:
        vectors = [stored.tensors[REQUEST] for stored in samples]
        labels = torch.arange(len(names)).repeat_interleave(torch.tensor([len(own) for own in vectors]))
        rows = fit_logistic(torch.cat(vectors), labels, len(names)).to(vectors[0].dtype)
        return {f"{name}/{REQUEST}": row for name, row in zip(names, rows, strict=True)}

    def unknown(self, name: str) -> RouterError:
        """The error over an expert that a router for all of them knows nothing of."""
        return RouterError(
            f"router '{self.settings.router}' must know all experts of the library",
            found=f"nothing for expert '{name}'",
            remedy="leave --experts out",
        )

    def _made_of(self, own: OwnData) -> dict[str, Any]:
        """All that decides what is made of an expert beside its weights, as values of JSON."""
        s, model = self.settings, self.base.model
        fingerprint = fingerprint_of_model(model)
        made_of: dict[str, Any] = {
            "data": dict(own.hashes), "rows": s.num_rows, "seed": s.seed, "template": self.template.name,
            "max_length": self.template.max_length, "model": fingerprint.digest,
            "dtype": str(model.dtype), **text_of(self.base.tokenizer, self.template.name),
        }  # fmt: skip
        if differing := differing_fields(self.library.base.fingerprint.configuration, fingerprint.configuration):
            made_of["configuration"] = {name: found for name, (_, found) in differing.items()}
        if s.router == "phatgoose":
            made_of |= {"steps": s.steps, "batch_size": s.batch_size, "learning_rate": s.learning_rate}
        if s.features == "text":
            encoder_folder()  # says what to install
            made_of["encoder"] = f"{ENCODER_PACKAGE} {version(ENCODER_PACKAGE.replace('_', '-'))}"
        return made_of

    def _make(self, name: str, examples: list[Example]) -> tuple[Mapping[str, Tensor], dict[str, Any]]:
        """Tensors of one expert, and notes on how it went."""
        s, model = self.settings, self.base.model
        if ROUTERS[s.router].request is not None:
            embed = embedding(s.routing, model, self.base.tokenizer)
            vectors = prompt_vectors(model, embed, [example.prompt_ids for example in examples])
            if s.router not in JOINT:
                vectors = torch.nn.functional.normalize(vectors, dim=1).mean(dim=0)
            return {REQUEST: vectors}, {}
        adapter = self.library.get(name)
        if s.router == "phatgoose":
            gates, losses = train_gates(model, adapter, examples, s.gates)
            return gates, {"losses": losses}
        make = norm_statistics if s.router == NORM else layer_centroids
        return make(model, adapter, examples), {}


def _check_finite(router: str, tensors: Mapping[str, Tensor]) -> None:
    """Refuse to store what a router could not score by."""
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            expert, path = name.split("/", 1)
            raise BaseModelError(
                f"what router '{router}' knows of expert '{expert}' must be finite numbers, at {path} too",
                found="NaN or infinity out of the base model with this expert",
                remedy="another --dtype where activations overflow, and lorary library verify for the adapters",
            )
