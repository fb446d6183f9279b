"""`lorary explain` and `lorary.explain`: opens a library and its base, and explains prompts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorary.errors import UsageError, did_you_mean
from lorary.evaluate.explain_library import explain_library
from lorary.evaluate.explanation import Explanation
from lorary.evaluate.prompts import Prompt
from lorary.evaluate.settings import ExplainSettings
from lorary.flags import OptionValues
from lorary.keywords import with_settings
from lorary.library.opening import template_of
from lorary.library.store import Library
from lorary.model.attach import attach, detach
from lorary.model.base import Base
from lorary.recipes.base_options import BaseOptions
from lorary.recipes.inputs import base_at_hand, library_of, listed, prompts_of
from lorary.route.setting import FIELDS


@with_settings(ExplainSettings, BaseOptions, omit=("base",), also=(*FIELDS, "preset"))
def explain(
    library: Library | str | Path,
    prompts: str | Path | Prompt | Sequence[str | Prompt],
    *,
    answer: str | None = None,
    base: Base | str | Path | None = None,
    options: OptionValues,
    route: Mapping[str, Any],
) -> Explanation:
    """See which experts act on some prompts, and what each expert is worth to their answers.

    Args:
        library: the library, or the path of its folder.
        prompts: a text, or several; a `pathlib.Path` is a JSONL file of them.
        answer: the answer to the one prompt, whose likelihood is looked at; the router's own greedy one where None.
        base: the base model, loaded or by reference; the library's own where None. A loaded one is left as it was.
        options: the settings.
        route: a router, experts, a preset and fields of a routing setting, as `lorary.attach` takes them.

    Returns:
        What was seen. It shows prompts, answers and experts as tables.

    Raises:
        UsageError: if a text is empty or too long, an argument does not exist or is out of range, or an expert is not
            there.
        LoraryError: as for `lorary.attach`.
    """
    load = BaseOptions(**options[BaseOptions])
    fields = dict(options[ExplainSettings])
    if "without" in fields:
        fields["without"] = tuple(listed(fields["without"]) or ())
    settings = ExplainSettings(**fields)
    texts = prompts_of(prompts, answer, route.get("experts"))
    library = library_of(library)
    template = template_of(library, settings.template)
    _check_names(library, settings.without or ())
    loaded = base_at_hand(library, base, load)
    attach(loaded.model, library, tokenizer=loaded.tokenizer, template=template, force_base=load.force_base, **route)
    try:
        return explain_library(loaded, texts, template, settings)
    finally:
        detach(loaded.model)


def _check_names(library: Library, names: Sequence[str]) -> None:
    missing = [name for name in names if name not in library.names()]
    if missing:
        raise UsageError(
            "--without must name experts of the library",
            found=missing,
            remedy=did_you_mean(missing[0], library.names(), remedy=f"it has {library.names()}"),
        )
