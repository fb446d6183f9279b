"""A base model with a library's experts seated in it, put together when something must be computed."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from lorary.data.chat import chat_frame
from lorary.errors import BaseModelError, UsageError
from lorary.evaluate.base_key import content_of_base, content_of_files
from lorary.evaluate.cache import ResultCache
from lorary.formats.base import resolve_base
from lorary.library.fingerprint import fingerprint_of_model
from lorary.library.fingerprint_folder import fingerprint_of_folder
from lorary.library.store import Library
from lorary.model.attach import attach, detach
from lorary.model.base import Base, choose_device, choose_dtype, load_base, load_tokenizer


@dataclass(frozen=True)
class KnownBase:
    """What is known of a base model before it is loaded.

    Args:
        name: of the model.
        content: hash of all that it computes with, as it will be in memory, and of what its tokenizer does.
        device: kind of device.
        dtype: of its weights there, as torch writes it.
        chat_prompt: a message of one character in its own chat template as that writes it now, "" without a template.
        load: gives the model, the same one every time.
    """

    name: str
    content: str
    device: str
    dtype: str
    chat_prompt: str
    load: Callable[[], Base]


def known_base(base: Base) -> KnownBase:
    """What is known of a model in memory."""
    return KnownBase(
        base.files.name,
        content_of_base(base),
        base.model.device.type,
        str(base.model.dtype),
        _chat_prompt(base.tokenizer),
        lambda: base,
    )


def known_unloaded(reference: str, *, dtype: str, device: str) -> KnownBase:
    """What is known of a model by its files; it is loaded when something must be computed.

    In float32 and wider, a model holds the values of its files as they are, so that its fingerprint is theirs. In
    anything else it is loaded at once.

    Args:
        reference: as `lorary.model.base.load_base` takes it, as the other two.
        dtype: of its weights.
        device: where it will lie.

    Raises:
        BaseModelError: if it cannot be found; when it is loaded, if it cannot be, or is not what its files say.
        UsageError: if there is no such dtype or device.
    """
    where = choose_device(device)
    kind = choose_dtype(dtype, where)
    files = resolve_base(reference)
    if kind not in (torch.float32, torch.float64):
        return known_base(load_base(files, dtype=dtype, device=device))
    digest, content = fingerprint_of_folder(files.path).digest, content_of_files(files)
    tokenizer = load_tokenizer(files)

    @cache
    def load() -> Base:
        base = load_base(files, dtype=dtype, device=device)
        if (loaded_digest := fingerprint_of_model(base.model).digest) != digest:
            raise BaseModelError(
                f"base model {files.path} must be in memory what its files say",
                found=f"{loaded_digest[:12]}, not {digest[:12]}",
            )
        return base

    return KnownBase(files.name, content, where.type, str(kind), _chat_prompt(tokenizer), load)


def _chat_prompt(tokenizer: Any) -> str:
    if not getattr(tokenizer, "chat_template", None):
        return ""
    try:
        return chat_frame(tokenizer).prompt
    except UsageError as error:  # it is said where a prompt is made
        return str(error)


class SeatedBase:
    """A base and a library; as a context it leaves the base as it was.

    Args:
        base: the base model.
        library: the library.
        template: in which prompts will come; that of the experts where None.
        force_base: accept unrelated weights of the same shapes.
    """

    def __init__(self, base: KnownBase, library: Library, *, template: str | None = None, force_base: bool) -> None:
        self.library = library
        self.cache = ResultCache(library, base.content)
        self.device, self.dtype, self.chat_prompt = base.device, base.dtype, base.chat_prompt
        self._base, self._template, self._force_base = base, template, force_base
        self._loaded: Base | None = None

    def __enter__(self) -> "SeatedBase":
        return self

    def __exit__(self, *error: object) -> None:
        if self._loaded is not None:
            detach(self._loaded.model)
            self._loaded = None

    def loaded(self) -> Base:
        """The base with the experts seated; loads and seats them the first time."""
        if self._loaded is None:
            base = self._base.load()
            attach(
                base.model, self.library, router="base", tokenizer=base.tokenizer, template=self._template,
                force_base=self._force_base,
            )  # fmt: skip
            self._loaded = base
            self.cache.check_experts()
        return self._loaded
