"""The autoencoders in plain PyTorch: the reference that every faster path is compared with.

Usage:
    decoder = load_decoder(None, "configs/vae/dec_dist.yml", "dec_distill.pt")     # fp32, CPU, eval
    plain = fold_weight_norm(decoder)                                              # ordinary conv weights, same numbers
    fresh = build_decoder(load_vae_model("configs/vae/dec_dist.yml"))       # random weights
"""

from owl_wms.vae.blocks import set_gradient_checkpointing
from owl_wms.vae.build import build_autoencoder, build_decoder, build_encoder, default_variant
from owl_wms.vae.checkpoint import load_weights, read_state_dict, save_weights
from owl_wms.vae.fold import fold_weight_norm
from owl_wms.vae.layouts import select_core, select_part
from owl_wms.vae.load import load_decoder, load_encoder

__all__ = [
    "build_autoencoder",
    "build_decoder",
    "build_encoder",
    "default_variant",
    "fold_weight_norm",
    "load_decoder",
    "load_encoder",
    "load_weights",
    "read_state_dict",
    "save_weights",
    "select_core",
    "select_part",
    "set_gradient_checkpointing",
]
