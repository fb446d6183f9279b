"""What a server may answer while an adapter comes and goes, computed beforehand as `lorary generate` does.

The library passes through three states: without the live adapter, and with it in one of two versions. An answer is
right if it is that of a state which was in force at some time between its request and its end.
"""

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lorary.adapter import Adapter, LoraFactors
from lorary.data.tasks import load_tasks
from lorary.data.template import Ids
from lorary.data.text_of_ids import text_of_ids
from lorary.errors import LoraryError
from lorary.evaluate.completion import complete
from lorary.evaluate.decisions import asks_base, decide
from lorary.formats.peft import encode_adapter
from lorary.library.store import Library
from lorary.model.attach import attach, detach, routing
from lorary.model.base import Base
from lorary.route.presets import merged
from lorary.route.setting import CHAT, Routing
from lorary.serve.at_hand import routers_at_hand
from lorary.serve.prompts import PLAIN, Prompts

LIVE = "live-adapter"
WITHOUT, FIRST, SECOND = "without", "first", "second"
VERSIONS = (FIRST, SECOND)
MOST_ROUTERS, MOST_EXPERTS = 2, 4


@dataclass(frozen=True)
class Expected:
    """What each name answers to each prompt in each state.

    Args:
        prompts: as texts.
        names: that requests give as `model`.
        context: positions of the base.
        files: PEFT's files of each version of the live adapter.
        texts: by name, number of the prompt and state: the texts of 1, 2, ... tokens up to the longest answer; None
            where the name is refused.
    """

    prompts: Sequence[str]
    names: Sequence[str]
    context: int
    files: Mapping[str, Mapping[str, bytes]]
    texts: Mapping[tuple[str, int, str], Sequence[str] | None]

    def admitted(self, name: str, number: int, states: set[str], num_tokens: int) -> set[str | None]:
        """The answers of at most so many tokens that are right in one of the states; None for a refusal."""
        answers = [self.texts[name, number, state] for state in states]
        return {texts if texts is None else texts[min(num_tokens, len(texts)) - 1] for texts in answers}


def expected_answers(base: Base, library: Library, folder: Path, *, num_prompts: int, num_tokens: int) -> Expected:
    """Answer every prompt by every name in every state.

    Args:
        base: without experts.
        library: as it is served; it stays as it is.
        folder: for copies of it.
        num_prompts: of different lengths.
        num_tokens: of each answer.
    """
    versions = {version: _made(library, version) for version in VERSIONS}
    context = int(base.model.config.max_position_embeddings)
    prompts = _prompts(base, num_prompts, context - num_tokens)
    texts: dict[tuple[str, int, str], Sequence[str] | None] = {}
    names: list[str] = []
    for state in (WITHOUT, *VERSIONS):
        copy = Library.open(shutil.copytree(library.path, folder / state / library.name))
        if state != WITHOUT:
            copy.add_adapter(versions[state], {})
        attach(base.model, copy, tokenizer=base.tokenizer)
        default = Routing.of(**copy.default_router)
        names = names or _names(library, routers_at_hand(default, library))
        for name in names:
            if state != WITHOUT and not _depends_on_state(name, library):
                texts.update({(name, i, state): texts[name, i, WITHOUT] for i in range(num_prompts)})
                continue
            setting = _setting(name, copy, default)
            for number, prompt in enumerate(prompts):
                texts[name, number, state] = (
                    None if setting is None else _answer(base, copy, setting, prompt, num_tokens)
                )
        detach(base.model)
    return Expected(prompts, names, context, {state: encode_adapter(each) for state, each in versions.items()}, texts)


def _made(library: Library, version: str) -> Adapter:
    """An adapter of the shapes and sizes of the library's first one; what it answers is noise."""
    model = library.get(library.names()[0])
    generator = torch.Generator().manual_seed(VERSIONS.index(version))

    def like(tensor: torch.Tensor) -> torch.Tensor:
        return torch.randn(tensor.shape, generator=generator) * tensor.float().std().clamp(min=1e-3)

    modules = {path: LoraFactors(like(each.lora_a), like(each.lora_b), each.scaling) for path, each in model}
    return Adapter(LIVE, modules, model.config)


