"""What an engine does for the server: decide which experts answer a prompt, and make tokens."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from lorary.data.template import Ids
from lorary.evaluate.decisions import Decision
from lorary.evaluate.sampling import Sampling
from lorary.route.setting import Routing

Finish = Literal["stop", "length"]


@dataclass(frozen=True)
class Job:
    """One answer to be made.

    Args:
        ids: token ids of the prompt.
        setting: what answers: named experts with weights, the base, or a rule that decides for each token. A rule that
            decides for the whole request is asked before (`Engine.decide`), and its decision stands here.
        max_new_tokens: most tokens of the answer; 0 where only the prompt's log-probabilities are asked for.
        sampling: how tokens are drawn; the likeliest ones are taken where None.
        seed: of the draws of this answer alone, whatever else is in the batch; anything where None.
        num_top: how many of the likeliest tokens are reported beside each token; log-probabilities are left out where
            None.
        prompt_logprobs: whether those of the prompt's tokens are reported too.
        timeout: seconds after which the answer is broken off; never where None.
        session: that the answer belongs to; what is kept of its beginning is near to the rest of it.
    """

    ids: Ids
    setting: Routing
    max_new_tokens: int
    sampling: Sampling | None = None
    seed: int | None = None
    num_top: int | None = None
    prompt_logprobs: bool = False
    timeout: float | None = None
    session: str | None = None


@dataclass(frozen=True)
class Token:
    """One token of a prompt or an answer.

    Args:
        id: of the token.
        logprob: natural logarithm of its probability in the model's own distribution (temperature 1); None for the
            first token of a prompt, and where none were asked for.
        top: the likeliest tokens there with theirs, best first.
        finish: why the answer ends with this token; None where it goes on.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    finish: Finish | None = None


@runtime_checkable
class Stream(Protocol):
    """An answer while it is made."""

    prompt: Sequence[Token]
    """Tokens of the prompt with their log-probabilities, where these were asked for; filled before the first token."""

    def __aiter__(self) -> AsyncIterator[Token]:
        """The tokens of the answer as they are made, the one that ends it counted; raises what went wrong."""
        ...

    def cancel(self) -> None:
        """Break the answer off and free its place; any number of times, at any time."""
        ...


@dataclass(frozen=True)
class Traced:
    """How the tokens of one text were routed.

    Args:
        experts: names, in the order of the last axis.
        layers: paths of the layers that decided, in the model's order; empty where no token decides.
        weights: routing weight of each expert, float32 on the CPU.
    """

    experts: tuple[str, ...]
    layers: tuple[str, ...]
    weights: Float[Tensor, "layers tokens experts"]


@dataclass(frozen=True)
class Load:
    """How busy an engine is: requests that wait, requests that are answered, and the most of both."""

    waiting: int
    running: int
    capacity: int


@runtime_checkable
class Engine(Protocol):
    """Makes answers. All methods are called from one event loop; heavy work happens in a thread of the engine."""

    async def start(self) -> None:
        """Begin to take jobs."""
        ...

    async def stop(self, *, drain: float) -> None:
        """Take no more jobs, finish those that were accepted for at most `drain` seconds, break off the rest."""
        ...

    def submit(self, job: Job) -> Stream:
        """Accept a job.

        Raises:
            BusyError: if as many jobs are accepted as the engine holds.
            UsageError: if prompt and answer do not fit the base's context.
        """
        ...

    async def decide(self, setting: Routing, prompts: Sequence[Ids]) -> list[Decision]:
        """Let a rule that decides for whole requests decide for each prompt, by a pass of the base or a part of it."""
        ...

    @property
    def is_ready(self) -> bool:
        """Whether jobs are taken."""
        ...

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of the experts that are seated, sorted."""
        ...

    def check(self, setting: Routing) -> None:
        """Refuse a setting that cannot be used over the experts that are seated; may wait, and be called anywhere.

        Raises:
            RouterError: if it cannot.
            UsageError: if it names layers that are not routed.
        """
        ...

    async def trace(self, setting: Routing, ids: Ids) -> Traced:
        """Run one pass over a text, and record how each of its tokens is routed."""
        ...

    async def seat(self, name: str) -> None:
        """Seat the library's adapter of a name, in the place of the expert of that name where there is one.

        Jobs that were accepted before are answered without it; those accepted later, with it.

        Raises:
            LoraryError: if it cannot be seated; nothing has changed then.
        """
        ...

    async def unseat(self, name: str) -> None:
        """Take an expert out. Jobs that were accepted before are still answered with it.

        Raises:
            LoraryError: if it must stay; nothing has changed then.
        """
        ...

    def load(self) -> Load:
        """How busy the engine is now."""
        ...
