"""`lorary explain`: how a routed library treats some prompts, and what each expert is worth to their answers."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lorary.data.jsonl import iter_records
from lorary.data.schema import shorten
from lorary.data.template import Example, make_template
from lorary.errors import TaskError, UsageError
from lorary.evaluate.explanation import Explanation, SeenPrompt, SeenToken
from lorary.evaluate.generation import stop_ids
from lorary.evaluate.loglik import answer_losses
from lorary.evaluate.routing import SINK_RATIO, norm_ratios
from lorary.library.store import Library
from lorary.model.attach import attach, routing, seating
from lorary.model.base import Base, load_base
from lorary.model.probe import deciding_by
from lorary.model.seating import constant_weights, prober_of
from lorary.model.setting import Routing, merged
from lorary.model.trace import trace
from lorary.recipes.display import Display
from lorary.recipes.generate import check_context, check_text, complete, prompt_ids
from lorary.recipes.open import base_of, template_of

FIRST_TOKEN = "first token of the row"


@dataclass(frozen=True)
class Prompt:
    """A prompt to explain.

    Args:
        text: the prompt.
        answer: the answer whose likelihood is looked at; the router's own greedy one where None.
    """

    text: str
    answer: str | None = None


def read_prompts(path: str) -> list[Prompt]:
    """Prompts out of a JSONL file: one object a line, `prompt` and perhaps `answer`.

    Raises:
        UsageError: if there is no such file, or a text is empty.
        TaskError: if a line is something else, or there is none; names file:line.
    """
    prompts = []
    for where, record in iter_records(path, "prompts"):
        if not isinstance(record, dict) or not {"prompt"} <= set(record) <= {"prompt", "answer"}:
            raise TaskError(
                f"{where}: a line must be an object with 'prompt' and perhaps 'answer', and nothing else",
                found=shorten(record),
                remedy='{"prompt": "...", "answer": "..."}',
            )
        wrong = {key: value for key, value in record.items() if not isinstance(value, str)}
        if wrong:
            raise TaskError(f"{where}: prompt and answer must be strings", found=shorten(wrong))
        for key, value in record.items():
            check_text(value, f"{where}: '{key}'")
        prompts.append(Prompt(record["prompt"], record.get("answer")))
    if not prompts:
        raise TaskError(f"{path}: the prompts file must hold a prompt", found="none")
    return prompts


def run_explain(
    library_path: str,
    prompts: Sequence[Prompt],
    *,
    router: str | None = None,
    experts: Sequence[str] | None = None,
    against: str | None = None,
    without: Sequence[str] | None = None,
    most: int = 8,
    top_k: int | None = None,
    temperature: float | None = None,
    mix: Any = None,
    template: str | None = None,
    max_new_tokens: int = 32,
    base: str | None = None,
    force_base: bool = False,
    device: str = "auto",
    dtype: str = "auto",
) -> Explanation:
    """Load a library and its base, and see how prompts are routed.

    Args:
        library_path: folder of the library.
        prompts: at least one.
        router: name of a router; the library's default where None.
        experts: named experts in place of a router.
        against: another router to compare with, under the same settings.
        without: experts to take out, one at a time; the most used ones where None.
        most: how many of the most used, 0 for none.
        top_k: experts per token and layer.
        temperature: divides the router's scores.
        mix: `outputs` or `factors`.
        template: `plain` or `chat`; the experts' own where None.
        max_new_tokens: most tokens of an answer that is not given.
        base: the base model to load; the library's own where None.
        force_base: accept unrelated weights of the same shapes.
        device: where to run.
        dtype: of the base.

    Returns:
        What was seen.

    Raises:
        UsageError: if a text is empty or too long, an option is out of range, or an expert is not there.
        LoraryError: as for `lorary.attach`.
    """
    _check_options(prompts, experts, most, max_new_tokens)
    library = Library.open(library_path)
    name = template_of(library, template)
    _check_names(library, without or [])
    loaded = load_base(base_of(library, base), dtype=dtype, device=device)
    attach(
        loaded.model, library, router=router, top_k=top_k, temperature=temperature, mix=mix, experts=experts,
        force_base=force_base,
    )  # fmt: skip
    return explain(
        loaded, prompts, name, against=against, without=without, most=most, max_new_tokens=max_new_tokens,
    )  # fmt: skip


def explain(
    base: Base,
    prompts: Sequence[Prompt],
    template: str,
    *,
    against: str | None = None,
    without: Sequence[str] | None = None,
    most: int = 8,
    max_new_tokens: int = 32,
) -> Explanation:
    """See how the router in force treats prompts; see `run_explain`.

    Args:
        base: with experts seated.
        prompts: as there.
        template: `plain` or `chat`.
        against: as there.
        without: as there.
        most: as there.
        max_new_tokens: as there.

    Returns:
        What was seen.
    """
    state = seating(base.model)
    setting, names = state.routing, state.experts
    other = None if against is None else merged(setting, against)
    display = Display()
    with display.bar("tracing", len(prompts)) as bar:
        seen = []
        for prompt in prompts:
            seen.append(_see(base, prompt, template, other, max_new_tokens))
            bar.advance()
    layers = seen[0].layers
    constant = constant_weights(setting, names)
    known = Explanation(
        library=state.library.name,
        base_model=base.files.name,
        template=template,
        router="fixed" if setting.fixed is not None else setting.router,
        settings=setting.to_json(),
        experts=names,
        layers=layers,
        reach=_reach(base.model, layers, setting),
        prompts=[one.seen for one in seen],
        fixed=None if constant is None else {n: w for n, w in zip(names, constant.tolist(), strict=True) if w},
        log_likelihood=(),
        base=(),
    )
    return _scored(base, known, [one.example for one in seen], setting, other, _to_take_out(known, without, most))


@dataclass(frozen=True)
class _Seen:
    """A traced prompt, the ids behind it, and the layers that decided."""

    seen: SeenPrompt
    example: Example
    layers: list[str]


def _see(base: Base, prompt: Prompt, template: str, other: Routing | None, max_new_tokens: int) -> _Seen:
    """Answer a prompt where it comes without an answer, and record one uncached pass over both."""
    example = _example(base, prompt, template, max_new_tokens)
    stops = {*stop_ids(base.model, base.tokenizer)}
    is_finished = example.target_ids[-1] in stops
    shown = example.target_ids[:-1] if is_finished else example.target_ids
    answer = prompt.answer if prompt.answer is not None else base.tokenizer.decode(shown).strip()
    layers, weights, left_out = _trace(base, example)
    against = None
    if other is not None and weights is not None:
        with routing(base.model, other):
            others, against, _ = _trace(base, example)
        assert against is None or others == layers
    parts = ["prompt"] * len(example.prompt_ids) + ["answer"] * (len(example.target_ids) - 1)
    texts = token_texts(base.tokenizer, (*example.prompt_ids, *example.target_ids[:-1]))
    tokens = [SeenToken(*fields) for fields in zip(texts, parts, left_out, strict=True)]
    given = prompt.answer is not None
    seen = SeenPrompt(
        prompt.text, answer, given, is_finished, len(example.target_ids), tokens, weights, against
    )  # fmt: skip
    return _Seen(seen, example, layers)


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text of each token; a character of several tokens stands at its last one, and those before are empty.

    Args:
        tokenizer: transformers' own.
        ids: of the tokens.
    """
    texts: list[str] = []
    pending: list[int] = []
    for number, token in enumerate(ids, start=1):
        pending.append(token)
        text = str(tokenizer.decode(pending))
        is_part = text.endswith("\N{REPLACEMENT CHARACTER}") and number < len(ids)
        texts.append("" if is_part else text)
        pending = pending if is_part else []
    return texts


