"""The interface: paths, and what each of them calls."""

from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, File, Form, Path, Query, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from lorary.data.conversation import Conversation
from lorary.data.template import Ids
from lorary.errors import LoraryError
from lorary.serve import adapters
from lorary.serve.answers import Answers
from lorary.serve.api_error import ApiError
from lorary.serve.gateway import Gateway
from lorary.serve.gone import unless_gone
from lorary.serve.guard import Guard
from lorary.serve.metrics import CONTENT_TYPE
from lorary.serve.page import Page
from lorary.serve.problems import error_response
from lorary.serve.prompts import PLAIN
from lorary.serve.router import Asked, session_of
from lorary.serve.schemas import (
    Adapters,
    Changed,
    ChatAnswer,
    ChatRequest,
    CompletionAnswer,
    CompletionRequest,
    Decided,
    Decisions,
    ErrorAnswer,
    Message,
    Model,
    Models,
    RouteRequest,
    RoutingFields,
    ServerUsage,
    State,
)
from lorary.serve.server import Server
from lorary.serve.shapes import ChatShape, CompletionShape
from lorary.serve.wanted import wanted_chat, wanted_completion
from lorary.version import __version__

# What any path may answer with beside its own answer.
_ERRORS = (400, 401, 403, 404, 408, 409, 413, 421, 429, 503, 504)
ERRORS: dict[int | str, dict[str, Any]] = {
    **{status: {"model": ErrorAnswer} for status in _ERRORS},
    "default": {"model": ErrorAnswer},
}
MOST_LISTED = 1000


def create_app(server: Server, page: Callable[[], str] | None = None, gateway: Gateway | None = None) -> FastAPI:
    """The interface of a server.

    Args:
        server: what all requests share.
        page: makes the page at `/`; there is none where None.
        gateway: passes requests on to a server that answers; the engine of `server` answers where None.
    """

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncGenerator[None, None]:
        await server.start()
        try:
            if gateway is not None:
                await gateway.start()
            yield
        finally:
            if gateway is not None:
                await gateway.stop()
            await server.stop()

    # Pages of documentation would load scripts from elsewhere; the schema itself is served.
    app = FastAPI(title="Lorary", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.include_router(_answering(server, gateway), prefix="/v1", responses=ERRORS)
    app.include_router(_telling(server), prefix="/v1", responses=ERRORS)
    app.include_router(_changing(server), prefix=adapters.PATH, responses=ERRORS)
    app.include_router(_watching(server, page), responses=ERRORS)
    app.add_middleware(Guard, server=server)
    for kind in (RequestValidationError, HTTPException, LoraryError, TimeoutError):
        app.add_exception_handler(kind, _refuse)
    _without_422(app)
    return app


def _answering(server: Server, gateway: Gateway | None) -> APIRouter:
    """Paths that decide and answer."""
    router, prompts = APIRouter(tags=["answers"]), server.prompts

    @router.post("/completions", response_model=CompletionAnswer)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Go on with a text, or with several; a stream of events where `stream` is true."""
        target, session = await server.router.target(body.model, body), session_of(request.headers)
        asked = []
        for source in _sources(body.prompt):
            if isinstance(source, str):
                template = body.template or PLAIN
                # What is echoed must be what was sent: no other template writes it.
                text = None if body.echo else source
                asked.append(Asked(target, prompts.encode(source, template), text, template, session))
            else:
                asked.append(Asked(target, source, session=session))
        if gateway is not None:
            return await gateway.respond(request, "completions", asked)
        wanted = wanted_completion(body)
        shape = CompletionShape(prompts.texts)
        answers = Answers(server, shape, request.state.request_id, body.model, asked, wanted)
        return await answers.respond(request)

    @router.post("/chat/completions", response_model=ChatAnswer)
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation; a stream of events where `stream` is true."""
        if gateway is not None:
            template = gateway.template(body.template)
            session = session_of(request.headers)
            asked = await _conversation(server, body, body.model, body.messages, session, template)
            return await gateway.respond(request, "chat/completions", [replace(asked, source=None)])
        wanted = wanted_chat(body)
        asked = await _conversation(server, body, body.model, body.messages, session_of(request.headers))
        shape = ChatShape(prompts.texts)
        answers = Answers(server, shape, request.state.request_id, body.model, [asked], wanted)
        return await answers.respond(request)

    @router.post("/route", response_model=Decided, response_model_exclude_none=False)
    async def route(body: RouteRequest, request: Request) -> Response:
        """A dry run: who would answer, and why."""
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "a dry run takes either a prompt or messages", param="prompt")
        session = session_of(request.headers)
        if body.messages is not None:
            template = None if gateway is None else gateway.template(body.template)
            asked = await _conversation(server, body, body.model, body.messages, session, template)
        else:
            template, source = body.template or PLAIN, body.prompt or ""
            target = await server.router.target(body.model, body)
            asked = Asked(target, prompts.encode(source, template), source, template, session)
        with server.traffic.place():
            return await unless_gone(request, _dry_run(server, asked, request.state.request_id, bool(body.trace)))

    return router


async def _dry_run(server: Server, asked: Asked, request_id: str, has_trace: bool) -> Response:
    server.prompts.check(asked.ids, 1)
    (routed,) = await server.router.route([asked], f"route-{request_id}", is_dry=True)
    receipt = await server.router.seen(routed) if has_trace else routed.receipt
    server.record(routed, "route", asked.source or asked.ids)
    return JSONResponse(receipt.to_json(), headers={"x-request-id": receipt.id, **receipt.headers()})


