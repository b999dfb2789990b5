"""A TCP proxy that does to connections what a mobile network does.

Knows sockets and time; knows no gRPC and no models. Bytes of a direction keep their order, and none is ever changed:
they come late, slowly, in pieces, not at all, or the connection breaks under them.
"""

import asyncio
import random
import socket
import struct
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

PIECE = 16 << 10
AHEAD = 64
"""Pieces that may be under way at once in one direction; who sends more waits, as behind a full buffer."""
AT_ONCE = struct.pack("ii", 1, 0)
"""SO_LINGER: closing sends a reset, and forgets what is not sent."""


@dataclass(frozen=True)
class Weather:
    """What happens to the bytes of either direction.

    Attributes:
        late_s: how long each byte is under way, in seconds.
        jitter_s: give or take so much, in seconds; bytes do not overtake each other.
        rate: bytes per second; None for no limit.
        pieces: at most so many bytes are handed on at once, a random number of them; None for as they come.
        stalls_every: after so many bytes nothing moves for `stall_s` seconds; None for never.
        slow_close_s: how long the end of a connection is kept from the other side, in seconds.
        still: nothing moves while this is so, and all of it does afterwards.
        hole: what is under way now is lost, and nothing moves on these connections ever again.
    """

    late_s: float = 0.0
    jitter_s: float = 0.0
    rate: float | None = None
    pieces: int | None = None
    stalls_every: int | None = None
    stall_s: float = 0.3
    slow_close_s: float = 0.0
    still: bool = False
    hole: bool = False


FAIR = Weather()


class Proxy:
    """Listens on loopback in front of a server; the weather may change at any time.

    Attributes:
        weather: what happens to bytes from now on.
        resets: each new connection takes the next number, and is reset when so many bytes have gone up or down on it.
        accepted: how many connections there were.
    """

    def __init__(self, server: str, weather: Weather = FAIR, seed: int = 0) -> None:
        self.weather = weather
        self.resets: deque[int] = deque()
        self.accepted = 0
        self._host, _, port = server.rpartition(":")
        self._port = int(port)
        self._random = random.Random(seed)
        self._open: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._listening = self._loop.run_until_complete(asyncio.start_server(self._accept, "127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listening.sockets[0].getsockname()[1]}"
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def change(self, **weather: Any) -> None:
        """Change some of the weather."""
        self.weather = replace(self.weather, **weather)

    def cut(self) -> None:
        """Reset every connection there is."""
        asyncio.run_coroutine_threadsafe(self._cut(), self._loop).result(10)

    def close(self) -> None:
        """Reset everything and listen no more."""
        self.cut()
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _cut(self) -> None:
        for writer in tuple(self._open):
            _reset(writer)

    async def _end(self) -> None:
        self._listening.close()
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _accept(self, client: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        self.accepted += 1
        connection = _Connection(self, self.resets.popleft() if self.resets else None)
        self._open.add(back)
        try:
            server, on = await asyncio.open_connection(self._host, self._port)
            self._open.add(on)
            with suppress(ConnectionError, asyncio.CancelledError):
                await asyncio.gather(connection.pump(client, on), connection.pump(server, back))
            self._open.discard(on)
            _reset(on) if connection.broken else on.close()
        except OSError:  # nobody listens there
            connection.broken = True
        finally:
            self._open.discard(back)
            _reset(back) if connection.broken else back.close()


class _Connection:
    def __init__(self, proxy: Proxy, reset_at: int | None) -> None:
        self._proxy, self._reset_at = proxy, reset_at
        self._passed = 0
        self._lost = False
        self.broken = False

    async def pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        """Carry one direction to its end."""
        under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(AHEAD)
        taking = asyncio.ensure_future(self._take(source, under_way))
        try:
            while (piece := await self._arrived(under_way)) and not self.broken:
                await self._hand_on(piece, sink)
            await self._passes(self._proxy.weather.slow_close_s)
            if sink.can_write_eof():
                sink.write_eof()
        except ConnectionError:
            self.broken = True
            raise
        finally:
            taking.cancel()

    async def _take(self, source: asyncio.StreamReader, under_way: "asyncio.Queue[tuple[float, bytes]]") -> None:
        clock, last = asyncio.get_running_loop().time, 0.0
        while True:
            try:
                piece = await source.read(PIECE)
            except ConnectionError:
                self.broken, piece = True, b""
            weather = self._proxy.weather
            jitter = self._proxy._random.uniform(-weather.jitter_s, weather.jitter_s)
            last = max(last, clock() + max(0.0, weather.late_s + jitter))
            await under_way.put((last, piece))
            if not piece:
                return

    async def _arrived(self, under_way: "asyncio.Queue[tuple[float, bytes]]") -> bytes:
        due, piece = await under_way.get()
        await self._passes(due - asyncio.get_running_loop().time())
        return piece

    async def _hand_on(self, piece: bytes, sink: asyncio.StreamWriter) -> None:
        while piece and not self.broken:
            while self._proxy.weather.still:
                await asyncio.sleep(0.005)
            weather = self._proxy.weather
            self._lost = self._lost or weather.hole
            size = self._proxy._random.randint(1, weather.pieces) if weather.pieces else len(piece)
            part, piece = piece[:size], piece[size:]
            if self._reset_at is not None and self._passed + len(part) >= self._reset_at:
                part, self.broken = part[: self._reset_at - self._passed], True
            await self._pass_on(part, sink, weather)
        if self.broken:
            raise ConnectionResetError

    async def _pass_on(self, part: bytes, sink: asyncio.StreamWriter, weather: Weather) -> None:
        before, self._passed = self._passed, self._passed + len(part)
        if weather.rate is not None:
            await self._passes(len(part) / weather.rate)
        if weather.stalls_every is not None and before // weather.stalls_every < self._passed // weather.stalls_every:
            await self._passes(weather.stall_s)
        if not self._lost:
            sink.write(part)
            await sink.drain()

    async def _passes(self, seconds: float) -> None:
        if seconds > 0:
            await asyncio.sleep(seconds)


def _reset(writer: asyncio.StreamWriter) -> None:
    plain = writer.get_extra_info("socket")
    with suppress(OSError):
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, AT_ONCE)
    writer.transport.abort()


@contextmanager
def proxied(server: str, weather: Weather = FAIR) -> Iterator[Proxy]:
    """A proxy in front of a server while in here."""
    proxy = Proxy(server, weather)
    try:
        yield proxy
    finally:
        proxy.close()
