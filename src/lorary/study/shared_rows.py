"""What a study's training tasks share with its held-out ones: said in the report, since held-out means hang on it."""

from lorary.data.decontaminate import decontaminate
from lorary.errors import LoraryError
from lorary.study.context import Place
from lorary.study.record import FOLDER, read_document, stage_key, write_document

FILE = "overlap.json"


def shared_lines(place: Place) -> list[str]:
    """What training and held-out tasks share, in words; computed once, and anew when the data have changed.

    Args:
        place: of the study.

    Returns:
        Lines; none before anything was run, or where the tasks cannot be read.
    """
    if not (place.out / FOLDER).exists():
        return []
    try:
        train, held_out = place.listed(place.study.train), place.held_out_tasks
    except LoraryError:
        return []
    key = stage_key(**{side: {name: task.data_hash for name, task in tasks.items()}
                       for side, tasks in (("train", train), ("held_out", held_out))})  # fmt: skip
    path = place.out / "results" / FILE
    known = read_document(path)
    if known.get("key") != key:
        _, found = decontaminate(train, held_out)
        known = {"key": key, "lines": found.lines()}
        write_document(path, known)
    return [str(line) for line in known["lines"]]
