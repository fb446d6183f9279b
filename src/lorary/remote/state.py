"""What a library remembers of its remotes: where it came from, and what it last had in common with each of them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lorary.library.files import encode_json, reported
from lorary.library.handles import opened
from lorary.library.layout import REMOTE
from lorary.reading import parse_json

STATE_FILE = "state.json"


@dataclass
class State:
    """What is written in `.remote/state.json`.

    Args:
        origin: URL of the remote that was last pushed to or pulled from; None where there is none.
        agreed: by root of a remote, digests of the entries that both had.
    """

    origin: str | None = None
    agreed: dict[str, Mapping[str, str]] = field(default_factory=dict)


def read_state(library: Path) -> State:
    """The state of a library. Where it is missing or damaged nothing is remembered, so that nothing is overwritten."""
    try:
        with opened(library) as root, root.enter(REMOTE) as folder:
            document = parse_json(folder.read(STATE_FILE))
        agreed: dict[str, Mapping[str, str]] = {
            str(root): {str(entry): str(digest) for entry, digest in entries.items()}
            for root, entries in document["agreed"].items()
        }
        origin = document["origin"]
        return State(origin if isinstance(origin, str) else None, agreed)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return State()


def write_state(library: Path, state: State) -> None:
    """Replace the state of a library, atomically.

    Raises:
        LibraryError: if it cannot be written.
    """
    document = json.loads(json.dumps({"agreed": state.agreed, "origin": state.origin}))
    with reported(library), opened(library) as root, root.enter(REMOTE, make=True) as folder:
        folder.replace(STATE_FILE, encode_json(document), f"{STATE_FILE}.new")
