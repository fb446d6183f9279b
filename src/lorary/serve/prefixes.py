"""Prompts that begin alike are computed once: keys and values of beginnings, by what computed them."""

import hashlib
import json
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorary.adapter import content_hash
from lorary.formats.peft import tensors_of
from lorary.model.seating import Seating
from lorary.route.setting import Routing
from lorary.serve.row_cache import RowStates

# Beginnings are looked for at multiples of so many tokens.
STRIDE = 16


@dataclass(eq=False)
class _Entry:
    states: RowStates
    digests: list[bytes]

    @property
    def length(self) -> int:
        return len(self.digests) * STRIDE


class PrefixCache:
    """Beginnings of prompts, the least recently used ones forgotten first.

    Args:
        most_tokens: to keep, of all beginnings together; 0 keeps none.
    """

    def __init__(self, most_tokens: int) -> None:
        self.most_tokens = most_tokens
        self._entries: OrderedDict[int, _Entry] = OrderedDict()
        self._places: dict[bytes, tuple[int, int]] = {}
        self._next = 0

    @property
    def num_tokens(self) -> int:
        """Tokens that are kept."""
        return sum(entry.length for entry in self._entries.values())

    def find(self, computed_by: bytes, ids: Sequence[int]) -> tuple[RowStates, int] | None:
        """The longest known beginning of a prompt that leaves a token to compute; its states and length.

        Args:
            computed_by: what computes it; see `computed_by`.
            ids: of the prompt.
        """
        digests = list(_digests(computed_by, ids[:-1]))
        for number in range(len(digests), 0, -1):
            if (place := self._places.get(digests[number - 1])) is not None:
                entry = self._entries[place[0]]
                self._entries.move_to_end(place[0])
                length = number * STRIDE
                return [
                    None if pair is None else (pair[0][:, :, :length], pair[1][:, :, :length]) for pair in entry.states
                ], length
        return None

    def keep(self, computed_by: bytes, ids: Sequence[int], states: RowStates) -> None:
        """Keep the beginning of a prompt, unless it is known.

        Args:
            computed_by: what computed it.
            ids: of the prompt.
            states: of all its tokens; copied.
        """
        digests = list(_digests(computed_by, ids))
        length = len(digests) * STRIDE
        if not digests or digests[-1] in self._places or length > self.most_tokens:
            return
        while self._entries and self.num_tokens + length > self.most_tokens:
            self._forget()
        copied: RowStates = [
            None if pair is None else (pair[0][:, :, :length].clone(), pair[1][:, :, :length].clone())
            for pair in states
        ]
        number, self._next = self._next, self._next + 1
        self._entries[number] = _Entry(copied, digests)
        self._places.update({digest: (number, place) for place, digest in enumerate(digests)})

    def clear(self) -> None:
        """Forget all."""
        self._entries.clear()
        self._places.clear()

    def _forget(self) -> None:
        number, entry = self._entries.popitem(last=False)
        for digest in entry.digests:
            if self._places[digest][0] == number:  # else a later one begins alike
                del self._places[digest]


def contents(state: Seating) -> dict[str, str]:
    """The content hash of each expert that is seated."""
    hashes = {}
    for name in state.experts:
        if (adapter := state.live.get(name)) is None:
            hashes[name] = str(state.library.provenance(name)["content_hash"])
        else:
            hashes[name] = content_hash(adapter.config, adapter.tensors or tensors_of(adapter.modules))
    return hashes


def computed_by(setting: Routing, hashes: Mapping[str, str]) -> bytes:
    """What computes keys and values, so that none are shared between settings or experts that differ.

    Args:
        setting: of the request.
        hashes: of the experts that are seated; see `contents`.

    Returns:
        A digest of the setting and of the contents of all experts that may take part.
    """
    fixed = setting.fixed
    who: list[Any] = [setting.to_json()]
    experts = list(hashes)
    if fixed is not None:
        who = [fixed, setting.mix, setting.general.experts, setting.general.mode]
        experts = sorted(name for name in {*fixed, *(setting.general.experts or ())} if name in hashes)
    elif setting.router == "base":
        who, experts = ["base"], []
    document = [who, [(name, hashes[name]) for name in experts]]
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).digest()


def _digests(start: bytes, ids: Sequence[int]) -> Iterator[bytes]:
    """One digest for each beginning of whole strides."""
    digest = start
    for stop in range(STRIDE, len(ids) + 1, STRIDE):
        digest = hashlib.sha256(digest + array("q", ids[stop - STRIDE : stop]).tobytes()).digest()
        yield digest
