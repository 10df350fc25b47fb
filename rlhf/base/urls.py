"""Addresses of servers, and how messages show them: without what is secret in them."""

from __future__ import annotations

import re

USER = re.compile(  # user and password in a URL, or in what looks like one
    r"(?<=//)[^\s/:@]+:(?!\d*(?:[/?#]|$))\S*@"  # the password may have any character
    r"|(?<=//)[^\s/?#]*@"
    r"|(?<![^\s'\"=(])[^\s/:@'\"=(]+:(?!/)[^\s/]*@"  # without http://
)
QUERY = re.compile(r"([?&][^\s=&#?]*=)[^\s&#]+|(\?)[^\s=&#]+(?![^\s&#])")


def shown_url(url: str) -> str:
    """A URL, or a text with URLs, without user and password and without the values of its query.

    >>> shown_url("http://me:secret@host:5000/path?key=secret&n=1")
    'http://host:5000/path?key=***&n=***'
    """
    return QUERY.sub(lambda found: f"{found[1] or found[2]}***", USER.sub("", url))


def wrong_address(key: str, address: str | None) -> str:
    """What is wrong with the address of a server, as a line; "" where it may be one, or is null."""
    if address is None or re.match(r"https?://[^/\s]+", address):
        return ""
    return f"{key}={shown_url(address)}: give an address that begins with http:// or https://"
