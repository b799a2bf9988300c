"""Tests of owl_wms.trt.run."""
