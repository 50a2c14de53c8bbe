"""A LAN on this machine: TCP links between processes of this machine that are slow, uneven, lossy, or cut.

A `Lan` runs in a thread. Each `Link` listens on a loopback port and forwards what connects there to a server's
endpoint, which may be a socket file. Bytes arrive unchanged and in order, as TCP has it, but later: see `Line`.
"""

from __future__ import annotations

import asyncio
import math
import random
import threading
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

SEGMENT_BYTES = 1448
"""What TCP sends at a time over Ethernet."""
WINDOW_SEGMENTS = 4096
"""Segments under way in one direction of a connection; then its sender has to wait."""

_T = TypeVar("_T")


@dataclass(frozen=True)
class Conditions:
    """How a link is at the moment, the same in both directions.

    delay_s: one way. jitter_s: up to so much more, uniformly. bytes_per_s: of all its connections together.
    loss: the probability that a segment is lost. TCP sends it again, so it arrives `rto_s` later, and what follows it
        waits for it.
    """

    delay_s: float = 0.0
    jitter_s: float = 0.0
    bytes_per_s: float = math.inf
    loss: float = 0.0
    rto_s: float = 0.2


class Wire:
    """One direction of a link, which sends one segment at a time. Pure: times come from outside."""

    def __init__(self) -> None:
        self._free_at = 0.0

    def send(self, now: float, n_bytes: int, conditions: Conditions) -> float:
        """When the last byte of a segment has left, if it is ready now."""
        self._free_at = max(now, self._free_at) + n_bytes / conditions.bytes_per_s
        return self._free_at


class Line:
    """One direction of a connection: when its segments arrive. Pure: times and chance come from outside."""

    def __init__(self, wire: Wire, chance: random.Random) -> None:
        self._wire = wire
        self._random = chance
        self._last = 0.0

    def arrival(self, now: float, n_bytes: int, conditions: Conditions) -> float:
        """When a segment arrives that is ready now; never before the one before it."""
        at = self._wire.send(now, n_bytes, conditions) + conditions.delay_s
        at += self._random.uniform(0, conditions.jitter_s)
        if self._random.random() < conditions.loss:
            at += conditions.rto_s
        self._last = max(self._last, at)
        return self._last


Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Link:
    """See the module's docstring. Made by `Lan.link`; its methods may be called from any thread.

    conditions: may be set at any time; they hold for what is sent from then on.
    """

    def __init__(self, lan: Lan, connect: Callable[[], Awaitable[Streams]], conditions: Conditions, seed: int) -> None:
        self.conditions = conditions
        self._lan = lan
        self._connect = connect
        self._random = random.Random(seed)
        self._wires = Wire(), Wire()
        self._passing = asyncio.Event()
        self._passing.set()
        self._cut = False
        self._connections: set[asyncio.Task[None]] = set()
        self.n_bytes = 0
        """What has arrived, in both directions together."""

    async def open(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, limit=SEGMENT_BYTES)
        self.port: int = self._server.sockets[0].getsockname()[1]

    @property
    def endpoint(self) -> str:
        """What to connect to instead of the server's own endpoint."""
        return f"tcp://127.0.0.1:{self.port}"

    def stall(self) -> None:
        """A black hole: connections stay, and nothing arrives until `restore`."""
        self._lan.call(self._set(passing=False))

    def cut(self) -> None:
        """Reset all connections, and new ones until `restore`."""
        self._lan.call(self._set(cut=True))

    def restore(self) -> None:
        """End a stall or a cut. What was stalled arrives, as TCP would send it again."""
        self._lan.call(self._set())

    async def _set(self, *, passing: bool = True, cut: bool = False) -> None:
        self._cut = cut
        if passing:
            self._passing.set()
        else:
            self._passing.clear()
        if cut:
            await self._drop()

    async def close(self) -> None:
        self._server.close()
        await self._drop()

    async def _drop(self) -> None:
        connections = list(self._connections)
        for connection in connections:
            connection.cancel()
        await asyncio.gather(*connections, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            if not self._cut:
                await self._relay(reader, writer)
        except (OSError, asyncio.CancelledError):
            pass  # either end has gone, or the link is cut
        finally:
            writer.transport.abort()
            self._connections.discard(task)

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await self._connect()
        directions = (reader, far_writer, self._wires[0]), (far_reader, writer, self._wires[1])
        tasks: list[asyncio.Task[None]] = []
        for source, sink, wire in directions:
            under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(WINDOW_SEGMENTS)
            tasks.append(asyncio.create_task(self._depart(source, Line(wire, self._random), under_way)))
            tasks.append(asyncio.create_task(self._arrive(under_way, sink)))
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            for task in tasks:
                task.cancel()
            far_writer.transport.abort()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _depart(
        self, reader: asyncio.StreamReader, line: Line, under_way: asyncio.Queue[tuple[float, bytes]]
    ) -> None:
        """Take what one end sends, up to and with its end (no bytes)."""
        data = b"-"
        while data:
            data = await reader.read(SEGMENT_BYTES)
            now = asyncio.get_running_loop().time()
            await under_way.put((line.arrival(now, len(data), self.conditions), data))

    async def _arrive(self, under_way: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter) -> None:
        """Hand it to the other end when its time has come."""
        loop = asyncio.get_running_loop()
        while True:
            at, data = await under_way.get()
            await asyncio.sleep(max(0.0, at - loop.time()))
            await self._passing.wait()
            if not data:
                writer.write_eof()
                return
            self.n_bytes += len(data)
            writer.write(data)
            await writer.drain()


class Lan:
    """See the module's docstring. A context manager; at its end all links are gone."""

    def __enter__(self) -> Lan:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="lan")
        self._thread.start()
        self._links: list[Link] = []
        return self

    def __exit__(self, *_: object) -> None:
        for link in self._links:
            self.call(link.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def link(self, endpoint: str, conditions: Conditions | None = None, *, seed: int = 0) -> Link:
        """A link to the server at an ipc:// or tcp:// endpoint, which need not be there yet."""
        kind, _, address = endpoint.partition("://")
        host, _, port = address.rpartition(":")

        async def connect() -> Streams:
            if kind == "ipc":
                return await asyncio.open_unix_connection(address, limit=SEGMENT_BYTES)
            return await asyncio.open_connection(host, int(port), limit=SEGMENT_BYTES)

        async def make() -> Link:
            link = Link(self, connect, conditions or Conditions(), seed)
            await link.open()
            return link

        link = self.call(make())
        self._links.append(link)
        return link

    def call(self, what: Coroutine[Any, Any, _T]) -> _T:
        """Run something on the loop and wait for it."""
        return asyncio.run_coroutine_threadsafe(what, self._loop).result(30)
