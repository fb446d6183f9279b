"""What takes part in the routing benchmark: two bases, a library of made adapters that grows, and the contenders."""

import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import harness
import torch
from peft import ArrowConfig, PeftModel
from peft.tuners.lora.arrow import create_arrow_model
from route_floor import Routed
from train_peer import twin

import lorary
from lorary.keys import keyed_generator
from lorary.library.prepared import Prepared, expert_key, save_prepared
from lorary.lora.targets import ALL_LINEAR, find_targets
from lorary.model.base import load_base
from lorary.model.prepared import REQUEST
from lorary.route import ROUTERS

BASES = ("embedded", "mistral")
RANK, TOP_K = 4, 4
# Made prompts of each expert, by which `auto` chooses one for a request, as a build prepares them.
PROMPTS = 16
# One expert whatever a request is like: bare tokens, which no expert fits, would go to the base.
AUTO = {"router": "auto", "threshold": None, "fallback": None}
MOST_PEER_EXPERTS, MOST_PEER_TOKENS = 64, 512
WARM_UP_TOKENS = 16


def load_model(base: str) -> Any:
    """A base in float32 on the CPU: the embedded one, or two random layers of Mistral-7B's shapes."""
    if base == "embedded":
        model = load_base("embedded", device="cpu", dtype="float32").model
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()  # out of the mapped file: resident from the start
        return model
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=1024, hidden_size=4096, intermediate_size=14336, num_hidden_layers=2, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=4096, sliding_window=None,
    )  # fmt: skip
    torch.manual_seed(0)
    return MistralForCausalLM(config).requires_grad_(False).eval()


@dataclass(frozen=True, eq=False)
class Contender:
    """One side of the contest, ready to run.

    Args:
        name: of its figures.
        experts: seated in it; 1 for a single adapter, 0 for the base.
        model: the bare base, a routed model, or PEFT's.
        setting: of routing, while it has its turn; as attached where None.
        routed: what it has to compute at least.
        is_peer: whether PEFT runs it.
    """

    name: str
    experts: int
    model: Any
    setting: str | Mapping[str, Any] | None = None
    routed: Routed | None = None
    is_peer: bool = False

    def turn(self) -> AbstractContextManager[Any]:
        """What is in force while it runs."""
        return nullcontext(self.model) if self.setting is None else lorary.routing(self.model, self.setting)

    @property
    def decides_once(self) -> bool:
        """Whether it decides for a whole request, where that begins: it needs a cache of its own."""
        return isinstance(self.setting, Mapping) and self.setting.get("router") == AUTO["router"]

    @torch.no_grad()
    def warm_up(self) -> "Contender":
        """Do what is done once and belongs to no figure, such as PEFT's prototypes."""
        with self.turn() as model:
            model(input_ids=torch.ones(1, WARM_UP_TOKENS, dtype=torch.long), use_cache=False)
        return self


