"""`lorary serve`: one library behind an OpenAI-compatible interface."""

from collections.abc import Callable
from typing import Any

from lorary.errors import MissingExtraError
from lorary.library.opening import base_of
from lorary.library.store import Library
from lorary.model.base import load_base
from lorary.model.vocabulary import embedded_tokens
from lorary.recipes.base_options import BaseOptions
from lorary.route.presets import merged, preset_fields
from lorary.route.setting import Routing
from lorary.serve.settings import ServeSettings


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
        from lorary.serve.run import listen, run
    except ImportError as error:
        raise MissingExtraError(str(error.name).partition(".")[0], "serve") from error
    from lorary.serve.names import served_name
    from lorary.serve.prompts import Prompts
    from lorary.serve.server import Server

    load = load or BaseOptions()
    library = Library.open(library_path)
    default = default_of(library, route)
    # Before the base is loaded, which takes time.
    place = listen(settings.host, settings.port)
    with place:
        base = load_base(base_of(library, load.base), dtype=load.dtype, device=load.device)
        engine = make_engine(base, library, default, settings, force_base=load.force_base)
        context = base.most_tokens(_UNBOUNDED)
        prompts = Prompts(
            library,
            base.tokenizer,
            context=None if context == _UNBOUNDED else context,
            num_tokens=embedded_tokens(base.model),
            most=settings.max_prompt_tokens,
        )
        server = Server(engine, library, prompts, settings, default)
        run(create_app(server), server, place, lambda address: ready(address, served_name(library.name)))


_UNBOUNDED = 2**62


def default_of(library: Library, route: dict[str, Any]) -> Routing:
    """What the library's own name means: its default router, with what the options change.

    Raises:
        UsageError: if a setting does not exist or is out of range.
        RouterError: if there is no such router.
    """
    preset = route.pop("preset", None)
    return merged(Routing.of(**(library.default_router if preset is None else preset_fields(preset))), route)