def _prompts(base: Base, number: int, most: int) -> list[str]:
    """Texts of different lengths, made of the builtin tasks; each second one begins as the one before it."""
    rows = [row.prompt for task in load_tasks("builtin").values() for row in task.split("val")[:4]]
    generator = torch.Generator().manual_seed(0)
    texts: list[str] = []
    for place in range(number):
        order = torch.randperm(len(rows), generator=generator)[: 1 + 2 * (place // 2)].tolist()
        text = "\n".join(rows[i] for i in order)
        text = f"{texts[-1]}\n{rows[place]}" if place % 2 else text
        while len(base.tokenizer(text)["input_ids"]) > most:
            text = text[: len(text) // 2]
        texts.append(text)
    return texts


def _names(library: Library, routers: Sequence[str]) -> list[str]:
    name, default = library.name, str(library.default_router["router"])
    others = [router for router in routers if router != default][:MOST_ROUTERS]
    experts = [*library.names()[:MOST_EXPERTS], LIVE]
    return [name, "base", *(f"{name}@{router}" for router in others), *(f"{name}:{expert}" for expert in experts)]


def _depends_on_state(name: str, library: Library) -> bool:
    """Whether the live adapter may answer: the base and the other experts are what they are."""
    return name != "base" and name.removeprefix(f"{library.name}:") not in library


def _setting(name: str, library: Library, default: Routing) -> Routing | None:
    """What a name means in a state; None where it is refused there."""
    if name == "base":
        return Routing("base")
    if name == library.name:
        return default
    if (expert := name.removeprefix(f"{library.name}:")) != name:
        return merged(default, {"experts": [expert]}) if expert in library else None
    router = name.removeprefix(f"{library.name}@")
    return merged(default, router) if router in routers_at_hand(default, library) else None


def _answer(base: Base, library: Library, setting: Routing, prompt: str, num_tokens: int) -> list[str] | None:
    """The texts of 1, 2, ... tokens of the answer to a text; the last one is whole."""
    prompts = Prompts(library, base.tokenizer, context=None, num_tokens=len(base.tokenizer), most=None)
    ids: Ids = prompts.encode(prompt, PLAIN)
    try:
        if setting.decides == "request":
            with routing(base.model, setting), torch.no_grad():
                (decision,) = decide(base.model, [ids])
            if asks_base(setting, decision) and prompts.has_chat:
                decision, ids = decision.of_base(), prompts.encode(prompt, CHAT)
            setting = decision.setting(setting)
        with routing(base.model, setting):
            new = complete(base, ids, max_new_tokens=num_tokens)
    except LoraryError:
        return None
    return [text_of_ids(base.tokenizer, new[: number + 1], ids, special=False) for number in range(len(new))]


@dataclass
class Timeline:
    """Which states were in force when, as far as one who changes them can tell.

    Args:
        changes: each state with the times at which its change was asked for and was acknowledged; the first one holds
            from the start.
    """

    changes: list[tuple[str, float, float | None]] = field(default_factory=lambda: [(WITHOUT, 0.0, 0.0)])

    @property
    def state(self) -> str:
        """The last one."""
        return self.changes[-1][0]

    def begin(self, state: str) -> None:
        """A change is asked for."""
        self.changes.append((state, time.monotonic(), None))

    def end(self) -> None:
        """It was acknowledged."""
        state, begin, _ = self.changes[-1]
        self.changes[-1] = (state, begin, time.monotonic())

    def during(self, begin: float, end: float) -> set[str]:
        """The states that may have been in force at some time between two times."""
        states = set()
        for place, (state, asked, _) in enumerate(self.changes):
            gone = self.changes[place + 1][2] if place + 1 < len(self.changes) else None
            if asked <= end and (gone is None or gone >= begin):
                states.add(state)
        return states
