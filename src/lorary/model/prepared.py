"""Data that a setting needs beyond weights: where it is kept, and reading it from the library when it is needed."""

from collections.abc import Collection, Iterable, Mapping, MutableMapping, Sequence

from torch import Tensor

from lorary.data.yardstick import yardstick_digest
from lorary.errors import RouterError
from lorary.library.prepared import Key, expert_key, group_key, load_prepared, prepared_hashes, was_prepared_before
from lorary.library.store import Library
from lorary.model.check_seated import check_unchanged
from lorary.model.fallback import KIND as FALLBACK
from lorary.model.layers import SeatedLayer
from lorary.route import ROUTERS
from lorary.route.setting import CHAT, Routing

# By expert, then by the path of the layer (or `REQUEST`): what rules need beyond weights.
PreparedTensors = Mapping[str, Mapping[str, Tensor]]
# The path of what belongs to a whole request and to no layer.
REQUEST = "request"
# Beside it: the number of the task of each prompt, among the tasks of its expert.
TASKS = "tasks"


def paths_of(setting: Routing, modules: Iterable[str]) -> set[str]:
    """Under which paths the data must be there for an expert that adapts these layers; none where none is needed."""
    if setting.data is None:
        return set()
    return {REQUEST} if setting.data.holds == "request" else set(modules)


def read_missing(
    setting: Routing, library: Library, experts: Sequence[str], layers: Mapping[str, SeatedLayer],
    live: Collection[str], prepared: MutableMapping[str, PreparedTensors],
) -> PreparedTensors:  # fmt: skip
    """What a setting needs beyond weights, by expert; of what is missing, what the library has is read and kept.

    Args:
        setting: the router.
        library: where the experts came from.
        experts: names of the seated ones, in canonical order.
        layers: the routed layers.
        live: experts that came live: what the library has under their names is not theirs.
        prepared: what is there already, by kind; gets what is read.

    Returns:
        By expert and path; nothing for an expert that nothing was prepared for.

    Raises:
        LibraryError: if something is damaged, or the library holds other weights than the seated ones.
    """
    kind = setting.data_kind
    if kind is None:
        return {}
    at_hand = prepared.get(kind, {})
    missing = [name for name in experts if name not in at_hand and name not in live]
    stored = _read(setting, library, kind, missing) if missing else {}
    if stored:
        check_unchanged(library, experts, layers, live)
        prepared[kind] = {**at_hand, **stored}
    return prepared.get(kind, {})


def prepared_marks(setting: Routing, library: Library) -> dict[str, Mapping[str, str]]:
    """Hashes of what a setting would read from a library, by expert: with them a result can be known again.

    For a rule that picks one of several, of what each of these would read.
    """
    marks = _rule_marks(setting, library)
    if setting.fallback == CHAT:
        # Until version 2, ranked options were handed to the base too, and evidence was not asked for.
        evidence = prepared_hashes(library, FALLBACK, group_key(library, library.names()))
        marks[CHAT] = {"version": "2", **evidence}
    return marks


def _rule_marks(setting: Routing, library: Library) -> dict[str, Mapping[str, str]]:
    if setting.experts is None and (tries := ROUTERS[setting.router].tries):
        return {
            f"{router}/{name}": marks
            for router in tries
            for name, marks in _rule_marks(setting.changed(router=router), library).items()
        }
    kind = setting.data_kind
    if kind is None or setting.data is None:
        return {}
    keys = _keys(setting, library, library.names())
    marks: dict[str, Mapping[str, str]] = {name: prepared_hashes(library, kind, key) for name, key in keys.items()}
    if setting.data.has_yardstick and not all(marks.values()):
        return {"": {"yardstick": yardstick_digest()}}  # what is measured on it depends on weights alone
    return marks


def not_prepared(setting: Routing, library: Library, name: str, where: str, otherwise: str = "") -> RouterError:
    """The error over an expert for which something is missing, or was made for other weights; `otherwise` ends it."""
    kind = setting.data_kind
    assert kind is not None
    is_stale = was_prepared_before(library, kind, name)
    return RouterError(
        f"'{kind}' must be prepared from data for each expert and layer before it can be used",
        found=f"nothing for expert '{name}' at {where}" + (" as it is now: it, or its company, changed" * is_stale),
        remedy=f"lorary library prepare {library.path} --router {setting.router}"
        + (f" --features {setting.options.features}" if setting.options.features != "hidden" else "")
        + ", or lorary.model.prepare.prepare for one that came live"
        + otherwise,
    )


def _read(setting: Routing, library: Library, kind: str, names: Sequence[str]) -> dict[str, dict[str, Tensor]]:
    by_expert: dict[str, dict[str, Tensor]] = {}
    for name, key in _keys(setting, library, names).items():
        stored = load_prepared(library, kind, key)
        for path, tensor in () if stored is None else stored.tensors.items():
            expert, layer = (name, path) if name else path.split("/", 1)
            by_expert.setdefault(expert, {})[layer] = tensor
    return {name: by_expert[name] for name in names if name in by_expert}


def _keys(setting: Routing, library: Library, names: Sequence[str]) -> dict[str, Key]:
    """The keys to read, by expert; one under an empty name for joint data."""
    measured_by = ROUTERS[setting.router].measured_by
    if setting.data is not None and setting.data.is_joint:
        return {"": {**group_key(library, library.names()), **measured_by}}
    return {name: {**expert_key(library, name), **measured_by} for name in names}
