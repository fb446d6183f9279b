"""`lorary serve`: one library behind an OpenAI-compatible interface."""

from collections.abc import Callable
from typing import Any

from lorary.errors import MissingExtraError
from lorary.library.opening import base_of
from lorary.library.store import Library
from lorary.model.attach import attach
from lorary.model.base import load_base
from lorary.model.seating import seating
from lorary.model.verdict import context_of
from lorary.model.vocabulary import embedded_tokens
from lorary.recipes.base_options import BaseOptions
from lorary.serve.batching import RoutedEngine
from lorary.serve.names import served_name
from lorary.serve.prompts import Prompts
from lorary.serve.settings import ServeSettings
from lorary.serve.sizes import Sizes


def run_serve(
    library_path: str,
    settings: ServeSettings,
    *,
    ready: Callable[[str, str], None],
    load: BaseOptions | None = None,
    **route: Any,
) -> None:
    """Load a library and its base, and answer requests until a signal ends it.

    Args:
        library_path: folder of the library.
        settings: how the server is reached, and what it bounds.
        ready: called with the address and the name of the library once requests are taken.
        load: the base model; the library's own where None.
        route: router, experts, preset and fields of a routing setting, as `lorary.attach` takes them.

    Raises:
        UsageError: if the port is taken, or an option is out of range.
        MissingExtraError: if the packages of the extra `serve` are not installed.
        LoraryError: as for `lorary.attach`.
    """
    try:
        from lorary.serve.app import create_app
        from lorary.serve.run import reserve, run
        from lorary.serve.server import Server
    except ImportError as error:
        raise MissingExtraError(str(error.name).partition(".")[0], "serve") from error
    load = load or BaseOptions()
    library = Library.open(library_path)
    # Before the base is loaded, which takes time.
    place = reserve(settings.host, settings.port)
    with place:
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
        server = Server(engine, library, prompts, settings, seating(base.model).routing)
        run(create_app(server), server, place, lambda address: ready(address, served_name(library.name)))
