"""Where clips, latents and controls come from: the rendered game world and the loaders of stored data."""
