"""What a setting needs beyond weights: under which kind it goes, and reading it from the library when it is needed."""

from collections.abc import Collection, Iterable, Mapping, MutableMapping, Sequence

from torch import Tensor

from lorary.errors import RouterError
from lorary.library.prepared import Key, expert_key, group_key, load_prepared, prepared_hashes, was_prepared_before
from lorary.library.store import Library
from lorary.model.check_seated import check_unchanged
from lorary.model.layers import SeatedLayer
from lorary.route import ROUTERS
from lorary.route.setting import Routing

# By expert, then by the path of the layer (or `REQUEST`): what rules need beyond weights.
Known = Mapping[str, Mapping[str, Tensor]]
# The path of what belongs to a whole request and to no layer.
REQUEST = "request"
# Routers whose tensors were made for all experts of a library together.
JOINT = frozenset({"contrast", "task-predictor"})


def kind_of(setting: Routing) -> str | None:
    """Under which kind goes what a setting needs beyond weights; None where it needs nothing."""
    if setting.experts is not None:
        return None
    rule, word = ROUTERS[setting.router], setting.router.replace("-", "_")
    if setting.calibrated:
        return f"{word}_calibration"
    if rule.needs != "prepared":
        return None
    return word if rule.request is None else f"{word}_{setting.features}"


def paths_of(setting: Routing, modules: Iterable[str]) -> set[str]:
    """Under which paths it must be there for an expert that adapts these layers."""
    return set(modules) if ROUTERS[setting.router].request is None else {REQUEST}


def read_missing(
    setting: Routing, library: Library, experts: Sequence[str], layers: Mapping[str, SeatedLayer],
    live: Collection[str], prepared: MutableMapping[str, Known],
) -> Known:  # fmt: skip
    """What a setting needs beyond weights, by expert; of what is missing, what the library has is read and kept.

    Args:
        setting: the router.
        library: where the experts came from.
        experts: names of the seated ones, in canonical order.
        layers: the routed layers.
        live: experts that came live: what the library has under their names is not theirs.
        prepared: what is there already, by kind; gets what is read.

    Returns:
        By expert and path; nothing for an expert of which nothing is known.

    Raises:
        LibraryError: if something is damaged, or the library holds other weights than the seated ones.
    """
    kind = kind_of(setting)
    if kind is None:
        return {}
    known = prepared.get(kind, {})
    missing = [name for name in experts if name not in known and name not in live]
    found = _read(setting, library, kind, missing) if missing else {}
    if found:
        check_unchanged(library, experts, layers, live)
        prepared[kind] = {**known, **found}
    return prepared.get(kind, {})


def prepared_marks(setting: Routing, library: Library) -> dict[str, Mapping[str, str]]:
    """Hashes of what a setting would read from a library, by expert: with them a result can be known again."""
    kind = kind_of(setting)
    if kind is None:
        return {}
    return {name: prepared_hashes(library, kind, key) for name, key in _keys(setting, library, library.names()).items()}


def not_prepared(setting: Routing, library: Library, name: str, where: str) -> RouterError:
    """The error over an expert for which something is missing, or was made for other weights."""
    kind = kind_of(setting)
    assert kind is not None
    is_stale = was_prepared_before(library, kind, name)
    return RouterError(
        f"'{kind}' must be prepared from data for each expert and layer before it can be used",
        found=f"nothing for expert '{name}' at {where}" + (" as it is now: it, or its company, changed" * is_stale),
        remedy=f"lorary library prepare {library.path} --router {setting.router}"
        + (f" --features {setting.features}" if setting.features != "hidden" else "")
        + ", or lorary.model.prepare.prepare for one that came live",
    )


def _read(setting: Routing, library: Library, kind: str, names: Sequence[str]) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    for name, key in _keys(setting, library, names).items():
        stored = load_prepared(library, kind, key)
        for path, tensor in () if stored is None else stored.tensors.items():
            expert, own = path.split("/", 1) if setting.router in JOINT else (name, path)
            found.setdefault(expert, {})[own] = tensor
    return {name: found[name] for name in names if name in found}


def _keys(setting: Routing, library: Library, names: Sequence[str]) -> dict[str, Key]:
    """The keys to read, by expert; one under any name where they were made together."""
    if setting.router in JOINT:
        return {"": group_key(library, library.names())}
    return {name: expert_key(library, name) for name in names}
