"""From verified bytes to a callable: loading, machine code, CUDA graph."""