class Shelf:
    """A base and a library on disk that grows, so that each adapter is made and written once.

    Args:
        name: of the base.
        model: the base.
        folder: where the library is put.
    """

    def __init__(self, name: str, model: Any, folder: Path) -> None:
        self.name, self.model = name, model
        self.targets = find_targets(model, [ALL_LINEAR])
        self.library = lorary.Library.create(folder / "library", base=model, base_name=name)

    def grow(self, experts: int) -> None:
        """Make adapters until there are so many."""
        for index in range(len(self.library), experts):
            name = f"made-{index:03d}"
            self.library.add_adapter(harness.made_adapter(name, self.targets, RANK), {"tasks": []})
            vectors = torch.randn(PROMPTS, self.model.config.hidden_size, generator=keyed_generator("benchmark", name))
            key = expert_key(self.library, name)
            save_prepared(self.library, "samples_early", key, Prepared({REQUEST: vectors}, {}, {}))

    @property
    def folders(self) -> list[str]:
        """The adapters' folders, for PEFT."""
        return [str(self.library.path / "adapters" / name) for name in self.library]

    def num_bytes(self) -> int:
        """Bytes of all adapters' files of weights."""
        return sum(path.stat().st_size for path in self.library.path.rglob("*.safetensors"))

    def attach(self, repeats: int = 3) -> tuple[Any, float]:
        """A routed model over all adapters there are, and the seconds that took: the median of some repeats."""
        model, times = twin(self.model), []
        for number in range(repeats):
            start = time.perf_counter()
            lorary.attach(model, self.library, router="arrow", top_k=TOP_K)
            times.append(time.perf_counter() - start)
            if number < repeats - 1:
                lorary.detach(model)
        return model, median(times)

    def attach_peer(self, patience_s: float) -> tuple[Any, float, int]:
        """PEFT's Arrow over all adapters there are, as far as it comes.

        Args:
            patience_s: when to stop it.

        Returns:
            The model (None where it was stopped), seconds, and how many adapters it had loaded by then.
        """
        model = twin(self.model)
        start = time.perf_counter()
        try:
            with stopped_after(patience_s):
                arrow = peer_arrow(model, self.folders)
        except TimeoutError:
            return None, time.perf_counter() - start, num_loaded(model)
        return arrow, time.perf_counter() - start, len(self.folders)


def peer_arrow(model: Any, folders: Sequence[str]) -> Any:
    """PEFT's Arrow over some adapters; its top_k must not be more than they are."""
    config = ArrowConfig(top_k=min(TOP_K, len(folders)), router_temperature=1.0, rng_seed=0)
    return create_arrow_model(model, task_specific_adapter_paths=list(folders), arrow_config=config).eval()


def num_loaded(model: Any) -> int:
    """Adapters that PEFT has put into all layers of a model."""
    return min((len(module.lora_A) for module in model.modules() if hasattr(module, "lora_A")), default=0)


@contextmanager
def stopped_after(seconds: float) -> Iterator[None]:
    """Raise TimeoutError from PEFT where it begins with another adapter later than that.

    Between two adapters, since what a signal raises can land where Python drops it: in a callback of its collector.
    """
    load_adapter, start = PeftModel.load_adapter, time.perf_counter()

    def load(*args: Any, **settings: Any) -> Any:
        if time.perf_counter() - start > seconds:
            raise TimeoutError
        return load_adapter(*args, **settings)

    with mock.patch.object(PeftModel, "load_adapter", load):
        yield


def routed_contenders(model: Any, experts: int, *, all_rules: bool) -> list[Contender]:
    """Ours over one routed model: Arrow, `auto`, and the other rules that need weights alone where asked for."""
    arrow = Contender("arrow", experts, model, None, Routed(ROUTERS["arrow"], experts, RANK, TOP_K))
    others = [name for name, rule in ROUTERS.items() if rule.needs == "weights" and not rule.tries and name != "arrow"]
    return [
        arrow,
        Contender("auto", experts, model, AUTO, Routed(None, 1, RANK)),
        *(
            Contender(name, experts, model, name, Routed(ROUTERS[name], experts, RANK, TOP_K))
            for name in (others if all_rules else [])
        ),
    ]


def single_contenders(shelf: Shelf, routed: Any) -> list[Contender]:
    """One adapter alone: ours as a fixed expert of a routed model, PEFT's beside its layers, and PEFT's merged."""
    name, folder = shelf.library.names()[0], shelf.folders[0]
    merged = PeftModel.from_pretrained(copy.deepcopy(shelf.model), folder).merge_and_unload()
    return [
        Contender("one expert", 1, routed, {"experts": [name]}, Routed(None, 1, RANK)),
        Contender("one expert", 1, PeftModel.from_pretrained(twin(shelf.model), folder).eval(), is_peer=True),
        Contender("one expert, merged", 1, merged.eval(), is_peer=True),
    ]
