"""Serves the page of `owl-wms play`, and one WebSocket per player.

One player may connect by default; `max_clients` allows more. Safe by default: it listens on loopback only, a random
token is the first part of every path (compared in constant time), the browser's Origin must be the server's own, a
Host that the public DNS can give away is refused, connections and messages are limited. The token is all that protects
a server that listens on other interfaces, and nothing is encrypted: put it behind a tunnel.

Usage:
    settings = ServerSettings(port=8080)
    app = make_app(lambda: GameSource(), settings)
    web.run_app(app, host=settings.host, port=settings.port, access_log=None)       # the log would hold the token
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import resources
from typing import TYPE_CHECKING

from aiohttp import WSCloseCode, web

from owl_wms.errors import ConfigError, DataError
from owl_wms.inference.clip import to_mp4
from owl_wms.inference.limits import KEEP_ALIVE_SECONDS, ConnectionLimits, request_log
from owl_wms.inference.loading import Loading
from owl_wms.inference.messages import MAX_MESSAGE_BYTES
from owl_wms.inference.origins import is_local_name, one_form, parse_origin
from owl_wms.inference.session import Pace, Session, Threads

if TYPE_CHECKING:
    from owl_wms.inference.source import Source

_LOG = logging.getLogger("owl_wms.inference")
PAGE = {
    "": ("play.html", "text/html"),
    "play.js": ("play.js", "text/javascript"),
    "controls.js": ("controls.js", "text/javascript"),
    "play.css": ("play.css", "text/css"),
}
GOODBYE_SECONDS = 2
HEARTBEAT_SECONDS = 8  # a player who vanished holds the place for one and a half of these
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


def new_token() -> str:
    """192 random bits, safe in a path."""
    return secrets.token_urlsafe(24)


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerSettings:
    """Address, limits and secrets of the server.

    Attributes:
        host: interface to listen on.
        port: 0 takes a free one.
        token: needed in every path; at least 16 characters.
        max_clients: players at once, each with a source of its own.
        pace: frame rate and compression.
        origins: further browser origins to accept, for a page behind a proxy, for example `https://play.example.org`.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    token: str = field(default_factory=new_token)
    max_clients: int = 1
    pace: Pace = field(default_factory=Pace)
    origins: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.host:
            raise ConfigError("host must name an interface, for example 127.0.0.1 or 0.0.0.0", key="host")
        if len(self.token) < 16 or not all(c.isalnum() or c in "-_" for c in self.token):
            raise ConfigError("token must be at least 16 letters, digits, - or _", key="token")
        for origin in self.origins:
            if parse_origin(origin) is None:
                raise ConfigError(
                    f"origin must be scheme, host and port, such as https://play.example.org, got {origin!r}",
                    key="origin",
                )
        if self.max_clients < 1:
            raise ConfigError(f"max_clients must be at least 1, got {self.max_clients}", key="max_clients")
        if not 1 <= self.pace.fps <= 240 or not 1 <= self.pace.quality <= 95:
            raise ConfigError(f"fps must be 1 to 240 and quality 1 to 95, got {self.pace.fps} and {self.pace.quality}")


