"""Which HTTP proxy gRPC takes to an address, and a connection made the same way.

Knows the variables that gRPC's core reads, in its order, and one CONNECT; knows nothing of what is said afterwards.
"""

import ipaddress
import os
import socket
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final
from urllib.parse import unquote, urlsplit

VARIABLES: Final = ("grpc_proxy", "https_proxy", "http_proxy")
"""The first that is set counts; set to nothing, it turns proxies off."""

EXCEPTIONS: Final = ("no_grpc_proxy", "no_proxy")

MOST_HEAD: Final = 1 << 14


@dataclass(frozen=True)
class Proxy:
    """A proxy in force: the variable that names it, where it is, and what it is told of who asks."""

    variable: str
    host: str
    port: int
    authorization: str | None = None

    def __str__(self) -> str:
        """Without its password."""
        return f"{self.variable}=http://{self.host}:{self.port}"

    def __repr__(self) -> str:
        """As above: no log shows the password."""
        return str(self)


def proxy_for(host: str, environment: Mapping[str, str] = os.environ) -> Proxy | None:
    """The proxy that gRPC takes to a host; None: it goes there directly."""
    variable = next((name for name in VARIABLES if name in environment), None)
    if variable is None or not environment[variable] or _excepted(host, environment):
        return None
    found = urlsplit(environment[variable])
    try:
        port = found.port or 80
    except ValueError:
        return None
    if found.scheme != "http" or not found.hostname:  # gRPC knows no others
        return None
    who = f"{unquote(found.username)}:{unquote(found.password or '')}" if found.username else None
    return Proxy(variable, found.hostname, port, b64encode(who.encode()).decode() if who else None)


def connect(host: str, port: int, timeout_s: float) -> socket.socket:
    """A TCP connection to a host, through the proxy in force if there is one.

    Raises:
        OSError: it cannot be had; a proxy that refuses says why in `strerror`.
    """
    proxy = proxy_for(host)
    if proxy is None:
        return socket.create_connection((host, port), timeout_s)
    line = socket.create_connection((proxy.host, proxy.port), timeout_s)
    try:
        _ask(line, proxy, f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
    except OSError:
        line.close()
        raise
    return line


def _ask(line: socket.socket, proxy: Proxy, target: str) -> None:
    told = f"Proxy-Authorization: Basic {proxy.authorization}\r\n" if proxy.authorization else ""
    line.sendall(f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n{told}\r\n".encode())
    head = b""
    while not head.endswith(b"\r\n\r\n") and len(head) < MOST_HEAD and (more := line.recv(1)):
        head += more
    words = head.split(b"\r\n", 1)[0].decode("latin-1").split(" ", 2)
    if len(words) < 2 or words[1] != "200":
        said = " ".join(words[1:]) or "nothing"
        raise OSError(0, f"the proxy of {proxy.variable} answered {said!r:.80}")


def _excepted(host: str, environment: Mapping[str, str]) -> bool:
    name = next((name for name in EXCEPTIONS if name in environment), None)
    entries = (entry.strip().lower() for entry in environment[name].split(",")) if name is not None else ()
    return any(entry and (host.lower().endswith(entry) or _within(host, entry)) for entry in entries)


def _within(host: str, network: str) -> bool:
    try:
        return ipaddress.ip_address(host) in ipaddress.ip_network(network, strict=False)
    except ValueError:
        return False
