"""`owl-wms play` as a process: it prints an address, serves it, and stops cleanly; bad calls end in one line."""

from __future__ import annotations

import asyncio
import contextlib
import io
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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from aiohttp import ClientSession, ClientWebSocketResponse, WSMsgType
from rich.console import Console

from owl_wms.cli import main, play
from owl_wms.cli.play import serve
from owl_wms.errors import ConfigError
from owl_wms.inference import listen
from owl_wms.inference.server import ServerSettings

COMMAND = [sys.executable, "-c", "from owl_wms.cli import main; main()", "play"]


@contextmanager
def playing(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process, and the address that it printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    process = subprocess.Popen(
        [*COMMAND, "--game", "--port", "0", "--device", "cpu", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    try:
        assert process.stderr is not None
        found, end = None, time.monotonic() + 60
        while found is None and time.monotonic() < end:
            line = process.stderr.readline()
            assert line, "it ended before it listened"
            found = re.search(r"http://127\.0\.0\.1:\d+/[\w-]{32}/", line)
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
        (["--game", "--token", "short"], "at least 16"),
        (["--game", "--fps", "0"], "fps must be"),
        (["absent.yml", "absent.pt"], "absent.yml"),
        ([str(Path(__file__).parents[2] / "configs" / "av_v4_8x8.yml"), "absent.pt"], "only game_rft"),
        (["--game", "--device", "cuda:77"], "CUDA devices"),
        (["--game", "--host", "a..b", "--device", "cpu"], "cannot listen on a..b:8080"),
    ],
)
def test_bad_calls_end_in_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["play", *arguments])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err.replace("\n", " ")


class Loaded:
    """Counts what is made of it."""

    def __init__(self) -> None:
        self.twins: list[int] = []

    def twin(self, number: int) -> Loaded:
        self.twins.append(number)
        return self


@contextmanager
def stopped_once_it_listens(port: int) -> Iterator[None]:
    """Sends SIGTERM to this process once somebody listens on `port`, or after half a minute."""

    def watch() -> None:
        for _ in range(300):
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port), timeout=5).close()
                break
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, lambda *_: None)
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        watcher.join()  # its signal is for the server, or for the handler above
        signal.signal(signal.SIGTERM, before)


def test_a_taken_port_is_told_before_anything_is_loaded() -> None:
    made: list[Loaded] = []
    with socket.create_server(("127.0.0.1", 0)) as taken:
        settings = ServerSettings(port=taken.getsockname()[1])
        with pytest.raises(ConfigError, match=r"cannot listen on .* in use"):
            serve(lambda: made.append(Loaded()), settings, Console(stderr=True), open_page=False)
    assert made == []


def test_one_model_is_loaded_and_every_player_has_a_twin_before_anybody_plays() -> None:
    """One thread prepares and plays: what it prepared later would stop the players who are there."""
    made: list[Loaded] = []

    def new_source() -> Loaded:
        with pytest.raises(ConnectionRefusedError):  # ours already, but nobody is served by half a model
            socket.create_connection(("127.0.0.1", settings.port), timeout=5).close()
        made.append(Loaded())
        return made[-1]

    with socket.create_server(("127.0.0.1", 0)) as free:
        settings = ServerSettings(port=free.getsockname()[1], max_clients=3)
    with stopped_once_it_listens(settings.port):
        serve(new_source, settings, Console(stderr=True), open_page=False)
    assert [source.twins for source in made] == [[1, 2]]
    with socket.create_server(("127.0.0.1", settings.port)):
        pass  # given back


def test_the_port_is_given_back_when_loading_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[socket.socket] = []
    original = listen.bind
    monkeypatch.setattr(listen, "bind", lambda host, port: kept.extend(original(host, port)) or kept[:])  # type: ignore[func-returns-value]
    with socket.create_server(("127.0.0.1", 0)) as free:
        settings = ServerSettings(port=free.getsockname()[1])

    def new_source() -> Loaded:
        raise ConfigError("no such model")

    with pytest.raises(ConfigError, match="no such model"):
        serve(new_source, settings, Console(stderr=True), open_page=False)
    (bound,) = kept
    assert bound.fileno() == -1, "closed, not merely forgotten"


def test_the_address_of_any_interface_is_printed_as_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """[fd00::2] looks like rich's markup."""
    (bound,) = listen.bind("127.0.0.1", 0)
    monkeypatch.setattr(listen, "bind", lambda *_: [bound])
    monkeypatch.setattr("aiohttp.web.AppRunner.addresses", property(lambda _: [("fd00::2", 8080)]))
    settings = ServerSettings(host="fd00::2", token="t" * 24)
    with stopped_once_it_listens(bound.getsockname()[1]):
        serve(Loaded, settings, Console(stderr=True, width=200), open_page=False)
    assert f"play at http://[fd00::2]:8080/{'t' * 24}/" in capsys.readouterr().err


def test_a_proxy_in_front_may_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[ServerSettings] = []
    monkeypatch.setattr("owl_wms.cli.play.serve", lambda _new, settings, *_a, **_k: given.append(settings))
    with pytest.raises(SystemExit):
        main(["play", "--game", "--device", "cpu", "--origin", "https://a.example", "--origin", "https://b.example"])
    assert given[0].origins == ("https://a.example", "https://b.example")
