"""Requests and answers as JSON, in the shapes of the OpenAI interface and with the fields that routing adds.

Fields that nobody knows are ignored, as other servers of this interface do.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

from lorary.evaluate.decoding import HIGHEST, LOWEST
from lorary.numbers import MOST_COUNT, MOST_SEED

MOST_STOPS, MOST_STOP_LENGTH = 16, 1000
MOST_TOP_LOGPROBS = 20


def _unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("must be valid Unicode") from None
    return text


Text = Annotated[str, AfterValidator(_unicode)]
Count = Annotated[int, Field(ge=1, le=MOST_COUNT)]
TokenId = Annotated[int, Field(ge=0, le=MOST_COUNT)]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=MOST_STOP_LENGTH), AfterValidator(_unicode)]
Name = Annotated[str, StringConstraints(min_length=1, max_length=512), AfterValidator(_unicode)]
# Temperatures below the lowest leave what a float holds; 0 takes the likeliest token.
Temperature = Annotated[float, Field(ge=0.0, le=HIGHEST)]


class Strict(BaseModel):
    """Values are of the type that is asked for: no text is taken for a number, and none is infinite."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False, protected_namespaces=())


class RoutingFields(Strict):
    """What a request may say of its routing; a field that is left out is that of the model's name."""

    router: Name | None = Field(None, description="router that decides, in place of the model's own")
    top_k: Count | None = Field(None, description="experts per token and layer, or per request")
    temperature_routing: float | None = Field(None, description="divides the router's scores")
    threshold: float | None = Field(None, description="lowest score with which an expert may be chosen")
    null: float | None = Field(None, description="score of the base")
    allow: list[Name] | None = Field(None, description="experts that may be used at all")
    per: Literal["layer", "token", "request"] | None = Field(None, description="when the router decides")
    template: Literal["plain", "chat"] | None = Field(None, description="how the prompt is written")
    trace: bool | None = Field(None, description="show the decision in the answer, token by token")


class StreamOptions(Strict):
    """What a stream holds beside the answer."""

    include_usage: bool | None = None


class SamplingFields(RoutingFields):
    """What both kinds of answers may be asked for."""

    model: Name
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    temperature: Temperature | None = Field(None, description=f"0 is greedy, the default; else at least {LOWEST:g}")
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    seed: Annotated[int, Field(ge=0, le=MOST_SEED - 1000)] | None = None
    # These would change the answer in ways that are not supported, and are refused where they would.
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, Any] | None = None


class CompletionRequest(SamplingFields):
    """A request to go on with a text."""

    prompt: Text | list[TokenId] | list[Text] | list[list[TokenId]]
    max_tokens: Annotated[int, Field(ge=0, le=MOST_COUNT)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=MOST_TOP_LOGPROBS)] | None = None
    echo: bool | None = None
    best_of: int | None = None
    suffix: str | None = None


class TextPart(Strict):
    """A part of a message."""

    type: Literal["text"]
    text: Text


class Message(Strict):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1)]

    @property
    def turn(self) -> tuple[str, str]:
        """Role and text."""
        role = "system" if self.role == "developer" else self.role
        is_text = isinstance(self.content, str)
        return role, str(self.content) if is_text else "".join(part.text for part in self.content)  # type: ignore[union-attr]


Messages = Annotated[list[Message], Field(min_length=1, max_length=10_000)]


class ChatRequest(SamplingFields):
    """A request to answer a conversation."""

    messages: Messages
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP_LOGPROBS)] | None = None
    tools: list[Any] | None = None
    functions: list[Any] | None = None
    response_format: dict[str, Any] | None = None


class RouteRequest(RoutingFields):
    """A dry run: who would answer, and why. Either a prompt or messages."""

    model: Name
    prompt: Text | None = None
    messages: Messages | None = None


class ErrorBody(BaseModel):
    """What went wrong: the rule, the value found, and the remedy."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """An error as OpenAI's clients read it."""

    error: ErrorBody


class ExpertWeight(BaseModel):
    """An expert and its routing weight."""

    name: str
    weight: float


class ExpertScore(BaseModel):
    """An expert and its score, in units of the rule."""

    name: str
    score: float


class TokenRoute(BaseModel):
    """The experts of one token, as the mean over layers."""

    text: str
    experts: list[ExpertWeight]


class LayerRoute(BaseModel):
    """The experts of one group of layers, as the mean over tokens."""

    group: str
    experts: list[ExpertWeight]


class Decided(BaseModel):
    """A decision."""

    id: str
    router: str
    rule: str
    is_fallback: bool
    confidence: float | None
    threshold: float | None
    sentence: str
    experts: list[ExpertWeight]
    rejected: list[ExpertScore]
    ms: float
    num_tokens: int
    tokens: list[TokenRoute] | None = None
    layers: list[LayerRoute] | None = None


class Usage(BaseModel):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionChoice(BaseModel):
    """One text."""

    index: int
    text: str
    logprobs: dict[str, list[Any]] | None
    finish_reason: str | None


class CompletionAnswer(BaseModel):
    """Answer of `/v1/completions`."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    lorary: Decided | list[Decided] | None = None


class ChatMessage(BaseModel):
    """The assistant's turn."""

    role: Literal["assistant"]
    content: str


class ChatChoice(BaseModel):
    """One reply."""

    index: int
    message: ChatMessage
    logprobs: dict[str, Any] | None
    finish_reason: str | None


class ChatAnswer(BaseModel):
    """Answer of `/v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    lorary: Decided | list[Decided] | None = None


class Model(BaseModel):
    """A name that requests may give as `model`."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["lorary"] = "lorary"
    root: str
    parent: str | None


class Models(BaseModel):
    """All names that requests may give as `model`."""

    object: Literal["list"] = "list"
    data: list[Model]


class AdapterInfo(BaseModel):
    """An adapter of the library."""

    name: str
    rank: int
    targets: list[str] | None
    tasks: list[str]
    size: int
    content_hash: str
    cluster: int | None


class Adapters(BaseModel):
    """All adapters that are served."""

    data: list[AdapterInfo]


class Changed(BaseModel):
    """The adapter that was added, replaced or removed."""

    name: str


class Decisions(BaseModel):
    """Decisions, the last one first."""

    data: list[dict[str, Any]]


class ShadowUsage(BaseModel):
    """How often the router that decides beside the others chose as they did."""

    router: str
    requests: int
    agree: int


class ServerUsage(BaseModel):
    """What was answered since the server started."""

    requests: int
    fallback: int
    experts: dict[str, int]
    shadow: ShadowUsage | None


class State(BaseModel):
    """Whether the server can answer."""

    status: Literal["ok"]
