"""The `owl-wms` command: a thin layer over the package, and the only place that prints or configures logging.

Each command lives in a module of its own under `owl_wms/cli/` and is imported when it is called: `owl-wms --help`
needs neither torch nor TensorRT. Errors that the package raises on purpose, and a full disk, end as one line and exit
code 2. Help texts are rich markup: a bracket that opens a shape is written `\\[`.
"""

from __future__ import annotations

import importlib
import logging
import sys
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.text import Text

from owl_wms import __version__, env
from owl_wms.cli._disk import closed_path, described, disk_failure
from owl_wms.errors import FastPathError, OwlError

# name -> (module, attribute, one-line help). The attribute is a function with typer annotations, or a typer app.
COMMANDS: dict[str, tuple[str, str, str]] = {
    "demo": (
        "owl_wms.cli.demo",
        "demo",
        "Render a game clip, encode it, decode it through the bridge, show both.",
    ),
    "decode": ("owl_wms.cli.decode", "decode", "Decode latents to a video clip, an array or pictures."),
    "encode": ("owl_wms.cli.encode", "encode", "Encode a video clip or frames to latents."),
    "decode-dataset": ("owl_wms.cli.dataset", "decode_dataset", "Decode every file of latents of a dataset."),
    "encode-dataset": ("owl_wms.cli.dataset", "encode_dataset", "Encode every clip of a dataset to latents."),
    "sample": ("owl_wms.cli.sample", "sample", "Sample a clip from a world model."),
    "play": ("owl_wms.cli.play", "play", "Play a world model in the browser."),
    "init": ("owl_wms.cli.init", "init", "Write a first configuration that fits your data."),
    "train": ("owl_wms.cli.train", "train", "Train a world model from a YAML configuration."),
    "report": ("owl_wms.cli.report", "report", "Write one HTML page about a training run."),
    "data": ("owl_wms.cli.data", "app", "Make and inspect data sets of latents."),
    "trt": ("owl_wms.cli.trt", "app", "Build, list, show, verify, prune and time compiled decoders."),
    "bench": ("owl_wms.cli.bench", "bench", "Time the demo decoder here; prints one JSON object for an issue."),
    "doctor": ("owl_wms.cli.doctor", "doctor", "Report what would decode on this machine, and why."),
}


def build_app(requested: str | None) -> typer.Typer:
    """The typer application with the requested command imported and the others as names only.

    Args:
        requested: name of the command about to run, or None when there is none (help, version).

    Returns:
        An application in which only `requested` can do work; the rest exist for the help text.
    """
    app = typer.Typer(
        add_completion=False,
        pretty_exceptions_enable=False,
        no_args_is_help=True,
        context_settings={"help_option_names": ["-h", "--help"]},
        help="Fast, verified VAE decoding for real-time world models.",
    )
    app.callback()(_global_options)
    for name, (module, attribute, text) in COMMANDS.items():
        target: Any = getattr(importlib.import_module(module), attribute) if name == requested else _placeholder
        if isinstance(target, typer.Typer):
            app.add_typer(target, name=name, help=text)
        else:
            app.command(name=name, help=None if name == requested else text)(target)
    return app


def _placeholder() -> None:
    raise AssertionError("a command that was not requested was run")


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"owl-wms {__version__}")
        raise typer.Exit


def _global_options(
    verbose: int = typer.Option(0, "-v", "--verbose", count=True, help="More log lines; twice for debug."),
    quiet: bool = typer.Option(False, "-q", "--quiet", help="Log errors only."),
    version: bool = typer.Option(False, "--version", callback=_show_version, is_eager=True, help="Show the version."),
) -> None:
    level = logging.ERROR if quiet else (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    handler = RichHandler(console=Console(stderr=True), show_path=False)
    logging.basicConfig(level=level, format="%(message)s", handlers=[handler], force=True)


def main(argv: list[str] | None = None) -> None:
    """Entry point of the console script.

    Args:
        argv: arguments without the program name; the process's own when None.
    """
    arguments = sys.argv[1:] if argv is None else argv
    requested = next((word for word in arguments if not word.startswith("-")), None)
    try:
        build_app(requested)(args=arguments, prog_name="owl-wms")
    except OwlError as error:
        _end(f"{error}{_who_forbids_pytorch(error, requested)}")
    except (OSError, RuntimeError) as error:
        closed = closed_path(error)
        if closed is not None:
            _end(described(closed))
        failure = disk_failure(error)
        if failure is None:
            raise
        _end(f"the disk refused what was written: {described(failure)}")


def _who_forbids_pytorch(error: OwlError, requested: str | None) -> str:
    """Names the variable that made an error of what PyTorch would have decoded; empty for `trt`."""
    variable = env.TENSORRT_VARIABLES["fallback_on_error"]
    forbids = (env.read(variable) or "").lower() == "error"
    if not isinstance(error, FastPathError) or not forbids or requested == "trt":
        return ""
    return f"; {variable}=error forbids PyTorch: unset it, or set it to pytorch"


def say(console: Console, text: str, style: str = "") -> None:
    """Print a line as it is: shapes in brackets are no markup, and a narrow terminal does not break it."""
    console.print(Text(text, style=style), soft_wrap=True)


def _end(message: str) -> NoReturn:
    # Text, not markup: messages hold shapes such as [b, n, c, h, w], which markup would swallow.
    Console(stderr=True).print(Text.assemble(("error: ", "bold red"), message), soft_wrap=True)
    sys.exit(2)