def _sources(prompt: Any) -> list[str | Ids]:
    """The prompts of a request, which may be one text, one list of token ids, or a list of either."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt or isinstance(prompt[0], int):
        return [tuple(prompt)]
    return [each if isinstance(each, str) else tuple(each) for each in prompt]


async def _conversation(
    server: Server,
    fields: RoutingFields,
    model: str,
    messages: list[Message],
    session: str | None,
    template: str | None = None,
) -> Asked:
    target = await server.router.target(model, fields)
    conversation = Conversation(tuple(message.turn for message in messages))
    is_base = target.setting.router == "base" and target.setting.fixed is None
    template = template or fields.template or server.prompts.chat_template(conversation, is_base=is_base)
    ids = server.prompts.encode(conversation, template)
    return Asked(target, ids, conversation, template, session)


def _telling(server: Server) -> APIRouter:
    """Paths that say what is served, and what was decided."""
    router = APIRouter(tags=["library"])

    @router.get("/models", response_model=Models)
    async def models() -> Models:
        """Names that requests may give as `model`."""
        names = server.router.names
        return Models(data=[_model(server, name, names.library) for name in names.all()])

    @router.get("/models/{name:path}", response_model=Model)
    async def model(name: Annotated[str, Path(max_length=1024)]) -> Model:
        """One of these names."""
        server.router.names.target(name, server.router.default)
        return _model(server, name, server.router.names.library)

    @router.get("/adapters", response_model=Adapters)
    def list_adapters() -> Response:
        """The adapters that are served; `cluster` is that of `lorary cluster`, where it was computed for them."""
        return JSONResponse({"data": adapters.listed(server)})

    @router.get("/decisions", response_model=Decisions)
    async def decisions(limit: Annotated[int, Query(ge=1, le=MOST_LISTED)] = 100) -> Response:
        """The last decisions, the very last first."""
        return JSONResponse({"data": server.decisions.last(limit)})

    @router.get("/decisions/{decision_id}")
    async def decision(decision_id: Annotated[str, Path(max_length=200)]) -> Response:
        """A decision again, by the id of its request."""
        entry = server.decisions.get(decision_id)
        if entry is None:
            remedy = "the last 1000 are kept; --log keeps all"
            raise ApiError(404, "the decision must be one of the last ones", found=decision_id[:100], remedy=remedy)
        return JSONResponse(entry)

    @router.get("/usage", response_model=ServerUsage)
    async def usage() -> Response:
        """What was answered since the server started."""
        return JSONResponse(server.decisions.tally.to_json())

    return router


def _model(server: Server, name: str, library: str) -> Model:
    is_part = name != library and name.startswith((f"{library}:", f"{library}@"))
    parent = library if is_part else "base" if name == library else None
    root = server.library.base.name if name == "base" else library
    return Model(id=name, created=server.started, root=root, parent=parent)


def _changing(server: Server) -> APIRouter:
    """Paths that change the library; they need the admin token."""
    router = APIRouter(tags=["library"])
    upload = File(description="a file of PEFT")
    Tasks = Annotated[str, Form(description="tasks that it was trained on, separated by commas")]

    @router.post("", response_model=Changed, status_code=201)
    async def add(
        name: Annotated[str, Form(max_length=200)],
        config: Annotated[UploadFile, upload],
        weights: Annotated[UploadFile, upload],
        tasks: Tasks = "",
    ) -> Changed:
        """Add an adapter: its adapter_config.json and adapter_model.safetensors."""
        server.traffic.check_open()
        await adapters.put(server, name, {"config": config, "weights": weights}, _split(tasks), is_new=True)
        return Changed(name=name)

    @router.put("/{name}", response_model=Changed)
    async def replace(
        name: Annotated[str, Path(max_length=200)],
        config: Annotated[UploadFile, upload],
        weights: Annotated[UploadFile, upload],
        tasks: Tasks = "",
    ) -> Changed:
        """Put an adapter in the place of the one that has its name."""
        server.traffic.check_open()
        await adapters.put(server, name, {"config": config, "weights": weights}, _split(tasks), is_new=False)
        return Changed(name=name)

    @router.delete("/{name}", response_model=Changed)
    async def remove(name: Annotated[str, Path(max_length=200)]) -> Changed:
        """Remove an adapter."""
        server.traffic.check_open()
        await adapters.remove(server, name)
        return Changed(name=name)

    return router


def _split(tasks: str) -> list[str]:
    return [task.strip() for task in tasks.split(",") if task.strip()]


def _watching(server: Server, page: Callable[[], str] | None) -> APIRouter:
    """Paths for those who watch the server."""
    router = APIRouter(tags=["server"])

    @router.get("/health", response_model=State)
    async def health() -> State:
        """Whether the process lives."""
        return State(status="ok")

    @router.get("/ready", response_model=State)
    async def ready() -> State:
        """Whether requests are taken."""
        server.traffic.check_open()
        if not server.engine.is_ready:
            raise ApiError(503, "the engine must take requests", remedy="restart the server", code="not_ready")
        return State(status="ok")

    @router.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Counts and times for Prometheus."""
        return Response(server.metrics.text(), headers={"content-type": CONTENT_TYPE})

    if page is not None:
        shown = Page(server.library, page)

        @router.get("/", include_in_schema=False)
        def show_page() -> Response:
            return shown.response()

    return router


async def _refuse(_request: Request, error: Exception) -> Response:
    return error_response(error)


def _without_422(app: FastAPI) -> None:
    """Leave the status out of the schema that FastAPI gives bad bodies by itself; ours is 400."""
    make = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = make()
            for methods in schema["paths"].values():
                for operation in methods.values():
                    operation["responses"].pop("422", None)
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
