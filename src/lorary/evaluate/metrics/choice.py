"""Accuracy: whether the likeliest option of a row is a right one."""

from collections.abc import Sequence
from dataclasses import dataclass

from lorary.evaluate.loglik import AnswerLoss
from lorary.evaluate.metrics.metric import Metric


@dataclass(frozen=True)
class ChoiceMetric(Metric):
    """A metric read off the log-likelihoods of a row's options.

    Args:
        normalise: divide by the number of tokens, as the paper does; otherwise the raw sum decides.
        count_eos: count EOS among the tokens, as the paper does; the raw sum has it always.
    """

    normalise: bool = True
    count_eos: bool = True

    def choose(self, losses: Sequence[Sequence[AnswerLoss]]) -> list[int]:
        """Position of the likeliest option of each row; the first of equal ones.

        Args:
            losses: for each row, the losses of its options.
        """
        return [min(range(len(row)), key=lambda option: self._cost(row[option])) for row in losses]

    def _cost(self, loss: AnswerLoss) -> float:
        if not self.normalise:
            return loss.total
        return loss.mean if self.count_eos else loss.mean_no_eos


_SHARE = "the share of rows in which the right option has the highest"
ACC = ChoiceMetric("acc", "accuracy", f"{_SHARE} log-likelihood per token")
ACC_NO_EOS = ChoiceMetric("acc_no_eos", "acc_no_eos", count_eos=False)
ACC_RAW = ChoiceMetric("acc_raw", "accuracy, raw", f"{_SHARE} summed log-likelihood", normalise=False)