def _example(base: Base, prompt: Prompt, template: str, max_new_tokens: int) -> Example:
    if prompt.answer is None:
        ids = prompt_ids(base, prompt.text, template, max_new_tokens)
        # These very ids: the text they decode to may be cut otherwise when it is encoded again.
        return Example(ids, tuple(complete(base, ids, max_new_tokens=max_new_tokens)), 0)
    example = make_template(template, base.tokenizer, max_length=sys.maxsize).encode(prompt.text, prompt.answer)
    check_context(base, len(example.prompt_ids), len(example.target_ids))
    return example


def _trace(base: Base, example: Example) -> tuple[list[str], Tensor | None, list[str]]:
    """The layers that decided, their weights, and for each token why it is left out.

    One row alone, so that there is no padding to leave out.
    """
    ids = [*example.prompt_ids, *example.target_ids[:-1]]
    input_ids = torch.tensor([ids], device=base.model.device)
    is_prompt = torch.arange(len(ids), device=base.model.device)[None] < len(example.prompt_ids)
    with torch.no_grad(), trace(base.model) as traced, deciding_by(prober_of(base.model), is_prompt):
        states = base.model(input_ids=input_ids, use_cache=False, output_hidden_states=True).hidden_states
    # Some tokens stand out where a model keeps its hidden states to itself, too; the first one is known in any case.
    norms = [state[0].double().norm(dim=-1).cpu() for state in states or ()]
    ratios = norm_ratios(torch.stack(norms)).tolist() if norms else [0.0] * len(ids)
    left_out = [FIRST_TOKEN] + [_why(ratio) for ratio in ratios[1:]]
    return traced.layers, traced.stacked()[:, 0] if traced.layers else None, left_out


