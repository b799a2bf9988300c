"""Playing: a model with its decoder, driven frame by frame, and the server that shows it in a browser.

Usage:
    model, decoder = owl_wms.from_pretrained("config.yml", "model.pt", return_decoder=True)
    pipeline = InteractivePipeline(model.core, decoder, context=latents, image_scale=0.63)
    frame = pipeline(mouse, buttons).image
"""
