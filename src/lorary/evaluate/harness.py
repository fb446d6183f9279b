"""Tasks of lm-evaluation-harness on a model routed or not: its own interface for models, Lorary's scorer inside.

Its tokenising, truncation, chat templates and generation are those of the harness's own class for transformers models,
from which the one here inherits; log-likelihoods come from `lorary.evaluate.loglik`, which shares prompts, and lets a
router that decides for a whole request see the context alone.
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

import numpy as np
import torch

from lorary.data.schema import shorten
from lorary.data.template import Example
from lorary.errors import BaseModelError, MissingExtraError, TaskError
from lorary.evaluate.finite import finite_logits
from lorary.evaluate.generation import plain_generation
from lorary.evaluate.loglik import answer_losses
from lorary.model.verdict import context_of

try:
    # Any, because the package carries no types that can be followed in seconds.
    _hf: Any = import_module("lm_eval.models.huggingface")
    _evaluator: Any = import_module("lm_eval.evaluator")
    TaskManager: Any = import_module("lm_eval.tasks").TaskManager
except ImportError as error:
    raise MissingExtraError("lm-eval", "harness") from error

HFLM: Any = _hf.HFLM
# Prompts that a batch of generated answers holds.
GENERATED_ROWS = 16
# Those of the harness's command: for Python; for NumPy, torch and the examples of few-shot prompts.
PYTHON_SEED, SEED = 0, 1234

# (kind of request, task, what is asked, how to compute the answers) -> the answers.
Recall = Callable[[str, str, Sequence[Any], Callable[[], list[Any]]], list[Any]]


class HarnessModel(HFLM):
    """A model as lm-evaluation-harness sees it.

    Args:
        model: a transformers model for causal language modelling, routed or not.
        tokenizer: its tokenizer.
        recall: may answer what it answered before; by default everything is computed.
    """

    def __init__(self, model: Any, tokenizer: Any, recall: Recall | None = None) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=GENERATED_ROWS, max_length=context_of(model))
        self._recall = recall

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation after its context, and whether it is the likeliest token by token."""
        answers = self._by_task("loglikelihood", requests, super().loglikelihood)
        return [(float(value), bool(is_greedy)) for value, is_greedy in answers]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[float]:
        """Log-likelihood of each whole text, in windows of the model's context."""
        return self._by_task("loglikelihood_rolling", requests, super().loglikelihood_rolling)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:
        """An answer to each context, up to its stop words."""
        self._check_lengths(requests)
        with plain_generation(self.model, self.tokenizer):
            return self._by_task("generate_until", requests, super().generate_until)

    def _check_lengths(self, requests: Sequence[Any]) -> None:
        for request in requests:
            arguments = _hf.normalize_gen_kwargs(dict(request.args[1]), self.max_gen_toks)
            answer_length, total_length = arguments["max_gen_toks"], arguments.get("max_length", 1)
            for name, value in (("max_gen_toks", answer_length), ("max_length", total_length)):
                if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                    raise TaskError(
                        f"{name} of task '{request.task_name}' must be a whole number above 0", found=shorten(value)
                    )
            if total_length > self.max_length:
                raise TaskError(
                    f"prompt and answer of task '{request.task_name}' must fit the base's {self.max_length} positions",
                    found=f"max_length {total_length}",
                    remedy="a copy of the task with max_gen_toks in place of max_length",
                )  # fmt: skip
            if answer_length >= self.max_length:
                raise TaskError(
                    f"an answer to task '{request.task_name}' must leave room for a prompt in the base's "
                    f"{self.max_length} positions",
                    found=f"max_gen_toks {answer_length}",
                    remedy="a base with a longer context, or a copy of the task with a smaller max_gen_toks",
                )

    def tok_decode(self, tokens: Any, skip_special_tokens: bool = True) -> Any:
        """The text of ids, spaces before punctuation as they stand."""
        return self.tokenizer.decode(
            tokens, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )

    def get_model_info(self) -> dict[str, Any]:
        """Nothing: the harness would ask the Hub for what it takes for the model's name."""
        return {}

    def _by_task(self, kind: str, requests: Sequence[Any], compute: Callable[..., list[Any]]) -> list[Any]:
        """Answers in the order of the requests, which come for many tasks at once."""
        of_task: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            of_task.setdefault(request.task_name, []).append(number)
        answers: dict[int, Any] = {}
        for task, numbers in of_task.items():
            answers.update(zip(numbers, self._answer(kind, task, [requests[i] for i in numbers], compute), strict=True))
        return [answers[number] for number in range(len(requests))]

    def _answer(self, kind: str, task: str, requests: list[Any], compute: Callable[..., list[Any]]) -> list[Any]:
        def run() -> list[Any]:
            with finite_logits(self.model):
                answers = compute(requests, disable_tqdm=True)
            _check_sums(task, answers)
            return answers

        return run() if self._recall is None else self._recall(kind, task, [request.args for request in requests], run)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = True,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        examples = [self._example(context, continuation) for _, context, continuation in requests]
        answers = [(-loss.total, loss.is_greedy) for loss in answer_losses(self.model, examples)]
        for (strings, _, _), answer in zip(requests, answers, strict=True):
            if strings is not None:
                self.cache_hook.add_partial("loglikelihood", strings, answer)
        return answers

    def _example(self, context: Sequence[int], continuation: Sequence[int]) -> Example:
        """Cut from the left as the harness cuts: what is fed has `max_length` tokens, the last token is not fed."""
        if not 0 < len(continuation) <= self.max_length:
            raise TaskError(
                f"a continuation must have 1 to {self.max_length} tokens to be scored",
                found=f"{len(continuation)} tokens: {shorten(self.tok_decode(continuation))}",
                remedy="look at the task's choices and its target_delimiter",
            )
        prompt = tuple(context)[-(self.max_length + 1 - len(continuation)) :]
        return Example(prompt, tuple(continuation), len(context) - len(prompt))


