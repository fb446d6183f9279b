"""What a run of a study has done."""

from lorary.recipes.reproduce import ReproduceResult
from lorary.study.record import DONE


def done(result: ReproduceResult) -> list[str]:
    """The stages that this run did, in order."""
    return [name for name, state in result.stages.items() if state == DONE]
