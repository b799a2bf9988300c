"""Bounds that several commands share, apart from `_shared` since reading a command's options must not import torch."""

MOST_FRAMES = 1 << 16
"""Frames at once: more than any GPU holds, and far from what torch's integers cannot take."""
