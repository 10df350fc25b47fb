"""The logger of the package, and helpers for messages. No torch here."""

from __future__ import annotations

import logging
import socket
from urllib.parse import urlsplit

log = logging.getLogger("rlhf")


def first_line(error: BaseException) -> str:
    """What an exception says, or its kind where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def is_listening(url: str) -> bool:
    """Whether somebody listens at a URL, within 2 s."""
    where = urlsplit(url)
    try:
        socket.create_connection(
            (where.hostname or "", where.port or (443 if where.scheme == "https" else 80)),
            timeout=2,
        ).close()
    except OSError:
        return False
    return True
