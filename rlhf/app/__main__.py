"""A page to look at runs, chat and compare, in a browser on this machine.

    python -m rlhf.app [--host 127.0.0.1] [--port 7860] [FOLDER ...]

A FOLDER has outputs/ and multirun/ (default: the current folder). Nothing is sent to other
machines, and only this machine can open the page. With another --host, its address has a token.
"""

from __future__ import annotations

import contextlib
import os
import sys

if __name__ == "__main__":  # -m would take modules from the current directory first
    with contextlib.suppress(FileNotFoundError):  # it was deleted: run_interruptible says so
        sys.path[:] = [path for path in sys.path if path not in ("", os.getcwd())]

import argparse
import gc
import importlib.util
import secrets
import socket
from pathlib import Path

from rlhf.base.interrupts import end_at_interrupt, raise_at_interrupt, run_interruptible

if __name__ == "__main__":
    end_at_interrupt()  # before imports that take seconds

from rlhf.base.errors import UserError
from rlhf.base.log import say
from rlhf.base.server import is_loopback

PORT = 7860
OFFLINE = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m rlhf.app", description="Runs, chat and comparisons in a browser."
    )
    parser.add_argument(
        "folders",
        nargs="*",
        type=Path,
        metavar="FOLDER",
        help="with outputs/ and multirun/; default: the current folder",
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="where to listen (default: %(default)s)"
    )
    parser.add_argument(
        "--port", type=int, default=PORT, help="default: %(default)s; 0: a free one"
    )
    args = parser.parse_args()
    try:
        show(args.folders or [Path()], args.host, args.port)
    except UserError as error:
        say(f"error: {error}")
        return 2
    return 0


def show(roots: list[Path], host: str, port: int) -> None:
    """Serve the page until Ctrl-C.

    Raises: UserError where gradio is not installed, a folder is not there, or the port is taken.
    """
    for root in roots:
        if not root.is_dir():
            raise UserError(f"{root}: no such folder; give one that has outputs/ or multirun/")
    if importlib.util.find_spec("gradio") is None:
        raise UserError("gradio is not installed: pip install -e '.[app]'")
    with contextlib.closing(listen(host, port)) as listening:
        os.environ |= OFFLINE  # gradio reads it when it is imported
        gc.disable()  # a fifth of the import
        from rlhf.app import page

        gc.freeze()
        gc.enable()
        token = "" if is_loopback(host) else secrets.token_urlsafe(24)
        application = page.application([root.resolve() for root in roots], token)
        raise_at_interrupt()
        name, number = listening.getsockname()[:2]
        name = socket.gethostname() if name in ("0.0.0.0", "::") else name
        shown = f"[{name}]" if ":" in name else name
        say(f"http://{shown}:{number}" + (f"/?token={token}" if token else ""))
        page.serve(application, listening)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises: UserError where that is not possible."""
    if not 0 <= port < 1 << 16:
        raise UserError(f"--port {port}: a port is a number from 0 to 65535")
    try:
        family, *_, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(place)
        listening.listen(128)
    except socket.gaierror as error:
        raise UserError(f"--host {host}: {error.strerror}") from None
    except OSError as error:
        raise UserError(
            f"--host {host} --port {port}: {error.strerror}; choose another --port"
        ) from None
    return listening


if __name__ == "__main__":
    sys.exit(run_interruptible(main))
