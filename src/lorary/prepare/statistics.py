"""What an expert's layers meet on its own data: their mean input, and how long its updates are there.

The expert acts while it is looked at. Rows are fed as in training: prompt and answer, all but the last token, which
nothing follows.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lorary.adapter import Adapter
from lorary.data.batching import collate, input_length, length_buckets
from lorary.data.template import Example
from lorary.errors import TaskError
from lorary.lora.gate import Seen
from lorary.lora.gated import GatedLora
from lorary.model.features import MAX_TOKENS, decoder_of
from lorary.model.one_expert import alone
from lorary.model.row_gates import rows_of
from lorary.ops.choose import Chosen

# Path, module, (batch, seq, d_in) inputs and (batch, seq, ranks) down-projections, lengths of the rows.
Look = Callable[[str, GatedLora, Tensor, Tensor, Tensor], None]


def layer_centroids(model: Any, adapter: Adapter, examples: Sequence[Example]) -> dict[str, Tensor]:
    """Mean input of each adapted layer at the last token of each row.

    Paper: 2405.11157, centroid matching; there too the expert acts, and the last token stands for its row.

    Args:
        model: the bare base model.
        adapter: the expert.
        examples: rows of its own data, at least one.

    Returns:
        (d_in,) for each layer, in the dtype of the experts.
    """
    sums: dict[str, Tensor] = {}

    def look(path: str, _lora: GatedLora, x: Tensor, _z: Tensor, lengths: Tensor) -> None:
        last = x[torch.arange(len(x), device=x.device), lengths - 1].double().sum(dim=0)
        sums[path] = sums.get(path, torch.zeros_like(last)) + last

    dtypes = _look(model, adapter, examples, look)
    return {path: (total / len(examples)).to(dtypes[path]) for path, total in sums.items()}


def norm_statistics(model: Any, adapter: Adapter, examples: Sequence[Example]) -> dict[str, Tensor]:
    """Mean and deviation of `‖ΔW x‖` over the tokens of the expert's own data, in each adapted layer.

    The first token of each row is left out: attention sinks there, and its hidden states may be a hundred times as
    long as all others. An update that is zero has mean 0 and deviation 1. Source: SEQR, arXiv 2509.18093.

    Args:
        model: the bare base model.
        adapter: the expert.
        examples: rows of its own data.

    Returns:
        (2,) for each layer, in the dtype of the experts.

    Raises:
        TaskError: if there are no two tokens of different norm.
    """
    norms: dict[str, list[Tensor]] = {path: [] for path in adapter.modules}

    def look(path: str, lora: GatedLora, x: Tensor, z: Tensor, lengths: Tensor) -> None:
        position = torch.arange(x.shape[1], device=x.device)
        kept = (position > 0) & (position < lengths[:, None])
        norms[path].append(torch.linalg.vector_norm(z[kept] @ lora.up, dim=-1).double())

    dtypes = _look(model, adapter, examples, look)
    found = {}
    for path, parts in norms.items():
        own = torch.cat(parts)
        deviation, mean = torch.std_mean(own, correction=0) if len(own) else own.new_zeros(2)
        if deviation == 0 and (len(own) == 0 or own.any()):
            raise TaskError(
                f"the data of expert '{adapter.name}' must have tokens of different norms at {path}",
                found=f"{len(own)} tokens",
                remedy="raise --rows",
            )
        found[path] = torch.stack([mean, deviation if deviation > 0 else torch.ones_like(mean)]).to(dtypes[path])
    return found


@torch.no_grad()
def _look(model: Any, adapter: Adapter, examples: Sequence[Example], look: Look) -> Mapping[str, torch.dtype]:
    """Run rows through the model with one expert, and show what each of its layers is given; the layers' dtypes."""
    with alone(model, adapter) as loras:
        for bucket in length_buckets([input_length(example) for example in examples], MAX_TOKENS):
            batch = collate([examples[i] for i in bucket]).to(model.device)
            lengths = torch.tensor([input_length(examples[i]) for i in bucket], device=model.device)
            for path, lora in loras.items():
                lora.route_by(_Window(partial(look, path, lora), lengths), "outputs")
            decoder_of(model)(input_ids=batch.input_ids, use_cache=False)
        return {path: lora.up.dtype for path, lora in loras.items()}


class _Window:
    """A gate that lets its one expert act in full, and shows what the layer was given."""

    reads_prototypes, reads_z, most, quick = False, True, 1, None

    def __init__(self, look: Callable[[Tensor, Tensor, Tensor], None], lengths: Tensor) -> None:
        self._look, self._lengths = look, lengths

    def __call__(self, seen: Seen) -> Chosen:
        batch, seq = rows_of(seen)
        assert seen.z is not None
        self._look(seen.x.view(batch, seq, -1), seen.z.view(batch, seq, -1), self._lengths.to(seen.x.device))
        return Chosen(torch.zeros_like(seen.x[:, :1], dtype=torch.int64), torch.ones_like(seen.x[:, :1]))
