"""`lorary explore`: opens a library and makes its page."""

from pathlib import Path

from lorary.library.store import Library
from lorary.recipes.inputs import library_of
from lorary.report.explore import explore_page
from lorary.report.shell import check_writable, write_page


def explore(library: Library | str | Path, html: str | Path) -> None:
    """Write the page of a library: a map of its adapters with a card for each.

    Args:
        library: the library, or the path of its folder.
        html: the file to write; an older one is replaced.

    Raises:
        UsageError: if the file cannot be written.
        LibraryError: if there is no library, or something in it cannot be read.
        AdapterError: if an adapter is damaged.
    """
    check_writable(Path(html))
    write_page(Path(html), explore_page(library_of(library)))
