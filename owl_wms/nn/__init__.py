"""Building blocks of the world model: embeddings, rotary positions, masks, attention, the key/value cache, the
transformer.

Nothing here knows of decoders, data or training. Shapes use b batch, n frames, t tokens a frame, d width, e head width.
"""
