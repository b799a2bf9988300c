"""Tests of owl_wms.trt.rewrites."""
