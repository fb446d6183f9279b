"""Whether a base model computes as Lorary supposes: found out once by a trial, kept in the cache, asked for everywhere.

`lorary.model.trial` says what is tried. A model with a fault is refused. Layers that no pass calls, or whose output
never reaches the logits, are left out of `all-linear`, and refused where something names them.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
import transformers
from torch import nn

from lorary.errors import AdapterError, BaseModelError
from lorary.formats.quiet import quiet_transformers
from lorary.library.fingerprint import bare_modules, fingerprint_of_model
from lorary.lora.flattened import note_rows
from lorary.lora.seat import CHILD, linear_shape
from lorary.model.finite import weight_at_fault
from lorary.model.handle import Handle
from lorary.model.kept import Verdict, read_verdict, write_verdict
from lorary.model.positions import configured_positions, guard_positions, shift_positions, text_config
from lorary.model.shorten import shortened
from lorary.model.trial import Outcome, in_words, reaching_layers, run_trial

# Raise it when a trial learns to see more: older verdicts are ignored then.
_FORMAT = 2
# A fault must show with each of these draws of token ids: experts of a mixture may flip by rounding in one of them.
_DRAWS = 3
# Tokens of the text in which layers that short ones leave out are looked for.
_LONGER = 300
# Attention whose pattern depends on the length of the batch, which short rows do not show.
_BY_LENGTH = {"attention_type": "block_sparse"}
# How the configuration says that a model reads both ways.
_DIRECTIONS = {"is_causal": True, "is_decoder": True, "use_bidirectional_attention": False}

_RUNS = "must run on token ids alone, and generate"
_WEIGHTS = "must have weights that its layers can compute with"

_verdicts: dict[str, Verdict] = {}


def verdict_of(model: Any) -> Verdict:
    """The verdict on a model: from this process, from the cache, or by a trial.

    Args:
        model: a transformers model; it is left as it was. One with experts seated in it has the verdict that it had.
    """
    if not _can_be_tried(model):
        return Verdict()
    key = _key(model)
    if key in _verdicts:
        return _verdicts[key]
    if any(CHILD in module._modules for module in model.modules()):
        return Verdict()
    verdict = read_verdict(key, model)
    if verdict is None:
        verdict, is_final = _try(model)
        if is_final:
            write_verdict(key, verdict)
    if verdict.rule != _WEIGHTS:
        _verdicts[key] = verdict
    return verdict


def check_computes(model: Any, name: str, *, must_run: bool = True) -> Verdict:
    """Refuse a base model that does not compute as Lorary supposes.

    Args:
        model: a transformers model, bare.
        name: what to call it in errors.
        must_run: whether to refuse a model that fails at token ids alone too, or generates otherwise.

    Returns:
        The verdict, for those who ask next: looking it up takes a fingerprint.

    Raises:
        BaseModelError: naming its architecture and what is wrong.
    """
    verdict = verdict_of(model)
    if verdict.fault and (must_run or verdict.rule != _RUNS):
        raise BaseModelError(
            f"the base model {name} ({type(model).__name__}) {verdict.rule}",
            found=verdict.fault,
            remedy="use a causal language model; docs/models.md lists families",
        )
    return verdict


def settle(model: Any, verdict: Verdict) -> list[Handle]:
    """Hooks that make positions count alike in every pass, refuse those at which they would not, and note rows.

    Args:
        model: a base model that `check_computes` took, changed in place.
        verdict: what that returned.

    Returns:
        Handles of the hooks; most models need none.
    """
    return [
        *shift_positions(model, verdict.shift),
        *guard_positions(model),
        *note_rows(model, verdict.flat),
    ]


def check_layers(model: Any, adapters: Mapping[str, Iterable[str]]) -> None:
    """Refuse adapters of a layer beside which experts would be silent.

    Args:
        model: the base model.
        adapters: paths of the layers that each adapts, by its name.

    Raises:
        AdapterError: naming the adapter and the layer.
    """
    dead = set(verdict_of(model).dead)
    for adapter, paths in adapters.items():
        if silent := [path for path in paths if path in dead]:
            raise AdapterError(
                f"adapter '{adapter}' adapts layer '{silent[0]}', whose output must reach the logits",
                found=f"{type(model).__name__} never calls this layer as a module, or drops its output",
                remedy="train the adapter without it: an update of its weight would have to be merged to act",
            )


def context_of(model: Any) -> int | None:
    """The positions that a text may take, or None where nothing bounds them.

    Args:
        model: a transformers model for causal language modelling.
    """
    bounds = (configured_positions(model), verdict_of(model).positions)
    return min((bound for bound in bounds if bound is not None), default=None)


def _can_be_tried(model: Any) -> bool:
    """Whether it is a language model of transformers, with its weights in reach."""
    if not isinstance(model, transformers.PreTrainedModel) or model.get_input_embeddings() is None:
        return False
    return not any(p.is_meta for p in model.parameters()) or hasattr(model, "hf_device_map")


def _key(model: Any) -> str:
    """What decides a verdict: weights, configuration, precision, kernels and versions."""
    config = model.config.to_dict()
    document = [
        _FORMAT, fingerprint_of_model(model).digest, type(model).__qualname__,
        {name: value for name, value in config.items() if name not in ("_name_or_path", "transformers_version")},
        str(text_config(model)._attn_implementation), str(model.dtype), model.device.type,
        transformers.__version__, torch.__version__,
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(document, sort_keys=True, default=str).encode()).hexdigest()


def _try(model: Any) -> tuple[Verdict, bool]:
    """The verdict, and whether it would be the same again."""
    try:
        return _tried(model)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a model raises at inputs that it does not take
        return Verdict(in_words(error), _RUNS), False


def _tried(model: Any) -> tuple[Verdict, bool]:
    with torch.random.fork_rng(devices=[]), quiet_transformers(), torch.inference_mode(False):
        if model.config.is_encoder_decoder:
            return Verdict(dead=_dead(model, *reaching_layers(model))), True
        quick = _quick(model)
        if quick is not None:
            return quick, True
        outcome = run_trial(model)
        for seed in range(1, _DRAWS):
            if outcome.is_clean:
                break
            outcome = run_trial(model, seed)
    verdict = _judge(model, outcome)
    if verdict.dead:
        # Some layers act on longer texts only.
        verdict = _judge(model, _with_longer(model, outcome))
    # One weight decides none of the fingerprint: a sound copy of the base has the same key.
    return verdict, verdict.rule != _WEIGHTS and not math.isnan(outcome.causality + outcome.company)


def _quick(model: Any) -> Verdict | None:
    """The verdict on a few blocks, if nothing is found there; else the whole model has to be tried."""
    with shortened(model) as rename:
        if rename is None:
            return None
        try:
            outcome = run_trial(model)
        except Exception:  # a model may need all of its blocks
            return None
    verdict = _judge(model, outcome, rename)
    is_sure = not math.isnan(outcome.causality + outcome.company)
    return verdict if is_sure and not verdict.fault and not verdict.dead else None


def _with_longer(model: Any, outcome: Outcome) -> Outcome:
    """What a trial saw, and the layers that a trial of a longer text sees besides."""
    try:
        longer = run_trial(model, length=_LONGER)
    except Exception:  # it may be too long for the model
        return outcome
    reached = outcome.reaching, longer.reaching
    reaching = None if reached[0] is None or reached[1] is None else reached[0] | reached[1]
    return replace(outcome, called=outcome.called | longer.called, reaching=reaching)


def _judge(model: Any, outcome: Outcome, rename: Any = str) -> Verdict:
    dead = _dead(model, outcome.called, outcome.reaching, rename)
    flat = tuple(path for path in _linear_paths(model) if rename(path) in outcome.flat)
    sound = Verdict(dead=dead, positions=outcome.positions, shift=outcome.shift, flat=flat)
    config = text_config(model)
    if outcome.looks_ahead:
        settings = [f"{name}={value}" for name in _DIRECTIONS if (value := getattr(config, name, None)) is not None]
        directions = f" ({', '.join(settings)} in its configuration)" if settings else ""
        rule = "must be causal: a token must not change what is computed for tokens before it"
        fault = f"changing the last token moved the logits of earlier ones by {outcome.causality:.2g} of their range"
        return replace(sound, fault=fault + directions, rule=rule)
    if outcome.failure:
        return replace(sound, fault=outcome.failure, rule=_RUNS)
    if outcome.company > outcome.tolerance:
        rule = (
            "must give a row the same logits with padding on its left, beside other rows, with a cache, and after "
            "other passes"
        )
        fault = f"logits that differ by {outcome.company:.2g} of their range"
        if math.isinf(outcome.company):
            dtype = str(model.dtype).removeprefix("torch.")
            fault = f"logits that are finite for a row alone and not in a batch, in {dtype}"
        if cause := weight_at_fault(model):
            fault, rule = cause, _WEIGHTS
        return replace(sound, fault=fault, rule=rule)
    for name, value in _BY_LENGTH.items():
        if getattr(config, name, None) == value:
            rule = "must attend alike whatever the length of the batch"
            return replace(sound, fault=f"{name}={value} in its configuration", rule=rule)
    return sound


def _dead(
    model: nn.Module, called: frozenset[str], reaching: frozenset[str] | None, rename: Any = str
) -> tuple[str, ...]:
    """Linear layers that reach no logits. An expert of a mixture that no token was sent to may be sent others."""
    alive = called if reaching is None else reaching
    layers = _linear_paths(model)
    return tuple(p for p in layers if rename(p) not in alive and not ("expert" in p and rename(p) not in called))


def _linear_paths(model: nn.Module) -> list[str]:
    return [path for path, module in bare_modules(model) if linear_shape(module)]
