"""Tests of owl_wms.nn."""
