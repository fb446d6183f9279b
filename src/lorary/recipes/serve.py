"""`lorary serve`: one library behind an OpenAI-compatible interface."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from lorary.errors import MissingExtraError
from lorary.formats.base import resolve_base
from lorary.library.opening import base_of
from lorary.library.store import Library
from lorary.model.attach import attach
from lorary.model.base import load_base, load_tokenizer
from lorary.model.seating import seating
from lorary.model.verdict import context_of
from lorary.model.vocabulary import embedded_tokens
from lorary.recipes.base_options import BaseOptions
from lorary.report.explore import explore_page
from lorary.route.presets import merged
from lorary.route.setting import Routing
from lorary.serve.batching import RoutedEngine
from lorary.serve.engine import Engine
from lorary.serve.names import served_name
from lorary.serve.prompts import Prompts
from lorary.serve.settings import ServeSettings
from lorary.serve.sizes import Sizes
from lorary.serve.text_decider import TextDecider
from lorary.serve.upstream_settings import UpstreamSettings


def run_serve(
    library_path: str,
    settings: ServeSettings,
    *,
    ready: Callable[[str, str], None],
    load: BaseOptions | None = None,
    upstream: UpstreamSettings | None = None,
    **route: Any,
) -> None:
    """Load a library and its base, and answer requests until a signal ends it.

    Where another server answers, the base only decides; for a router that reads text alone it is not even loaded.

    Args:
        library_path: folder of the library.
        settings: how the server is reached, and what it bounds.
        ready: called with the address and the name of the library once requests are taken.
        load: the base model; the library's own where None.
        upstream: the server that answers; this one does where None.
        route: router, experts, preset and fields of a routing setting, as `lorary.attach` takes them.

    Raises:
        UsageError: if the port is taken, an option is out of range, or the server behind does not hold the experts.
        MissingExtraError: if the packages of the extra `serve` are not installed.
        LoraryError: as for `lorary.attach`.
    """
    try:
        from lorary.serve.app import create_app
        from lorary.serve.gateway import Gateway
        from lorary.serve.run import reserve, run
        from lorary.serve.server import Server
        from lorary.serve.upstream import Upstream
    except ImportError as error:
        raise MissingExtraError(str(error.name).partition(".")[0], "serve") from error
    load = load or BaseOptions()
    library = Library.open(library_path)
    # Before the base is loaded, which takes time.
    place = reserve(settings.host, settings.port)
    with place:
        by_text = None if upstream is None else _deciding_by_text(library, load, settings, route)
        engine, prompts, default = by_text or _with_base(library, load, settings, route)
        server = Server(engine, library, prompts, settings, default)
        gateway = None if upstream is None else Gateway(server, Upstream(upstream))
        app = create_app(server, partial(explore_page, library, live=True), gateway)
        run(app, server, place, lambda address: ready(address, served_name(library.name)))


def _with_base(
    library: Library, load: BaseOptions, settings: ServeSettings, route: Mapping[str, Any]
) -> tuple[Engine, Prompts, Routing]:
    base = load_base(base_of(library, load.base), dtype=load.dtype, device=load.device)
    attach(base.model, library, tokenizer=base.tokenizer, force_base=load.force_base, **route)
    # Places for one request of many answers beside requests of one.
    capacity = settings.max_requests + settings.max_choices
    engine = RoutedEngine(base, Sizes(rows=settings.batch, capacity=capacity))
    prompts = Prompts(
        library,
        base.tokenizer,
        context=context_of(base.model),
        num_tokens=embedded_tokens(base.model),
        most=settings.max_prompt_tokens,
    )
    return engine, prompts, seating(base.model).routing


def _deciding_by_text(
    library: Library, load: BaseOptions, settings: ServeSettings, route: Mapping[str, Any]
) -> tuple[Engine, Prompts, Routing] | None:
    """What decides without the base model; None where the router reads more than text."""
    changes = {key: value for key, value in route.items() if value is not None}
    default = merged(Routing.of(**library.default_router), changes)
    if default.options.features != "text":
        return None
    tokenizer = load_tokenizer(resolve_base(base_of(library, load.base)))
    decider = TextDecider(library, tokenizer)
    decider.check(default)
    # The server behind knows its context.
    prompts = Prompts(library, tokenizer, context=None, num_tokens=len(tokenizer), most=settings.max_prompt_tokens)
    return decider, prompts, default
