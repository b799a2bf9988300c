"""Makes the ways to run one step of a streaming decoder that `benchmarks.taehv` compares."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from owl_wms.fused.taehv import FusedTAEHV
from owl_wms.request import Request
from owl_wms.state import State
from owl_wms.trt.run.step_graph import GraphedStep
from owl_wms.vae import build_decoder
from owl_wms.vae.stepping import Stepping
from owl_wms.vae.taehv import MEMORY_BLOCKS, Grow, TAEHVDecoder

Step = Callable[[Tensor, State], tuple[Tensor, State]]


def one_frame_at_a_time(decoder: TAEHVDecoder) -> Step:
    """Runs the author's arrangement: a frame passes all layers before the next one of the same latent does."""
    layers = list(decoder)

    def step(latent: Tensor, state: State) -> tuple[Tensor, State]:
        memory, frames = list(state), []

        def walk(x: Tensor, first: int, block: int) -> None:
            for i in range(first, len(layers)):
                layer = layers[i]
                if isinstance(layer, MEMORY_BLOCKS):
                    x, memory[block] = layer(x, memory[block]), x
                    block += 1
                elif isinstance(layer, Grow):
                    for frame in layer(x).unflatten(0, (len(latent), -1)).unbind(1):
                        walk(frame, i + 1, block)
                    return
                else:
                    x = layer(x)
            frames.append(torch.nn.functional.pixel_shuffle(x, decoder.config.patch_size).clamp(0, 1))

        walk(latent, 0, 0)
        return torch.stack(frames, 1), tuple(memory)

    return step


def shape_of(latent: Tensor) -> tuple[int, int, int, int]:
    streams, channels, height, width = latent.shape
    return streams, channels, height, width


def tensorrt_step(decoder: TAEHVDecoder, latent: Tensor, state: State) -> Step:
    """Returns the whole step as TensorRT engines."""
    from owl_wms.trt.library import importer
    from owl_wms.trt.spec import compile_settings

    settings = compile_settings(Request(input_shape=shape_of(latent), min_block_size=1), "fp16")
    exported = torch.export.export(Stepping(decoder), (latent, *state))
    program = importer.require().compile(exported, ir="dynamo", inputs=[latent, *state], **settings)

    def step(latent: Tensor, state: State) -> tuple[Tensor, State]:
        frames, *following = program(latent, *state)
        return frames, tuple(following)

    return step


def graphed(step: Step, latent: Tensor, state: State) -> Step:
    """Returns the step as a CUDA graph that keeps the state in its buffers; on a CPU the step itself."""
    if not latent.is_cuda:
        return step

    def flat(latent: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        frames, following = step(latent, state)
        return frames, *following

    return GraphedStep(flat, latent, *state).step_in_place


def compiled(decoder: TAEHVDecoder, latent: Tensor, state: State) -> Step:
    """Returns the step under torch.compile in channels_last, compiled for states as it makes them itself."""
    on_cpu = not latent.is_cuda  # where a toy run needs no C++ compiler
    laid_out = Stepping(decoder.to(memory_format=torch.channels_last))  # type: ignore[call-overload]
    module = torch.compile(laid_out, dynamic=False, backend="eager" if on_cpu else "inductor")
    like = laid_out(latent, *state)[1:]
    orders = {like[0].stride()}

    def step(latent: Tensor, state: State) -> tuple[Tensor, State]:
        if state[0].stride() not in orders:  # the first one of a stream; for another order it would be compiled anew
            state = tuple(torch.empty_like(other).copy_(tensor) for other, tensor in zip(like, state, strict=True))
        frames, *following = module(latent, *state)
        orders.add(following[0].stride())
        return frames, tuple(following)

    return step


def in_half(decoder: TAEHVDecoder, dtype: torch.dtype) -> TAEHVDecoder:
    """Returns a copy of the decoder in `dtype`."""
    twin = build_decoder(decoder.config).to(next(decoder.parameters()).device).eval().requires_grad_(False)
    twin.load_state_dict(decoder.state_dict())
    assert isinstance(twin, TAEHVDecoder)
    return twin.to(dtype)


Makers = dict[str, Callable[[Tensor, State], Step]]
TO_BYTES = "ours, to bytes on the host"


def own(decoder: TAEHVDecoder, fused: FusedTAEHV, half: torch.dtype) -> Makers:
    """Name -> maker of a step, given an example: ours, and eager PyTorch, whose error is the measure."""
    return {
        "eager": lambda z, s: in_half(decoder, half).step,
        "ours": lambda z, s: graphed(fused.step, z, s),
        TO_BYTES: lambda z, s: to_host(graphed(fused.step_bytes, z, s)),
    }


def rivals(decoder: TAEHVDecoder, half: torch.dtype, with_tensorrt: bool) -> Makers:
    """Name -> maker of a step of everybody else, the fastest first."""
    made: Makers = {}
    if with_tensorrt:
        made["TensorRT, CUDA graph"] = lambda z, s: graphed(tensorrt_step(in_half(decoder, half), z, s), z, s)
    shared: list[Step] = []

    def compiled_once(z: Tensor, s: State) -> Step:
        if not shared:
            step = compiled(in_half(decoder, half), z, s)
            step(z, s)
            shared.append(step)
        return shared[0]

    made["torch.compile"] = compiled_once
    made["torch.compile, CUDA graph"] = lambda z, s: graphed(compiled_once(z, s), z, s)
    made["author's arrangement"] = lambda z, s: one_frame_at_a_time(in_half(decoder, half))
    return made


def to_host(step: Step) -> Step:
    """Returns the step, and its bytes copied into pinned memory of the host and waited for."""
    pinned: list[Tensor] = []

    def with_copy(latent: Tensor, state: State) -> tuple[Tensor, State]:
        frames, state = step(latent, state)
        if not frames.is_cuda:
            return frames, state
        if not pinned:
            pinned.append(torch.empty(frames.shape, dtype=frames.dtype, pin_memory=True))
        pinned[0].copy_(frames, non_blocking=True)
        torch.cuda.current_stream().synchronize()
        return pinned[0], state

    return with_copy
