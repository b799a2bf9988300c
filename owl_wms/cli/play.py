"""`owl-wms play`: a world model, or the game itself, in the browser.

Usage:
    owl-wms play                                  # the shipped model, or the game if there is none
    owl-wms play configs/dit_v4.yml step_100000.pt --context context.pt
    owl-wms play --game                           # no model: the rendered game, to try page and network
"""

from __future__ import annotations

import contextlib
import signal
import socket
import webbrowser
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from owl_wms.cli import _bounds as bounds
from owl_wms.cli import say
from owl_wms.cli._options import CfgScale, Context, Device, TensorRT
from owl_wms.configs.paths import DEMO_VAE, EXAMPLES

if TYPE_CHECKING:
    import asyncio

    import torch

    from owl_wms.inference.controls import Button
    from owl_wms.inference.loading import Loading, Progress
    from owl_wms.inference.server import ServerSettings
    from owl_wms.inference.source import Source

# asyncio accepts so many connections before it looks at any of them, each with a file descriptor.
ACCEPTED_AT_ONCE = 16
# A second signal that comes sooner is the first one, passed on by a launcher.
AGAIN_AFTER_SECONDS = 1.0
# A page that waits asks more often than this how far the loading is.
WATCHED_SECONDS = 1.5
SHIPPED = EXAMPLES / "world" / "game_rft.yml", EXAMPLES / "world" / "game_rft.safetensors"


