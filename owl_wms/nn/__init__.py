"""Building blocks of the world model: embeddings, rotary positions, masks, attention, the key/value cache, the
transformer.

Nothing here knows of decoders, data or training. Shapes: b batch, n frames, t tokens per frame, d width, e head width.
"""
