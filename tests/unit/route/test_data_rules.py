"""Rules that know experts by their data equal their definitions."""

import torch
from torch.nn.functional import layer_norm

from lorary.ops.logistic import fit_logistic
from lorary.route.centroid import centroid_score_rows, product_readout
from lorary.route.phatgoose import gate_score_rows
from lorary.route.retrieval import retrieval_scores
from lorary.route.task_predictor import predictor_logits

TOKENS, EXPERTS, D = 7, 4, 24
ALIVE = torch.tensor([True, True, False, True])


def random(*shape: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_a_token_is_scored_by_its_product_with_the_unit_centroid(generator: torch.Generator) -> None:
    x, means = random(TOKENS, D, generator=generator), 5 * random(EXPERTS, D, generator=generator)
    found = product_readout(x @ centroid_score_rows(means).mT, ALIVE)
    for token in range(TOKENS):
        for expert in (0, 1, 3):
            expected = torch.dot(x[token], means[expert]) / means[expert].norm() / D**0.5
            assert abs(found[token, expert] - expected) < 1e-12
    assert (found < 0).any()  # a product and not its size
    assert (found[:, 2] == -torch.inf).all()
    standard = layer_norm(x, (D,), eps=0.0)
    cosines = torch.cosine_similarity((x - x.mean(dim=1, keepdim=True))[:, None], means[None], dim=-1)
    assert torch.allclose(product_readout(standard @ centroid_score_rows(means).mT, ALIVE)[:, 0], cosines[:, 0])


def test_tokens_and_gates_are_both_standardised(generator: torch.Generator) -> None:
    x, gates = random(TOKENS, D, generator=generator), 1e-3 * random(EXPERTS, D, generator=generator) + 0.5
    found = product_readout(layer_norm(x, (D,), eps=0.0) @ gate_score_rows(gates).mT, ALIVE)
    expected = layer_norm(x, (D,), eps=0.0) @ layer_norm(gates, (D,), eps=0.0).mT / D**0.5
    assert torch.allclose(found[:, ALIVE], expected[:, ALIVE], rtol=1e-8)
    assert torch.allclose(gate_score_rows(gates * torch.tensor([[1.0], [9.0], [1.0], [0.1]])), gate_score_rows(gates))


def test_what_nothing_is_known_of_has_no_row() -> None:
    zeros = torch.zeros(2, D)
    assert not centroid_score_rows(zeros).any()
    assert not gate_score_rows(zeros).any()


def test_retrieval_is_the_cosine_with_the_mean(generator: torch.Generator) -> None:
    features, means = random(3, D, generator=generator), random(EXPERTS, D, generator=generator)
    expected = torch.cosine_similarity(features[:, None], means[None], dim=-1)
    assert torch.allclose(retrieval_scores(features, means), expected)
    assert torch.allclose(retrieval_scores(7 * features, 3 * means), expected)


def test_the_classifier_minimises_the_penalised_loss_of_standardised_features(generator: torch.Generator) -> None:
    """At the minimum of `½‖W‖² + Σ w_i loss_i` over standardised features, the gradient vanishes; three classes."""
    labels = torch.tensor([0] * 12 + [1] * 6 + [2] * 3)
    features = random(21, 5, generator=generator) * 10 + labels[:, None] * 4
    coefficients = fit_logistic(features, labels, 3)
    deviation, mean = torch.std_mean(features, dim=0, correction=0)
    weights = (coefficients[:, :-1] * deviation).requires_grad_()
    intercepts = (coefficients[:, -1] + coefficients[:, :-1] @ mean).requires_grad_()
    assert torch.allclose(
        predictor_logits(features, coefficients), (features - mean) / deviation @ weights.mT + intercepts, atol=1e-8
    )
    losses = torch.nn.functional.cross_entropy(
        (features - mean) / deviation @ weights.mT + intercepts, labels, reduction="none"
    )
    balance = torch.tensor([7 / 12, 7 / 6, 7 / 3], dtype=torch.float64)[labels]  # rows / (classes * rows of the class)
    (0.5 * weights.square().sum() + (balance * losses).sum()).backward()
    assert weights.grad is not None
    assert intercepts.grad is not None
    assert weights.grad.abs().max() < 1e-2
    # The intercepts are free up to one constant that softmax does not see.
    assert intercepts.grad.abs().max() < 1e-2


def test_two_classes_and_one_are_classes_too(generator: torch.Generator) -> None:
    labels = torch.tensor([0] * 8 + [1] * 8)
    features = random(16, 3, generator=generator) + 5 * labels[:, None]
    logits = predictor_logits(features, fit_logistic(features, labels, 2))
    assert torch.equal(logits.argmax(dim=1), labels)
    assert not fit_logistic(features, torch.zeros(16, dtype=torch.int64), 1).any()
