"""Measures: every figure that the project states comes out of this folder. See README.md for the method."""
