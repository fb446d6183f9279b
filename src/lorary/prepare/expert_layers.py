"""Shows what the layers of one expert are given on rows of its own tasks."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lorary.adapter import Adapter
from lorary.data.batching import collate, input_length, length_buckets
from lorary.data.template import Example
from lorary.lora.gate import LayerInput
from lorary.lora.gated import GatedLora
from lorary.model.features import MAX_TOKENS, decoder_of
from lorary.model.one_expert import alone
from lorary.model.row_gates import rows_of
from lorary.ops.choose import Chosen

# Path, module, (batch, seq, d_in) inputs and (batch, seq, ranks) down-projections, lengths of the rows.
Look = Callable[[str, GatedLora, Tensor, Tensor, Tensor], None]


@torch.no_grad()
def watch_expert(model: Any, adapter: Adapter, examples: Sequence[Example], look: Look) -> Mapping[str, torch.dtype]:
    """Run rows through the model with one expert, and show what each of its layers is given.

    Rows are fed as in training: prompt and answer, without the last token, which nothing follows.

    Args:
        model: the bare base model.
        adapter: the expert; it acts while it is watched.
        examples: rows of its own tasks.
        look: is shown each layer's inputs, batch by batch.

    Returns:
        The dtype of each layer.
    """
    with alone(model, adapter) as loras:
        for bucket in length_buckets([input_length(example) for example in examples], MAX_TOKENS):
            batch = collate([examples[i] for i in bucket]).to(model.device)
            lengths = torch.tensor([input_length(examples[i]) for i in bucket], device=model.device)
            for path, lora in loras.items():
                lora.route_by(_WatchGate(partial(look, path, lora), lengths), "outputs")
            decoder_of(model)(input_ids=batch.input_ids, use_cache=False)
        return {path: lora.up.dtype for path, lora in loras.items()}


class _WatchGate:
    """A gate that lets its one expert act in full, and shows what the layer was given."""

    reads_prototypes, reads_z, most, quick, decided = False, True, 1, None, None

    def __init__(self, look: Callable[[Tensor, Tensor, Tensor], None], lengths: Tensor) -> None:
        self._look, self._lengths = look, lengths

    def __call__(self, inputs: LayerInput) -> Chosen:
        batch, seq = rows_of(inputs)
        assert inputs.z is not None
        self._look(inputs.x.view(batch, seq, -1), inputs.z.view(batch, seq, -1), self._lengths.to(inputs.x.device))
        return Chosen(torch.zeros_like(inputs.x[:, :1], dtype=torch.int64), torch.ones_like(inputs.x[:, :1]))
