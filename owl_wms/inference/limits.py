"""Limits what connections may cost before they have shown the token: time, number, file descriptors.

aiohttp waits for ever for the first request of a connection, and asyncio writes a traceback for every connection that
finds no descriptor. Both let anyone who reaches the port shut the player out, without the token.

Usage:
    limits = ConnectionLimits()
    limits.guard(app)                   # before the app starts
    limits.trust(request)               # this connection has shown the token
"""

from __future__ import annotations

import asyncio
import errno
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

try:
    import resource
except ImportError:  # Windows has no such limit
    resource = None  # type: ignore[assignment]

_LOG = logging.getLogger("owl_wms.inference")
# A browser sends its request within milliseconds; the slowest links need a few seconds.
HEADER_SECONDS = 8.0
LOOK_SECONDS = 0.25
KEEP_ALIVE_SECONDS = 15.0
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


def request_log() -> logging.Logger:
    """Return the log of requests that failed, without those that are no HTTP.

    aiohttp writes a traceback for each of those, with the target in it: anyone could fill the disk, and a damaged
    address could put the token there.
    """
    log = _LOG.getChild("requests")
    log.addFilter(_is_ours)
    return log


def _is_ours(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, (HttpProcessingError, web.RequestPayloadError))  # the head, or a body, is none


def most_connections() -> int:
    """Returns how many connections may be open at once: half of the descriptors, at least 8, at most 256."""
    limit = None if resource is None else resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 256 if limit is None or limit < 0 else max(8, min(256, limit // 2))  # below 0: no limit


class ConnectionLimits:
    """Closes connections that take too long over their first request, and the oldest of them if there are too many.

    Beyond `most_connections()` that are open at once, the oldest without a good request are closed.
    """

    def __init__(self) -> None:
        self._most = most_connections()
        self._trusted: set[Any] = set()
        self._since: dict[Any, float] = {}
        self._watch: asyncio.Task[None] | None = None
        self._told = False

    def guard(self, app: web.Application) -> None:
        """Makes `app` watch the connections of every server that is made from it."""
        make: Callable[..., web.Server] = app._make_handler

        def make_and_watch(**options: Any) -> web.Server:
            server = make(**options)
            self._watch = asyncio.get_running_loop().create_task(self._look(server))
            return server

        # aiohttp tells nobody of a connection before its first request; the server's list of them is public, and this
        # is where the server is made.
        app._make_handler = make_and_watch  # type: ignore[method-assign]
        app.on_startup.append(self._quiet)
        app.on_cleanup.append(self._stop)

    def trust(self, request: web.Request) -> None:
        """Notes that the connection of `request` has shown the token: it may stay as long as it plays."""
        self._trusted.add(request.protocol)

    async def _look(self, server: web.Server) -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            now, open_now = time.monotonic(), server.connections
            self._trusted.intersection_update(open_now)
            self._since = {made: self._since.get(made, now) for made in open_now if made not in self._trusted}
            waiting = sorted(self._since, key=lambda made: self._since[made])
            too_many = max(0, len(open_now) - self._most)
            for number, made in enumerate(waiting):
                if number < too_many or now - self._since[made] > HEADER_SECONDS:
                    made.force_close()

    async def _stop(self, _app: web.Application) -> None:
        if self._watch is not None:
            self._watch.cancel()
            with suppress(asyncio.CancelledError):
                await self._watch

    async def _quiet(self, _app: web.Application) -> None:
        loop = asyncio.get_running_loop()
        before = loop.get_exception_handler()

        def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
            error = context.get("exception")
            if not (isinstance(error, OSError) and error.errno in _EXHAUSTED and "accept" in context["message"]):
                (before or type(loop).default_exception_handler)(loop, context)
            elif not self._told:  # asyncio calls this up to a hundred times per second meanwhile
                self._told = True
                _LOG.warning("new connections must wait: %s; raise the limit with `ulimit -n`", error.strerror)

        loop.set_exception_handler(handle)
