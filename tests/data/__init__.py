"""Tests of owl_wms.data, and golden files."""
