"""Measurements: every figure the project states comes out of this folder. See README.md for the method."""
