"""Tests of owl_wms.trainers.optim."""
