"""What a router needs beyond weights, computed from data and kept in the library.

One expert after the other is computed and stored, so that a run that was killed loses one of them; run again, it goes
on. What is there and was made of the same is kept. Contrast looks at all experts at once, and begins anew.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from lorary.data.template import make_template
from lorary.display import Display
from lorary.library.opening import template_of
from lorary.library.prepared import expert_key, load_prepared
from lorary.library.store import Library
from lorary.model.base import Base
from lorary.model.prepared import JOINT
from lorary.prepare.data import OwnData
from lorary.prepare.experts import CONTRAST, Preparer, PrepareSettings


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


def prepare_library(
    base: Base,
    library: Library,
    data: Mapping[str, OwnData],
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
        BaseModelError: if the model is not the library's base.
        RouterError: if the router must know all experts, and some are neither given nor there.
        LibraryError: if the library cannot be written.
    """
    library.check_base(base.model, force_base=force_base)
    limit = base.most_tokens(settings.max_length)
    template = make_template(template_of(library, None), base.tokenizer, max_length=limit)
    preparer = Preparer(base, library, settings, template)
    is_joint = settings.router in JOINT
    if is_joint:
        _check_all(preparer, data)
    done: dict[bool, list[str]] = {True: [], False: []}
    if settings.router == CONTRAST:
        done[preparer.pool(data)] += data
    else:
        with (display or Display()).bar(f"preparing {settings.router}", len(data)) as bar:
            for name, own in data.items():
                done[preparer.prepare(name, own)].append(name)
                bar.advance(name)
        if is_joint:
            preparer.fit()
    return PrepareResult(str(library.path), settings.router, settings.kind, prepared=done[True], kept=done[False])


def _check_all(preparer: Preparer, data: Mapping[str, OwnData]) -> None:
    """Refuse to tell experts apart some of which are unknown, before anything is computed."""
    library, kind = preparer.library, preparer.settings.expert_kind
    for name in library.names():
        if name not in data and load_prepared(library, kind, expert_key(library, name)) is None:
            raise preparer.unknown(name)
