"""One routed adapter out of a library: the experts' factors side by side, written so that their scores can be read.

An engine that serves many adapters computes `z = x lora_aᵀ`, then `z lora_bᵀ`. `lorary.serve.slot_gate` goes between
the two. Each rule reads its scores from z alone, since an update may be factored in many ways:

    arrow        factors as they are, and one more row of lora_a for each expert: its prototype
    projection   lora_a orthonormal, so that the norm of an expert's z is the length of x in its input space
    norm         lora_b orthonormal, so that the norm of an expert's z is that of its output
"""

import hashlib
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from lorary.adapter import Adapter, LoraFactors, check_low_rank, content_hash
from lorary.axes import layer_number
from lorary.errors import AdapterError, LibraryError, RouterError, UsageError
from lorary.formats.peft import encode_adapter, new_config, tensors_of
from lorary.formats.peft_files import Shape
from lorary.library.files import reported, write_folder
from lorary.library.store import Library
from lorary.ops.finite import is_finite
from lorary.ops.spectrum import RELATIVE_ZERO
from lorary.route.facts import expert_facts
from lorary.route.setting import Routing
from lorary.serve.routed_folder import read_routed_folder
from lorary.serve.routed_layout import ROUTING_FILE, RULES, RoutedLayout

# Ranks that vLLM takes as --max-lora-rank.
MAX_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# Stands in the score columns of lora_b where an expert acts; the gate multiplies it by 0. A server without the gate
# adds it to every output, so that it gives nonsense and no answer that is a little wrong.
MARKER = 2.0**15
# Layers whose LoRA vLLM computes without the seam of the gate.
_UNGATED = ("lm_head", "embed_tokens", "wte")


@dataclass(frozen=True)
class RoutedAdapter:
    """A library as one adapter.

    Args:
        adapter: its factors, in float32.
        layout: how its columns are gated.
    """

    adapter: Adapter
    layout: RoutedLayout

    @property
    def max_lora_rank(self) -> int:
        """The smallest value of vLLM's --max-lora-rank that takes it."""
        return next(rank for rank in MAX_RANKS if rank >= self.layout.num_columns)

    def files(self) -> dict[str, bytes]:
        """The files of its folder, by name."""
        return {**encode_adapter(self.adapter), ROUTING_FILE: self.layout.encode()}


def routed_adapter(library: Library, setting: Routing) -> RoutedAdapter:
    """Make one adapter of a library.

    Args:
        library: the experts.
        setting: a rule that decides for each token in each layer, with `top_k`, `temperature` and `allow`.

    Returns:
        The adapter; its name holds the hash of what it computes.

    Raises:
        RouterError: if the setting asks for what the gate does not have.
        LibraryError: if the library holds no adapter.
        AdapterError: if an expert adapts a layer that cannot be gated, or all of them have too many ranks.
    """
    check_setting(setting)
    if not library.names():
        raise LibraryError(f"library '{library.path}' must hold an adapter to export", found="none")
    names = _names(library, setting)
    shapes = {name: library.shapes(name) for name in names}
    ranks = [max(shape.rank for shape in shapes[name].values()) for name in names]
    _check_size(sum(ranks), len(names))
    paths = sorted({path for by_path in shapes.values() for path in by_path})
    _check_layers(paths)
    columns = sum(ranks) + len(names)
    lora_a = {path: torch.zeros(columns, _shape(shapes, path).d_in) for path in paths}
    lora_b = {path: torch.zeros(_shape(shapes, path).d_out, columns) for path in paths}
    for number, name in enumerate(names):
        start = sum(ranks[:number])
        adapter = library.get(name)
        check_low_rank(
            name, adapter.modules, "be one of vLLM's routed experts, which are two factors a layer",
            remedy="leave it out with --route allow=[...], or serve the library with lorary serve",
        )  # fmt: skip
        for path, factors in adapter:
            a, b, row = gated_factors(factors, setting.router)
            if not (is_finite(a) and is_finite(b)):
                raise AdapterError(f"adapter '{name}' must have finite factors in float32", found=path)
            if not b.any():
                continue
            lora_a[path][start : start + len(a)] = a
            lora_b[path][:, start : start + len(a)] = b
            lora_a[path][sum(ranks) + number] = row
            lora_b[path][:, sum(ranks) + number] = MARKER
    modules = {path: LoraFactors(lora_a[path], lora_b[path], 1.0) for path in paths}
    config = new_config(library.base.name, rank=columns, alpha=columns, target_modules=paths)
    layout = RoutedLayout(
        setting.router, setting.choosing.top_k, _temperature(setting), tuple(names), tuple(ranks),
        content_hash(config, tensors_of(modules)),
    )  # fmt: skip
    digest = hashlib.sha256(layout.encode()).hexdigest()[:12]
    return RoutedAdapter(Adapter(f"{library.name}-{setting.router}-{digest}", modules, config), layout)


