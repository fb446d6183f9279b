"""The interface between a routed layer and its gate."""

from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from lorary.ops.choose import Chosen
from lorary.ops.native import Quick


class LayerInput(NamedTuple):
    """What a gate may read of the input of its layer.

    Args:
        x: (tokens, d_in), in the dtype of the experts; as the layer was given it where the plan is fused, whose gates
            do not read it.
        z: (tokens, ranks), the experts' down-projections; None where the gate does not read them and few are needed.
        projections: (tokens, experts), products with the prototypes, for a gate that reads them.
        leading: the axes of the tokens before they were flattened, (batch, seq) in most models.
    """

    x: Tensor
    z: Tensor | None
    projections: Tensor | None
    leading: torch.Size


@runtime_checkable
class Gate(Protocol):
    """Turns what a layer sees into its experts."""

    @property
    def reads_prototypes(self) -> bool:
        """Whether the gate wants products with the prototypes; the others cost no products."""

    @property
    def reads_z(self) -> bool:
        """Whether the gate wants the down-projections of all experts."""

    @property
    def most(self) -> int:
        """The most experts that it gives a token."""

    @property
    def quick(self) -> Quick | None:
        """The same in a form that compiled code knows, if there is one; without score rows if it `reads_prototypes`."""

    @property
    def decided(self) -> object:
        """Where the experts of the running thread's rows do not depend on the layer's input: what decided them.

        They are the same in all passes of as many rows and tokens, until this is another object. None where a gate
        looks at its input.
        """

    def __call__(self, inputs: LayerInput) -> Chosen | None:
        """The experts of each token, or None to leave the layer's output as it is."""
