"""What a routed layer weighs, on shapes that no machine of a developer holds: docs/scaling.md computes the same."""

import contextlib
import io
import re
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lorary.lora.gate import LayerInput
from lorary.lora.gated import GatedLora
from lorary.ops.choose import Choice, Chosen, choose
from lorary.route.arrow import arrow_readout

PAGE = Path(__file__).parents[3] / "docs" / "scaling.md"
EXPERTS, TOKENS = 256, 4096


class Peak(TorchDispatchMode):
    """The most bytes on the meta device that were alive at once, of what was made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.most = self.alive = 0
        self._holders: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        results = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(results):
            if isinstance(tensor, Tensor) and tensor.is_meta:
                storage = tensor.untyped_storage()
                if storage._cdata not in known or self._holders[storage._cdata]:
                    self._hold(tensor, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.alive)
        return results

    def _hold(self, tensor: Tensor, key: int, size: int) -> None:
        self.alive += 0 if self._holders[key] else size
        self._holders[key] += 1
        weakref.finalize(tensor, self._let_go, key, size)

    def _let_go(self, key: int, size: int) -> None:
        self._holders[key] -= 1
        self.alive -= 0 if self._holders[key] else size


class ArrowGate(nn.Module):
    """Arrow, top 4."""

    reads_prototypes, reads_z, quick, decided, most = True, False, None, None, 4

    def forward(self, inputs: LayerInput) -> Chosen:
        assert inputs.projections is not None
        alive = torch.ones(EXPERTS, dtype=torch.bool, device=inputs.x.device)
        return choose(arrow_readout(inputs.projections, alive), Choice(top_k=4))


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    """What the page's code defines, down to the memory of a routed model."""
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        with contextlib.redirect_stdout(io.StringIO()):
            exec(block, names)
        if "routed_bytes" in names:
            return names
    raise AssertionError("the page must compute the memory of a routed model")


def layer(rank: int, d_in: int, d_out: int) -> GatedLora:
    """A routed layer of 256 experts on the meta device."""
    ranks, experts = EXPERTS * rank, torch.arange(EXPERTS).repeat_interleave(rank)
    meta = {"device": "meta", "dtype": torch.float32}
    return GatedLora(torch.empty(ranks + EXPERTS, d_in, **meta), torch.empty(ranks, d_out, **meta), experts).to("meta")


@pytest.mark.parametrize("rank", [4, 16])
def test_256_experts_on_a_base_of_70_billion_weigh_what_the_page_says(page: dict[str, Any], rank: int) -> None:
    for d_in, d_out in {*page["attention_70b"], *page["mlp_70b"]}:
        lora = layer(rank, d_in, d_out)
        lora.route_by(ArrowGate(), "outputs")
        assert sum(buffer.nbytes for buffer in lora.buffers()) == page["routed_bytes"](EXPERTS, rank, d_in, d_out)


@pytest.mark.parametrize("rank", [4, 16])
@torch.no_grad()
def test_a_pass_over_them_needs_what_the_page_says(page: dict[str, Any], rank: int) -> None:
    for d_in, d_out in {*page["attention_70b"], *page["mlp_70b"]}:
        lora = layer(rank, d_in, d_out)
        lora.route_by(ArrowGate(), "outputs")
        x, output = (torch.empty(1, TOKENS, size, device="meta", dtype=torch.bfloat16) for size in (d_in, d_out))
        with Peak() as peak:
            total = lora(x, output)
        assert total.shape == output.shape
        assert peak.most == pytest.approx(page["pass_bytes"](TOKENS, EXPERTS, rank, d_in, d_out), rel=0.03)
        # Outputs of all experts would be many times larger.
        assert peak.most < TOKENS * EXPERTS * d_out * 4 / 10
