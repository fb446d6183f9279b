"""What transformers' own `save_pretrained` says over a routed model."""

import warnings
from typing import Any

METHOD = "save_pretrained"


class SaveWarning:
    """Stands in for that method on one model: it writes the base alone, since experts are no part of a state dict.

    Args:
        model: a routed model.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        vars(model)[METHOD] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Warn, and save the base."""
        warnings.warn(
            "save_pretrained writes the base model without the experts that are seated in it; "
            "lorary.save(model, folder) writes both, and lorary.load(folder) reads them",
            stacklevel=2,
        )
        return getattr(type(self.model), METHOD)(self.model, *args, **kwargs)

    def remove(self) -> None:
        """Let the model be as it was."""
        if vars(self.model).get(METHOD) is self:
            del vars(self.model)[METHOD]
