"""`owl-wms play`: a world model, or the game itself, in the browser.

Usage:
    owl-wms play                                  # the shipped model, or the game if there is none
    owl-wms play configs/dit_v4.yml step_100000.pt --context context.pt
    owl-wms play --game                           # no model: the rendered game, to try page and network
"""

from __future__ import annotations

import contextlib
import itertools
import signal
import socket
import webbrowser
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from owl_wms.configs.paths import EXAMPLES

if TYPE_CHECKING:
    import asyncio

# asyncio accepts so many connections before it looks at any of them, each with a file descriptor.
ACCEPTED_AT_ONCE = 16
# A second signal that comes sooner is the first one, passed on by a launcher.
AGAIN_AFTER_SECONDS = 1.0
SHIPPED = EXAMPLES / "world" / "game_rft.yml", EXAMPLES / "world" / "game_rft.safetensors"
DEMO_VAE = EXAMPLES / "demo" / "demo_vae.yml", EXAMPLES / "demo" / "demo_vae.safetensors"


def play(
    config: Annotated[Path | None, typer.Argument(help="YAML of the world model; the shipped one if left out.")] = None,
    checkpoint: Annotated[Path | None, typer.Argument(help="Its weights.")] = None,
    game: Annotated[bool, typer.Option("--game", help="Play the rendered game itself, without a model.")] = False,
    vae: Annotated[
        bool, typer.Option(help="With --game: through the demo autoencoder, so that decoding is seen.")
    ] = False,
    context: Annotated[
        Path | None, typer.Option(help="Where to begin: a file of latents, mouse and buttons, or row 12 of TABLE#12.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, max=20, help="Sampling steps a frame.")] = None,
    cfg_scale: Annotated[float | None, typer.Option(help="Guidance; other than 1 doubles the work.")] = None,
    max_window: Annotated[int | None, typer.Option(min=1, help="Frames of history that are seen.")] = None,
    seed: Annotated[int, typer.Option(help="Of noise and worlds.")] = 0,
    fps: Annotated[float | None, typer.Option(help="Most frames a second; the model's own rate if left out.")] = None,
    quality: Annotated[int, typer.Option(min=1, max=95, help="Of the pictures sent.")] = 85,
    webp: Annotated[bool, typer.Option("--webp", help="Send WebP instead of JPEG: smaller, slower.")] = False,
    host: Annotated[
        str, typer.Option(help="Interface to listen on; anything but loopback is seen by others.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8080,
    origin: Annotated[
        list[str] | None, typer.Option(help="Address of a proxy in front, such as https://play.example.org; repeats.")
    ] = None,
    token: Annotated[
        str | None,
        typer.Option(
            help="Part of the address, at least 16 characters; by default random, and the same after a restart."
        ),
    ] = None,
    max_clients: Annotated[int, typer.Option(min=1, help="Players at once; they share the model.")] = 1,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; the GPU if there is one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="bf16, fp16 or fp32; bf16 on a GPU, else fp32.")] = None,
    tensorrt: Annotated[bool, typer.Option(help="Use the compiled decoder where one can be had.")] = True,
    open_page: Annotated[bool, typer.Option("--open", help="Open the page in this machine's browser.")] = False,
) -> None:
    """Play a world model in the browser."""
    from owl_wms.cli import _shared as shared
    from owl_wms.errors import ConfigError
    from owl_wms.inference.build import build_game, build_pipeline

    try:
        from owl_wms.inference.kept_token import keep_token
        from owl_wms.inference.server import ServerSettings, new_token
        from owl_wms.inference.session import Pace
    except ImportError as error:
        raise ConfigError("owl-wms play needs aiohttp: pip install aiohttp") from error

    console = Console(stderr=True)
    if (config is None) != (checkpoint is None):
        raise ConfigError("give both a config and a checkpoint, or neither", key="checkpoint")
    shared.check_number("--cfg-scale", cfg_scale, shared.GUIDANCE)
    shared.check_number("--seed", seed, shared.SEEDS)
    shared.check_number("--fps", fps, shared.FPS)
    if vae and not game:
        raise ConfigError("--vae goes with --game: a model always decodes", key="vae")
    if config is None and not game:
        if all(path.is_file() for path in SHIPPED):
            config, checkpoint = SHIPPED
        else:
            console.print("there is no shipped model here: playing the game itself", highlight=False)
            game = True
    where = shared.choose_device(device)
    precision = shared.choose_dtype(dtype, where)
    rate = fps if fps is not None else _own_rate(config)
    settings = ServerSettings(
        host=host,
        port=port,
        token=token if token is not None else keep_token(port) if port else new_token(),
        max_clients=max_clients,
        origins=tuple(origin or ()),
        pace=Pace(fps=rate, kind="webp" if webp else "jpeg", quality=quality),
    )
    loading = Loading(console)
    common: dict[str, Any] = {"device": where, "dtype": precision, "tensorrt": tensorrt, "seed": seed}
    if game:
        vae_config, vae_checkpoint = DEMO_VAE if vae else (None, None)
        new_source: Callable[[], Any] = lambda: build_game(  # noqa: E731
            vae_config=vae_config, vae_checkpoint=vae_checkpoint, fps=rate, **common
        )
    else:
        assert config is not None
        assert checkpoint is not None
        chosen = config, checkpoint
        options: dict[str, Any] = {"context": context, "steps": steps, "cfg_scale": cfg_scale, "max_window": max_window}
        options["progress"] = loading
        new_source = lambda: build_pipeline(chosen[0], chosen[1], **options, **common)  # noqa: E731
    serve(new_source, settings, console, open_page=open_page, loading=loading)


class Loading:
    """Says in the terminal what is being loaded, and how far it is."""

    def __init__(self, console: Console) -> None:
        self._console, self._last = console, ""
        self.status = console.status("loading")

    def __call__(self, what: str, done: int, total: int) -> None:
        """See `owl_wms.inference.build.Progress`."""
        if self._console.is_terminal:
            self.status.update(f"loading: {what}" + (f", {done} of {total}" if total else ""))
        elif what != self._last:  # a log has one line for each
            self._console.print(f"loading: {what}", highlight=False)
        self._last = what


def _own_rate(config: Path | None) -> float:
    from owl_wms.inference.build import frames_per_second, load_video_config

    return 60.0 if config is None else frames_per_second(load_video_config(config), config)


def serve(
    new_source: Callable[[], Any],
    settings: Any,
    console: Console,
    *,
    open_page: bool,
    loading: Loading | None = None,
) -> None:
    """Take the port, load a source for every player, then listen until interrupted."""
    import asyncio

    from owl_wms.inference import listen

    sockets = listen.bind(settings.host, settings.port)
    try:
        # Loaded before the address is shown: what is wrong with files is said here, not in the browser. One for every
        # player: one thread prepares and plays, so that a beginning made later would stop whoever plays already.
        with (Loading(console) if loading is None else loading).status:
            first = new_source()
            numbers = itertools.count(1)
            ready = [first, *(first.twin(next(numbers)) for _ in range(1, settings.max_clients))]
        source = lambda: ready.pop(0) if ready else first.twin(next(numbers))  # noqa: E731
        asyncio.run(_until_interrupted(source, settings, sockets, console, open_page))
    finally:
        listen.close(sockets)
    console.print("stopped", highlight=False)


def stop_on_signals(console: Console) -> asyncio.Event:
    """Returns an event that the first SIGINT or SIGTERM sets; a later one ends the process at once.

    aiohttp's own signal handling ends the event loop, which cuts players off before they are told why.
    """
    import asyncio

    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    numbers = (signal.SIGINT, signal.SIGTERM)

    def end_at_once() -> None:
        for number in numbers:
            with contextlib.suppress(NotImplementedError):
                loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_DFL)

    def asked() -> None:
        if not stop.is_set():
            console.print("stopping: the players are told; Ctrl-C again stops at once", highlight=False)
            loop.call_later(AGAIN_AFTER_SECONDS, end_at_once)
        stop.set()

    for number in numbers:
        try:
            loop.add_signal_handler(number, asked)
        except NotImplementedError:  # Windows
            signal.signal(number, lambda *_: loop.call_soon_threadsafe(asked))
    return stop


async def _until_interrupted(
    new_source: Callable[[], Any], settings: Any, sockets: list[socket.socket], console: Console, open_page: bool
) -> None:
    from aiohttp import web

    from owl_wms.inference import listen
    from owl_wms.inference.server import make_app, page_address

    stop = stop_on_signals(console)
    # A log would hold the token.
    runner = web.AppRunner(make_app(new_source, settings), access_log=None, shutdown_timeout=3)
    await runner.setup()
    try:
        try:
            listen.let_listen(sockets)
            for bound in sockets:
                await web.SockSite(runner, bound, backlog=ACCEPTED_AT_ONCE).start()
        except OSError as error:
            raise listen.cannot_listen(settings.host, settings.port, error) from error
        address = page_address(settings, runner.addresses[0][1])
        console.print(f"play at {address}", highlight=False, soft_wrap=True, markup=False, emoji=False)
        console.print("Ctrl-C stops.", highlight=False)
        if not settings.host.startswith("127.") and settings.host not in ("::1", "localhost"):
            console.print("Others can reach this server: the address is the only key, and nothing is encrypted.")
        if open_page:
            webbrowser.open(address)
        await stop.wait()
    finally:
        await runner.cleanup()
