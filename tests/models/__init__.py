"""Tests of owl_wms.models."""