def play(
    config: Annotated[Path | None, typer.Argument(help="YAML of the world model; the shipped one if left out.")] = None,
    checkpoint: Annotated[Path | None, typer.Argument(help="Weights of that model.")] = None,
    game: Annotated[bool, typer.Option("--game", help="Play the rendered game itself, without a model.")] = False,
    vae: Annotated[
        bool, typer.Option(help="With --game: through the demo autoencoder, so that decoding is seen.")
    ] = False,
    context: Context = None,
    steps: Annotated[int | None, typer.Option(min=1, max=20, help="Sampling steps per frame.")] = None,
    cfg_scale: CfgScale = None,
    max_window: Annotated[int | None, typer.Option(min=1, help="Frames of history that are seen.")] = None,
    seed: Annotated[int, typer.Option(help="Random seed of the noise and of rendered worlds.")] = 0,
    fps: Annotated[float | None, typer.Option(help="Most frames per second. Default: the model's own rate.")] = None,
    quality: Annotated[int, typer.Option(min=1, max=95, help="JPEG or WebP quality of the pictures.")] = 85,
    webp: Annotated[bool, typer.Option("--webp", help="Send WebP instead of JPEG: smaller, slower.")] = False,
    host: Annotated[
        str, typer.Option(help="Interface to listen on; anything but loopback is seen by others.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="TCP port to listen on; 0 takes a free one.")] = 8080,
    origin: Annotated[
        list[str] | None, typer.Option(help="Address of a proxy in front, such as https://play.example.org; repeats.")
    ] = None,
    token: Annotated[
        str | None,
        typer.Option(
            help="Part of the address, at least 16 characters; by default random, and the same after a restart."
        ),
    ] = None,
    max_clients: Annotated[int, typer.Option(min=1, max=64, help="Players at once; they share the model.")] = 1,
    device: Device = None,
    dtype: Annotated[str | None, typer.Option(help="bf16, fp16 or fp32; bf16 where the device multiplies it.")] = None,
    tensorrt: TensorRT = True,
    open_page: Annotated[bool, typer.Option("--open", help="Open the page in this machine's browser.")] = False,
) -> None:
    """Play a world model in the browser."""
    from owl_wms.errors import ConfigError
    from owl_wms.inference.controls import GAME_CONTROLS
    from owl_wms.inference.loading import Loading

    try:
        from owl_wms.inference.kept_token import keep_token
        from owl_wms.inference.server import ServerSettings, new_token
        from owl_wms.inference.session import Pace
    except ImportError as error:
        raise ConfigError("owl-wms play needs aiohttp: pip install aiohttp") from error

    console = Console(stderr=True)
    if (config is None) != (checkpoint is None):
        raise ConfigError("give both a config and a checkpoint, or neither", key="checkpoint")
    bounds.check_number("--cfg-scale", cfg_scale, bounds.GUIDANCE)
    bounds.check_number("--seed", seed, bounds.SEEDS)
    bounds.check_number("--fps", fps, bounds.FPS)
    if game:
        options = {"a config": config, "--context": context, "--steps": steps, "--cfg-scale": cfg_scale}
        options["--max-window"] = max_window
        if given := [name for name, value in options.items() if value is not None]:
            text = f"{', '.join(given)} would do nothing; leave out either"
            raise ConfigError(f"--game plays without a model: {text}", key="game")
    if vae and not game:
        raise ConfigError("--vae goes with --game: a model always decodes", key="vae")
    if device is not None:
        bounds.device_number(device)
    if dtype is not None:
        bounds.check_dtype(dtype)
    if config is None and not game and not all(path.is_file() for path in SHIPPED):
        say(console, "there is no shipped model here: playing the game itself")
        game = True
    model = None if game else (config or SHIPPED[0], checkpoint or SHIPPED[1])
    rate, controls = (fps or 60.0, GAME_CONTROLS) if model is None else _rate_and_controls(model[0], fps)
    settings = ServerSettings(
        host=host,
        port=port,
        token=token if token is not None else keep_token(port) if port else new_token(),
        max_clients=max_clients,
        origins=tuple(origin or ()),
        pace=Pace(fps=rate, kind="webp" if webp else "jpeg", quality=quality),
    )

    def load(progress: Progress) -> Source:
        progress("PyTorch", 0, 0)
        from owl_wms.cli import _shared as shared

        where = shared.choose_device(device)
        _wake(where)
        from owl_wms.inference.build import build_game, build_pipeline, quick_dtype

        precision = shared.choose_dtype(dtype, where)
        precision = quick_dtype(where, precision) if dtype is None else precision
        common: dict[str, Any] = {"device": where, "dtype": precision, "tensorrt": tensorrt, "seed": seed}
        if model is None:
            files = DEMO_VAE if vae else (None, None)
            return build_game(vae_config=files[0], vae_checkpoint=files[1], fps=rate, **common)
        common |= {"steps": steps, "cfg_scale": cfg_scale, "max_window": max_window, "context": context}
        return build_pipeline(cfg_path=model[0], ckpt_path=model[1], progress=progress, **common)

    terminal = Terminal(console)
    serve(Loading(load, max_clients, terminal, controls), settings, console, open_page=open_page, terminal=terminal)


def _rate_and_controls(config: Path, fps: float | None) -> tuple[float, tuple[Button, ...]]:
    """Returns frames per second and buttons of a world model, whose configuration is refused before it is loaded.

    Args:
        config: its YAML.
        fps: the rate that was asked for; None takes the model's own.
    """
    from owl_wms.errors import ConfigError
    from owl_wms.inference.configured import frames_per_second, load_video_config, played_sampler
    from owl_wms.inference.controls import controls_for

    world = load_video_config(config)
    controls = controls_for(world, config)
    played_sampler(world, config)
    own = frames_per_second(world, config)
    rate = own if fps is None else fps
    if rate > bounds.FPS[1]:
        text = f"{config}: {rate:g} frames a second, and the page shows at most {bounds.FPS[1]}: give a rate with --fps"
        raise ConfigError(text, path=config, key="train.fps")
    return rate, controls


def _wake(device: torch.device) -> None:
    """Makes a GPU's context on a thread of its own: that takes a second, in which modules can be imported."""
    import torch

    from owl_wms import ending

    def make_context() -> None:
        with contextlib.suppress(RuntimeError):  # what fails here fails again where it is needed, and says so there
            torch.zeros(1, device=device)

    if device.type == "cuda":
        ending.begin(make_context, name="owl-play-gpu")


class Terminal:
    """Says in the terminal what is being loaded, and how far it is."""

    def __init__(self, console: Console) -> None:
        self._console, self._last = console, ""
        self.status = console.status("loading")

    def __call__(self, what: str, done: int, total: int) -> None:
        """See `owl_wms.inference.loading.Progress`."""
        if self._console.is_terminal:
            self.status.update(f"loading: {what}" + (f", {done} of {total}" if total else ""))
        elif what != self._last:  # a log has one line for each
            say(self._console, f"loading: {what}")
        self._last = what


def serve(
    loading: Loading, settings: ServerSettings, console: Console, *, open_page: bool, terminal: Terminal | None = None
) -> None:
    """Takes the port, serves the page while the game is loaded, then plays until interrupted.

    Raises:
        ConfigError: the port cannot be had.
        Exception: what the loading raised, once the pages that wait for it have been told.
    """
    import asyncio

    from owl_wms.inference import listen

    sockets = listen.bind(settings.host, settings.port)
    try:
        with (Terminal(console) if terminal is None else terminal).status as status:
            asyncio.run(_until_interrupted(loading, settings, sockets, console, open_page, status.stop))
    finally:
        listen.close(sockets)
    say(console, "stopped")


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
            say(console, "stopping: the players are told; Ctrl-C again stops at once")
            loop.call_later(AGAIN_AFTER_SECONDS, end_at_once)
        stop.set()

    for number in numbers:
        try:
            loop.add_signal_handler(number, asked)
        except NotImplementedError:  # Windows
            signal.signal(number, lambda *_: loop.call_soon_threadsafe(asked))
    return stop


async def _until_interrupted(
    loading: Loading,
    settings: ServerSettings,
    sockets: list[socket.socket],
    console: Console,
    open_page: bool,
    loaded: Callable[[], None],
) -> None:
    import asyncio

    from aiohttp import web

    from owl_wms.inference import listen
    from owl_wms.inference.server import make_app, page_address

    stop = stop_on_signals(console)
    # A log would hold the token.
    app = make_app(loading.new_source, settings, loading)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=3)
    await runner.setup()
    try:
        try:
            listen.let_listen(sockets)
            for bound in sockets:
                await web.SockSite(runner, bound, backlog=ACCEPTED_AT_ONCE).start()
        except OSError as error:
            raise listen.cannot_listen(settings.host, settings.port, error) from error
        address = page_address(settings, runner.addresses[0][1])
        say(console, f"play at {address}")
        say(console, "Ctrl-C stops.")
        if not settings.host.startswith("127.") and settings.host not in ("::1", "localhost"):
            say(console, "Others can reach this server: the address is the only key, and nothing is encrypted.")
        if open_page and not webbrowser.open(address):
            say(console, "No browser can be opened here: open the address yourself.")
        loading.begin()
        stopping = asyncio.create_task(stop.wait())
        done = asyncio.wrap_future(loading.done)
        waits: list[asyncio.Future[Any]] = [stopping, done]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        loaded()
        if done.done():
            if done.exception() is not None and loading.watched(WATCHED_SECONDS):
                await asyncio.sleep(WATCHED_SECONDS)  # the pages that wait hear why
            done.result()
            say(console, "ready")
        await stopping
    finally:
        await runner.cleanup()
