"""`lorary explore`, run as a user runs it."""

from pathlib import Path

from commands import Run

from lorary.library.store import Library


def test_the_page_is_written_and_the_library_stays_whole(tmp_path: Path, tiny_base_folder: Path, run: Run) -> None:
    library = Library.create(tmp_path / "lib", tiny_base_folder)
    page = tmp_path / "page.html"
    done = run("explore", library.path, "--html", page)
    assert (done.code, done.out) == (0, f"page: {page}\n"), done.err
    assert page.read_text().endswith("</html>")
    assert library.verify() == []


def test_what_cannot_be_done_is_said_and_nothing_is_written(tmp_path: Path, tiny_base_folder: Path, run: Run) -> None:
    library = Library.create(tmp_path / "lib", tiny_base_folder)
    nowhere = run("explore", library.path, "--html", tmp_path / "no" / "page.html")
    assert (nowhere.code, "no such folder" in nowhere.err) == (2, True)
    missing = run("explore", tmp_path / "other", "--html", tmp_path / "page.html")
    assert (missing.code, "must be a library" in missing.err) == (1, True)
    assert run("explore", library.path).code == 2
    assert not (tmp_path / "page.html").exists()
