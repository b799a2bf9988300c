"""Tests of owl_wms.trt.graph."""
