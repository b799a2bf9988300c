"""Tests of owl_wms.trt.check."""
