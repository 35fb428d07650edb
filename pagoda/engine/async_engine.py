"""The engine in a thread of its own, for a server: requests come from an event loop, and pieces of answers go back."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

from pagoda.common import PagodaError
from pagoda.engine.engine import Engine
from pagoda.engine.request import Group, Output, Request

Result = TypeVar("Result")
log = logging.getLogger("pagoda.engine")


class QueueFull(PagodaError):
    """So many requests are waiting that another one would wait too long: come back later."""


class Stream:
    """The pieces of one request's answers: `async for piece in stream`. Whoever stops listening calls `cancel`."""

    def __init__(self, owner: AsyncEngine, request: Request):
        self.owner, self.request = owner, request
        self.pieces: asyncio.Queue[Output] = asyncio.Queue()
        self.open = min(request.sampling.n, request.sampling.answers)  # answers that have not ended
        self.group: Group | None = None  # known to the engine's thread alone
        self.cancelled = False

    async def __aiter__(self) -> AsyncIterator[Output]:
        try:
            while self.open:
                piece = await self.pieces.get()
                self.open -= piece.finish_reason is not None
                yield piece
        finally:
            self.cancel()

    def cancel(self) -> None:
        """The request ends now, if it has not ended; its memory is free with the engine's next step."""
        self.owner._close(self)


class AsyncEngine:
    """`start`, then `submit` from the event loop that called it. All else happens in the engine's thread."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.streams: set[Stream] = set()
        self.of_group: dict[Group, Stream] = {}
        self.thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self.loop: asyncio.AbstractEventLoop | None = None
        self.closing = False

    def start(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.thread.start()

    def submit(self, request: Request) -> Stream:
        """Raises PagodaError for a request that cannot be answered, QueueFull when too many wait."""
        if self.closing or not self.thread.is_alive():
            raise PagodaError("the engine is closing: no further requests")
        o = self.engine.options
        if len(self.streams) >= o.max_num_seqs + o.max_queue:
            raise QueueFull(f"{len(self.streams)} requests are open, more than this server takes at once: retry later")
        self.engine.check(request)
        stream = Stream(self, request)
        self.streams.add(stream)
        self.commands.put(lambda: self._add(stream))
        return stream

    async def run(self, function: Callable[[Engine], Result]) -> Result:
        """function(engine), in the engine's thread between two steps."""
        future = self.loop.create_future()

        def call() -> None:
            try:
                result, error = function(self.engine), None
            except Exception as e:
                result, error = None, e
            self._tell(self._settle, future, result, error)

        self.commands.put(call)
        return await future

    def stats(self) -> dict[str, int | float]:
        return {**self.engine.stats(), "open": len(self.streams)}

    async def close(self, seconds: float = 30.0) -> None:
        """Take nothing more, finish what runs in at most so many seconds, end."""
        self.closing = True
        end = asyncio.get_running_loop().time() + seconds
        while self.streams and self.thread.is_alive() and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(0.02)
        for stream in list(self.streams):
            stream.pieces.put_nowait(Output(0, finish_reason="abort", error="the server is shutting down"))
            stream.open = min(stream.open, 1)
            stream.cancel()
        self.commands.put(self._leave)
        while self.thread.is_alive():
            await asyncio.sleep(0.01)

    # -------------------------------------------------------------------------------------- in the event loop

    def _close(self, stream: Stream) -> None:
        if stream in self.streams:
            self.streams.discard(stream)
            stream.cancelled = True
            self.commands.put(lambda: self._drop(stream))

    def _deliver(self, pieces: list[tuple[Stream, Output]]) -> None:
        for stream, piece in pieces:
            stream.pieces.put_nowait(piece)

    @staticmethod
    def _settle(future: asyncio.Future, result: Any, error: Exception | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)

    # ------------------------------------------------------------------------------------ in the engine's thread

    def _work(self) -> None:
        self.left = False
        while not self.left:
            try:
                while not self.left:
                    self.commands.get(block=not self.engine.has_work)()
            except queue.Empty:
                pass
            if self.left:
                return
            try:
                pieces = self.engine.step()
            except Exception as e:
                log.exception("a step of the engine failed")
                pieces = self._fail(str(e) or type(e).__name__)
            self._tell(self._deliver, [(self.of_group[g], p) for g, p in pieces if g in self.of_group])

    def _leave(self) -> None:
        self.left = True

    def _add(self, stream: Stream) -> None:
        if stream.cancelled:
            return
        try:
            stream.group = self.engine.add(stream.request)
            self.of_group[stream.group] = stream
        except Exception as e:
            pieces = [Output(i, finish_reason="error", error=str(e)) for i in range(stream.request.sampling.n)]
            self._tell(self._deliver, [(stream, piece) for piece in pieces])

    def _drop(self, stream: Stream) -> None:
        if stream.group is not None:
            self.of_group.pop(stream.group, None)
            self.engine.abort(stream.group)

    def _fail(self, error: str) -> list[tuple[Group, Output]]:
        """A step went wrong: everybody who took part hears of it; who waits goes on."""
        failed = [g for g in self.engine.groups if g.started]
        for group in failed:
            self.engine.abort(group)
        return [(g, Output(i, finish_reason="error", error=error)) for g in failed for i in range(g.request.sampling.n)]

    def _tell(self, function: Callable, *arguments: Any) -> None:
        try:
            self.loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the loop has gone
            self.left = True
