"""Transformers without its progress bars and advice, for the few calls whose outcome Lorary checks itself."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers inside the block: progress bars, log lines below errors, and Python warnings.

    Loading a model prints bars and advice that mean nothing to someone who asked Lorary for it. Whoever uses this
    must check what it hides (missing or left-over weights), as `lorary.model.base.load_base` does. Every setting is
    put back at the end, also after an error.
    """
    # Imported here: transformers takes seconds to import, and files that use this block are imported by cheap commands.
    from transformers.utils import logging

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()
        try:
            with _no_progress_bars():
                yield
        finally:
            logging.set_verbosity(verbosity)


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Transformers' switch also turns the Hub's bars, so the two are recorded apart and the Hub's is put back last."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging

    had_bars, hub_was_silent = logging.is_progress_bar_enabled(), are_progress_bars_disabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if had_bars:
            logging.enable_progress_bar()
        (disable_progress_bars if hub_was_silent else enable_progress_bars)()
