"""What a request asks of its answers, checked."""

from collections.abc import Sequence
from dataclasses import dataclass

from lorary.evaluate.decoding import HIGHEST, LOWEST
from lorary.evaluate.sampling import Sampling
from lorary.serve.api_error import ApiError
from lorary.serve.schemas import ChatRequest, CompletionRequest, SamplingFields

# Where a request for a completion does not say; that is what OpenAI's clients expect.
DEFAULT_TOKENS = 16


@dataclass(frozen=True)
class Wanted:
    """What a request asks of its answers.

    Args:
        num_each: answers to each prompt.
        max_new_tokens: most tokens of each; what fits where None.
        sampling: how tokens are drawn; the likeliest ones are taken where None.
        seed: of the first answer; each other one has the next.
        stops: texts before which an answer is cut.
        num_top: likeliest tokens beside each token; no log-probabilities where None.
        is_echoed: whether prompts are written before their answers.
        is_streamed: whether answers come in pieces.
        has_usage: whether the last piece tells the number of tokens.
        has_trace: whether decisions are shown token by token.
    """

    num_each: int
    max_new_tokens: int | None
    sampling: Sampling | None
    seed: int | None
    stops: tuple[str, ...]
    num_top: int | None
    is_echoed: bool
    is_streamed: bool
    has_usage: bool
    has_trace: bool


def wanted_completion(request: CompletionRequest) -> Wanted:
    """What a request for completions asks.

    Raises:
        ApiError: if it asks for what is not supported.
    """
    if request.best_of not in (None, 1, request.n):
        raise _unsupported("best_of", request.best_of)
    if request.suffix:
        raise _unsupported("suffix", "a text")
    if request.max_tokens == 0 and not request.echo:
        raise ApiError(400, "max_tokens may be 0 with echo alone", found=0, param="max_tokens")
    most = DEFAULT_TOKENS if request.max_tokens is None else request.max_tokens
    return _wanted(request, most, request.logprobs, is_echoed=bool(request.echo))


def wanted_chat(request: ChatRequest) -> Wanted:
    """What a request for a reply asks.

    Raises:
        ApiError: if it asks for what is not supported.
    """
    if request.tools or request.functions:
        raise _unsupported("tools", "tools")
    if request.response_format and request.response_format.get("type") != "text":
        raise _unsupported("response_format", request.response_format.get("type"))
    if request.top_logprobs is not None and not request.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs", found="logprobs: false", param="top_logprobs")
    num_top = (request.top_logprobs or 0) if request.logprobs else None
    most = request.max_completion_tokens if request.max_tokens is None else request.max_tokens
    return _wanted(request, most, num_top, is_echoed=False)


def _wanted(request: SamplingFields, most: int | None, num_top: int | None, *, is_echoed: bool) -> Wanted:
    for name in ("presence_penalty", "frequency_penalty"):
        if getattr(request, name):
            raise _unsupported(name, getattr(request, name))
    if request.logit_bias:
        raise _unsupported("logit_bias", "biases")
    stops: Sequence[str] = [request.stop] if isinstance(request.stop, str) else request.stop or []
    return Wanted(
        num_each=request.n or 1,
        max_new_tokens=most,
        sampling=_sampling(request),
        seed=request.seed,
        stops=tuple(stops),
        num_top=num_top,
        is_echoed=is_echoed,
        is_streamed=bool(request.stream),
        has_usage=bool(request.stream_options and request.stream_options.include_usage),
        has_trace=bool(request.trace),
    )


def _sampling(request: SamplingFields) -> Sampling | None:
    """How tokens are drawn: greedily where the request says nothing, as `lorary generate` does."""
    temperature = request.temperature
    if temperature is None:
        temperature = 0.0 if request.top_p is None else 1.0
    if temperature == 0:
        return None
    if temperature < LOWEST:
        rule = f"temperature must be 0 or between {LOWEST:g} and {HIGHEST:g}"
        raise ApiError(400, rule, found=temperature, param="temperature")
    return Sampling(temperature, 1.0 if request.top_p is None else request.top_p)


def _unsupported(name: str, found: object) -> ApiError:
    return ApiError(400, f"{name} is not supported", found=found, remedy="leave it out", param=name, code="unsupported")
