"""Tests of clips, pictures and array files."""
