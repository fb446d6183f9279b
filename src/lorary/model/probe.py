"""The probe: before a new request runs, a pass of the bare base over its prompt, in which experts are only scored.

It stops behind the first layers where these decide.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from inspect import signature
from itertools import count
from typing import Any

import torch
from torch import Tensor

from lorary.errors import UsageError
from lorary.lora.context import PerThread
from lorary.model.decision import Request
from lorary.model.early import early_pass
from lorary.model.features import decoder_of
from lorary.model.row_gates import spread
from lorary.ops.upload import upload

# Arguments in which families are given what they keep of earlier tokens.
_CACHES = ("past_key_values", "cache_params", "state", "mems")
_DECIDED = "_lorary_decided"
_KEYS = count()


def make_probers(requests: Sequence[PerThread[Request] | None], of_row: Sequence[int]) -> PerThread["Prober"]:
    """A prober for each thread; a cache that one of them filled is known to all.

    Args:
        requests: one for each different setting, None for settings that decide otherwise.
        of_row: as for `Prober`.
    """
    return PerThread(partial(_make_prober, requests, of_row, next(_KEYS)))


def _make_prober(requests: Sequence[PerThread[Request] | None], of_row: Sequence[int], key: int) -> "Prober":
    return Prober([None if each is None else each.here for each in requests], of_row, key)


class Prober:
    """Decides for each new request, when a pass of the base's decoder begins.

    A pass without cached tokens is a new request, and its real tokens are the prompt. One with cached tokens goes on
    with the request that filled the cache, which keeps its decision, also in a copy. One that repeats the last prompt
    and is one token longer than the pass before goes on with the last request: that is generation without a cache.
    A prompt that comes in pieces is decided beforehand (`lorary.model.prefill`).

    Args:
        requests: one for each different setting, None for settings that decide otherwise.
        of_row: the setting of each row that was set; one for all where it has one.
        key: of these settings, by which a cache says whose decisions it holds.
    """

    def __init__(self, requests: Sequence[Request | None], of_row: Sequence[int], key: int) -> None:
        self.requests, self.of_row = requests, of_row
        self.prompt: Tensor | None = None
        self._ids: Tensor | None = None
        self._length = 0
        self._num_behind = 0
        self._is_decided = False
        self._key = key

    def note(self, _model: torch.nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A pass of the whole model begins: where logits of the last n tokens are asked for, n - 1 are no prompt.

        Assisted generation hands the prompt over together with the assistant's draft, and asks for those logits.
        """
        num_logits = kwargs.get("logits_to_keep")
        self._num_behind = num_logits - 1 if isinstance(num_logits, int) and num_logits > 1 else 0

    def __call__(self, decoder: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Probe if the pass that begins is a new request."""
        arguments = {**dict(zip(signature(decoder.forward).parameters, args, strict=False)), **kwargs}
        cache, self._is_decided, is_decided = cache_of(arguments), False, self._is_decided
        if is_filled(cache):
            self._recall(cache)
        elif not (is_decided or self._goes_on(arguments)):
            self._probe(decoder, arguments)
        self._keep(cache)

    def decide(self, model: Any, arguments: Mapping[str, Any]) -> None:
        """Decide by a whole prompt, of which the next pass brings the first piece.

        Args:
            model: whose decoder is probed.
            arguments: what it would be given for the whole prompt, by name.
        """
        decoder = decoder_of(model)
        names = signature(decoder.forward).parameters
        self._num_behind = 0
        self._probe(decoder, {name: value for name, value in arguments.items() if name in names})
        self._ids, self._is_decided = None, True

    def forget(self) -> None:
        """Let the next pass be a new request, whatever was decided before."""
        self._ids, self._is_decided = None, False

    def mark(self, _decoder: torch.nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        """A pass of the decoder has ended: a cache that it made itself belongs to the request, too."""
        parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple) else ()
        for part in parts:
            if hasattr(part, "get_seq_length"):
                self._keep(part)

    def _keep(self, cache: Any) -> None:
        """Write down in a cache what was decided for its request."""
        if hasattr(cache, "__dict__"):
            vars(cache)[_DECIDED] = (self._key, [request and request.chosen for request in self.requests])

    def _recall(self, cache: Any) -> None:
        """What was decided for the request that filled a cache; nothing for a cache of other settings."""
        if not hasattr(cache, "__dict__"):  # a list of states: it can bear no mark, and goes on with the last request
            return
        key, decided = getattr(cache, _DECIDED, (None, []))
        if key != self._key:
            decided = [None] * len(self.requests)
        for request, chosen in zip(self.requests, decided, strict=True):
            if request is not None:
                request.chosen = chosen

    def _probe(self, decoder: torch.nn.Module, arguments: Mapping[str, Any]) -> None:
        ids = arguments.get("input_ids")
        try:
            started = self._start(arguments)

            def look(hidden: Tensor) -> bool:
                are_decided = [
                    request.see(rows_at(hidden, rows), None if ids is None else rows_at(ids, rows))
                    for request, rows in started
                ]
                return all(are_decided)

            with torch.no_grad():
                last = early_pass(decoder, {**arguments, **_uncached(arguments)}, look)
            for request, rows in started:
                request.finish(None if last is None else rows_at(last, rows))
        finally:
            for pending in self.requests:
                if pending is not None:
                    pending.stop()

    def _start(self, arguments: Mapping[str, Any]) -> list[tuple[Request, list[int] | None]]:
        """Begin the probe of each request; its rows of the batch, None for all of them."""
        real = self.prompt if self.prompt is not None else self._without_draft(real_tokens(arguments))
        of_row = spread(self.of_row, len(real)) if len(self.of_row) > 1 else []
        started: list[tuple[Request, list[int] | None]] = []
        for number, request in enumerate(self.requests):
            if request is not None:
                places = [row for row, own in enumerate(of_row) if own == number]
                rows = None if len(places) == len(of_row) else places
                request.start(rows_at(real, rows))
                started.append((request, rows))
        return started

    def _without_draft(self, real: Tensor) -> Tensor:
        is_prompt = torch.arange(real.shape[1], device=real.device) < real.shape[1] - self._num_behind
        return real & is_prompt

    def _goes_on(self, arguments: Mapping[str, Any]) -> bool:
        ids = arguments.get("input_ids")
        old, self._ids = self._ids, ids
        length, self._length = self._length, 0 if ids is None else ids.shape[1]
        if old is None or ids is None or len(old) != len(ids) or ids.shape[1] != length + 1:
            return False
        if not torch.equal(ids[:, : old.shape[1]], old):
            return False
        self._ids = old
        return True


def rows_at(tensor: Tensor, rows: Sequence[int] | None) -> Tensor:
    """Some rows of a tensor, by numbers that the host knows: a mask on a device would make it wait.

    Args:
        tensor: (batch, ...), on any device.
        rows: which; None for all of them.
    """
    return tensor if rows is None else tensor[upload(torch.tensor(rows), tensor.device)]


def cache_of(arguments: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a pass, by whatever name its family gives it; None where there is none."""
    return next((arguments[name] for name in _CACHES if arguments.get(name) is not None), None)


def is_filled(cache: Any) -> bool:
    """Whether a cache holds tokens already."""
    if cache is None:
        return False
    if not hasattr(cache, "get_seq_length"):
        return True  # the states of a recurrent model, which come from a pass
    return cached_length(cache) > 0 or (hasattr(cache, "has_previous_state") and _has_states(cache))


def cached_length(cache: Any) -> int:
    """How many tokens a cache holds; 0 for one of states, which do not tell."""
    try:
        return int(cache.get_seq_length())
    except (AttributeError, ValueError):
        return 0


def _has_states(cache: Any) -> bool:
    try:
        return bool(cache.has_previous_state())
    except ValueError:  # of attention alone
        return False


@contextmanager
def deciding_by(prober: Prober | None, prompt: Tensor) -> Iterator[None]:
    """Say which tokens of the passes inside the block are prompt, where answers stand behind them.

    Args:
        prober: of the model, None for one that decides nothing for requests.
        prompt: (batch, seq) bool.
    """
    if prober is None:
        yield
        return
    before, prober.prompt = prober.prompt, prompt
    prober._ids = None
    try:
        yield
    finally:
        prober.prompt = before


def real_tokens(arguments: Mapping[str, Any]) -> Tensor:
    """Which tokens of a pass are no padding, (batch, seq) bool, from the attention mask in any of its forms.

    Args:
        arguments: what the decoder was given, by name.

    Raises:
        UsageError: if it was given a mask of a kind that does not tell.
    """
    inputs = arguments.get("input_ids")
    inputs = arguments["inputs_embeds"] if inputs is None else inputs
    batch, seq = inputs.shape[:2]
    mask = arguments.get("attention_mask")
    if isinstance(mask, Mapping):  # one for each kind of layer
        mask = next((layer_mask for layer_mask in mask.values() if layer_mask is not None), None)
    if mask is None:
        return torch.ones(batch, seq, dtype=torch.bool, device=inputs.device)
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        raise UsageError(
            "per='request' must tell padding from the attention mask", found=f"a mask of type {type(mask).__name__}"
        )
    if mask.dim() == 2:
        return mask[:, -seq:].bool()
    # A real token attends to itself: True in a mask of bools, 0 in one that is added.
    diagonal = mask[:, 0].diagonal(dim1=1, dim2=2)[:, :seq]
    return (diagonal if diagonal.dtype == torch.bool else diagonal == 0).expand(batch, seq)


def _uncached(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that keep the probe out of the cache, whose empty places a mask may already show."""
    changed: dict[str, Any] = {name: None for name in _CACHES if name in arguments} | {"use_cache": False}
    seq = (arguments["inputs_embeds"] if arguments.get("input_ids") is None else arguments["input_ids"]).shape[1]
    mask = arguments.get("attention_mask")
    if isinstance(mask, Mapping):
        changed["attention_mask"] = {key: _cut(layer_mask, seq) for key, layer_mask in mask.items()}
    elif mask is not None:
        changed["attention_mask"] = _cut(mask, seq)
    return changed


def _cut(mask: Any, seq: int) -> Any:
    return mask[..., :seq] if isinstance(mask, Tensor) and mask.dim() == 4 else mask
