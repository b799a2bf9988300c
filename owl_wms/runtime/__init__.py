"""Decodes latents by a program from the cache, by one that is built now, or by PyTorch, and says which one and why.

If anything fails in the compiled path, PyTorch decodes, one warning says so, and a counter goes up; with `strict` the
failure is raised instead. Importing this package touches neither CUDA nor TensorRT.

Usage:
    decode = VideoDecode(decoder, batch_size=8, settings=TensorRTConfig.resolve())
    frames = decode(latents)            # [b, n, c, h, w] -> [b, n, C, H, W] bf16
    decode.stats().reason               # "cached program dcae_0123456789abcdef"
"""

from owl_wms.runtime.audio import AudioDecode
from owl_wms.runtime.canary import UNATTENDED
from owl_wms.runtime.clips import ClipDecode, clip_decoder, decode_pieces, stream_bytes
from owl_wms.runtime.decode import VideoDecode
from owl_wms.runtime.programs import Stored, Toolchain
from owl_wms.runtime.stats import DecodeStats
from owl_wms.runtime.stream import Latents, decode_stream
from owl_wms.runtime.streaming import StreamDecode
from owl_wms.runtime.toolchain import Jit, TensorRT

__all__ = [
    "AudioDecode",
    "ClipDecode",
    "DecodeStats",
    "Jit",
    "Latents",
    "Stored",
    "StreamDecode",
    "TensorRT",
    "Toolchain",
    "UNATTENDED",
    "VideoDecode",
    "clip_decoder",
    "decode_pieces",
    "decode_stream",
    "stream_bytes",
]