def _check_sums(task: str, answers: Sequence[Any]) -> None:
    """Refuse log-likelihoods that are no finite numbers; generated answers are texts, and pass."""
    values = [answer[0] if isinstance(answer, tuple) else answer for answer in answers]
    bad = [value for value in values if isinstance(value, float) and not math.isfinite(value)]
    if bad:
        raise BaseModelError(
            f"log-likelihoods of task '{task}' must be finite numbers",
            found=f"{len(bad)} that are not, {bad[0]} among them",
            remedy="another --dtype",
        )


def load_tasks(names: Sequence[str], include_path: str | None = None) -> Mapping[str, Any]:
    """Tasks by their names in the harness, with their data.

    Args:
        names: of tasks, groups or tags, with wildcards where wanted.
        include_path: folder of further tasks; where it has all that are named, those that come with the harness are not
            looked through, which takes seconds.

    Returns:
        What the harness's `evaluate` takes.

    Raises:
        TaskError: if there is no such task, it does not load, or it runs code that a model wrote.
    """
    manager = None
    if include_path is not None:
        manager = TaskManager(include_path=include_path, include_defaults=False)
    if manager is None or _unknown(manager, names):
        manager = TaskManager(include_path=include_path)
    if missing := _unknown(manager, names):
        raise TaskError(
            "a task must be known to lm-evaluation-harness",
            found=", ".join(missing),
            remedy="lm_eval ls tasks; a folder of your own is named with --harness-path",
        )
    try:
        loaded: Mapping[str, Any] = manager.load(manager.match_tasks(list(names)))
    except Exception as error:  # whatever a task's own code and its data set raise
        raise TaskError(
            f"the tasks must load: {', '.join(names)}",
            found=f"{type(error).__name__}: {shorten(str(error))}",
            remedy="name each task once, not its group too; data on the Hub needs the network, or a copy in the cache",
        ) from error
    if unsafe := [name for name, task in loaded["tasks"].items() if getattr(task, "UNSAFE_CODE", False)]:
        raise TaskError("a task must not run code that a model wrote", found=", ".join(unsafe), remedy="lm_eval itself")
    return loaded


def _unknown(manager: Any, names: Sequence[str]) -> list[str]:
    return [name for name in names if not manager.match_tasks([name])]


def evaluate_tasks(
    model: Any, tasks: Mapping[str, Any], *, rows: int | None, shots: int | None, chat: bool
) -> Mapping[str, Any]:
    """Run tasks as the harness's own command does, its seeds included.

    Args:
        model: a `HarnessModel`, or another model of the harness's kind.
        tasks: of `load_tasks`.
        rows: the first so many of each task; all where None.
        shots: examples in the prompt, in place of the task's own number; a task that allows none keeps to it.
        chat: put prompts in the base's chat template.

    Returns:
        The harness's results.
    """
    random.seed(PYTHON_SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
    for task in tasks["tasks"].values():
        num_fewshot = task.get_config("num_fewshot")
        task.set_config(key="num_fewshot", value=(num_fewshot or 0) if shots is None or num_fewshot == 0 else shots)
        task.set_fewshot_seed(seed=SEED)
    report: Mapping[str, Any] = _evaluator.evaluate(
        lm=model, task_dict=tasks, limit=rows, log_samples=False, apply_chat_template=chat, fewshot_as_multiturn=chat
    )
    return report
