"""Tests of owl_wms/utils."""
