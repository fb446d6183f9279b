"""Which routers can decide at once."""

import shutil
from pathlib import Path

import pytest
import torch

from lorary.library.prepared import Prepared, content_key, expert_key, group_key, save_prepared
from lorary.library.store import Library
from lorary.route.setting import Routing
from lorary.serve.at_hand import routers_at_hand


@pytest.fixture
def own(lent_library: Path, tmp_path: Path) -> Library:
    shutil.copytree(lent_library, tmp_path / "lib")
    return Library.open(tmp_path / "lib")


def prepared() -> Prepared:
    return Prepared({"request": torch.ones(2)}, {}, {})


def test_routers_without_data_are_and_that_of_the_default_is(own: Library) -> None:
    names = routers_at_hand(Routing.of("auto"), own)
    assert {"auto", "arrow", "norm", "uniform"} <= set(names)
    assert not {"centroid", "contrast", "base"} & set(names)
    assert "auto" not in routers_at_hand(Routing.of("arrow"), own)


def test_a_router_is_once_all_experts_are_prepared(own: Library) -> None:
    kind = str(Routing.of("centroid").data_kind)
    for number, name in enumerate(own.names()):
        assert "centroid" not in routers_at_hand(Routing(), own), number
        save_prepared(own, kind, expert_key(own, name), prepared())
    assert "centroid" in routers_at_hand(Routing(), own)


@pytest.mark.parametrize("is_joint", [True, False])
def test_contrast_is_once_it_is_prepared_or_measured(own: Library, is_joint: bool) -> None:
    data = Routing.of("contrast").data
    assert data is not None
    if is_joint:
        save_prepared(own, data.kind, group_key(own, own.names()), prepared())
    else:
        for name in own.names():
            assert "contrast" not in routers_at_hand(Routing(), own)
            save_prepared(own, data.yardstick_kind, content_key(own, name, {"edition": 1}), prepared())
    assert {"contrast", "auto"} <= set(routers_at_hand(Routing(), own))
