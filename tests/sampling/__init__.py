"""Tests of owl_wms.sampling."""
