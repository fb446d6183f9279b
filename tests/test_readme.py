"""Every bash and python block of the documentation runs, in the order in which a reader meets it.

The blocks of one page share a folder, an environment and a Python namespace. A block is left out only where the line
before it says `<!-- no-run: the reason -->`, or where it is no more than `make demo` and `make check`, the two commands
that run these tests or run far too long for them; each such block is reported as skipped, with its reason.
"""

import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from forked_server import COMMANDS, forking

ROOT = Path(__file__).parents[1]
PAGES = sorted(path for path in [ROOT / "README.md", *ROOT.glob("docs/**/*.md")] if path.is_file())
RUN = ("bash", "python")
SHOWN = ("", "text", "json", "jsonl", "html", "toml", "yaml", "make", "mermaid", "diff", "bibtex", "markdown")
MADE_BY_MAKE = "make runs it"
TIMEOUT_S = 900

_FENCE = re.compile(r"(?P<indent> *)(?P<ticks>`{3,}|~{3,}) *(?P<tag>[\w+-]*).*")
_NO_RUN = re.compile(r"\s*<!-- *no-run: *(?P<reason>.*?) *-->\s*")


@dataclass(frozen=True)
class Block:
    """A fenced code block: where its code begins, and why it is not run (None where it is)."""

    page: Path
    line: int
    tag: str
    code: str
    not_run: str | None

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks_of(page: Path, text: str) -> list[Block]:
    """The fenced code blocks of a page, in order."""
    blocks, lines, number = [], text.splitlines(), 0
    while number < len(lines):
        fence = _FENCE.fullmatch(lines[number])
        number += 1
        if fence is None:
            continue
        start = number
        while number < len(lines) and lines[number].strip() != fence["ticks"]:
            number += 1
        code = textwrap.dedent("\n".join(lines[start:number]))
        before = lines[start - 2] if start >= 2 else ""
        blocks.append(Block(page, start + 1, fence["tag"], code, reason_not_to_run(fence["tag"], code, before)))
        number += 1
    return blocks


def reason_not_to_run(tag: str, code: str, line_before: str) -> str | None:
    if said := _NO_RUN.fullmatch(line_before):
        return said["reason"]
    commands = [re.sub(r"\s*#.*", "", line).strip() for line in code.splitlines()]
    if tag == "bash" and {*commands} - {""} <= {"make demo", "make check"}:
        return MADE_BY_MAKE
    return None


ALL = [block for page in PAGES for block in blocks_of(page, page.read_text(encoding="utf-8"))]
RUNNABLE = [block for block in ALL if block.tag in RUN and block.not_run is None]
LEFT_OUT = [block for block in ALL if block.tag in RUN and block.not_run is not None]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """What forks commands off."""
    with forking() as place:
        yield place


@pytest.fixture
def shell(tmp_path: Path, server: str) -> dict[str, str]:
    """The environment of bash blocks: `lorary` and `python` are those of this test run."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, program in {"lorary": "lorary", "python": ""}.items():
        asking = f'"{sys.executable}" -I -S "{COMMANDS}" "{server}" {program}'
        (programs / name).write_text(f'#!/bin/sh\nexec {asking} "$@"\n')
        (programs / name).chmod(0o755)
    return {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT / "src")}


def run_bash(block: Block, folder: Path, environment: dict[str, str]) -> None:
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.code],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    if done.returncode != 0:
        pytest.fail(f"{block} ended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")


def run_python(block: Block, namespace: dict[str, Any]) -> None:
    # The empty lines before the code make a traceback point into the page.
    exec(compile("\n" * (block.line - 1) + block.code, str(block.page), "exec"), namespace)


def run_page(blocks: list[Block], folder: Path, environment: dict[str, str]) -> None:
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks:
        if block.tag == "bash":
            run_bash(block, folder, environment)
        else:
            run_python(block, namespace)


@pytest.mark.parametrize(
    "page", sorted({block.page for block in RUNNABLE}), ids=lambda page: str(page.relative_to(ROOT))
)
def test_the_blocks_of_a_page_run(
    page: Path, shell: dict[str, str], embedded_cache: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "reader"
    folder.mkdir()
    monkeypatch.chdir(folder)
    run_page([block for block in RUNNABLE if block.page == page], folder, shell)


@pytest.mark.parametrize("block", LEFT_OUT, ids=str)
def test_a_block_that_is_not_run_says_why(block: Block) -> None:
    assert block.not_run, f"{block}: write the reason, <!-- no-run: the reason -->"
    pytest.skip(f"{block} is not run: {block.not_run}")


@pytest.mark.parametrize("block", ALL, ids=str)
def test_a_block_is_tagged_as_what_it_is(block: Block) -> None:
    assert block.tag in (*RUN, *SHOWN), f"{block}: write 'bash' or 'python' for what can be run, not '{block.tag}'"


# --- the reader of pages itself

SAMPLE = """\
# A page

```bash
make check   # sets up and runs the tests
```

- in a list:

  ```python
  number = 1
  if number:
      number += 1
  ```

<!-- no-run: needs a GPU -->
```bash
lorary serve lib
```

```python
assert number == 2
```

````markdown
```bash
false
```
````

```
just text
```
"""


def test_blocks_are_found_with_their_lines_and_reasons() -> None:
    found = [(block.line, block.tag, block.not_run) for block in blocks_of(Path("page.md"), SAMPLE)]
    assert found == [
        (4, "bash", MADE_BY_MAKE),
        (10, "python", None),
        (17, "bash", "needs a GPU"),
        (21, "python", None),
        (25, "markdown", None),
        (31, "", None),
    ]


def test_python_blocks_of_a_page_share_their_names(tmp_path: Path) -> None:
    blocks = [block for block in blocks_of(Path("page.md"), SAMPLE) if block.tag == "python"]
    run_page(blocks, tmp_path, {})
    with pytest.raises(NameError):
        run_page(blocks[1:], tmp_path, {})


def test_a_block_that_fails_fails_the_page_and_names_its_line(tmp_path: Path, shell: dict[str, str]) -> None:
    text = "```bash\necho made > file\n```\n\n```bash\ncat file\nfalse | true\n```\n"
    with pytest.raises(pytest.fail.Exception, match=r"page\.md:6 ended with 1:\nmade"):
        run_page(blocks_of(Path("page.md"), text), tmp_path, shell)


def test_commands_and_scripts_run_in_the_readers_folder_and_their_failures_show(
    tmp_path: Path, shell: dict[str, str]
) -> None:
    (tmp_path / "beside.py").write_text("WORD = 'beside'\n")
    text = (
        "```bash\necho 'import beside, sys; print(beside.WORD, sys.argv, input())' > script.py\n"
        "echo read | python script.py one 'two three' > said\nlorary --version >> said\n"
        "! lorary library ls nowhere 2>> said\n```\n\n```bash\nlorary library ls nowhere\n```\n"
    )
    with pytest.raises(pytest.fail.Exception, match=r"page\.md:9 ended with 1:\n\nerror: nowhere must be a library"):
        run_page(blocks_of(Path("page.md"), text), tmp_path, shell)
    script, version, error, *_ = (tmp_path / "said").read_text().splitlines()
    assert script == "beside ['script.py', 'one', 'two three'] read"
    assert version.startswith("lorary ")
    assert error.startswith("error: nowhere must be a library")


def test_a_make_command_with_anything_else_beside_it_is_run() -> None:
    assert reason_not_to_run("bash", "make demo\nlorary --help", "") is None
    assert reason_not_to_run("bash", "make demo --help", "") is None
