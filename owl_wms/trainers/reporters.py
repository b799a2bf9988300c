"""Services that show a run while it trains: Weights & Biases and TensorBoard. Both are optional; neither can end it.

Usage:
    reporters = start_reporters(folder, cfg.wandb, config, tensorboard=True)
    for reporter in reporters:
        reporter.log(12, {"diffusion_loss": 0.9})
"""

from __future__ import annotations

import configparser
import contextlib
import logging
import netrc
import queue
import threading
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from owl_wms import env
from owl_wms.configs.vae import WandbConfig
from owl_wms.files import one_line
from owl_wms.interrupts import raise_interrupt

_log = logging.getLogger(__name__)
_WITHOUT_LOGIN = ("offline", "dryrun", "disabled")
"""Values of WANDB_MODE under which nothing is sent, so that no key is needed."""

SECONDS = 30.0
"""Longest call of a service. What it still has to send, it sends meanwhile, or when the process ends."""

Values = Mapping[str, float | str | None]


class _Service(Protocol):
    def log(self, step: int, values: Values) -> None: ...
    def clips(self, step: int, videos: Sequence[Path]) -> None: ...
    def close(self, failed: bool) -> None: ...


class Reporter:
    """Calls a service until its first failure, which costs one warning; a call of `SECONDS` without an end is one."""

    def __init__(self, name: str, service: _Service) -> None:
        self._name = name
        self._service: _Service | None = service

    def log(self, step: int, values: Values) -> None:
        """Show the values of a step."""
        self._try(lambda service: service.log(step, values))

    def clips(self, step: int, videos: Sequence[Path]) -> None:
        """Show mp4 files."""
        self._try(lambda service: service.clips(step, videos))

    def close(self, *, failed: bool = False) -> None:
        """Send what is left, and whether the run failed."""
        self._try(lambda service: service.close(failed))

    def _try(self, call: Callable[[_Service], None]) -> None:
        if self._service is None:
            return
        try:
            _within(SECONDS, call, self._service)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a service that broke down raises anything: sys.exit, asyncio's CancelledError
            raise_interrupt(error)
            self._service = None
            said = one_line(error) or type(error).__name__
            _log.warning("%s failed (%s): the run goes on and is logged to disk only", self._name, said)


def _within(seconds: float, call: Callable[[_Service], None], service: _Service) -> None:
    """Call a service on a thread of its own, which is left behind when it takes longer.

    Raises:
        TimeoutError: the time is over.
        BaseException: what the call raised.
    """
    ended: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

    def run() -> None:
        try:
            call(service)
        except BaseException as error:
            ended.put(error)
        else:
            ended.put(None)

    threading.Thread(target=run, name="owl-wms-report", daemon=True).start()
    try:
        error = ended.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer in {seconds:g} s") from None
    if error is not None:
        raise error


def start_reporters(
    folder: Path, wandb_cfg: WandbConfig | None, config: Mapping[str, Any], *, tensorboard: bool
) -> list[Reporter]:
    """Start the services that the configuration names; one that cannot be started costs a warning."""
    found = []
    if wandb_cfg is not None and wandb_cfg.project:
        if _may_log_in():
            remedy = "if it is not installed: pip install wandb"
            found.append(_started("Weights & Biases", lambda: _Wandb(wandb_cfg, config), remedy))
        else:
            _log.warning(
                "wandb.project is set, but there is no WANDB_API_KEY, no login of `wandb login` and no "
                "WANDB_MODE=offline: logging to disk only"
            )
    if tensorboard:
        remedy = "if it is not installed: pip install tensorboard"
        found.append(_started("TensorBoard", lambda: _TensorBoard(folder / "tensorboard"), remedy))
    return [reporter for reporter in found if reporter is not None]


def _started(name: str, make: Callable[[], _Service], remedy: str) -> Reporter | None:
    try:
        return Reporter(name, make())
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # not installed, refused, unreachable, cancelled: these share no other base class
        raise_interrupt(error)
        said = one_line(error) or type(error).__name__
        _log.warning("%s is not available (%s): logging to disk only; %s", name, said, remedy)
        return None


def _may_log_in() -> bool:
    """Return whether `wandb.init` would start without asking on the terminal for a key.

    Where it looks: https://docs.wandb.ai/models/ref/python/functions/login
    """
    written = _settings_of_files()

    def setting(name: str) -> str:
        return env.read(f"WANDB_{name.upper()}") or written.get(name, "")

    if setting("mode").lower() in _WITHOUT_LOGIN or setting("api_key") or setting("identity_token_file"):
        return True
    host = urllib.parse.urlparse(setting("base_url") or "https://api.wandb.ai").hostname or ""
    named = env.read("NETRC")
    for path in [Path(named)] if named else [Path("~/.netrc"), Path("~/_netrc")]:
        try:
            if netrc.netrc(path.expanduser()).authenticators(host) is not None:
                return True
        except (OSError, ValueError, RuntimeError, netrc.NetrcParseError):
            continue
    return False


def _settings_of_files() -> Mapping[str, str]:
    """Return what `wandb offline`, `wandb disabled` and `wandb login --host` left in a folder or for a user."""
    folders = [Path(env.read("WANDB_CONFIG_DIR") or "~/.config/wandb"), Path(env.read("WANDB_DIR") or ".") / "wandb"]
    settings = configparser.ConfigParser(interpolation=None)
    with contextlib.suppress(OSError, ValueError, RuntimeError, configparser.Error):
        settings.read([folder.expanduser() / "settings" for folder in folders], encoding="utf-8")
    return dict(settings["default"]) if settings.has_section("default") else {}


class _Wandb:
    """A run of Weights & Biases."""

    def __init__(self, cfg: WandbConfig, config: Mapping[str, Any]) -> None:
        import wandb

        self._run: Any = wandb.init(entity=cfg.name, project=cfg.project, name=cfg.run_name, config=dict(config))

    def log(self, step: int, values: Values) -> None:
        self._run.log(dict(values), step=step)

    def clips(self, step: int, videos: Sequence[Path]) -> None:
        import wandb

        self._run.log({"samples": [wandb.Video(str(path), format="mp4") for path in videos]}, step=step)

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class _TensorBoard:
    """Scalars and texts as TensorBoard reads them; clips by their names, as its own video format is GIF."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder))

    def log(self, step: int, values: Values) -> None:
        for name, value in values.items():
            if isinstance(value, str):
                self._writer.add_text(name, value, step)
            elif value is not None:
                self._writer.add_scalar(name, value, step)

    def clips(self, step: int, videos: Sequence[Path]) -> None:
        self._writer.add_text("samples", ", ".join(path.name for path in videos), step)

    def close(self, failed: bool) -> None:
        self._writer.close()
