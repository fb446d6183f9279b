"""One answer while it is made: tokens in, text out, cut at stop strings."""

from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lorary.data.template import Ids
from lorary.serve.engine import Finish, Stream, Token
from lorary.serve.stops import StopFinder
from lorary.serve.text import Detokeniser


@dataclass(frozen=True)
class Delta:
    """What an answer grows by.

    Args:
        index: of the answer among those of its request.
        text: that comes behind the text so far.
        tokens: those that have come to an end within it, each with the place in the answer where its text begins.
        finish: why the answer ends here; None where it goes on.
    """

    index: int
    text: str
    tokens: tuple[tuple[Token, int], ...] = ()
    finish: Finish | None = None


@dataclass(frozen=True)
class Echo:
    """A prompt that is written before its answer.

    Args:
        text: of the prompt.
        starts: place in it where the text of each token begins.
    """

    text: str
    starts: tuple[int, ...]


class Choice:
    """One answer of a request.

    Args:
        index: among the answers of the request.
        stream: its tokens.
        tokenizer: of the base.
        ids: of its prompt.
        stops: texts before which it is cut.
        is_trimmed: whether white space before its first word is left out.
        echo: its prompt, where that is written before it.
        on_token: called with each token.
    """

    def __init__(
        self,
        index: int,
        stream: Stream,
        tokenizer: Any,
        ids: Ids,
        stops: Sequence[str],
        *,
        is_trimmed: bool,
        echo: Echo | None,
        on_token: Callable[[], None],
    ) -> None:
        self.index, self.stream = index, stream
        self.new_ids: list[int] = []
        self.finish: Finish | None = None
        self._echo, self._on_token = echo, on_token
        self._detokeniser, self._finder = Detokeniser(tokenizer, ids), StopFinder(stops)
        self._is_trimmed = is_trimmed
        self._waiting: list[tuple[Token, int]] = []
        self._num_read = self._num_let = 0

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """The answer as it grows; the last of them says why it ends. Closing this breaks the answer off."""
        try:
            async for token in self.stream:
                self._on_token()
                if not self.new_ids and self._echo is not None:
                    yield self._echoed(self._echo)
                self.new_ids.append(token.id)
                delta = self._grown(token)
                if delta.finish:
                    self.finish = delta.finish
                    yield delta
                    return
                if delta.text or delta.tokens:
                    yield delta
            self.finish = "length"  # no token was asked for
            if not self.new_ids and self._echo is not None:
                yield self._echoed(self._echo)
            yield Delta(self.index, "", (), "length")
        finally:
            self.stream.cancel()

    def _echoed(self, echo: Echo) -> Delta:
        tokens = zip(self.stream.prompt, echo.starts, strict=False)  # none, where they are not asked for
        return Delta(self.index, echo.text, tuple(tokens))

    def _grown(self, token: Token) -> Delta:
        piece = self._detokeniser.push(token.id)
        self._waiting.append((token, self._num_read))
        if token.finish:
            piece += self._detokeniser.flush()
        self._num_read += len(piece)
        text, is_stopped = self._finder.push(piece)
        if token.finish and not is_stopped:
            text += self._finder.flush()
        self._num_let += len(text)
        finish: Finish | None = "stop" if is_stopped else token.finish
        # All of them where it ends by itself; before a stop string, those that have a part in what is let through.
        is_all = finish is not None and not is_stopped
        ready = [(each, start) for each, start in self._waiting if is_all or start < self._num_let]
        self._waiting = self._waiting[len(ready) :]
        ahead = 0 if self._echo is None else len(self._echo.text)
        placed = tuple((each, ahead + start) for each, start in ready)
        return Delta(self.index, self._trimmed(text), placed, finish)

    def _trimmed(self, text: str) -> str:
        if self._is_trimmed:
            text = text.lstrip()
            self._is_trimmed = not text
        return text
