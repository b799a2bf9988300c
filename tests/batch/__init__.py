"""Tests of `owl_wms.batch`."""
