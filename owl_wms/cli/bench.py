"""`owl-wms bench`: one decoder timed on this machine, as one JSON object to paste into an issue.

Why JSON alone: `benchmarks/results/community.md` is made of such objects, and a table cannot be compared by a program.

Usage: owl-wms bench > result.json
"""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from owl_wms import __version__, env
from owl_wms.cli._bounds import MOST_FRAMES
from owl_wms.cli._options import Device
from owl_wms.configs.paths import DEMO_VAE

if TYPE_CHECKING:
    import torch

SCHEMA = 1
_COMPILED = "torch.compile"


def bench(
    batch_size: int = typer.Option(8, min=1, max=MOST_FRAMES, help="Frames per batch."),
    precision: str | None = typer.Option(None, help="auto, fp16, bf16, fp32, fp8 or int8."),
    iterations: int = typer.Option(20, min=1, help="Timed runs of each way; the median is printed."),
    compiled: bool = typer.Option(True, help="Also time torch.compile."),
    device: Device = None,
) -> None:
    """Time the shipped demo decoder on this machine and print one JSON object for an issue."""
    from owl_wms.cli import _shared as shared
    from owl_wms.cli._support import capability_of, support
    from owl_wms.runtime import VideoDecode
    from owl_wms.settings import TensorRTConfig
    from owl_wms.trt import run_status
    from owl_wms.utils.owl_vae_bridge import get_decoder_only

    where = shared.choose_device(device)
    settings = TensorRTConfig.resolve(precision=precision)
    files = (None, *DEMO_VAE)
    decoder = get_decoder_only(*files, device=where, dtype=shared.choose_dtype(None, where))
    decode = VideoDecode(decoder, batch_size=batch_size, settings=settings)
    shape = (128, 8, 8)
    rows = measured(decode, decoder, shape, files, compiled=compiled, iterations=iterations)
    machine = env.describe_machine(where.index or 0 if where.type == "cuda" else None)
    capability = capability_of(machine["compute_capability"]) if where.type == "cuda" else None
    stats = decode.stats()
    programs = [{key: found[key] for key in ("plan", "precision")} for found in stats.programs if found.get("plan")]
    result = {
        "schema": SCHEMA,
        "owl_wms": __version__,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "device": where.type,
        "machine": machine,
        "gpu": support(capability, run_status().available, settings.precision),
        "decoder": "demo",
        "batch_size": batch_size,
        "latent": list(shape),
        "iterations": iterations,
        "rows": rows,
        "decoded_by": stats.reason,
        "programs": programs,
    }
    typer.echo(json.dumps(result))


def measured(
    decode: Any,
    decoder: torch.nn.Module,
    shape: tuple[int, int, int],
    files: tuple[str | None, Path | None, str | Path | None],
    *,
    compiled: bool,
    iterations: int,
) -> list[dict[str, Any]]:
    """Time eager PyTorch, torch.compile and `decode` on the same latents, in turns, so that a drifting clock hits all.

    Args:
        decode: a `VideoDecode` of `decoder`.
        decoder: with its weights on the device that is timed.
        shape: `c, h, w` of one latent.
        files: id, configuration and checkpoint, for the fp32 decoder that the errors are measured against.
        compiled: whether torch.compile is timed.
        iterations: timed runs of each.

    Returns:
        One dict per way: `way`, `ms` (median of a batch), `frames_per_second`, `over_eager` and `over_compiled` (how
        many times as fast as those), `relative_error` (L2, against fp32), `max_uint8` (largest difference of a pixel
        after conversion to 8 bits). On a GPU also `unbroken_ms`, `watts`, `clock_mhz` and `joules` of a batch in calls
        without a pause, None where the driver does not tell. If torch.compile fails, its dict has `way` and `failed`,
        the reason.
    """
    import torch

    from owl_wms.runtime import VideoDecode
    from owl_wms.settings import TensorRTConfig
    from owl_wms.timing import interleaved
    from owl_wms.trt.check.parity import reference_arithmetic
    from owl_wms.utils.owl_vae_bridge import get_decoder_only

    tensor = next(decoder.parameters())
    count = decode.batch_size
    z = torch.randn(1, count, *shape, generator=torch.Generator().manual_seed(0)).to(tensor.device, tensor.dtype)
    ways: dict[str, Any] = {"eager": VideoDecode(decoder, batch_size=count, settings=TensorRTConfig(enabled=False))}
    if compiled:
        inductor = torch.compile(decoder, dynamic=False)
        ways[_COMPILED] = lambda x: inductor(x[0])[None]
    ways[f"owl_wms ({decode.prepare(shape).backend})"] = decode
    truth = get_decoder_only(*files, device=tensor.device, dtype=torch.float32)
    with torch.no_grad(), reference_arithmetic():  # a frame at a time, which bounds the memory of fp32
        exact = torch.cat([truth(frame[None]) for frame in z[0].float()])[None]
    del truth
    rows: dict[str, dict[str, Any]] = {}

    def measure(name: str, run: Callable[[], float]) -> float | None:
        """The first call of each way compares its frames; torch.compile may fail there, and the others go on."""
        try:
            if name not in rows:
                typer.echo(f"timing {name}", err=True)  # a CPU takes minutes
                rows[name] = {"way": name, **_distance(ways[name](z), exact)}
            return run()
        except Exception as failure:
            if name != _COMPILED:
                raise
            # It needs a C++ compiler, among others, and the other ways do not.
            first = next(iter(str(failure).splitlines()), "")
            rows[name] = {"way": name, "failed": f"{type(failure).__name__}: {first}"}
            return None

    medians = interleaved(ways, z, rounds=iterations, warmup=2, budget_seconds=None, measure=measure)
    for name, ms in medians.items():
        rows[name] |= {"ms": ms, "frames_per_second": count / ms * 1e3, "over_eager": medians["eager"] / ms}
        rows[name]["over_compiled"] = medians[_COMPILED] / ms if _COMPILED in medians else None
        if tensor.is_cuda:
            rows[name] |= _under_load(ways[name], z)
    return list(rows.values())


def _distance(frames: torch.Tensor, exact: torch.Tensor) -> dict[str, Any]:
    """Measure how far frames in [-1, 1] are from those of the fp32 decoder."""
    in_bytes = [((each[:, :, :3].float().clamp(-1, 1) / 2 + 0.5) * 255).round() for each in (frames, exact)]
    wanted = exact.double()
    return {
        "relative_error": float((frames.double() - wanted).norm() / wanted.norm()),
        "max_uint8": int((in_bytes[0] - in_bytes[1]).abs().max()),
    }


def _under_load(decode: Callable[[torch.Tensor], Any], z: torch.Tensor) -> dict[str, float | None]:
    """Milliseconds, watts, MHz and joules of a batch, in calls without a pause."""
    import torch

    from owl_wms.power import under_load

    with torch.no_grad():
        found = under_load(lambda: decode(z), z.device)
    found["unbroken_ms"] = found.pop("sustained_ms")
    return {key: None if math.isnan(value) else value for key, value in found.items()}  # JSON has no NaN
