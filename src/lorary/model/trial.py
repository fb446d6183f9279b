"""A trial of a base model: one pass with its way back, and one short generation, over the same few tokens.

What Lorary computes rests on three properties. The trial looks for each of them:
(a) a token changes no logits of tokens before it;
(b) a row has the same logits with padding on its left, beside other rows, with a cache, and after other passes;
(c) a layer is called as a module and its output reaches the logits, or else experts beside it would be silent.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from lorary.lora.seat import linear_shape
from lorary.model.positions import configured_positions, shifting_positions, text_config

LENGTH = 10  # tokens of the rows
_NEW = 3  # tokens that are generated
_PADDING = 4  # on the left of the shorter row
_SHORTEST = _NEW + 2
# Largest difference, by the spread of all logits, that rounding explains. Generation hands out logits in float32, and
# recurrent layers of a float64 model compute in it.
_TOLERANCE = 1e-4
_COARSE = 5e-2
# Rows of one batch and one length are rounded alike, so that the first property shows finer.
_SAME_BATCH = 0.2


@dataclass(frozen=True)
class Outcome:
    """What a trial saw.

    Args:
        causality: how far changing the last token moved earlier logits, by the spread of all logits.
        company: how far padding, company, a cache and earlier passes moved them; NaN where it could not be found out.
        failure: what generation raised, or nothing.
        called: paths of linear layers that were called.
        reaching: those whose output reached the logits; None where it could not be found out.
        flat: those that were given the tokens of all rows along one axis, row by row.
        positions: how many positions the model's tables hold; None where it has no table.
        shift: what the model adds to positions that it counts itself, and not to those that it is given.
        tolerance: what rounding explains of them.
    """

    causality: float
    company: float
    failure: str
    called: frozenset[str]
    reaching: frozenset[str] | None
    flat: frozenset[str]
    positions: int | None
    shift: int
    tolerance: float

    @property
    def is_clean(self) -> bool:
        """Whether (a) and (b) hold; logits that are not finite do not tell."""
        return not (self.looks_ahead or self.company > self.tolerance)

    @property
    def looks_ahead(self) -> bool:
        """Whether (a) does not hold."""
        return self.causality > (self.tolerance if self.tolerance < _COARSE else _SAME_BATCH * self.tolerance)


def run_trial(model: Any, seed: int = 0, length: int = LENGTH) -> Outcome:
    """Try a model in evaluation mode; it is left as it was.

    Args:
        model: a transformers model for causal language modelling, decoder-only.
        seed: of the token ids.
        length: of the rows, in tokens.

    Raises:
        Exception: whatever the model raises at plain token ids.
    """
    rows = _rows(model, seed, length)
    layers = {path: module for path, module in model.named_modules() if linear_shape(module)}
    watch = _Watch(layers, rows)
    with _evaluating(model):
        logits, tables, reaching = _pass(model, rows, watch)
        takes_positions = "position_ids" in signature(model.forward).parameters
        shift = tables.start - _given_start(model, rows) if tables.start and takes_positions else 0
        causality = _distance(logits[1, :-1], logits[0, :-1], logits)
        try:
            with shifting_positions(model, shift):
                company, failure = _company(model, rows, logits), ""
        except Exception as error:  # whatever a model raises at inputs that it does not take
            company, failure = math.nan, in_words(error)
    called, tolerance = frozenset(watch.outputs), _tolerance(model, layers)
    flat = frozenset(watch.flat)
    return Outcome(causality, company, failure, called, reaching, flat, tables.positions, shift, tolerance)


def in_words(error: Exception) -> str:
    """The kind of an error and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"


def reaching_layers(model: Any) -> tuple[frozenset[str], frozenset[str] | None]:
    """Which linear layers of an encoder-decoder are called, and which reach the logits; as in `Outcome`."""
    rows = _rows(model, 0, LENGTH)
    watch = _Watch({path: module for path, module in model.named_modules() if linear_shape(module)}, rows)
    with _evaluating(model):
        _, _, reaching = _pass(model, rows, watch, decoder_input_ids=rows)
    return frozenset(watch.outputs), reaching


