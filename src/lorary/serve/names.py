"""Names that requests give as `model`: the library, one of its experts, one of its routers, or the base."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lorary.errors import did_you_mean
from lorary.route import ROUTERS
from lorary.route.presets import merged
from lorary.route.setting import Routing
from lorary.serve.api_error import ApiError

BASE = "base"
# So many valid names are listed in an error; a library may hold thousands.
_SHOWN = 20

Kind = Literal["library", "expert", "router", "base"]


@dataclass(frozen=True)
class Target:
    """What a name means.

    Args:
        name: as it was given.
        kind: what it names.
        setting: who answers.
    """

    name: str
    kind: Kind
    setting: Routing


@dataclass(frozen=True)
class Names:
    """All names.

    Args:
        library: name of the library.
        experts: names of its experts.
        routers: those that can run over them.
    """

    library: str
    experts: Sequence[str]
    routers: Sequence[str]

    def all(self) -> list[str]:
        """The names, the library's own first."""
        return [
            self.library, BASE,
            *(f"{self.library}@{router}" for router in self.routers),
            *(f"{self.library}:{expert}" for expert in self.experts),
        ]  # fmt: skip

    def target(self, name: str, default: Routing) -> Target:
        """What a name means.

        Args:
            name: as it was given.
            default: what the library's own name means.

        Raises:
            ApiError: if there is no such name; it lists the valid ones.
        """
        if name == self.library:
            return Target(name, "library", default)
        if name == BASE:
            return Target(name, "base", Routing("base"))
        expert = name.removeprefix(f"{self.library}:")
        if expert != name and expert in self.experts:
            return Target(name, "expert", merged(default, {"experts": [expert]}))
        router = name.removeprefix(f"{self.library}@")
        if router != name and router in self.routers:
            return Target(name, "router", merged(default, router))
        if router != name and router in ROUTERS:
            raise not_at_hand(router, 404)
        raise self._missing(name)

    def _missing(self, name: str) -> ApiError:
        names = self.all()
        listed = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
        return ApiError(
            404,
            "the model must be one of those that are served",
            found=repr(name[:200]),
            remedy=did_you_mean(name[:200], names, remedy=f"one of {listed} (GET /v1/models)"),
            param="model",
            code="model_not_found",
        )


def not_at_hand(router: str, status: int) -> ApiError:
    """The refusal of a router that lacks data.

    Args:
        router: its name.
        status: of the response.
    """
    return ApiError(
        status,
        f"router '{router}' must be prepared before the server starts",
        found="nothing",
        remedy=f"lorary library prepare LIB --router {router}",
        param="model" if status == 404 else "router",
        code="not_prepared",
    )


def served_name(name: str) -> str:
    """The name of a library as it is served; that of the base is taken."""
    return f"{name}-library" if name == BASE else name
