"""How a server is reached, and what it bounds."""

import ipaddress
from dataclasses import dataclass

from lorary.errors import UsageError
from lorary.flags import check_flags, flag
from lorary.numbers import check_count


@dataclass(frozen=True)
class ServeSettings:
    """How a server is reached, and what it bounds.

    Args:
        host: address to listen on; any other than a loopback one needs --token.
        port: port to listen on; 0 takes a free one and prints it.
        token: what requests must bring as `Authorization: Bearer TOKEN`; the variable LORARY_TOKEN otherwise.
        admin_token: the same for requests that change the library; the variable LORARY_ADMIN_TOKEN otherwise. Without
            it no request can.
        executor: what answers: `local`, a model in this process, or `ray`, replicas on the cluster in RAY_ADDRESS, or
            on one that is started on this machine.
        replicas: how many with --executor ray; one per GPU, or per machine where there is none, by default.
        batch: answers that are made at the same time, by each replica; others wait.
        max_requests: requests that are answered or wait at the same time; more are refused with 429.
        max_choices: answers of one request, over all its prompts.
        max_prompt_tokens: tokens of a prompt; only the base's context bounds them by default.
        max_new_tokens: tokens of an answer.
        max_body: bytes of a request.
        max_upload: bytes of an adapter that is added.
        timeout: seconds that an answer may take.
        body_timeout: seconds in which the head or the body of a request must have come.
        drain: seconds that running requests have to end after SIGTERM.
        log: file that takes one line of JSON per decision.
        log_prompts: write prompts into it, too.
        redact: regular expression; what it matches in a prompt is not written. May be repeated.
        shadow: router that decides beside the one that answers, for a share of the requests.
        shadow_share: of the requests, between 0 and 1.
    """

    host: str = "127.0.0.1"
    port: int = flag(8000, least=0, most=65535)
    token: str | None = None
    admin_token: str | None = None
    executor: str = flag("local", choices=("local", "ray"))
    replicas: int | None = flag(None, least=1)
    batch: int = flag(16, least=1)
    max_requests: int = flag(64, least=1)
    max_choices: int = flag(64, least=1)
    max_prompt_tokens: int | None = None
    max_new_tokens: int = flag(1024, least=1)
    max_body: int = flag(4_000_000, least=1024)
    max_upload: int = flag(1_000_000_000, least=1024)
    timeout: float = flag(300.0, above=0.0)
    body_timeout: float = flag(30.0, above=0.0)
    drain: float = flag(30.0, least=0.0)
    log: str | None = None
    log_prompts: bool = False
    redact: tuple[str, ...] = flag((), metavar="REGEX", is_repeated=True)
    shadow: str | None = None
    shadow_share: float = flag(0.1, least=0.0, most=1.0)

    def __post_init__(self) -> None:
        check_flags(self)
        if self.max_prompt_tokens is not None:
            check_count("--max-prompt-tokens", self.max_prompt_tokens)
        if not (self.is_local or self.token):
            raise UsageError(
                "a server that other machines can reach needs a token",
                found=f"--host {self.host} without --token",
                remedy="--token TOKEN, or the variable LORARY_TOKEN",
            )
        for name, token in (("--token", self.token), ("--admin-token", self.admin_token)):
            if token is not None and not (token and token.isascii() and token.isprintable() and " " not in token):
                raise UsageError(f"{name} must be printable ASCII without spaces", found=f"{len(token)} characters")
        if self.replicas is not None and self.executor != "ray":
            raise UsageError("--replicas goes with --executor ray", found=f"--executor {self.executor}")
        if self.log_prompts and self.log is None:
            raise UsageError("--log-prompts needs a file to write them to", found="no --log", remedy="--log FILE")

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
