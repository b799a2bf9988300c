"""Losses: one module per trainer id."""
