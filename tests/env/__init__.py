"""Tests of owl_wms/env."""
