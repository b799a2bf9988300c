"""Tests of owl_wms/settings."""
