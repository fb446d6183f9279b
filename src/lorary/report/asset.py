"""The page's templates, styles and scripts, which lie beside this file."""

from importlib.resources import files


def asset(name: str) -> str:
    """The text of one of these files."""
    return (files("lorary.report") / "assets" / name).read_text(encoding="utf-8")
