"""What the house is made of, counted: `python tests/support/house.py [FOLDER]`, a folder such as src/lorary.

Prints lines and files of each room, imports upward, circles of files, the largest files and functions, functions of
more than eight parameters, and classes whose name is defined twice. Floors are those of `tests/test_floors.py` beside
it. Give the folder of another checkout to compare two versions; rooms without a floor count as none.
"""

import ast
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

MANY_PARAMETERS = 8

# The floor of each room (a folder or a file of the package). The files of the ground floor are one room.
FLOORS = {
    "adapter": 0,
    "axes": 0,
    "caching": 0,
    "cores": 0,
    "display": 0,
    "errors": 0,
    "fetching": 0,
    "flags": 0,
    "keys": 0,
    "keywords": 0,
    "numbers": 0,
    "reading": 0,
    "tabular": 0,
    "terminal": 0,
    "version": 0,
    "ops": 1,
    "data": 1,
    "lora": 2,
    "formats": 2,
    "cluster": 2,
    "merge": 2,
    "route": 2,
    "library": 3,
    "model": 4,
    "remote": 4,
    "train": 5,
    "evaluate": 5,
    "build": 6,
    "prepare": 6,
    "report": 6,
    "adapt": 7,
    "serve": 7,
    "study": 8,
    "recipes": 9,
    "cli": 10,
    # The door: it knows everybody, and nobody inside goes through it.
    "__main__": 11,
    "__init__": 11,
}


def modules_of(source: Path) -> dict[str, Path]:
    """The files of a package by dotted name; a package stands for its `__init__`."""
    modules = {}
    for path in sorted(source.rglob("*.py")):
        parts = path.relative_to(source.parent).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


def imports_of(name: str, path: Path, modules: Mapping[str, Path]) -> Iterator[tuple[int, str]]:
    """The modules of the package that a file imports, wherever in the file, with the line.

    Args:
        name: of the module.
        path: of its file.
        modules: of the whole package.
    """
    parts = name.split(".")
    package = parts if path.name == "__init__.py" else parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (start, node.module) if part)
            full = [f"{module}.{alias.name}" for alias in node.names]
            names = [other if other in modules else module for other in full]
        else:
            continue
        yield from ((node.lineno, other) for other in names if other in modules and other != name)


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other, directly or through others: strongly connected components."""
    reach: dict[str, set[str]] = {}
    for start in graph:
        seen: set[str] = set()
        waiting = list(graph[start])
        while waiting:
            module = waiting.pop()
            if module not in seen:
                seen.add(module)
                waiting.extend(graph.get(module, ()))
        reach[start] = seen
    groups = {
        tuple(sorted({a} | {b for b in reach[a] if a in reach.get(b, ())})) for a in graph if a in reach[a]
    }  # fmt: skip
    return sorted(map(list, groups))


def upward(source: Path) -> list[str]:
    """Imports from the same floor or one above, as lines for people."""
    modules, lines = modules_of(source), []
    for name, path in modules.items():
        room = room_of(name)
        for line, other in imports_of(name, path, modules):
            above = room_of(other)
            is_near = above == room or FLOORS.get(above) == FLOORS.get(room) == 0
            if not is_near and FLOORS.get(above, 99) >= FLOORS.get(room, 99):
                lines.append(f"{name}:{line} imports {other}")
    return lines


def room_of(name: str) -> str:
    """The room of a module: the first part below the package."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def functions_of(path: Path) -> Iterator[tuple[str, int, int]]:
    """Name, lines and number of parameters of every function in a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = node.args
            named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
            number = len([argument for argument in named if argument.arg not in ("self", "cls")])
            yield node.name, (node.end_lineno or node.lineno) - node.lineno + 1, number


def classes_of(path: Path) -> Iterator[str]:
    """Names of the classes at the top of a file."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            yield node.name


def twice(source: Path) -> dict[str, list[str]]:
    """Public classes whose name is defined in more than one file, with the files."""
    places = defaultdict(list)
    for path in source.rglob("*.py"):
        for name in classes_of(path):
            if not name.startswith("_"):
                places[name].append(str(path.relative_to(source)))
    return {name: sorted(files) for name, files in sorted(places.items()) if len(files) > 1}


def report(source: Path) -> str:
    """The whole account as text."""
    modules = modules_of(source)
    sizes = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in modules.values()}
    rooms: Counter[str] = Counter()
    files: Counter[str] = Counter()
    for name, path in modules.items():
        rooms[room_of(name)] += sizes[path]
        files[room_of(name)] += 1
    graph = {name: {other for _, other in imports_of(name, path, modules)} for name, path in modules.items()}
    functions = [(lines, number, f"{path.relative_to(source)}:{name}")
                 for path in modules.values() for name, lines, number in functions_of(path)]  # fmt: skip
    largest = sorted(sizes.items(), key=lambda pair: -pair[1])[:3]
    many = [f"{number} {where}" for _, number, where in sorted(functions, key=lambda f: -f[1])
            if number > MANY_PARAMETERS]  # fmt: skip
    names, ups, rings = twice(source), upward(source), circles(graph)
    lines = [f"{'room':<12}{'floor':>6}{'files':>7}{'lines':>8}"]
    for room in sorted(rooms, key=lambda room: (FLOORS.get(room, 99), room)):
        lines.append(f"{room:<12}{FLOORS.get(room, '-'):>6}{files[room]:>7}{rooms[room]:>8}")
    lines += [
        f"{'all':<12}{'':>6}{sum(files.values()):>7}{sum(rooms.values()):>8}",
        f"imports upward: {len(ups)}",
        f"circles of files: {len(rings)} {rings or ''}".rstrip(),
        f"largest files: {', '.join(f'{path.relative_to(source)} {size}' for path, size in largest)}",
        f"largest functions: {', '.join(f'{where} {size}' for size, _, where in sorted(functions, reverse=True)[:3])}",
        f"functions of more than {MANY_PARAMETERS} parameters: {len(many)}, the longest {', '.join(many[:3])}",
        f"class names defined twice: {len(names)} {', '.join(names)}".rstrip(),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    print(report(Path(sys.argv[1] if len(sys.argv) > 1 else "src/lorary").resolve()))
