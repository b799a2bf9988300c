"""Tests of the game world."""
