"""Clips, contact sheets and picture metrics: what turns tensors of frames into something to look at or a number."""
