"""Weights out and numbers in: saves the demo autoencoder as a stock checkpoint and measures it with the stock modules.

Usage: `evaluate(config_path, out, held_out_frames(64, 4, device), log)`; reads demo_vae.safetensors in `out`, writes
metrics.json and latent_stats.json there.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from owl_wms.media.metrics import depth_error, psnr, ssim
from owl_wms.vae import load_decoder, load_encoder


@torch.no_grad()
def save(folded: nn.Module, path: Path) -> None:
    """Write a folded autoencoder as the weight-normed checkpoint the stock modules load, in bfloat16.

    The direction is the weight itself and the gain its norm, so that `g * v / ||v||` is the weight again.
    """
    state = {}
    for name, module in folded.named_modules():
        if isinstance(module, nn.Conv2d):
            weight = module.weight.float()
            gain = weight.flatten(1).norm(dim=1)[:, None, None, None]
            state[f"{name}.parametrizations.weight.original0"] = gain
            state[f"{name}.parametrizations.weight.original1"] = weight
            if module.bias is not None:
                state[f"{name}.bias"] = module.bias
    save_file({key: value.bfloat16().contiguous().cpu() for key, value in state.items()}, path)


@torch.no_grad()
def evaluate(config_path: Path, out: Path, frames: Tensor, log) -> None:
    """Measure the saved checkpoint on frames [N, 4, H, W], in float32 and bfloat16, and describe its latents."""
    checkpoint = out / "demo_vae.safetensors"
    encoder = load_encoder(None, config_path, checkpoint).to(frames.device)
    decoder = load_decoder(None, config_path, checkpoint).to(frames.device)
    results: dict[str, object] = {"held_out_frames": len(frames), "checkpoint_bytes": checkpoint.stat().st_size}
    for dtype in (torch.float32, torch.bfloat16):
        encoder, decoder = encoder.to(dtype), decoder.to(dtype)
        rows, latents = [], []
        for chunk in frames.split(16):
            z = encoder(chunk.to(dtype))
            decoded = decoder(z).float().clamp(-1, 1)
            latents.append(z.float())
            scores = (
                psnr(decoded[:, :3], chunk[:, :3]),
                ssim(decoded[:, :3], chunk[:, :3]),
                depth_error(decoded[:, 3], chunk[:, 3]),
            )
            rows.append(torch.stack(scores, dim=1))
        table = torch.cat(rows).cpu()
        results[str(dtype).removeprefix("torch.")] = {
            "psnr_db_mean": round(table[:, 0].mean().item(), 3),
            "psnr_db_min": round(table[:, 0].min().item(), 3),
            "psnr_db_p10": round(table[:, 0].quantile(0.1).item(), 3),
            "ssim_mean": round(table[:, 1].mean().item(), 4),
            "depth_mean_abs_error": round(table[:, 2].mean().item(), 4),
        }
        if dtype is torch.float32:
            _write_latent_stats(torch.cat(latents), out / "latent_stats.json")
    (out / "metrics.json").write_text(json.dumps(results, indent=2) + "\n")
    log(event="evaluated", **results)


def _write_latent_stats(z: Tensor, path: Path) -> None:
    """`vae_scale` is upstream's convention: latents are divided by it before the world model and multiplied after."""
    stats = {
        "vae_scale": round(z.std().item(), 4),
        "mean": round(z.mean().item(), 4),
        "abs_max": round(z.abs().max().item(), 3),
        "channel_mean": [round(v, 4) for v in z.mean(dim=(0, 2, 3)).tolist()],
        "channel_std": [round(v, 4) for v in z.std(dim=(0, 2, 3)).tolist()],
    }
    path.write_text(json.dumps(stats, indent=2) + "\n")
