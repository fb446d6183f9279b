"""A request that is answered with an error."""

from lorary.errors import LoraryError


class ApiError(LoraryError):
    """A request that is answered with an error.

    Args:
        status: of HTTP.
        rule: what must hold.
        found: the offending value.
        remedy: what to do about it.
        param: field of the request.
        code: a word for programs.
        headers: of the response.
    """

    def __init__(
        self,
        status: int,
        rule: str,
        *,
        found: object = None,
        remedy: str | None = None,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(rule, found=found, remedy=remedy)
        self.status, self.param, self.code, self.headers = status, param, code, headers or {}
