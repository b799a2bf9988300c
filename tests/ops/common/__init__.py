"""Tests of what ops share."""
