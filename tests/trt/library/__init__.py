"""Tests of owl_wms.trt.library."""