def gated_factors(
    factors: LoraFactors, router: str
) -> tuple[Float[Tensor, "rank d_in"], Float[Tensor, "d_out rank"], Float[Tensor, " d_in"]]:
    """One expert's factors in one layer as a rule reads them, and the row of its score.

    Args:
        factors: of the expert.
        router: one of `lorary.serve.routed_layout.RULES`.

    Returns:
        lora_a, lora_b with the scaling in it, and the row: zeros for a rule that reads none. All float32; lora_b is
        zero for an update of zero. There may be fewer ranks than the expert has, where d_in or d_out is less.
    """
    # In float32 as routed layers hold them.
    lora_a, lora_b = factors.lora_a.float(), factors.lora_b.float() * factors.scaling
    prototype = expert_facts(lora_a[None], lora_b[None]).prototypes[0]
    if not prototype.any():
        return lora_a, torch.zeros_like(lora_b), torch.zeros_like(lora_a[0])
    if router == "arrow":
        return lora_a, lora_b, prototype.float()
    wide_a, wide_b = lora_a.double(), lora_b.double()
    q_a, r_a = torch.linalg.qr(wide_a.mT)
    q_b, r_b = torch.linalg.qr(wide_b)
    left, values, right = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
    inside, outside = right @ q_a.mT, q_b @ left
    if router == "projection":
        inside = inside * (values > RELATIVE_ZERO * values[0])[:, None]
        return inside.float(), (outside * values).float(), torch.zeros_like(lora_a[0])
    return (values[:, None] * inside).float(), outside.float(), torch.zeros_like(lora_a[0])


def write_routed_folder(above: Path, routed: RoutedAdapter) -> Path:
    """Write an adapter into a folder of its own name, which holds the hash of its content.

    A server keeps what it computed by the path of an adapter, so that other content never comes under an old name.

    Args:
        above: the folder in which it is made; made where it does not exist.
        routed: the adapter.

    Returns:
        The folder; that of before where the same adapter was written already.

    Raises:
        UsageError: if something else is in its place.
        LibraryError: if it cannot be written.
    """
    folder = above / routed.adapter.name
    if os.path.lexists(folder):
        if _is_whole(folder, routed.layout):
            return folder
        raise UsageError(
            "an exported adapter must get a folder of its own", found=f"{folder} is something else", remedy="remove it"
        )
    with reported(above):
        # A kill leaves the other name at most, and the next try begins anew.
        part = folder.with_name(f".{folder.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        write_folder(part, routed.files())
        os.rename(part, folder)
    return folder


def _is_whole(folder: Path, layout: RoutedLayout) -> bool:
    try:
        return folder.is_dir() and read_routed_folder(folder) == layout
    except AdapterError:
        return False


def check_setting(setting: Routing) -> None:
    """Refuse a setting that the gate of an engine cannot follow exactly.

    Raises:
        RouterError: naming what it asks for beyond.
    """
    if setting.experts is not None or setting.decides == "always":
        raise RouterError(
            "a routed adapter must have weights that differ from token to token",
            found="named experts" if setting.experts is not None else f"router '{setting.router}'",
            remedy="lorary merge makes an ordinary adapter of fixed weights; one expert is one already",
        )
    if setting.router not in RULES or setting.decides != "layer":
        raise RouterError(
            f"a routed adapter must be gated per token and layer by one of {list(RULES)}",
            found=f"router '{setting.router}', which decides per {setting.decides}",
            remedy="--router arrow; for a router that decides per request, lorary serve --upstream",
        )
    _temperature(setting)
    plain = Routing.of(
        setting.router, top_k=setting.choosing.top_k, temperature=setting.choosing.temperature, allow=setting.allow
    )
    further = [key for key, value in setting.changed(per=None).fields().items() if value != plain.fields()[key]]
    if further:
        raise RouterError(
            "a routed adapter takes router, top_k, temperature and allow, and no other setting",
            found=", ".join(f"{key}={setting.fields()[key]!r}" for key in further),
            remedy="leave it out, or serve the library with lorary serve",
        )


def _temperature(setting: Routing) -> float:
    temperature = setting.choosing.temperature
    if isinstance(temperature, Mapping):
        raise RouterError("a routed adapter must have one temperature for all layers", found=dict(temperature))
    return float(temperature)


def _names(library: Library, setting: Routing) -> list[str]:
    names = library.names()
    if missing := sorted(set(setting.allow or ()) - set(names)):
        raise RouterError("an allowed expert must be in the library", found=missing, remedy=f"it has {names}")
    return [name for name in names if setting.may_choose(name)]


def _shape(shapes: Mapping[str, Mapping[str, Shape]], path: str) -> Shape:
    """The sizes of a layer, which all experts that adapt it share: each of them fits the base."""
    return next(by_path[path] for by_path in shapes.values() if path in by_path)


def _check_size(num_ranks: int, num_experts: int) -> None:
    if num_ranks + num_experts > MAX_RANKS[-1]:
        raise AdapterError(
            f"a routed adapter must have a rank of {MAX_RANKS[-1]} at most: vLLM takes no more",
            found=f"{num_experts} experts of {num_ranks} ranks in all, and one row for the score of each",
            remedy="cluster the library first (lorary build --method mbc), or allow fewer experts",
        )


def _check_layers(paths: Sequence[str]) -> None:
    for path in paths:
        last = path.rpartition(".")[2]
        if layer_number(path) is None or last in _UNGATED or ".experts." in path:
            raise AdapterError(
                f"layer '{path}' must be a linear layer of a block, whose low-rank buffer an engine lets us gate",
                found="a head, an embedding or a layer of a mixture of experts",
                remedy="leave experts that adapt it out with --route allow=[...]",
            )
