"""What runs when a pass through a routed model begins and ends, by the setting in force where it runs."""

from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from lorary.lora.context import note_thread
from lorary.model.seating import Seating


class Passes:
    """Hooks that stay while any setting needs one, whichever thread it is in force in.

    A hook with keywords is told of them by a list apart from that of the hooks. A pass of another thread may look at
    one before the hook comes or goes, and at the other behind that; so `kwargs` may lack. No such pass needs a hook.

    Args:
        state: of the model.
    """

    def __init__(self, state: Seating) -> None:
        self.state = state

    def register(self, model: nn.Module, decoder: nn.Module) -> list[RemovableHandle]:
        """Put the hooks on a model.

        Args:
            model: that the experts are seated in.
            decoder: of it. Its head and loss play no part, and it may be called without them.
        """
        return [
            decoder.register_forward_pre_hook(self.begin, with_kwargs=True),
            model.register_forward_pre_hook(self.note, with_kwargs=True),
            decoder.register_forward_hook(self.end),
        ]

    def begin(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        """A pass of the decoder begins."""
        if kwargs is None:
            return
        note_thread()
        for decisions in self.state.in_force.decisions:
            decisions.here.clear()
        if (prober := self.state.prober) is not None:
            prober(decoder, args, kwargs)

    def note(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        """A pass of the whole model begins."""
        if kwargs is not None and (prober := self.state.prober) is not None:
            prober.note(model, args, kwargs)

    def end(self, decoder: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """A pass of the decoder has ended."""
        if (prober := self.state.prober) is not None:
            prober.mark(decoder, args, output)
