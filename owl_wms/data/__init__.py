"""Brings clips, latents and controls to a trainer: the rendered game, imports, tables and loaders."""
