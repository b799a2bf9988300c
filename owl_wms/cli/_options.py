"""Options that several commands have in the same words, written once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N. Default: the GPU, if there is one.")]
Dtype = Annotated[str | None, typer.Option(help="bf16, fp16 or fp32. Default: bf16 on a GPU, else fp32.")]
TensorRT = Annotated[bool, typer.Option(help="Decode by a compiled program if possible, else by PyTorch.")]
Context = Annotated[
    Path | None, typer.Option(help="Where to begin: a file of latents, mouse and buttons, or row 12 of TABLE#12.")
]
CfgScale = Annotated[float | None, typer.Option(help="Guidance; other than 1 doubles the work.")]