def _pass(model: Any, rows: Tensor, watch: "_Watch", **more: Any) -> tuple[Tensor, "_Tables", frozenset[str] | None]:
    """Logits of rows of one length, the model's tables of positions, and the layers that reach the logits."""
    tables = _Tables(rows.shape[1], model.get_input_embeddings())
    with torch.enable_grad(), watch, tables:
        logits = model(input_ids=rows, use_cache=False, **more).logits
    return logits.detach(), tables, watch.reaching(logits)


def _given_start(model: Any, rows: Tensor) -> int:
    """Where the table is read for positions from 0 on that the model is given, as generation gives them."""
    tables = _Tables(rows.shape[1], model.get_input_embeddings())
    positions = torch.arange(rows.shape[1], device=rows.device).expand_as(rows)
    with torch.no_grad(), tables:
        model(input_ids=rows, position_ids=positions, use_cache=False)
    return tables.start


def _rows(model: Any, seed: int, length: int) -> Tensor:
    """(2, length) token ids that differ in the last one; no special tokens where the vocabulary has others."""
    size = int(model.get_input_embeddings().num_embeddings)
    special = set(_special_ids(model.config)) | set(_special_ids(text_config(model)))
    allowed = torch.tensor([i for i in range(min(size, 1000)) if i not in special] or [0])
    length = max(_SHORTEST, min(length, configured_positions(model) or length))
    drawn = torch.randperm(max(len(allowed), length + 1), generator=torch.Generator().manual_seed(seed))
    ids = allowed[drawn[: length + 1] % len(allowed)]
    return torch.stack([ids[:-1], torch.cat([ids[:-2], ids[-1:]])]).to(model.get_input_embeddings().weight.device)


def _special_ids(config: Any) -> Iterator[int]:
    for name, value in vars(config).items():
        if name.endswith(("token_id", "token_index")):
            yield from (i for i in (value if isinstance(value, list) else [value]) if isinstance(i, int))


def _company(model: Any, rows: Tensor, logits: Tensor) -> float:
    """How far the logits of a padded row and of a longer one beside it, generated with a cache, are from `logits`.

    Padding is an ordinary token here, as it is where EOS serves for it: a row of zeros would hide what it does.
    """
    ids, padding = rows[0], int(rows[1, -1])
    longest = len(ids) - _NEW + 1
    lengths = (max(1, longest - _PADDING), longest)
    prompts, mask = ids.new_full((2, lengths[1]), padding), ids.new_zeros(2, lengths[1])
    for row, length in enumerate(lengths):
        prompts[row, lengths[1] - length :], mask[row, lengths[1] - length :] = ids[:length], 1
    forced = torch.stack([ids[length : length + _NEW - 1] for length in lengths])
    with torch.no_grad(), _plain_generation(model):
        step_logits = model.generate(
            input_ids=prompts, attention_mask=mask, max_new_tokens=_NEW, do_sample=False, use_cache=True,
            return_dict_in_generate=True, output_logits=True, logits_processor=LogitsProcessorList([_Forced(forced)]),
        ).logits  # fmt: skip
    if bool(logits.isfinite().all()) and not all(bool(step.isfinite().all()) for step in step_logits):
        return math.inf
    steps = [
        _distance(step_logits[step][row], logits[0, length - 1 + step], logits)
        for row, length in enumerate(lengths)
        for step in range(_NEW)
    ]
    return max(steps)


def _pad_id(model: Any) -> int:
    pad_id = getattr(text_config(model), "pad_token_id", None)
    size = int(model.get_input_embeddings().num_embeddings)
    return pad_id if isinstance(pad_id, int) and 0 <= pad_id < size else 0


class _Forced(LogitsProcessor):
    """Lets generation take the tokens that the pass took.

    Args:
        tokens: (rows, steps), the new tokens of each row; what comes behind them does not matter.
    """

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens
        self._step = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(rows, ids) scores of which the forced token's is the highest."""
        token = self.tokens[:, min(self._step, self.tokens.shape[1] - 1), None].to(scores.device)
        self._step += 1
        size = max(scores.shape[-1], int(self.tokens.max()) + 1)
        return scores.new_zeros(len(scores), size).scatter(1, token, 1.0)


