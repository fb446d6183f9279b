"""Measures what a router needs beyond weights, and keeps it in the library.

Experts are measured and stored one after the other, so that a run that was killed loses one of them; run again, it goes
on. What is there and was made of the same is kept. Data that is pooled over all experts begins anew.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from torch import Tensor

from lorary.data.encoder import ENCODER_PACKAGE, encoder_folder
from lorary.data.schema import Task
from lorary.data.template import Example, Template, make_template, warn_of_cuts
from lorary.data.tokenizer_content import text_of
from lorary.display import Display
from lorary.errors import BaseModelError, RouterError
from lorary.library.configuration import differing_fields
from lorary.library.fingerprint import fingerprint_of_model
from lorary.library.opening import template_of
from lorary.library.prepared import Key, Prepared, expert_key, group_key, load_prepared, save_prepared
from lorary.library.store import Library
from lorary.model.base import Base
from lorary.model.finite import finite_layers
from lorary.model.layers import build_layers
from lorary.model.prepared import REQUEST, TASKS
from lorary.model.yardstick import store_moments, stored_moments, yardstick_for, yardstick_moments
from lorary.prepare.catalogue import MEASURES
from lorary.prepare.expert_rows import ExpertRows, draw_rows
from lorary.prepare.fallback import measure_fallback
from lorary.prepare.measure import MeasureContext, Tensors
from lorary.prepare.settings import PrepareSettings
from lorary.route import ROUTERS, SAMPLES
from lorary.route.setting import CHAT, Routing


@dataclass(frozen=True)
class PrepareResult:
    """What was computed and what was there.

    Args:
        library: its folder.
        router: which router can be used now.
        kind: under which name its data is stored.
        prepared: experts that were computed by this run.
        kept: experts that were there already, made of the same.
    """

    library: str
    router: str
    kind: str
    prepared: list[str]
    kept: list[str]

    @property
    def is_from_yardstick(self) -> bool:
        """Whether it was made from prompts that ship with the package."""
        data = ROUTERS[self.router].data
        return data is not None and self.kind == data.yardstick_kind


def prepare_library(
    base: Base,
    library: Library,
    data: Mapping[str, ExpertRows],
    settings: PrepareSettings,
    *,
    force_base: bool = False,
    display: Display | None = None,
) -> PrepareResult:
    """Compute what a router needs beyond weights for each expert, and store it in the library.

    Args:
        base: the bare base model.
        library: the library.
        data: rows of each expert to prepare.
        settings: what to prepare.
        force_base: accept unrelated weights of the same shapes.
        display: where progress is shown.

    Returns:
        What was done.

    Raises:
        BaseModelError: if the model is not the library's base, or it gives data that is not finite.
        RouterError: if the router must know all experts, and some are neither given nor there.
        LibraryError: if the library cannot be written.
    """
    library.check_base(base.model, force_base=force_base)
    limit = base.most_tokens(settings.max_length)
    template = make_template(template_of(library, None), base.tokenizer, max_length=limit)
    preparer = _Preparer(MeasureContext(base, library, settings), template)
    if settings.data.is_joint:
        preparer.check_all(data)
    done: dict[bool, list[str]] = {True: [], False: []}
    if preparer.measure.pooled is not None:
        done[preparer.pool(data)] += data
    else:
        with (display or Display()).bar(f"preparing {settings.router}", len(data)) as bar:
            for name, rows in data.items():
                done[preparer.prepare(name, rows)].append(name)
                bar.advance(name)
        if preparer.measure.fit is not None:
            preparer.fit()
    return PrepareResult(str(library.path), settings.router, settings.kind, prepared=done[True], kept=done[False])


def prepare_built(
    base: Base, library: Library, tasks: Mapping[str, Task], *, seed: int = 0, display: Display | None = None
) -> PrepareResult | None:
    """Prepare the default router of a library, if that is one that picks its rule by what is known of the experts.

    The prompts are those of the tasks that the experts were just trained on. The same tasks say what answers a request
    that no expert fits.

    Args:
        base: the bare base model.
        library: the library.
        tasks: by name; experts of other tasks are left out.
        seed: of the rows that are drawn.
        display: where progress is shown.

    Returns:
        What was done; None for another default router.
    """
    router = library.default_router["router"]
    if router not in ROUTERS or not ROUTERS[router].tries:
        return None
    settings = PrepareSettings(router, seed=seed)
    tasks_of = {name: library.provenance(name)["tasks"] for name in library.names()}
    data = {
        name: draw_rows(name, [tasks[task] for task in names], settings.num_rows, seed)
        for name, names in tasks_of.items()
        if names and set(names) <= set(tasks)
    }
    result = prepare_library(base, library, data, settings, display=display)
    if Routing.of(**library.default_router).fallback == CHAT:
        measure_fallback(base, library, tasks, display=display)
    return result


def prepare_yardstick(
    base: Base, library: Library, names: Sequence[str], settings: PrepareSettings, *, force_base: bool = False
) -> PrepareResult:
    """Compute what a router needs beyond weights for each expert from prompts that ship with the package.

    Attaching with the router does the same for experts that were not prepared, where the library can be written.

    Args:
        base: the bare base model.
        library: the library.
        names: the experts.
        settings: what to prepare: a router that has a yardstick.
        force_base: accept unrelated weights of the same shapes.

    Returns:
        What was done.

    Raises:
        BaseModelError: as for `prepare_library`.
        TaskError: if an expert scores the same on all prompts.
        LibraryError: if the library cannot be written, or its experts were trained with different templates.
    """
    library.check_base(base.model, force_base=force_base)
    rule, kind = ROUTERS[settings.router], settings.data.yardstick_kind
    yardstick = yardstick_for(base.model, base.tokenizer, library, rule)
    kept = stored_moments(library, kind, names, yardstick)
    missing = [name for name in names if name not in kept]
    if missing:
        shapes = {name: library.shapes(name) for name in missing}
        layers = build_layers(base.model, (library.get(name) for name in missing), shapes=shapes)
        moments = yardstick_moments(base.model, rule, layers, missing, yardstick)
        store_moments(library, kind, moments, yardstick)
    return PrepareResult(str(library.path), settings.router, kind, prepared=missing, kept=list(kept))


class _Preparer:
    """Measures experts, unless what is stored was made of the same.

    Args:
        context: what measures look at.
        template: how rows become prompts.
    """

    def __init__(self, context: MeasureContext, template: Template) -> None:
        self._context, self._template = context, template
        self._library, self._settings = context.library, context.settings
        self.measure = MEASURES[context.settings.router]
        # Under which kind goes what is made of each expert alone.
        self._expert_kind = self._settings.kind
        if self.measure.fit is not None:
            self._expert_kind = SAMPLES.kind_of(self._settings.features)
        self._measured_by = ROUTERS[context.settings.router].measured_by

    def check_all(self, data: Mapping[str, ExpertRows]) -> None:
        """Refuse joint data without some of the experts, before anything is computed."""
        for name in self._library.names():
            if name not in data and (self.measure.fit is None or self._sample(name) is None):
                raise self._missing(name)

    def prepare(self, name: str, rows: ExpertRows) -> bool:
        """Measure and store one expert; False where that was there, made of the same."""
        assert self.measure.per_expert is not None
        made_of, stored = self._made_of(rows), self._sample(name)
        if stored is not None and stored.made_of == made_of:
            return False
        with finite_layers(self._context.base.model):
            tensors, notes = self.measure.per_expert(self._context, name, self._examples(rows))
        if self._settings.data.holds == "request" and len(tensors[REQUEST]) == len(rows.rows):
            tensors = {**tensors, TASKS: rows.tasks}
        self._check_finite({name: tensors})
        save_prepared(self._library, self._expert_kind, self._expert_key(name), Prepared(tensors, made_of, notes))
        return True

    def fit(self) -> None:
        """Fit and store joint data from the samples of all experts, unless it is there, made of the same samples."""
        samples: dict[str, Prepared] = {}
        for name in self._library.names():
            stored = self._sample(name)
            if stored is None:
                raise self._missing(name)
            samples[name] = stored
        fit = self.measure.fit
        assert fit is not None
        tensors = {name: stored.tensors for name, stored in samples.items()}
        self._store_joint({name: stored.made_of for name, stored in samples.items()}, lambda: fit(tensors))

    def pool(self, data: Mapping[str, ExpertRows]) -> bool:
        """Measure and store joint data from the rows of all experts; False where it was there, made of the same."""
        names, pooled = self._library.names(), self.measure.pooled
        assert pooled is not None

        def make() -> Mapping[str, Tensors]:
            return pooled(self._context, {name: self._examples(data[name]) for name in names})

        return self._store_joint({name: self._made_of(data[name]) for name in names}, make)

    def _store_joint(self, made_of: Mapping[str, Any], make: Callable[[], Mapping[str, Tensors]]) -> bool:
        kind = self._settings.kind
        key = {**group_key(self._library, list(made_of)), **self._measured_by}
        stored = load_prepared(self._library, kind, key)
        if stored is not None and stored.made_of == made_of:
            return False
        with finite_layers(self._context.base.model):
            by_expert = make()
        tensors = self._check_finite(by_expert)
        save_prepared(self._library, kind, key, Prepared(tensors, made_of, {}))
        return True

    def _sample(self, name: str) -> Prepared | None:
        return load_prepared(self._library, self._expert_kind, self._expert_key(name))

    def _expert_key(self, name: str) -> Key:
        # Samples, out of which joint data is fitted, are no scores of the rule.
        measured_by = self._measured_by if self.measure.fit is None else {}
        return {**expert_key(self._library, name), **measured_by}

    def _examples(self, rows: ExpertRows) -> list[Example]:
        examples = [self._template.encode(row.prompt, row.target) for row in rows.rows]
        warn_of_cuts(", ".join(rows.hashes), examples)
        return examples

    def _missing(self, name: str) -> RouterError:
        return RouterError(
            f"router '{self._settings.router}' must know all experts of the library",
            found=f"nothing for expert '{name}'",
            remedy="leave --experts out",
        )

    def _made_of(self, rows: ExpertRows) -> dict[str, Any]:
        """All that decides what is made of an expert beside its weights, as values of JSON."""
        s, base = self._settings, self._context.base
        fingerprint = fingerprint_of_model(base.model)
        made_of: dict[str, Any] = {
            "data": dict(rows.hashes), "rows": s.num_rows, "seed": s.seed, "template": self._template.name,
            "max_length": self._template.max_length, "model": fingerprint.digest,
            "dtype": str(base.model.dtype), **text_of(base.tokenizer, self._template.name),
            **{field: getattr(s, field) for field in self.measure.decided_by},
        }  # fmt: skip
        if differing := differing_fields(self._library.base.fingerprint.configuration, fingerprint.configuration):
            made_of["configuration"] = {name: at_hand for name, (_, at_hand) in differing.items()}
        if s.features == "text":
            encoder_folder()  # says what to install
            made_of["encoder"] = f"{ENCODER_PACKAGE} {version(ENCODER_PACKAGE.replace('_', '-'))}"
        return made_of

    def _check_finite(self, by_expert: Mapping[str, Tensors]) -> dict[str, Tensor]:
        """The tensors by expert and path in one name, as joint data is kept; refuses what no router could score by."""
        for name, tensors in by_expert.items():
            for path, tensor in tensors.items():
                if not bool(tensor.isfinite().all()):
                    raise BaseModelError(
                        f"what router '{self._settings.router}' reads of expert '{name}' must be finite, at {path} too",
                        found="NaN or infinity out of the base model with this expert",
                        remedy="another --dtype where activations overflow, and lorary library verify for the adapters",
                    )
        return {f"{name}/{path}": tensor for name, tensors in by_expert.items() for path, tensor in tensors.items()}
