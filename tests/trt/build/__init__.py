"""Tests of owl_wms.trt.build."""
