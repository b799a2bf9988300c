"""Tests of owl_wms.inference."""
