"""What to prepare, and from how much data."""

from dataclasses import dataclass

from lorary.errors import RouterError
from lorary.numbers import check_count, check_number, check_seed
from lorary.route import ROUTERS
from lorary.route.rule import Data, Features
from lorary.route.setting import Routing


def routers_with_data() -> list[str]:
    """Names of the routers that read data measured on rows of the experts' tasks."""
    return [name for name, rule in ROUTERS.items() if rule.data is not None]


@dataclass(frozen=True)
class GateSettings:
    """How gates are trained.

    Args:
        steps: optimiser steps.
        batch_size: rows per step.
        learning_rate: peak of the schedule; it warms up over a tenth of the steps.
        seed: of the order of rows.
    """

    steps: int = 100
    batch_size: int = 4
    learning_rate: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        check_count("--steps", self.steps, above=0)
        check_count("--batch-size", self.batch_size, above=0)
        check_seed("--seed", self.seed)
        check_number("--learning-rate", self.learning_rate, above=0.0)


@dataclass(frozen=True)
class PrepareSettings:
    """What to prepare, and from how much data.

    Args:
        router: one of `routers_with_data`; `norm` for its calibration.
        features: for a router that looks at whole requests: `hidden` or `text`.
        rows: training rows of each task, at most; None for what the catalogue of rules says.
        seed: of the rows that are drawn, and of the order in which gates meet them.
        max_length: tokens of a row; longer prompts lose their start.
        steps: phatgoose: optimiser steps of an expert's gates.
        batch_size: phatgoose: rows per step.
        learning_rate: phatgoose: peak of the schedule.
    """

    router: str
    features: Features = "hidden"
    rows: int | None = None
    seed: int = 0
    max_length: int = 1024
    steps: int = 100
    batch_size: int = 4
    learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        if self.router not in routers_with_data():
            raise RouterError(
                "the router must be one that needs data", found=self.router, remedy=f"one of {routers_with_data()}"
            )
        check_count("--rows", self.num_rows)
        check_count("--max-length", self.max_length)
        check_seed("--seed", self.seed)
        # What these refuse is refused here.
        _ = self.routing, self.gates

    @property
    def data(self) -> Data:
        """What the router needs."""
        data = ROUTERS[self.router].data
        assert data is not None
        return data

    @property
    def num_rows(self) -> int:
        """Training rows of each task, at most."""
        return self.data.num_rows if self.rows is None else self.rows

    @property
    def routing(self) -> Routing:
        """The setting that can be used afterwards."""
        return Routing.of(self.router, features=self.features, calibrated=self.data.is_optional)

    @property
    def gates(self) -> GateSettings:
        """How gates are trained."""
        return GateSettings(self.steps, self.batch_size, self.learning_rate, self.seed)

    @property
    def kind(self) -> str:
        """The name under which a library keeps what the router reads."""
        kind = self.routing.data_kind
        assert kind is not None
        return kind
