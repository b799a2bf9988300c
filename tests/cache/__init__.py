"""Tests of owl_wms.cache, file by file; the attacks on it as a whole are in tests/faults."""
