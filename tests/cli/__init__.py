"""Tests of owl_wms.cli."""
