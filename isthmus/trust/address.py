"""Addresses: HOST:PORT, and whether only this machine can reach a host.

Knows text and IP ranges; opens no connection.
"""

import ipaddress

from isthmus.errors import UsageError


def split_address(address: str) -> tuple[str, int]:
    """Host (without an IPv6 address's brackets) and port of `HOST:PORT`.

    Raises:
        UsageError: it is not of that form.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise UsageError(f"{address!r} is not HOST:PORT, such as 127.0.0.1:7070")
    try:
        host.encode("idna")
    except UnicodeError:
        raise UsageError(f"{host!r:.80} is no host name; write HOST:PORT, such as 127.0.0.1:7070") from None
    return host.strip("[]"), int(port)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
