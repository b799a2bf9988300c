"""What every op shares: compiling with NVRTC, launching, machine code that is kept, registering, tensor maps, device code."""
