"""Makes the baselines: eager PyTorch as upstream runs it, the same with weight norm folded, and compiled PyTorch.

Compiled candidates take the folded decoder in channels_last, the faster memory format for them on Hopper (docs/log.md).
`reduce-overhead` replays a CUDA graph, as ours does, which is what tells at batch 1. `max-autotune` can take minutes
and print megabytes, so it gets a time limit and its own row says when it was not met.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import signal
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from owl_wms.vae import fold_weight_norm

COMPILE_SECONDS = 240
Made = tuple[Callable[[Tensor], Tensor], dict[str, Any]]


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise TimeoutError in the main thread after `seconds`, whatever what it interrupts makes of it."""
    text = f"not ready after {seconds} s"
    reached = False

    def stop(signum: int, frame: object) -> None:
        nonlocal reached
        reached = True
        raise TimeoutError(text)

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    except Exception as error:
        # torch.compile wraps whatever is raised while it compiles in an error of its own.
        if reached and not isinstance(error, TimeoutError):
            raise TimeoutError(text) from error
        raise
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def _bounded_first_call(run: Callable[[Tensor], Tensor], seconds: int) -> Callable[[Tensor], Tensor]:
    """`run`, whose first call, the one that compiles, raises TimeoutError after `seconds`."""
    compiled = False

    def call(z_BCHW: Tensor) -> Tensor:
        nonlocal compiled
        if compiled:
            return run(z_BCHW)
        with time_limit(seconds):
            x_BCHW = run(z_BCHW)
        compiled = True
        return x_BCHW

    return call


def candidates(live_fp32: nn.Module, max_autotune_seconds: int) -> dict[str, Callable[[], Made]]:
    """Name -> maker of a bf16 decoder.

    Args:
        live_fp32: decoder on the GPU, parametrized as loaded.
        max_autotune_seconds: time limit of max-autotune; 0 leaves it out.
    """

    def folded() -> nn.Module:
        return fold_weight_norm(live_fp32).bfloat16().eval()

    def compiled(mode: str, seconds: int) -> Made:
        module = torch.compile(folded().to(memory_format=torch.channels_last), mode=mode, dynamic=False)

        def run(z_BCHW: Tensor) -> Tensor:
            # The other modes replay a CUDA graph into static memory; a clone would charge them for our convenience.
            torch.compiler.cudagraph_mark_step_begin()
            return module(z_BCHW)

        return _bounded_first_call(run, seconds), {}

    made: dict[str, Callable[[], Made]] = {
        "eager bf16": lambda: (copy.deepcopy(live_fp32).bfloat16().eval(), {}),
        "eager folded bf16": lambda: (folded(), {}),
        "torch.compile bf16": lambda: compiled("default", COMPILE_SECONDS),
        "torch.compile reduce-overhead bf16": lambda: compiled("reduce-overhead", COMPILE_SECONDS),
    }
    if max_autotune_seconds:
        logging.getLogger("torch._inductor").setLevel(logging.ERROR)
        made["torch.compile max-autotune bf16"] = lambda: compiled("max-autotune", max_autotune_seconds)
    return made
