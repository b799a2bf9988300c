"""Attacks on the cache and the runtime, kept as tests; `make faults` runs them at full counts and writes docs/faults.md."""
