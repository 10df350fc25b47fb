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


def link_to(path: Path, text: str) -> str:
    """A link to a page or picture of a run; other files are named by their path."""
    if path.name not in SERVED:
        return text if path.is_file() else str(path)
    return Markup('<a href="{}" target="_blank">{}</a>').format(address(path), text)


def folders_of(roots: Sequence[Path]) -> list[Path]:
    """Where the runs of these folders are; outputs/ may be a link."""
    return [
        folder.resolve() for root in roots for folder in (root, root / "outputs", root / "multirun")
    ]


def is_served(file: Path, roots: Sequence[Path]) -> bool:
    """Whether a resolved path is a page or picture of a run, and below these folders."""
    below = any(file.is_relative_to(folder) for folder in folders_of(roots))
    return below and file.name in SERVED and file.is_file()


def route(roots: Sequence[Path]) -> Route:
    """The route of these files. Args: roots: folders with outputs/ and multirun/."""

    def serve(request: Request) -> Response:
        file = Path("/", request.path_params["file"]).resolve()
        if not is_served(file, roots):
            return PlainTextResponse("no page of a run is there\n", 404)
        return FileResponse(file, headers=SANDBOX)

    return Route(f"{PREFIX}/{{file:path}}", serve)
