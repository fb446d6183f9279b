"""What Python's functions and commands are given, as the rooms below take it: libraries, base models, tasks, names."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lorary.data.schema import Task, shorten
from lorary.data.tasks import load_tasks, select_tasks
from lorary.errors import TaskError, UsageError
from lorary.evaluate.prompts import Prompt, check_prompts, read_prompts
from lorary.evaluate.seated_base import KnownBase, known_base, known_unloaded
from lorary.library.opening import base_of
from lorary.library.store import Library
from lorary.model.base import Base, load_base
from lorary.recipes.base_options import BaseOptions

TaskSource = str | Path | Task | Mapping[str, Task] | Sequence[str | Path | Task]


def library_of(library: Any) -> Library:
    """The library itself, or the one that lies at a path.

    Raises:
        LibraryError: if there is none.
        UsageError: if it is neither.
    """
    if isinstance(library, (str, Path)):
        return Library.open(library)
    if not isinstance(library, Library):
        raise UsageError("a library must be a lorary.Library or the path of its folder", found=_kind(library))
    return library


def base_at_hand(library: Library, base: Any, load: BaseOptions) -> Base:
    """The base model itself, or the one that is named, loaded; the library's own where None.

    Raises:
        UsageError: if it is something else, or a loaded one is given with options of loading.
        BaseModelError: if it cannot be loaded.
    """
    if isinstance(base, Base):
        _check_loaded(load)
        return base
    return load_base(_reference(library, base), dtype=load.dtype, device=load.device)


def unloaded_base(library: Library, base: Any, load: BaseOptions) -> KnownBase:
    """The same, loaded only when something must be computed."""
    if isinstance(base, Base):
        _check_loaded(load)
        return known_base(base)
    return known_unloaded(_reference(library, base), dtype=load.dtype, device=load.device)


def tasks_of(tasks: Any, names: Iterable[str] | None = None, columns: str | None = None) -> dict[str, Task]:
    """Tasks by name: of a reference, as they are, or of several of these.

    Args:
        tasks: a reference of `lorary.data.tasks.load_tasks`, a task, tasks by name, or a sequence of references and
            tasks.
        names: those to take; all where None.
        columns: which columns of references hold what, as `lorary.data.tasks.load_tasks` takes it.

    Raises:
        UsageError: if it is something else, or a name is not among the tasks.
        TaskError: if two tasks have one name, or rows do not follow the format.
    """
    wanted = None if names is None else list(names)
    if isinstance(tasks, (str, Path)):
        return load_tasks(tasks, names=wanted, columns=columns)
    sources = list(tasks.values()) if isinstance(tasks, Mapping) else [tasks] if isinstance(tasks, Task) else tasks
    if not isinstance(sources, (list, tuple)) or not all(isinstance(each, (str, Path, Task)) for each in sources):
        raise UsageError(
            "tasks must be a reference such as 'builtin' or a path, tasks as lorary.data.tasks.load_tasks gives them, "
            "or a list of these",
            found=shorten(tasks),
        )
    by_name: dict[str, Task] = {}
    for source in sources:
        for task in [source] if isinstance(source, Task) else load_tasks(source, columns=columns).values():
            if by_name.setdefault(task.name, task) is not task:
                raise TaskError(
                    f"task '{task.name}' must be given once", found="two tasks of that name", remedy="leave one out"
                )
    return select_tasks(by_name, wanted, "the tasks given")


def tasks_with_rows(tasks: Any, names: Sequence[str] | None = None, columns: str | None = None) -> dict[str, Task]:
    """The tasks that can be evaluated, of the arguments of `tasks_of`: those that are named, else all with test rows.

    Raises:
        TaskError: if there is none; else as for `tasks_of`.
    """
    by_name = {name: task for name, task in tasks_of(tasks, names, columns).items() if names or task.split("test")}
    if not by_name:
        raise TaskError(f"{shorten(tasks)} must have tasks with test rows", found="none")
    return by_name


def prompts_of(prompts: Any, answer: str | None, experts: Sequence[str] | None) -> list[Prompt]:
    """The prompts of a file, of a text, or of several; one answer goes with one prompt.

    Args:
        prompts: a text or a `Prompt`, several of them, or a `pathlib.Path` of a file that `read_prompts` reads.
        answer: to the one prompt.
        experts: that answer in place of a router.

    Raises:
        UsageError: if it is something else, a text is empty, there is no prompt, or an answer and no prompt for it, or
            experts without a name.
        TaskError: if the file holds something else.
    """
    if isinstance(prompts, Path):
        sources: Sequence[Any] = read_prompts(str(prompts))
    else:
        sources = [prompts] if isinstance(prompts, (str, Prompt)) else list(prompts)
    if wrong := [source for source in sources if not isinstance(source, (str, Prompt))]:
        raise UsageError("a prompt must be a text or a Prompt", found=f"a {type(wrong[0]).__name__}")
    texts = [source if isinstance(source, Prompt) else Prompt(source) for source in sources]
    if answer is not None:
        if len(texts) != 1 or texts[0].answer is not None:
            raise UsageError(
                "an answer must be given with one prompt that has none",
                found=f"{len(texts)} prompts",
                remedy="give each prompt its own: Prompt(text, answer)",
            )
        texts = [Prompt(texts[0].text, answer)]
    check_prompts(texts)
    if experts is not None and not experts:
        raise UsageError("--experts must name an expert", found="none", remedy="--router base uses no expert")
    return texts


def listed(names: str | Iterable[str] | None) -> list[str] | None:
    """Names as a list; a text is read as a command reads it, `a,b`."""
    if names is None:
        return None
    return [name.strip() for name in names.split(",") if name.strip()] if isinstance(names, str) else list(names)


def _reference(library: Library, base: Any) -> str:
    if base is not None and not isinstance(base, (str, Path)):
        raise UsageError(
            "a base model must be a lorary.Base or a reference such as 'embedded' or a path",
            found=_kind(base),
            remedy="base=lorary.load_base(...), or leave it out: the library names its own",
        )
    return base_of(library, None if base is None else str(base))


def _check_loaded(load: BaseOptions) -> None:
    if (load.device, load.dtype) != (BaseOptions.device, BaseOptions.dtype):
        raise UsageError(
            "device and dtype must be left out where the base model is loaded already",
            found=f"device {load.device}, dtype {load.dtype}",
            remedy="give them to lorary.load_base",
        )


def _kind(value: object) -> str:
    return f"a {type(value).__name__}"
