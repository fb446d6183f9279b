"""Stop strings in a text that comes in pieces: no part of one is ever let through."""

from collections.abc import Sequence


class StopFinder:
    """Lets a text through up to the first stop string in it.

    What may be the beginning of a stop string is held back until it is known.

    Args:
        stops: texts that end an answer; the answer is cut before them.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, piece: str) -> tuple[str, bool]:
        """Take the next piece.

        Returns:
            What can be let through, and whether a stop string was found behind it.
        """
        text = self._held + piece
        found = [place for place in (text.find(stop) for stop in self._stops) if place >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        num_held = max((_num_begun(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held], False

    def flush(self) -> str:
        """What was held back, where the answer ends without a stop string."""
        held, self._held = self._held, ""
        return held


def _num_begun(text: str, stop: str) -> int:
    """How many characters at the end of a text are the beginning of a stop string."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
