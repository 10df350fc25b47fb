"""Pages and pictures of runs that the app serves, each in a sandbox of its own.

A report page has scripts. The browser runs them without access to the app, whatever is in them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from markupsafe import Markup
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response
from starlette.routing import Route

from rlhf.base.log import valid_text

SERVED = ("report.html", "curves.png", "frontier.png")  # of a run
PREFIX = "/page"
SANDBOX = {
    "Content-Security-Policy": "sandbox allow-scripts; default-src 'none'; "
    "script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; font-src data:",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",  # curves.png is drawn anew while a run trains
}


def address(file: Path) -> str:
    """The address of a file of a run."""
    return PREFIX + quote(str(file.resolve()))


def has_address(file: Path) -> bool:
    """Whether a browser can name a file: its path is UTF-8."""
    path = str(file.resolve())
    return path == valid_text(path)


def link_to(path: Path, text: str) -> str:
    """A link to a page or picture of a run; other files are named by their path."""
    if path.name not in SERVED:
        return text if path.is_file() else str(path)
    if not has_address(path):
        return text
    return Markup('<a href="{}" target="_blank">{}</a>').format(address(path), text)


def folders_of(roots: Sequence[Path]) -> list[Path]:
    """Where the runs of these folders are; outputs/ may be a link."""
    return [
        folder.resolve() for root in roots for folder in (root, root / "outputs", root / "multirun")
    ]


def served_file(path: str, roots: Sequence[Path]) -> Path | None:
    """The page or picture of a run at a path, if it is one, and below these folders."""
    try:
        file = Path("/", path).resolve()
        below = any(file.is_relative_to(folder) for folder in folders_of(roots))
        is_page = below and file.name in SERVED and file.is_file() and has_address(file)
        return file if is_page else None
    except (OSError, RuntimeError, ValueError):  # a name too long, a link to itself, a null byte
        return None


def route(roots: Sequence[Path]) -> Route:
    """The route of these files. Args: roots: folders with outputs/ and multirun/."""

    def serve(request: Request) -> Response:
        file = served_file(request.path_params["file"], roots)
        if file is None:
            return PlainTextResponse("no page of a run is there\n", 404)
        return FileResponse(file, headers=SANDBOX)

    return Route(f"{PREFIX}/{{file:path}}", serve)
