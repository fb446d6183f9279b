"""Where the server behind ours is, and how it is asked."""

from dataclasses import dataclass
from urllib.parse import urlsplit

from lorary.errors import UsageError
from lorary.flags import check_flags, flag

KINDS = ("vllm", "sglang", "llamacpp")


@dataclass(frozen=True)
class UpstreamSettings:
    """Where the server behind ours is, and how it is asked.

    Args:
        url: address of a server that holds the base and its adapters; it answers, and this process only decides.
        token: variable that holds what it wants as `Authorization: Bearer TOKEN`.
        kind: `vllm`, `sglang` or `llamacpp`; as it says itself by default.
        load: have it load the library's adapters, from the library's own folder.
        adapter_prefix: of the adapters' names there.
        strict: refuse a decision that names several experts; the best of them answers otherwise.
        retries: further tries where it does not answer; none after its first byte.
        timeout: seconds without a byte from it.
        connect_timeout: seconds until it takes a connection.
    """

    url: str = flag("", option="--upstream", metavar="URL")
    token: str | None = flag(None, option="--upstream-token", metavar="VARIABLE")
    kind: str | None = flag(None, option="--upstream-kind")
    load: bool = flag(False, option="--upstream-load")
    adapter_prefix: str = flag("", option="--upstream-prefix")
    strict: bool = False
    retries: int = flag(2, least=0, most=10, option="--upstream-retries")
    timeout: float = flag(300.0, above=0.0, option="--upstream-timeout")
    connect_timeout: float = flag(5.0, above=0.0, option="--upstream-connect-timeout")

    def __post_init__(self) -> None:
        check_flags(self)
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(
                "--upstream must be the address of a server", found=repr(self.url), remedy="http://127.0.0.1:8001"
            )
        if self.kind is not None and self.kind not in KINDS:
            raise UsageError("--upstream-kind must be known", found=self.kind, remedy=f"one of {list(KINDS)}")
