"""`lorary library push`: a library to a remote, with a card where the remote shows one."""

from lorary.evaluate.recorded_cells import recorded_scores
from lorary.library.store import Library
from lorary.remote.card import model_card
from lorary.remote.push import PushResult, push_library


def run_push(
    library_path: str,
    url: str | None = None,
    *,
    results: bool = False,
    overwrite: bool = False,
    public: bool = False,
) -> PushResult:
    """Push a library.

    Args:
        library_path: folder of the library.
        url: where to; where it was last pushed to or pulled from if None.
        results: push lines of evaluations too.
        overwrite: where both sides changed an adapter, this library's goes.
        public: let everybody read a repository that is made for it.

    Raises:
        LoraryError: as for `lorary.remote.push.push_library`.
    """
    return push_library(library_path, url, results=results, overwrite=overwrite, public=public, card=_card)


def _card(library: Library) -> bytes:
    scores = recorded_scores(library, library.describe())
    rows = [
        {
            "adapter": name,
            "task": score.task,
            "metric": score.metric,
            "expert": f"{score.value:.3f}",
            "base": "" if score.base is None else f"{score.base:.3f}",
            "rows": score.n,
        }
        for name, of_expert in sorted(scores.items())
        for score in of_expert
    ]
    return model_card(library, rows)
