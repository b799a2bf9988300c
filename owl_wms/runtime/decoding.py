"""Decodes the batches of one call, by the program or else by PyTorch, and looks for values that are not finite.

Usage:
    decoding = Decoding(eager, slot, out, ledger=ledger, strict=False, looked=True, rebuild=remedy_of)
    decoding.decode(batch, start=0, by_program=True)         # into `out`
    for start in decoding.not_finite(batch_at): ...          # batches in which PyTorch's values are not finite either
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from owl_wms.errors import DecodeMemoryError, FastPathError
from owl_wms.interrupts import raise_interrupt
from owl_wms.memory import is_out_of_memory
from owl_wms.runtime.eager import EagerDecoder, decode_in_memory, release_memory
from owl_wms.runtime.output import Output
from owl_wms.runtime.slot import Slot, all_finite
from owl_wms.runtime.stats import Ledger


def run_failure(error: Exception, rebuild: Callable[[], str]) -> tuple[FastPathError, bool]:
    """Returns the failure to report for a run of a program that raised `error`, and whether memory ran out.

    Args:
        rebuild: returns the remedy if it was not.

    Raises:
        BaseException: a signal handler's, if `error` is that or came of it.
    """
    raise_interrupt(error)
    memory = is_out_of_memory(error)
    text = " ".join(str(error).split())[:300]
    remedy = "free GPU memory or lower the batch size" if memory else rebuild()
    failure = FastPathError("run", f"{type(error).__name__}: {text}", remedy)
    failure.__cause__ = None if memory else error
    return failure, memory


def non_finite_failure(slot: Slot, places: int) -> FastPathError:
    """Returns the failure to report if the program gave `places` non-finite values where PyTorch gave finite ones."""
    loaded = slot.loaded  # None if it was switched off meanwhile
    overflows = loaded is None or loaded.report.get("precision") not in ("bf16", "fp32")
    verify = "start the process again, which verifies the program; if it comes back, compare with another GPU"
    reason = f"it gave {places} non-finite values where PyTorch gives finite ones"
    return FastPathError("run", reason, "set TENSORRT_PRECISION=bf16" if overflows else verify)


def count_run_failure(
    slot: Slot, ledger: Ledger, failure: tuple[FastPathError, bool], batch: Tensor, *, strict: bool
) -> None:
    """Counts a run of `batch` that failed, as `run_failure` returned it; frees memory if that was the reason.

    Raises:
        FastPathError: in strict mode.
    """
    error, memory = failure
    if memory:
        release_memory(batch.device)
        slot.eager_step = max(1, min(slot.eager_step, len(batch)) // 2)
    count_failure(slot, ledger, error, "out of memory" if memory else "run", strict=strict)


def count_failure(slot: Slot, ledger: Ledger, failure: FastPathError, kind: str, *, strict: bool) -> None:
    """Counts a failed run; raises it in strict mode."""
    slot.strike(failure)
    ledger.failure(failure, kind, raised=strict)
    if strict:
        raise failure


class Decoding:
    """Decodes batch after batch into one output.

    Args:
        eager: PyTorch's decoder.
        slot: the program's state.
        out: receives the frames.
        ledger: counts batches and failures.
        strict: a failed run of the program raises, and PyTorch does not decode instead.
        looked: look for values that are not finite.
        rebuild: returns the remedy for a program that fails when it runs.
    """

    def __init__(
        self,
        eager: EagerDecoder,
        slot: Slot,
        out: Output,
        *,
        ledger: Ledger,
        strict: bool,
        looked: bool,
        rebuild: Callable[[Slot], str],
    ) -> None:
        self._eager, self._slot, self._out = eager, slot, out
        self._ledger, self._strict, self._looked, self._rebuild = ledger, strict, looked, rebuild
        # First frame of a batch, whether the program computed it, and whether all its values are finite.
        self._flags: list[tuple[int, bool, Tensor]] = []

    def decode(self, batch: Tensor, start: int, *, by_program: bool) -> None:
        """Decodes latents `[k, c, h, w]`, the frames from number `start` on."""
        done = False
        if by_program and self._slot.state == "ready":
            done = self._run(batch, start)
            self._ledger.add("fallbacks", int(not done))
        if not done:
            self._fall_back(batch, start)

    def not_finite(self, batch_at: Callable[[int], Tensor]) -> Iterator[int]:
        """Yields the first frame of every batch in which PyTorch's values are not finite.

        Values of the program that are not finite where PyTorch's are get replaced by PyTorch's.

        Args:
            batch_at: latents of the batch that begins with that frame.
        """
        if not self._flags:
            return
        # One wait for the device per decode, not per batch: decoding only launches.
        finite = torch.stack([flag for _, _, flag in self._flags]).tolist()
        for (start, by_program, _), good in zip(self._flags, finite, strict=True):
            if not good and not (by_program and self._compare(batch_at(start), start)):
                yield start

    def _run(self, batch: Tensor, start: int) -> bool:
        """Returns whether the program could decode latents `[k, c, h, w]`; a failed run is counted."""
        try:
            floating = batch if batch.is_floating_point() else batch.float()
            flag = self._slot.run(floating, lambda frames: self._out.write(start, frames), self._looked)
        except DecodeMemoryError:
            raise
        except Exception as error:  # whatever TensorRT or CUDA raised, PyTorch decodes this batch
            failure = run_failure(error, lambda: self._rebuild(self._slot))
        else:
            if flag is not None:
                self._flags.append((start, True, flag))
            self._ledger.add("chunks_program")
            return True
        count_run_failure(self._slot, self._ledger, failure, batch, strict=self._strict)
        return False

    def _fall_back(self, batch: Tensor, start: int) -> None:
        finite: list[Tensor] = []

        def write(offset: int, frames: Tensor) -> None:
            self._out.write(start + offset, frames)
            if self._looked:
                finite.append(all_finite(frames))

        self._slot.eager_step = decode_in_memory(self._eager, batch, write, self._slot.eager_step)
        if finite:
            self._flags.append((start, False, torch.stack(finite).all()))
        self._ledger.add("chunks_pytorch")

    def _compare(self, batch: Tensor, start: int) -> bool:
        """Decodes again what the program gave NaN or infinity for; PyTorch's frames replace those that are worse.

        Returns:
            Whether PyTorch's values are finite everywhere.
        """
        out, slot = self._out, self._slot
        truth = Output("bf16", len(batch), out.tensor.device, tuple(batch.shape[1:]))
        slot.eager_step = decode_in_memory(self._eager, batch, truth.write, slot.eager_step)
        worse = truth.tensor.isfinite()
        finite = bool(worse.all())
        if out.tensor.is_floating_point():
            worse &= ~out.tensor[start : start + len(batch)].isfinite()
        else:  # bytes do not show what was not finite, so the program runs once more
            again = Output("bf16", len(batch), worse.device, tuple(batch.shape[1:]))
            with contextlib.suppress(Exception):  # it was switched off meanwhile, or fails: PyTorch's frames stand
                floating = batch if batch.is_floating_point() else batch.float()
                slot.run(floating, lambda frames: again.write(0, frames), False)
                worse &= ~again.tensor.isfinite()
        places = int(worse.sum())
        if places:
            out.write(start, truth.tensor)
            self._ledger.add("fallbacks")
            failure = non_finite_failure(self._slot, places)
            count_failure(self._slot, self._ledger, failure, "non-finite", strict=self._strict)
        return finite
