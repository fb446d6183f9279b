"""Asking the Hugging Face Hub: what failed for a moment is repeated, and errors become ours, without credentials."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from lorary.errors import LibraryError
from lorary.remote.hiding import hide
from lorary.remote.store import AbsentError, StaleError, TransientError, retried
from lorary.version import __version__

TIMEOUT_S = 60.0
# What the Hub answers where the branch is not at the parent any more.
STALE = (409, 412)

Answer = TypeVar("Answer")


class Hub:
    """The Hub, as it is asked about one place.

    Args:
        where: the place, for errors.
    """

    def __init__(self, where: str) -> None:
        self.where = where
        self.api: Any = HfApi(library_name="lorary", library_version=__version__)

    def asked(self, action: Callable[[], Answer]) -> Answer:
        """What an action answers.

        Raises:
            AbsentError: if what it asks for is not there.
            StaleError: if something else is there.
            LibraryError: if the Hub refuses, or does not answer.
        """

        def reported() -> Answer:
            with self.reported():
                return action()

        return retried(reported, self.where)

    @contextmanager
    def reported(self) -> Iterator[None]:
        """Errors of the Hub as ours, without credentials."""
        try:
            yield
        except (RepositoryNotFoundError, RevisionNotFoundError, RemoteEntryNotFoundError):
            raise AbsentError(self.where) from None
        except HfHubHTTPError as error:
            raise self._of(error) from None
        except OfflineModeIsEnabled as error:
            raise self._refused(error, "unset HF_HUB_OFFLINE") from None
        except RuntimeError as error:  # what is said of a file that could not be uploaded
            if isinstance(error.__cause__, HfHubHTTPError):
                raise self._of(error.__cause__) from None
            raise TransientError(hide(f"{error} {error.__cause__ or ''}")) from None
        except (HTTPError, OSError) as error:
            raise TransientError(hide(f"{type(error).__name__}: {error}")) from None

    def _of(self, error: Any) -> Exception:
        status = error.response.status_code
        if status in STALE:
            return StaleError()
        if status == 429 or status >= 500:
            return TransientError(hide(str(error)))
        remedy = "log in as somebody who may (hf auth login, or HF_TOKEN)" if status in (401, 403) else "check the URL"
        return self._refused(error, remedy)

    def _refused(self, error: Exception, remedy: str) -> LibraryError:
        return LibraryError(f"{self.where} must do what is asked of it", found=hide(str(error)), remedy=remedy)


@contextmanager
def without_bars() -> Iterator[None]:
    """Without the Hub's own bars: there is one for the whole work."""
    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
