"""Checks that a world model still does what it should, on tiny models: python -m pytest sanity/ -v."""
