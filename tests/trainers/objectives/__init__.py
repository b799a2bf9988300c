"""Tests of owl_wms.trainers.objectives."""
