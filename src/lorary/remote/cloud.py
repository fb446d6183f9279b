"""A remote at S3 and what speaks as it does, at Google Cloud Storage or at Azure, through obstore.

obstore is young: nothing else of Lorary knows it. Credentials come from the environment, as that package reads them.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from lorary.errors import LibraryError, MissingExtraError
from lorary.remote.hiding import hide
from lorary.remote.place import Place
from lorary.remote.store import AbsentError, Fetched, StaleError, Traffic, TransientError, check_size

# What cannot be repeated conditionally is repeated by ourselves; obstore waits and repeats the rest.
RETRIES = {"max_retries": 4, "retry_timeout": timedelta(seconds=60)}
TIMEOUT_S = 120
# A larger object goes in parts, which no condition holds for. Its name is its hash, so that it may be put twice.
MOST_AT_ONCE = 64 * 1024 * 1024


class CloudStore:
    """Objects of a bucket or container, below the path of the place.

    Args:
        place: scheme, bucket and path.
        traffic: where requests are counted.

    Raises:
        MissingExtraError: if obstore is not installed.
        LibraryError: if it cannot make a client of the URL and the environment.
    """

    def __init__(self, place: Place, traffic: Traffic) -> None:
        try:
            import obstore
            from obstore import exceptions, store
        except ImportError as error:
            raise MissingExtraError("obstore", "remote") from error
        self._obstore: Any = obstore
        self._errors: Any = exceptions
        self._where, self._traffic = place.root, traffic
        with self._reported():
            options: Any = {"timeout": timedelta(seconds=TIMEOUT_S), "allow_http": _is_plain_server()}
            self._store: Any = store.from_url(place.root, client_options=options, retry_config=RETRIES)

    def get(self, key: str) -> Fetched:
        """An object and its etag, or generation where that is what the store compares."""
        with self._reported():
            result = self._obstore.get(self._store, key)
            meta = result.meta
            check_size(int(meta["size"]), key, self._where)
            data = bytes(result.bytes())
        self._traffic.add(received=len(data))
        return Fetched(data, f"{meta.get('e_tag') or ''}\n{meta.get('version') or ''}")

    def read(self, key: str, start: int, length: int) -> bytes:
        """A range of an object."""
        with self._reported():
            data = bytes(self._obstore.get_range(self._store, key, start=start, length=length))
        self._traffic.add(received=len(data))
        return data

    def size(self, key: str) -> int | None:
        """The size by a request for the head."""
        self._traffic.add()
        try:
            with self._reported():
                return int(self._obstore.head(self._store, key)["size"])
        except AbsentError:
            return None

    def list(self, prefix: str) -> dict[str, int]:
        """All keys of a prefix, by one request for a thousand of them."""
        sizes: dict[str, int] = {}
        with self._reported():
            for page in self._obstore.list(self._store, prefix=prefix, chunk_size=1000):
                self._traffic.add()
                sizes |= {str(meta["path"]): int(meta["size"]) for meta in page}
        return sizes

    def create(self, key: str, data: bytes) -> bool:
        """Put if absent; a large object is put in parts whether or not it is there."""
        try:
            with self._reported():
                if len(data) > MOST_AT_ONCE:
                    self._obstore.put(self._store, key, data)
                else:
                    self._obstore.put(self._store, key, data, mode="create", use_multipart=False)
        except self._errors.AlreadyExistsError:
            self._traffic.add()
            return False
        self._traffic.add(sent=len(data))
        return True

    def replace(self, key: str, data: bytes, etag: str) -> None:
        """Put if the etag matches."""
        e_tag, _, version = etag.partition("\n")
        mode = {name: value for name, value in (("e_tag", e_tag), ("version", version)) if value}
        try:
            with self._reported():
                self._obstore.put(self._store, key, data, mode=mode, use_multipart=False)
        except self._errors.PreconditionError:
            self._traffic.add()
            raise StaleError from None
        self._traffic.add(sent=len(data))

    @contextmanager
    def _reported(self) -> Iterator[None]:
        """Errors of obstore as ours, without credentials that its messages may hold."""
        errors = self._errors
        try:
            yield
        except (errors.AlreadyExistsError, errors.PreconditionError):
            raise
        except (errors.NotFoundError, FileNotFoundError) as error:
            if "NoSuchBucket" in str(error):
                raise self._refused(error, "make the bucket, or check its name") from None
            raise AbsentError(self._where) from None
        except (errors.PermissionDeniedError, errors.UnauthenticatedError) as error:
            remedy = "give credentials of somebody who may, by environment variables of that provider"
            raise self._refused(error, remedy) from None
        except (errors.NotSupportedError, errors.InvalidPathError, errors.UnknownConfigurationKeyError) as error:
            raise self._refused(error, "use a store that can put an object on condition of its etag") from None
        except (errors.BaseError, OSError) as error:
            raise TransientError(_brief(error)) from None
        except ValueError as error:
            raise self._refused(error, "check the URL, and the environment variables of that provider") from None

    def _refused(self, error: Exception, remedy: str) -> LibraryError:
        return LibraryError(f"{self._where} must do what is asked of it", found=_brief(error), remedy=remedy)


def _is_plain_server() -> bool:
    """Whether the environment names a server of the user's own that speaks HTTP without TLS."""
    return any(os.environ.get(name, "").startswith("http://") for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"))


def _brief(error: Exception) -> str:
    """The first sentence of an error; obstore tells all that it was made of behind it."""
    return hide(str(error).partition("Debug source")[0].strip() or type(error).__name__)
