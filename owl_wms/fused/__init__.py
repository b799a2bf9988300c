"""Decoders on our ops: they run by themselves, under a CUDA graph, or inside a compiled program, without TensorRT."""
