"""Attacks on the cache and the runtime, kept as tests; `make faults` runs all and writes docs/faults.md."""
