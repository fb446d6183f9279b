"""Weights that the caller or the size of the library fixes, and the menu of routers."""

import pytest

from lorary.errors import RouterError
from lorary.route.fixed import fixed_weights
from lorary.route.uniform import uniform_weights


def test_named_experts_get_their_weight_and_others_none() -> None:
    assert fixed_weights(["a", "b", "c"], {"c": 0.5, "a": -2}).tolist() == [-2, 0, 0.5]
    assert fixed_weights(["a"], {}).tolist() == [0]


def test_an_expert_that_is_not_there_is_refused_by_name() -> None:
    with pytest.raises(
        RouterError, match=r"must be in the library\nfound: sst3\nremedy: did you mean 'sst2'\? it has \['sst2'\]"
    ):
        fixed_weights(["sst2"], {"sst3": 1.0})


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_refused(weight: float) -> None:
    with pytest.raises(RouterError, match="weight of expert 'a' must be finite"):
        fixed_weights(["a"], {"a": weight})


def test_uniform_weights_share_one() -> None:
    assert uniform_weights(["a", "b", "c", "d"]).tolist() == [0.25] * 4
