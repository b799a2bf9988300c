"""Tests, mirroring the package; run with `python -m pytest`."""
