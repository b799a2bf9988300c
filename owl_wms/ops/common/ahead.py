"""Compiles the kernels that a module will launch, in threads, while other work goes on.

Usage:
    compile_ahead(module, z)        # returns at once; the first run waits for what is not ready
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import cast

import torch
from torch import Tensor, nn

from owl_wms.ops.common import machine_code, nvrtc

_LOG = logging.getLogger(__name__)


def compile_ahead(module: nn.Module, z: Tensor, also: Collection[nvrtc.Kernel] = ()) -> int:
    """Find the kernels that `module(z)` launches by running it without them, and compile those and `also` in threads.

    Costs one eager run; on the CPU nothing is done.

    Returns:
        How many kernels there are.
    """
    if z.device.type != "cuda":
        return 0
    try:
        with torch.no_grad(), machine_code.watched(launch=False) as seen:
            module(z)
        wanted = cast(set[nvrtc.Kernel], seen) | set(also)
        nvrtc.compile_ahead(wanted, torch.cuda.current_device() if z.device.index is None else z.device.index)
        return len(wanted)
    except Exception as error:  # the run that counts will raise it again
        _LOG.debug("kernels are compiled when they are met: %s", error)
        return 0
