"""`lorary explore`: the page of a library."""

from typing import Annotated

import typer

from lorary.cli.options import LibraryPath


def explore(
    library: LibraryPath,
    html: Annotated[str, typer.Option("--html", metavar="FILE.html", help="file to write")],
) -> None:
    """Write a page with a map of a library and a card for each adapter; it opens offline."""
    from lorary.recipes.explore import explore as write_explorer

    write_explorer(library, html)
    print(f"page: {html}")
