"""What a caller's process may have set for all of torch, for tests that nothing of it reaches us.

Research code sets `torch.set_default_dtype(torch.bfloat16)` and `torch.set_default_device("cuda")`; here the meta
device stands for the latter, where a tensor that strayed shows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

STATES = ("bfloat16", "float16", "float64", "meta", "inference", "gradients off", "deterministic", "tf32")


@contextlib.contextmanager
def set_in_process(state: str) -> Iterator[None]:
    """One of `STATES` inside the block, what was before after it."""
    with contextlib.ExitStack() as stack:
        if state in ("bfloat16", "float16", "float64"):
            stack.callback(torch.set_default_dtype, torch.get_default_dtype())
            torch.set_default_dtype(getattr(torch, state))
        elif state == "meta":
            stack.callback(torch.set_default_device, None)
            torch.set_default_device("meta")
        elif state == "inference":
            stack.enter_context(torch.inference_mode())
        elif state == "gradients off":
            stack.enter_context(torch.no_grad())
        elif state == "deterministic":
            stack.callback(torch.use_deterministic_algorithms, False)
            torch.use_deterministic_algorithms(True)
        else:
            stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision("medium")
        yield
