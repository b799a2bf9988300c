"""The autoencoders in plain PyTorch: the reference that every faster path is compared with.

Usage:
    cfg = load_vae_config("configs/vae/dec_dist.yml").model
    decoder = build_decoder(cfg)              # fresh weights
    plain = fold_weight_norm(decoder)         # ordinary conv weights, same numbers
"""

from owl_wms.vae.build import build_autoencoder, build_decoder, build_encoder, default_variant
from owl_wms.vae.fold import fold_weight_norm

__all__ = ["build_autoencoder", "build_decoder", "build_encoder", "default_variant", "fold_weight_norm"]
