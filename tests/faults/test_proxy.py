"""The proxy does what the tests that use it rely on."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest

from tests.faults.proxy import Proxy, Weather, proxied

SENT = bytes(range(256)) * 400


@pytest.fixture
def echo() -> Iterator[str]:
    """A server that sends everything back."""
    listening = socket.create_server(("127.0.0.1", 0))

    def answer(connection: socket.socket) -> None:
        with connection, suppress(ConnectionError):
            while piece := connection.recv(1 << 16):
                connection.sendall(piece)

    def accept() -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    yield f"127.0.0.1:{listening.getsockname()[1]}"
    listening.close()


def connected(proxy: Proxy, within_s: float = 20) -> socket.socket:
    host, _, port = proxy.address.rpartition(":")
    return socket.create_connection((host, int(port)), within_s)


def returned(line: socket.socket, sent: bytes) -> bytes:
    """What comes back of what is sent, until it is all there or the line ends."""
    threading.Thread(target=_send, args=(line, sent), daemon=True).start()
    found = b""
    while len(found) < len(sent) and (piece := line.recv(1 << 16)):
        found += piece
    return found


def _send(line: socket.socket, sent: bytes) -> None:
    with suppress(OSError):
        line.sendall(sent)


@pytest.mark.parametrize(
    "weather",
    [
        Weather(),
        Weather(late_s=0.05, jitter_s=0.05),
        Weather(rate=1_000_000),
        Weather(pieces=4000),
        Weather(stalls_every=50_000, stall_s=0.1),
        Weather(slow_close_s=0.2),
    ],
    ids=repr,
)
def test_every_byte_arrives_in_order_whatever_the_weather(echo: str, weather: Weather) -> None:
    with proxied(echo, weather) as proxy, connected(proxy) as line:
        assert returned(line, SENT) == SENT


def test_late_bytes_are_late_and_slow_ones_slow(echo: str) -> None:
    with proxied(echo, Weather(late_s=0.1)) as proxy, connected(proxy) as line:
        began = time.monotonic()
        assert returned(line, b"x") == b"x"
        assert time.monotonic() - began >= 0.2
        proxy.weather = Weather(rate=500_000)
        began = time.monotonic()
        assert returned(line, SENT) == SENT
        assert time.monotonic() - began >= len(SENT) / 500_000


@pytest.mark.parametrize("at", [0, 1, 5000, 150_000])
def test_a_connection_is_reset_at_its_byte_and_the_next_is_not(echo: str, at: int) -> None:
    with proxied(echo) as proxy:
        proxy.resets.append(at)
        with connected(proxy) as line, pytest.raises(ConnectionResetError):
            assert not returned(line, SENT)
        with connected(proxy) as line:
            assert returned(line, SENT) == SENT
        assert proxy.accepted == 2


def test_cutting_resets_what_is_open(echo: str) -> None:
    with proxied(echo) as proxy, connected(proxy) as line:
        assert returned(line, b"x") == b"x"
        proxy.cut()
        with pytest.raises(ConnectionResetError):
            line.recv(1)


def test_what_stood_still_moves_on_and_what_fell_into_a_hole_does_not(echo: str) -> None:
    with proxied(echo) as proxy, connected(proxy, within_s=0.3) as line:
        proxy.change(still=True)
        with pytest.raises(TimeoutError):
            returned(line, b"late")
        proxy.change(still=False)
        line.settimeout(20)
        assert line.recv(4) == b"late"
        proxy.change(hole=True)
        line.settimeout(0.3)
        with pytest.raises(TimeoutError):
            returned(line, b"lost")
        proxy.change(hole=False)
        with pytest.raises(TimeoutError):
            returned(line, b"lost too")
        with connected(proxy) as other:
            assert returned(other, SENT) == SENT
