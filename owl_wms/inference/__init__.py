"""Playing: a model with its decoder, driven frame by frame, and the server that shows it in a browser.

Usage:
    model, decoder = owl_wms.from_pretrained("config.yml", "model.pt", return_decoder=True)
    decode = make_batched_decode_fn(decoder, 1)
    pipeline = InteractivePipeline(model.core.eval(), decode, [context], image_scale=0.63)
    frame = pipeline(mouse, buttons)       # Frame: uint8 picture and timings

`owl_wms.inference.build.build_pipeline` makes such a pipeline, with a beginning, from a configuration and weights.
"""
