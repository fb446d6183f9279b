"""`lorary serve`: one library behind an OpenAI-compatible interface."""

import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stdout
from functools import partial
from typing import Any

from lorary.errors import MissingExtraError, UsageError
from lorary.formats.base import resolve_base
from lorary.library.opening import base_of
from lorary.library.store import Library
from lorary.model.attach import attach
from lorary.model.base import Base, load_base, load_tokenizer
from lorary.model.seating import seating
from lorary.model.verdict import context_of
from lorary.model.vocabulary import embedded_tokens
from lorary.recipes.base_options import BaseOptions
from lorary.report.explore import explore_page
from lorary.route.presets import merged
from lorary.route.setting import Routing
from lorary.serve.batching import RoutedEngine
from lorary.serve.engine import Engine
from lorary.serve.following import FollowingEngine
from lorary.serve.names import served_name
from lorary.serve.prompts import Prompts
from lorary.serve.replica import Facts
from lorary.serve.replicas import Replicas
from lorary.serve.settings import ServeSettings
from lorary.serve.sizes import Sizes
from lorary.serve.text_decider import TextDecider
from lorary.serve.upstream_settings import UpstreamSettings
from lorary.train.ray_worker import Site, check_site, site_of


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
        MissingExtraError: if the packages of the extra `serve` are not installed, or of `ray` where it is asked for.
        TrainError: if the Ray cluster that was named does not answer, or has other packages.
        EngineError: if a replica dies while it starts.
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
    if upstream is not None and settings.executor != "local":
        raise UsageError("--upstream goes without --executor", found=f"--executor {settings.executor}")
    load = load or BaseOptions()
    library = Library.open(library_path)
    out = sys.stdout  # which is kept clear of what Ray prints
    with ExitStack() as stack:
        # Before the base is loaded, which takes time.
        place = stack.enter_context(reserve(settings.host, settings.port))
        engine: Replicas | FollowingEngine | TextDecider
        if settings.executor == "ray":
            engine, prompts, default = stack.enter_context(_with_replicas(library, load, settings, route))
        else:
            by_text = None if upstream is None else _deciding_by_text(library, load, settings, route)
            engine, prompts, default = by_text or _with_base(library, load, settings, route)
        server = Server(engine, library, prompts, settings, default)
        engine.versions.serve(server.change, server.look_again)
        gateway = None if upstream is None else Gateway(server, Upstream(upstream))
        app = create_app(server, partial(explore_page, library, live=True), gateway)

        def say(address: str) -> None:
            with redirect_stdout(out):
                ready(address, served_name(library.name))

        run(app, server, place, say)


def _with_base(
    library: Library, load: BaseOptions, settings: ServeSettings, route: Mapping[str, Any]
) -> tuple[FollowingEngine, Prompts, Routing]:
    seated = library.stamps()  # what changes while it is loaded is noticed later
    base, facts = _load_routed(library, load, route)
    engine = FollowingEngine(base, _sizes(settings), seated, library.stamps)
    return engine, _prompts(library, base.tokenizer, facts, settings), facts.routing


@contextmanager
def _with_replicas(
    library: Library, load: BaseOptions, settings: ServeSettings, route: Mapping[str, Any]
) -> Iterator[tuple[Replicas, Prompts, Routing]]:
    # Ray is an extra.
    from lorary.serve.ray_replicas import ray_replicas

    sizes, path = _sizes(settings), str(library.path.resolve())
    make = partial(_load_replica, site_of(path), load, sizes, dict(route))
    with ray_replicas(make, settings.replicas) as (launch, number):
        links = [launch() for _ in range(number)]
        replicas = Replicas(launch, links, sizes, library.stamps)
        facts = replicas.look()
        tokenizer = load_tokenizer(resolve_base(base_of(library, load.base)))
        yield replicas, _prompts(library, tokenizer, facts, settings), facts.routing


def _load_replica(site: Site, load: BaseOptions, sizes: Sizes, route: Mapping[str, Any]) -> tuple[Engine, Facts]:
    check_site(site, socket.gethostname())
    base, facts = _load_routed(Library.open(site.library), load, route)
    return RoutedEngine(base, sizes), facts


def _load_routed(library: Library, load: BaseOptions, route: Mapping[str, Any]) -> tuple[Base, Facts]:
    base = load_base(base_of(library, load.base), dtype=load.dtype, device=load.device)
    attach(base.model, library, tokenizer=base.tokenizer, force_base=load.force_base, **route)
    state = seating(base.model)
    return base, Facts(state.experts, state.routing, context_of(base.model), embedded_tokens(base.model))


def _sizes(settings: ServeSettings) -> Sizes:
    # Places for one request of many answers beside requests of one.
    return Sizes(rows=settings.batch, capacity=settings.max_requests + settings.max_choices)


def _prompts(library: Library, tokenizer: Any, facts: Facts, settings: ServeSettings) -> Prompts:
    return Prompts(
        library, tokenizer, context=facts.context, num_tokens=facts.num_tokens, most=settings.max_prompt_tokens
    )


def _deciding_by_text(
    library: Library, load: BaseOptions, settings: ServeSettings, route: Mapping[str, Any]
) -> tuple[TextDecider, Prompts, Routing] | None:
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
