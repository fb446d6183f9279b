"""Statistics of routing weights on cases that can be worked out by hand."""

from math import log

import pytest
import torch

from lorary.evaluate.routing import SINK_RATIO, ExpertUse, agreement, as_shares, expert_use, measure, norm_ratios


def test_the_base_has_what_experts_leave() -> None:
    weights = torch.tensor([[0.5, 0.25], [0.0, 0.0], [1.0, 1.0], [0.3, 0.7 - 1e-7]])
    assert as_shares(weights).tolist() == [
        [0.5, 0.25, 0.25],
        [0, 0, 1],
        [0.5, 0.5, 0],
        [pytest.approx(0.3), pytest.approx(0.7), 0],
    ]


def test_one_expert_for_each_half_of_the_tokens_is_information_and_one_mixture_for_all_is_none() -> None:
    halves = measure(as_shares(torch.eye(2)))
    assert (halves.entropy, halves.balance, halves.information) == pytest.approx((0, log(2), log(2)))
    alike = measure(as_shares(torch.full((4, 2), 0.5)))
    assert (alike.entropy, alike.balance, alike.information) == pytest.approx((log(2), log(2), 0))
    assert alike.usage.tolist() == [0.5, 0.5]


def test_two_routers_agree_by_leader_by_set_and_by_weight() -> None:
    one = as_shares(torch.tensor([[0.9, 0.1, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]))
    other = as_shares(torch.tensor([[0.6, 0.0, 0.4], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0]]))
    singles = [agreement(a[None], b[None]) for a, b in zip(one, other, strict=True)]
    assert [round(found.overlap, 6) for found in singles] == [round(1 / 3, 6), 0, 1, 0]
    assert [found.top1 for found in singles] == [1, 0, 1, 0]
    assert [found.divergence for found in singles[1:]] == pytest.approx([1, 0, 1])
    mixture = [0.75, 0.05, 0.2]
    expected = sum(-m * log(m) for m in mixture) + sum(p * log(p) for p in (0.9, 0.1, 0.6, 0.4)) / 2
    assert singles[0].divergence == pytest.approx(expected / log(2), abs=1e-6)


def test_an_expert_is_judged_in_the_layers_it_has() -> None:
    weights = torch.zeros(2, 4, 3)
    weights[:, :, 0] = 0.4
    weights[1, :, 1] = 0.6
    weights[0, :2, 2] = 0.6
    reach = torch.tensor([[True, False, True], [True, True, False]])
    first, second, third = expert_use(as_shares(weights), reach)
    assert first == pytest.approx((2, 0.4, 0.5, 1.0, 0.0))  # where it stands alone, the base has the larger part
    assert second == pytest.approx((1, 0.6, 0.5, 1.0, 1.0))
    assert third == pytest.approx((1, 0.3, 0.5, 0.5, 0.5))


@pytest.mark.parametrize(
    ("use", "verdict"),
    [
        (ExpertUse(0, 0.0, 0.0, 0.0, 0.0), "out of reach"),
        (ExpertUse(3, 0.0, 0.25, 0.0, 0.0), "dead"),
        (ExpertUse(3, 0.024, 0.25, 0.1, 0.0), "hardly used"),
        (ExpertUse(3, 0.026, 0.25, 0.1, 0.0), ""),
        (ExpertUse(3, 0.5, 0.25, 0.9, 0.51), "dominating"),
        (ExpertUse(3, 0.5, 0.25, 0.9, 0.5), ""),
        (ExpertUse(3, 0.7, 0.5, 1.0, 0.74), ""),  # of two experts one always leads by some margin
        (ExpertUse(3, 0.7, 0.5, 1.0, 0.76), "dominating"),
        (ExpertUse(3, 1.0, 1.0, 1.0, 1.0), ""),  # an only expert has nobody to dominate
    ],
)
def test_remarks_follow_the_thresholds(use: ExpertUse, verdict: str) -> None:
    assert use.verdict == verdict


def test_a_token_that_is_huge_at_one_depth_alone_stands_out() -> None:
    norms = torch.ones(3, 7)
    norms[1, 4] = 2 * SINK_RATIO
    assert (norm_ratios(norms) > SINK_RATIO).tolist() == [i == 4 for i in range(7)]
    assert norm_ratios(torch.ones(1, 1)).tolist() == [1.0]
