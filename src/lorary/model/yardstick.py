"""Means and deviations of experts' scores on prompts that ship with the package, where those of their own are missing.

They depend on the expert, the base model and the prompts alone, and on no other expert. So one that comes costs one
pass of the bare base over the prompts, and one that goes costs nothing. A library keeps them under the content of the
adapter. Where it cannot be written, the model keeps them while it is attached.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorary.adapter import Adapter
from lorary.data.template import make_template
from lorary.data.tokenizer_content import content_of_tokenizer
from lorary.data.yardstick import measured_prompts, yardstick_digest
from lorary.display import Display
from lorary.errors import LibraryError, UsageError
from lorary.library.fingerprint import fingerprint_of_model
from lorary.library.opening import template_of
from lorary.library.prepared import Prepared, content_key, load_prepared, save_prepared, was_prepared_before
from lorary.library.store import Library
from lorary.model.check_seated import check_unchanged
from lorary.model.features import own_tokenizer
from lorary.model.finite import finite_layers
from lorary.model.layers import SeatedLayer, build_layers
from lorary.model.prepared import REQUEST, PreparedTensors, not_prepared, read_missing
from lorary.model.prompt_scores import checked_moments, watch_prompts
from lorary.model.seating import Seating
from lorary.model.verdict import context_of
from lorary.route import ROUTERS
from lorary.route.rule import Rule
from lorary.route.setting import Routing

# Goes up when the same experts and prompts would give other moments.
_EDITION = "2"
# Tokens of a prompt, at most: more than the longest has in any tokenizer that knows its letters.
MAX_LENGTH = 1024
_REMEDY = "use a base model whose tokenizer tells texts apart"


@dataclass(frozen=True)
class Yardstick:
    """The prompts as one base model is given them.

    Args:
        prompts: token ids.
        made_of: all that decides what experts score on them beside the experts, as values of JSON.
    """

    prompts: Sequence[Sequence[int]]
    made_of: Mapping[str, str]


def yardstick_for(model: Any, tokenizer: Any, library: Library, rule: Rule, template: str | None = None) -> Yardstick:
    """The prompts in the template in which prompts will come.

    Args:
        model: the base model, with or without experts seated in it.
        tokenizer: of the base.
        library: the library.
        rule: whose scores are read on them.
        template: its name; that of the library's experts where None.

    Raises:
        LibraryError: if its experts were trained with another template.
        UsageError: if the tokenizer cannot write the template.
    """
    name, context = template_of(library, template), context_of(model)
    made = make_template(name, tokenizer, max_length=MAX_LENGTH if context is None else min(MAX_LENGTH, context))
    encoded = [made.encode_prompt(text) for text in measured_prompts()]
    made_of = {
        "edition": _EDITION, "model": fingerprint_of_model(model).digest, "dtype": str(model.dtype), "template": name,
        "tokenizer": content_of_tokenizer(tokenizer), "yardstick": yardstick_digest(),
        **({"rule": str(rule.edition)} if rule.measured_by else {}),
    }  # fmt: skip
    # A tokenizer may know no letter of a language, and give no token for it.
    return Yardstick([ids for ids in encoded if ids], made_of)


def yardstick_moments(
    model: Any, rule: Rule, layers: Mapping[str, SeatedLayer], names: Sequence[str], yardstick: Yardstick
) -> dict[str, dict[str, Tensor]]:
    """Mean and deviation of each expert's mean score over a prompt, layer by layer, over the yardstick.

    All deviations of an expert are scaled by one number, so that the mean over its layers of its scores, each less its
    mean and by its deviation, has deviation 1 over these prompts. Else experts of many layers and of few would not be
    comparable: a mean over more layers varies less.

    Args:
        model: the base model, with or without experts seated in it.
        rule: a rule whose scores are read against means and deviations.
        layers: the experts.
        names: of the experts, by their positions in the layers.
        yardstick: the prompts.

    Returns:
        By expert and path of the layer (2,), in the dtype of the experts; mean 0 and deviation 1 where nothing is
        measured. Under `REQUEST` (prompts,), what the expert scores for each prompt as a whole: with them the border is
        found below which nothing fits.

    Raises:
        TaskError: if an expert scores the same on all prompts, naming it and the layer.
        BaseModelError: if a layer gives numbers that are not finite.
    """
    scores = _scores(model, rule, layers, yardstick.prompts)
    means = torch.zeros(len(yardstick.prompts), len(names), dtype=torch.float64)
    num_layers = torch.zeros(len(names), dtype=torch.int64)
    moments: dict[str, Tensor] = {}
    measured: dict[str, Tensor] = {}
    for path, layer in layers.items():
        experts, values = list(layer.experts), scores[path].double()
        # All of them are 0 where the decoder does not run the layer.
        measured[path] = layer.alive.cpu() & bool(values.any())
        deviation, mean = torch.std_mean(values, dim=0)
        seated = [names[position] for position in experts]
        moments[path] = checked_moments(mean, deviation, measured[path], path, seated, _REMEDY)
        means[:, experts] += ((values - mean) / moments[path][:, 1]).masked_fill(~measured[path], 0.0)
        num_layers[experts] += measured[path]
    means /= num_layers.clamp_min(1)
    deviations = means.std(dim=0)
    whole = means / deviations.where(num_layers > 0, 1.0)
    by_expert: dict[str, dict[str, Tensor]] = {}
    for path, layer in layers.items():
        moments[path][:, 1] *= deviations[list(layer.experts)].where(measured[path], 1.0)
        for position, pair in zip(layer.experts, moments[path], strict=True):
            tensors = by_expert.setdefault(names[position], {REQUEST: whole[:, position].float()})
            tensors[path] = pair.to(layer.lora.up.dtype)
    return by_expert


def data_for(setting: Routing, state: Seating, model: Any) -> PreparedTensors:
    """What a setting needs beyond weights, by expert and path: what was prepared, else what the yardstick gives.

    The yardstick stands in for all experts where the library has not what was prepared for all of them: scores against
    prompts of some and against others would not be comparable.

    Args:
        setting: the router.
        state: the experts; gets what is read or measured.
        model: that they are seated in, or are about to be.

    Returns:
        As `lorary.model.prepared.read_missing`.

    Raises:
        LibraryError: as `read_missing` does, or if the experts were trained with different templates.
        RouterError: if there is no tokenizer to encode the prompts with.
        TaskError, BaseModelError: as `yardstick_moments` does.
    """
    prepared = read_missing(setting, state.library, state.experts, state.layers, state.live, state.prepared)
    data = setting.data
    if data is None or not data.has_yardstick or _covers(prepared, state):
        return prepared
    at_hand = state.prepared.get(data.yardstick_kind, {})
    missing = [name for name in state.experts if name not in at_hand]
    if missing:
        state.prepared[data.yardstick_kind] = {**at_hand, **_read_or_measured(setting, state, model, missing)}
    return state.prepared[data.yardstick_kind]


def live_moments(setting: Routing, state: Seating, model: Any, adapter: Adapter) -> PreparedTensors:
    """What `data_for` would measure for an expert that is about to come, so that nothing is changed if it cannot be.

    Args:
        setting: the router in force.
        state: the experts that are there.
        model: that they are seated in.
        adapter: the expert.

    Returns:
        By its name and path of the layer; empty where the setting has no yardstick.
    """
    if setting.data is None or not setting.data.has_yardstick:
        return {}
    yardstick = _yardstick_of(setting, state, model, adapter.name)
    return yardstick_moments(model, ROUTERS[setting.router], build_layers(model, [adapter]), [adapter.name], yardstick)


def stored_moments(library: Library, kind: str, names: Sequence[str], yardstick: Yardstick) -> dict[str, Any]:
    """What a library keeps of experts as they are now, by name and path of the layer.

    Args:
        library: the library.
        kind: under which it is kept (`lorary.route.rule.Data.yardstick_kind`).
        names: of the experts.
        yardstick: the prompts.
    """
    keys = {name: content_key(library, name, yardstick.made_of) for name in names}
    stored = {name: load_prepared(library, kind, key) for name, key in keys.items()}
    return {name: entry.tensors for name, entry in stored.items() if entry is not None}


def store_moments(library: Library, kind: str, moments: PreparedTensors, yardstick: Yardstick) -> None:
    """Keep what was measured; arguments as for `stored_moments`.

    Raises:
        LibraryError: if the library cannot be written.
    """
    for name, tensors in moments.items():
        save_prepared(library, kind, content_key(library, name, yardstick.made_of), Prepared(tensors, {}, {}))


def _covers(prepared: PreparedTensors, state: Seating) -> bool:
    """Whether there is something for every expert in each of its layers."""
    return all(
        path in prepared.get(state.experts[position], {})
        for path, layer in state.layers.items()
        for position in layer.experts
    )


def _read_or_measured(setting: Routing, state: Seating, model: Any, names: Sequence[str]) -> PreparedTensors:
    assert setting.data is not None
    kind, library = setting.data.yardstick_kind, state.library
    yardstick = _yardstick_of(setting, state, model, names[0])
    if any(was_prepared_before(library, setting.data.kind, name) for name in names if name not in state.live):
        warnings.warn(
            f"what '{setting.data.kind}' holds was prepared for other experts than these, and prompts that ship with "
            f"Lorary stand in for those of their tasks. To prepare it again: lorary library prepare {library.path} "
            f"--router {setting.router} --tasks TASKS",
            stacklevel=2,
        )
    of_library = [name for name in names if name not in state.live]
    stored = stored_moments(library, kind, of_library, yardstick)
    if of_library:
        check_unchanged(library, state.experts, state.layers, state.live)
    if len(stored) == len(names):
        return stored
    positions = {state.experts.index(name) for name in names if name not in stored}
    layers = {path: part for path, layer in state.layers.items() if (part := layer.only(positions)) is not None}
    measured = yardstick_moments(model, ROUTERS[setting.router], layers, state.experts, yardstick)
    try:
        store_moments(library, kind, {name: measured[name] for name in measured if name in of_library}, yardstick)
    except LibraryError as error:  # shared, say: the next one who attaches it measures again
        warnings.warn(f"what '{kind}' holds is not stored: {error.rule} (found: {error.found})", stacklevel=2)
    return {**stored, **measured}


def _yardstick_of(setting: Routing, state: Seating, model: Any, name: str) -> Yardstick:
    try:
        tokenizer = state.tokenizer or own_tokenizer(model)
    except UsageError as error:
        where = f"any layer, and no tokenizer for prompts that could stand in ({error.found})"
        otherwise = ", or lorary.attach(..., tokenizer=tokenizer)"
        raise not_prepared(setting, state.library, name, where, otherwise) from error
    return yardstick_for(model, tokenizer, state.library, ROUTERS[setting.router], state.template)


def _scores(
    model: Any, rule: Rule, layers: Mapping[str, SeatedLayer], prompts: Sequence[Sequence[int]]
) -> dict[str, Tensor]:
    """(prompts, experts) float32 mean scores by path of the layer; 0 where the decoder does not run it."""
    scores = {path: torch.zeros(len(prompts), len(layer.experts)) for path, layer in layers.items()}
    title = "scoring experts on prompts that ship with Lorary"
    with Display().bar(title, len(prompts)) as bar, finite_layers(model):
        done: set[int] = set()

        def look(path: str, bucket: Sequence[int], means: Tensor) -> None:
            scores[path][list(bucket)] = means.float()
            if not done.issuperset(bucket):
                done.update(bucket)
                bar.advance_to(len(done))

        watch_prompts(model, rule, layers, prompts, look)
    return scores
