"""Tests of owl_wms.ops."""
