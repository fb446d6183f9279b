"""Multinomial logistic regression: which class a vector belongs to."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def fit_logistic(
    features: Float[Tensor, "rows features"], labels: Int[Tensor, " rows"], num_classes: int
) -> Float[Tensor, "classes coefficients"]:
    """Coefficients of a linear classifier, with scikit-learn's default penalty on standardised features.

    Classes count alike however many rows they have. The standardisation is folded into the coefficients.

    Args:
        features: any float dtype.
        labels: class of each row; every class has rows.
        num_classes: at least 1.

    Returns:
        Weights on the features as they are, and the intercept behind them, float64. Softmax of the logits gives the
        probabilities; a single class has zeros.
    """
    from sklearn.linear_model import LogisticRegression  # takes a second, which only preparing should wait for

    wide = features.double()
    if num_classes == 1:
        return wide.new_zeros(1, wide.shape[1] + 1)
    deviation, mean = torch.std_mean(wide, dim=0, correction=0)
    scale = torch.where(deviation > 0, deviation, 1.0)
    fitted = LogisticRegression(class_weight="balanced", max_iter=1000)
    fitted.fit(((wide - mean) / scale).numpy(), labels.numpy())
    weights, intercepts = torch.from_numpy(fitted.coef_), torch.from_numpy(fitted.intercept_)
    if num_classes == 2:  # given as the odds of the second class
        weights, intercepts = (torch.cat([torch.zeros_like(part), part]) for part in (weights, intercepts))
    weights = weights / scale
    return torch.cat([weights, (intercepts - weights @ mean)[:, None]], dim=1)