def _why(ratio: float) -> str:
    return f"norm {ratio:.0f} times the median" if ratio > SINK_RATIO else ""


def _reach(model: Any, layers: Sequence[str], setting: Routing) -> Tensor:
    """(layers, experts) bool: which experts may be chosen where."""
    state = seating(model)
    reach = torch.zeros(len(layers), len(state.experts), dtype=torch.bool)
    for i, path in enumerate(layers):
        reach[i, list(state.layers[path].experts)] = True
    if setting.allow is not None:
        reach &= torch.tensor([name in setting.allow for name in state.experts])
    return reach


def _to_take_out(known: Explanation, without: Sequence[str] | None, most: int) -> list[str]:
    """The experts that were named, else the most used ones that are used at all."""
    if without is not None:
        return list(dict.fromkeys(without))
    used = known.fixed if known.fixed is not None else _used(known)
    return [known.experts[i] for i in known.ranked() if used.get(known.experts[i])][:most]


def _used(known: Explanation) -> Mapping[str, float]:
    return dict(zip(known.experts, known.overall.measures.usage.tolist(), strict=True))


def _scored(
    base: Base,
    known: Explanation,
    examples: Sequence[Example],
    setting: Routing,
    other: Routing | None,
    names: Sequence[str],
) -> Explanation:
    """The log-likelihood of all answers under the router, the base, the other router, and without each expert."""
    settings = {"router": setting, "base": merged(setting, "base")} | ({"other": other} if other else {})
    taken_out = [without_expert(setting, name, known.experts) for name in names]
    found = []
    with Display().bar("scoring", len(settings) + len(names)) as bar:
        for one in (*settings.values(), *taken_out):
            with routing(base.model, one):
                found.append([-loss.total for loss in answer_losses(base.model, examples)])
            bar.advance()
    by_name = dict(zip(settings, found, strict=False))
    return replace(
        known,
        log_likelihood=by_name["router"],
        base=by_name["base"],
        against=(other.router, by_name["other"]) if other else None,
        without=dict(zip(names, found[len(settings) :], strict=True)),
    )


def without_expert(setting: Routing, name: str, experts: Sequence[str]) -> Routing:
    """The same settings without one expert; the bare base where none is left.

    Args:
        setting: a router, or fixed experts: named ones then share the weight 1 anew, given weights stay as they are.
        name: the expert.
        experts: all of them.
    """
    if setting.experts is not None:
        rest = [other for other in setting.experts if other != name]
        if not rest:
            return merged(setting, "base")
        is_given = isinstance(setting.experts, Mapping)
        return replace(setting, experts={n: setting.experts[n] for n in rest} if is_given else rest)  # type: ignore[call-overload]
    allowed = [other for other in setting.allow or experts if other != name]
    return replace(setting, allow=allowed) if allowed else merged(setting, "base")


def _check_options(prompts: Sequence[Prompt], experts: Sequence[str] | None, most: int, max_new_tokens: int) -> None:
    if not prompts:
        raise UsageError("there must be a prompt to explain", found="none", remedy="--prompt TEXT or --prompts FILE")
    for prompt in prompts:
        check_text(prompt.text, "--prompt")
        if prompt.answer is not None:
            check_text(prompt.answer, "--answer")
    if experts is not None and not experts:
        raise UsageError("--experts must name an expert", found="none", remedy="--router base uses no expert")
    if max_new_tokens < 1:
        raise UsageError("--max-new-tokens must be at least 1", found=max_new_tokens)
    if most < 0:
        raise UsageError("--most must be at least 0", found=most)


def _check_names(library: Library, names: Sequence[str]) -> None:
    missing = [name for name in names if name not in library.names()]
    if missing:
        raise UsageError(
            "--without must name experts of the library", found=missing, remedy=f"it has {library.names()}"
        )