def _distance(logits: Tensor, reference: Tensor, scale: Tensor) -> float:
    """Largest difference by the spread of all logits; NaN where they are not finite."""
    spread = scale.max() - scale.min()
    return float((logits - reference).abs().max() / spread.clamp_min(torch.finfo(scale.dtype).tiny))


def _tolerance(model: Any, layers: Mapping[str, nn.Module]) -> float:
    weights = [getattr(layer, "weight", None) for layer in layers.values()]
    is_plain = all(isinstance(w, Tensor) and type(w).dequantize is Tensor.dequantize for w in weights)
    if not is_plain or getattr(model, "hf_quantizer", None) is not None:
        return _COARSE
    if model.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        return _COARSE
    return _TOLERANCE if model.dtype in (torch.float32, torch.float64) else _COARSE


class _Watch:
    """Forward hooks that add an offset of zero to the output of each layer, so that a gradient tells what it reaches.

    Args:
        layers: linear layers by path.
        rows: that are fed: two, which differ in the last token.
    """

    def __init__(self, layers: Mapping[str, nn.Module], rows: Tensor) -> None:
        self.layers, self.shape = layers, rows.shape
        self.outputs: dict[str, Tensor | None] = {}
        self.flat: set[str] = set()

    def __enter__(self) -> "_Watch":
        paths = {id(layer): path for path, layer in self.layers.items()}

        def offset(layer: nn.Module, _args: Any, output: Any) -> Any:
            path = paths[id(layer)]
            if path not in self.outputs and isinstance(output, Tensor) and self._is_flat(output):
                self.flat.add(path)
            zero = self.outputs.setdefault(path, None)
            if not isinstance(output, Tensor) or not output.is_floating_point() or not torch.is_grad_enabled():
                return output
            if zero is None:
                zero = torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True)
                self.outputs[path] = zero
            return output + zero

        self._handles = [layer.register_forward_hook(offset) for layer in self.layers.values()]
        return self

    def __exit__(self, *_exception: Any) -> None:
        for handle in self._handles:
            handle.remove()

    def _is_flat(self, output: Tensor) -> bool:
        """Whether tokens that the rows share have the same outputs where the first row and the second would lie."""
        if output.dim() != 2 or len(output) != self.shape.numel():
            return False
        first, second = output.detach().unflatten(0, self.shape)
        far = (first[1:] - first[:-1]).abs().max()
        return bool((first[:-1] - second[:-1]).abs().max() <= _COARSE * far)

    def reaching(self, logits: Tensor) -> frozenset[str] | None:
        """The layers that `logits` depend on; None where a layer of a kind without a way back is between."""
        offsets = {path: offset for path, offset in self.outputs.items() if offset is not None}
        if not offsets or not logits.requires_grad:
            return frozenset()
        try:
            gradients = torch.autograd.grad(logits.sum(), list(offsets.values()), allow_unused=True)
        except (RuntimeError, NotImplementedError):
            return None
        return frozenset(path for path, grad in zip(offsets, gradients, strict=True) if grad is not None)


class _Tables(TorchFunctionMode):
    """Watches look-ups: a table that is asked for consecutive entries is one of positions, and may begin with others.

    Args:
        length: tokens of the rows that are fed.
        words: the embedding of the token ids.
    """

    def __init__(self, length: int, words: nn.Module) -> None:
        super().__init__()
        self.length, self.words, self.start = length, words, 0
        self.positions: int | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.embedding and len(args) > 1 and args[1] is not getattr(self.words, "weight", 0):
            self._look(args[0], len(args[1]))
        return func(*args, **(kwargs or {}))

    def _look(self, ids: Tensor, size: int) -> None:
        if ids.ndim > 2 or ids.shape[-1] != self.length or ids.numel() > 2 * self.length:
            return
        first = ids.reshape(-1, self.length)
        if bool((first.diff(dim=1) == 1).all()):
            self.start = int(first[0, 0])
            usable = size - self.start
            self.positions = usable if self.positions is None else min(usable, self.positions)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _plain_generation(model: Any) -> Iterator[None]:
    """Without the base's own generation defaults, which would sample, search or stop."""
    defaults = model.generation_config
    model.generation_config = GenerationConfig(pad_token_id=_pad_id(model))
    try:
        yield
    finally:
        model.generation_config = defaults
