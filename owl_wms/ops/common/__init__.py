"""Code that all ops share: compiling with NVRTC, launching, stored machine code, registering, tensor maps."""
