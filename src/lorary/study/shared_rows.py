"""What a study's training tasks share with its held-out ones: said in the report, since held-out means hang on it."""

from lorary.data.decontaminate import decontaminate
from lorary.errors import LoraryError
from lorary.study.context import StudyContext
from lorary.study.record import FOLDER, read_document, stage_key, write_document

FILE = "overlap.json"


def shared_lines(context: StudyContext) -> list[str]:
    """What training and held-out tasks share, in words; computed once, and anew when the data have changed.

    Returns:
        Lines; none before anything was run, or where the tasks cannot be read.
    """
    if not (context.out / FOLDER).exists():
        return []
    try:
        train, held_out = context.listed(context.study.train), context.held_out_tasks
    except LoraryError:
        return []
    key = stage_key(**{side: {name: task.data_hash for name, task in tasks.items()}
                       for side, tasks in (("train", train), ("held_out", held_out))})  # fmt: skip
    path = context.out / "results" / FILE
    document = read_document(path)
    if document.get("key") != key:
        _, overlap = decontaminate(train, held_out)
        document = {"key": key, "lines": overlap.lines()}
        write_document(path, document)
    return [str(line) for line in document["lines"]]