class PlayServer:
    """State shared by the handlers: who plays, and the one thread that runs sources."""

    def __init__(
        self, new_source: Callable[[], Source], settings: ServerSettings, loading: Loading | None = None
    ) -> None:
        self._new_source, self._settings, self._loading = new_source, settings, loading
        self._origins = {parse_origin(origin) for origin in settings.origins}
        self._hosts = {one_form(settings.host), *(origin.host for origin in self._origins if origin is not None)}
        self._limits = ConnectionLimits()
        # Read once: a page that is asked for while descriptors are short needs none.
        folder = resources.files("owl_wms.inference").joinpath("page")
        self._files = {
            name: (folder.joinpath(file).read_text(encoding="utf-8"), kind) for name, (file, kind) in PAGE.items()
        }
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="owl-play")
        # Two: one encodes clips for a second or more, and no picture should wait for it.
        self._encoder = ThreadPoolExecutor(max_workers=2, thread_name_prefix="owl-encode")
        self._threads = Threads(source=self._worker, turn=asyncio.Lock(), encoder=self._encoder)
        self._sessions: dict[str, Session] = {}
        self._sockets: set[web.WebSocketResponse] = set()
        self._sources: list[Source] = []

    def app(self) -> web.Application:
        """The aiohttp application."""
        arguments = {"keepalive_timeout": KEEP_ALIVE_SECONDS, "logger": request_log()}
        app = web.Application(middlewares=[self._guard], handler_args=arguments)
        self._limits.guard(app)
        app.router.add_get("/{token}", self._add_slash)
        app.router.add_get("/{token}/ws", self._play)
        app.router.add_get("/{token}/clip.mp4", self._clip)
        app.router.add_get("/{token}/loading", self._state)
        app.router.add_get("/{token}/{name:[a-z.]*}", self._page)
        app.on_shutdown.append(self._close)
        app.on_cleanup.append(self._stop)
        return app

    @web.middleware
    async def _guard(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        # "OPTIONS *" and the target of a proxy have no path, and no token either.
        token = request.path.removeprefix("/").partition("/")[0]
        # compare_digest takes as long for a wrong first letter as for a wrong last one.
        if not hmac.compare_digest(token.encode(), self._settings.token.encode()):
            return _refuse("wrong or missing token: open the address that the server printed")
        asked = parse_origin(f"{request.scheme}://{request.host}")
        if asked is None or not (is_local_name(asked.host) or asked.host in self._hosts):
            return _refuse("this name may not be used here: start the server with it as --origin")
        self._limits.trust(request)
        response = await handler(request)
        if not response.prepared:
            response.headers.update(HEADERS)
        return response

    async def _add_slash(self, request: web.Request) -> web.StreamResponse:
        """The page asks for its files relative to itself, so the address needs the last slash that people leave out."""
        return web.Response(status=308, headers={"Location": f"{self._settings.token}/"})

    async def _page(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info["name"]
        if name not in self._files:
            raise web.HTTPNotFound
        text, kind = self._files[name]
        return web.Response(text=text, content_type=kind)

    async def _state(self, request: web.Request) -> web.StreamResponse:
        return web.json_response({"ready": True} if self._loading is None else self._loading.state())

    def _same_origin(self, request: web.Request) -> bool:
        """Returns whether the page that asks came from here: browsers always send where it came from."""
        headers = request.headers.getall("Origin", [])
        said = parse_origin(headers[0]) if len(headers) == 1 else None
        return said is not None and said in {parse_origin(f"{request.scheme}://{request.host}"), *self._origins}

    async def _play(self, request: web.Request) -> web.StreamResponse:
        if not self._same_origin(request):
            return web.Response(status=403, text="this Origin may not connect\n")
        socket = web.WebSocketResponse(max_msg_size=MAX_MESSAGE_BYTES, heartbeat=HEARTBEAT_SECONDS, compress=False)
        await socket.prepare(request)
        reason = self._no_place()
        if reason:
            await socket.send_json({"type": "refused", "reason": reason})
            await socket.close(code=WSCloseCode.TRY_AGAIN_LATER, message=reason.encode())
            return socket
        self._sockets.add(socket)
        try:
            await self._run(socket, paused="paused" in request.query)
        finally:
            self._sockets.discard(socket)
        return socket

    def _no_place(self) -> str:
        if self._loading is not None and not self._loading.done.done():
            return "the game is still being loaded"
        if len(self._sockets) >= self._settings.max_clients:
            return f"somebody is playing: this server takes {self._settings.max_clients} at a time"
        return ""

    async def _run(self, socket: web.WebSocketResponse, *, paused: bool) -> None:
        loop = asyncio.get_running_loop()
        # A source may hold a model's cache and a compiled decoder: it is saved for the next player.
        try:
            if self._sources:
                source = self._sources.pop()
                await loop.run_in_executor(self._worker, source.restart)
            else:
                source = await loop.run_in_executor(self._worker, self._new_source)
        except Exception as error:  # whatever a model or a driver raises must reach the player as words
            _LOG.error("the source could not start: %s", error, exc_info=error)
            await socket.send_json({"type": "error", "reason": f"the source could not start: {type(error).__name__}"})
            await socket.close(code=WSCloseCode.INTERNAL_ERROR)
            return
        session = Session(socket, source, self._threads, self._settings.pace, paused=paused)
        self._sessions[session.number] = session
        try:
            await session.run()
        finally:
            del self._sessions[session.number]
            self._sources.append(source)

    async def _clip(self, request: web.Request) -> web.StreamResponse:
        """Returns the last seconds of a session that still plays, as a file to keep."""
        session = self._sessions.get(request.query.get("session", ""))
        if session is None:
            raise web.HTTPNotFound(text="no such session\n")
        loop = asyncio.get_running_loop()
        try:
            clip = await loop.run_in_executor(self._encoder, to_mp4, session.recent.snapshot())
        except DataError as error:
            return web.Response(status=409, text=f"{error}\n")
        named = {"Content-Disposition": 'attachment; filename="owl-wms-play.mp4"'}
        return web.Response(body=clip, content_type="video/mp4", headers=named)

    async def _close(self, app: web.Application) -> None:
        closing = [s.close(code=WSCloseCode.GOING_AWAY, message=b"the server is stopping") for s in self._sockets]
        # A client that reads nothing delays its own goodbye, or ends it in CancelledError; the others still get theirs.
        limited = [asyncio.wait_for(close, GOODBYE_SECONDS) for close in closing]
        await asyncio.gather(*limited, return_exceptions=True)

    async def _stop(self, app: web.Application) -> None:
        self._worker.shutdown(wait=True, cancel_futures=True)
        self._encoder.shutdown(wait=True, cancel_futures=True)


def _refuse(text: str) -> web.Response:
    refused = web.Response(status=403, text=f"{text}\n")
    refused.force_close()
    return refused


def make_app(
    new_source: Callable[[], Source], settings: ServerSettings, loading: Loading | None = None
) -> web.Application:
    """The application that serves the page and plays sources.

    Args:
        new_source: makes what a player drives; called on the worker thread, once for each player at the same time.
        settings: where and for whom.
        loading: shown by the page, and nobody plays before it is over.
    """
    return PlayServer(new_source, settings, loading).app()


def page_address(settings: ServerSettings, port: int | None = None) -> str:
    """Returns the address to open in a browser."""
    # A listener on :: takes IPv6 alone.
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)
    host = f"[{host}]" if ":" in host else host
    return f"http://{host}:{settings.port if port is None else port}/{settings.token}/"
