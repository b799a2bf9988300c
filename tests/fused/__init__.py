"""Tests of owl_wms.fused."""
