"""`owl-wms play` as a process: it prints an address, serves it, and stops cleanly; bad calls end in one line."""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientSession, ClientWebSocketResponse, WSMsgType
from rich.console import Console

from owl_wms.cli import main, play
from owl_wms.cli.play import serve
from owl_wms.errors import ConfigError
from owl_wms.inference import listen
from owl_wms.inference.loading import Loading, Progress
from owl_wms.inference.server import ServerSettings
from tests.cli.runner import run

COMMAND = [sys.executable, "-c", "from owl_wms.cli import main; main()", "play"]


@contextmanager
def playing(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process once it can be played, and the address that it printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    process = subprocess.Popen(
        [*COMMAND, "--game", "--port", "0", "--device", "cpu", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    try:
        assert process.stderr is not None
        found, line, end = None, "", time.monotonic() + 60
        while line != "ready\n" and time.monotonic() < end:
            line = process.stderr.readline()
            assert line, "it ended before anybody could play"
            found = found or re.search(r"http://127\.0\.0\.1:\d+/[\w-]{32}/", line)
        assert found is not None
        yield process, found[0]
    finally:
        process.kill()
        process.wait()


def assert_stops(process: subprocess.Popen[str]) -> None:
    assert process.wait(15) == 0
    assert process.stderr is not None
    rest = process.stderr.read()
    assert "Traceback" not in rest
    assert "stopped" in rest


def test_the_game_is_served_until_interrupted() -> None:
    with playing() as (process, address):
        with urllib.request.urlopen(address, timeout=10) as answer:
            assert "owl-wms play" in answer.read().decode()
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(f"{address[:-2]}{'-' if address[-2] == '_' else '_'}/", timeout=10)
        process.send_signal(signal.SIGINT)
        assert_stops(process)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_every_player_is_told_that_the_server_stops(number: signal.Signals) -> None:
    async def play(address: str, process: subprocess.Popen[str]) -> list[str | None]:
        async with ClientSession() as client:
            players = [
                await client.ws_connect(f"{address}ws", origin=address.rsplit("/", 2)[0], autoclose=False)
                for _ in range(3)
            ]
            for player in players:
                await player.receive(timeout=30)
            process.send_signal(number)
            return await asyncio.gather(*map(last_words, players))

    async def last_words(player: ClientWebSocketResponse) -> str | None:
        while (message := await player.receive(timeout=15)).type in (WSMsgType.TEXT, WSMsgType.BINARY):
            pass
        await player.close()
        return message.extra

    with playing("--max-clients", "3") as (process, address):
        assert asyncio.run(play(address, process)) == ["the server is stopping"] * 3
        assert_stops(process)


@pytest.mark.parametrize("windows", [False, True])
def test_a_second_signal_ends_at_once(windows: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if windows:  # its event loops have none of asyncio's signal handlers

        def refuse(*_: object) -> None:
            raise NotImplementedError

        for name in ("add_signal_handler", "remove_signal_handler"):
            monkeypatch.setattr(asyncio.SelectorEventLoop, name, refuse)
    monkeypatch.setattr(play, "AGAIN_AFTER_SECONDS", 0.0)
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}
    text = io.StringIO()

    async def stopped() -> list[object]:
        stop = play.stop_on_signals(Console(file=text))
        os.kill(os.getpid(), signal.SIGTERM)
        await stop.wait()
        await asyncio.sleep(0.01)
        return [signal.getsignal(number) for number in numbers]

    try:
        assert asyncio.run(stopped()) == [signal.SIG_DFL] * 2
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert text.getvalue() == "stopping: the players are told; Ctrl-C again stops at once\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["world.yml"], "both a config and a checkpoint"),
        (["--vae"], "goes with --game"),
        (["--game", "world.yml", "world.pt"], "--game plays without a model: a config would do nothing"),
        (["--game", "--steps", "3", "--context", "x.pt"], "a model: --context, --steps would do nothing"),
        (["--game", "--token", "short"], "at least 16"),
        (["--game", "--fps", "0"], "fps must be"),
        (["absent.yml", "absent.pt"], "absent.yml"),
        ([str(Path(__file__).parents[2] / "configs" / "av_v4_8x8.yml"), "absent.pt"], "only game_rft"),
        (["--game", "--device", "cuda:77", "--port", "0"], "CUDA devices"),
        (["--game", "--device", "gpu"], "must be cpu, cuda or cuda:N"),
        (["--game", "--dtype", "fp8"], "must be one of bf16"),
        (["--game", "--host", "a..b", "--device", "cpu"], "cannot listen on a..b:8080"),
    ],
)
def test_bad_calls_end_in_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("play", *arguments) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize(
    ("written", "instead", "message"),
    [
        ("fps: 20", "fps: 500", "train.fps: must be at most 240, received 500"),
        ("n_steps: 6", "n_steps: six", "train.sampler_kwargs.n_steps"),
        ("noise_prev: 0.2,", "noise_prev: 2,", "train.sampler_kwargs.noise_prev"),
        ("n_steps: 6", "n_steps: 6, custom_schedule: 1", "train.sampler_kwargs.custom_schedule"),
        ("n_buttons: 11", "n_buttons: 4", "has 4 buttons and the game 11"),
    ],
)
def test_what_is_wrong_in_a_configuration_is_said_before_anything_is_served(
    written: str,
    instead: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(play, "serve", lambda *_, **__: pytest.fail("it was served"))
    text = play.SHIPPED[0].read_text(encoding="utf-8")
    assert written in text
    text = text.replace(written, instead, 1).replace(" examples/", f" {play.EXAMPLES}/")
    config = tmp_path / "world.yml"
    config.write_text(text, encoding="utf-8")
    assert run("play", str(config), str(play.SHIPPED[1]), "--device", "cpu", "--port", "0") == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


class Loaded:
    """Counts what is made of it."""

    def __init__(self) -> None:
        self.twins: list[int] = []

    def twin(self, number: int) -> Loaded:
        self.twins.append(number)
        return self


@contextmanager
def stopped_when(what: Callable[[], bool]) -> Iterator[None]:
    """Sends SIGTERM to this process once `what` is so, or after half a minute."""

    def watch() -> None:
        for _ in range(600):
            if what():
                break
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, lambda *_: None)
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        watcher.join()  # its signal is for the server, or for the handler above
        signal.signal(signal.SIGTERM, before)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def asked(settings: ServerSettings) -> dict[str, Any]:
    """What the page of a server hears about its loading."""
    address = f"http://127.0.0.1:{settings.port}/{settings.token}/loading"
    with urllib.request.urlopen(address, timeout=10) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


def test_a_taken_port_is_told_before_anything_is_loaded() -> None:
    made: list[Loaded] = []
    with socket.create_server(("127.0.0.1", 0)) as taken:
        settings = ServerSettings(port=taken.getsockname()[1])
        with pytest.raises(ConfigError, match=r"cannot listen on .* in use"):
            serve(Loading(lambda _: made.append(Loaded())), settings, Console(stderr=True), open_page=False)  # type: ignore[arg-type, func-returns-value]
    assert made == []


def test_one_model_is_loaded_and_every_player_has_a_twin_before_anybody_plays() -> None:
    """One thread prepares and plays: what it prepared later would stop the players who are there."""
    made: list[Loaded] = []
    heard: list[dict[str, Any]] = []

    def load(progress: Progress) -> Loaded:
        progress("first frames", 3, 12)
        heard.append(asked(settings))
        made.append(Loaded())
        return made[-1]

    settings = ServerSettings(port=free_port(), max_clients=3)
    loading = Loading(load, 3)  # type: ignore[arg-type]
    with stopped_when(loading.done.done):
        serve(loading, settings, Console(stderr=True), open_page=False)
    assert heard == [{"ready": False, "what": "first frames", "done": 3, "total": 12, "controls": []}], (
        "the page is there meanwhile"
    )
    assert [source.twins for source in made] == [[1, 2]]
    assert loading.state()["ready"]
    assert [loading.new_source() for _ in range(4)] == made * 4
    assert made[0].twins == [1, 2, 3], "the fourth player is not the second again"
    with socket.create_server(("127.0.0.1", settings.port)):
        pass  # given back


def test_the_port_is_given_back_when_loading_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[socket.socket] = []
    original = listen.bind
    monkeypatch.setattr(listen, "bind", lambda host, port: kept.extend(original(host, port)) or kept[:])  # type: ignore[func-returns-value]
    settings = ServerSettings(port=free_port())

    def load(_: Progress) -> Loaded:
        raise ConfigError("no such model")

    with pytest.raises(ConfigError, match="no such model"):
        serve(Loading(load), settings, Console(stderr=True), open_page=False)  # type: ignore[arg-type]
    (bound,) = kept
    assert bound.fileno() == -1, "closed, not merely forgotten"


@pytest.mark.parametrize(
    ("error", "told"), [(ConfigError("no such model"), "no such model"), (RuntimeError("/home/x"), "RuntimeError")]
)
def test_pages_that_wait_hear_why_loading_failed(error: Exception, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(play, "WATCHED_SECONDS", 0.3)
    settings = ServerSettings(port=free_port())
    heard: list[dict[str, Any]] = []

    def page() -> None:
        while "failed" not in (state := asked(settings)):
            pass
        heard.append(state)

    watching = threading.Thread(target=page)

    def load(_: Progress) -> Loaded:
        asked(settings)
        watching.start()
        raise error

    with pytest.raises(type(error)):
        serve(Loading(load), settings, Console(stderr=True), open_page=False)  # type: ignore[arg-type]
    watching.join()
    assert [(state["ready"], state["failed"]) for state in heard] == [(False, told)]


def test_what_is_being_loaded_does_not_delay_the_end() -> None:
    over, began = threading.Event(), threading.Event()

    def load(_: Progress) -> Loaded:
        began.set()
        over.wait(60)
        return Loaded()

    loading = Loading(load)  # type: ignore[arg-type]
    try:
        with stopped_when(began.is_set):
            serve(loading, ServerSettings(port=free_port()), Console(stderr=True), open_page=False)
        assert not loading.done.done()
    finally:
        over.set()
        loading.done.result(timeout=60)


def test_the_page_is_served_without_torch() -> None:
    """It takes seconds to import; the page is there before."""
    modules = "owl_wms.cli.play, owl_wms.cli._bounds, owl_wms.inference.server, owl_wms.inference.kept_token"
    text = f"import sys, {modules}, owl_wms.inference.configured; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", text], check=True)


def test_the_address_of_any_interface_is_printed_as_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """[fd00::2] looks like rich's markup."""
    (bound,) = listen.bind("127.0.0.1", 0)
    monkeypatch.setattr(listen, "bind", lambda *_: [bound])
    monkeypatch.setattr("aiohttp.web.AppRunner.addresses", property(lambda _: [("fd00::2", 8080)]))
    settings = ServerSettings(host="fd00::2", token="t" * 24)
    loading = Loading(lambda _: Loaded())  # type: ignore[arg-type, return-value]
    with stopped_when(loading.done.done):
        serve(loading, settings, Console(stderr=True, width=200), open_page=False)
    assert f"play at http://[fd00::2]:8080/{'t' * 24}/" in capsys.readouterr().err


def test_a_proxy_in_front_may_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[ServerSettings] = []
    monkeypatch.setattr("owl_wms.cli.play.serve", lambda _new, settings, *_a, **_k: given.append(settings))
    with pytest.raises(SystemExit):
        main(["play", "--game", "--device", "cpu", "--origin", "https://a.example", "--origin", "https://b.example"])
    assert given[0].origins == ("https://a.example", "https://b.example")
