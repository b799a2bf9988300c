"""Tests of owl_wms/runtime."""
