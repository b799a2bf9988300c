"""The only place that touches torch_tensorrt: import, compile, engines."""
