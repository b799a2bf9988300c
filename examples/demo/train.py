"""Train the demo autoencoder on the repository's own game, by the clock, and measure what came out.

Why by the clock: the learning rate follows the share of `--seconds` that has passed, so a run ends well on any GPU.
Weights are saved whenever the held-out score is taken, so that an interrupted run leaves something usable.

Usage (an H200 needs about five minutes all told; --small is a one-minute check for a CPU):
    python examples/demo/train.py --seconds 250 --out build/demo
    python examples/demo/train.py --small --seconds 40 --out build/demo-small

Writes to --out: demo_vae.safetensors, latent_stats.json, train_log.jsonl, metrics.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
import traceback
from pathlib import Path

import torch
from evaluate import evaluate, save
from fast_net import FastAutoencoder, initialise
from frames import FramePool, held_out_frames
from muon import Muon
from torch import Tensor, nn

from owl_wms.configs import load_vae_config
from owl_wms.media.metrics import psnr
from owl_wms.vae import build_autoencoder, fold_weight_norm

HERE = Path(__file__).resolve().parent
FIRST_TRAINING_SEED = 1_000_000  # held-out seeds lie below
LATENT_NOISE = 0.03
LATENT_PENALTY = 1e-4


def loss_of(net: FastAutoencoder, frames: Tensor, device_type: str) -> Tensor:
    """Loss of frames [B, 4, H, W]: L1 and L2 of colour and (a quarter) depth, edges, and the latents' size."""
    with torch.autocast(device_type, torch.bfloat16, enabled=device_type == "cuda"):
        z = net.encode(frames)
        decoded = net.decode(z + LATENT_NOISE * torch.randn_like(z))
    error = decoded.float() - frames
    colour, depth = error[:, :3], error[:, 3]
    edges = (colour[..., 1:] - colour[..., :-1]).abs().mean() + (colour[:, :, 1:] - colour[:, :, :-1]).abs().mean()
    size = z.float().square().mean()
    pixels = 0.5 * colour.abs().mean() + 4 * colour.square().mean()
    return pixels + 0.25 * (0.5 * depth.abs().mean() + 4 * depth.square().mean()) + 0.1 * edges + LATENT_PENALTY * size


def make_optimisers(net: FastAutoencoder, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the inner convolutions; AdamW for biases and the convolutions that touch pixels or latents."""
    matrices, rest = [], []
    for name, module in net.stock.named_modules():
        if isinstance(module, nn.Conv2d):
            outer = "conv_in" in name or "conv_out" in name
            (rest if outer else matrices).append((module.weight, module.groups))
            if module.bias is not None:
                rest.append((module.bias, 1))
    fused = {"fused": True} if next(net.parameters()).is_cuda else {}
    adam = torch.optim.AdamW([p for p, _ in rest], lr=lr, betas=(0.9, 0.95), weight_decay=0.0, **fused)
    return [Muon(matrices, lr=lr), adam]


def learning_rate(share: float) -> float:
    """Factor in [0.01, 1] at a share of the time: a short warm-up, then a cosine."""
    return min(1.0, share / 0.02) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, share))))


def train(args: argparse.Namespace, log, out: Path) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = True
    config = load_vae_config(args.config).model
    if args.small:
        config = config.model_copy(update={"sample_size": (90, 160)})
    folded = fold_weight_norm(build_autoencoder(config, "tiled"))
    initialise(folded)
    folded = folded.to(device)
    started = time.monotonic()
    pool = FramePool(args.pool, FIRST_TRAINING_SEED, device, config.sample_size, players=min(512, args.pool))
    held_out = held_out_frames(min(16, args.pool), 2, device, config.sample_size)
    log(event="pool", frames=pool.rendered, seconds=round(time.monotonic() - started, 1))
    net = FastAutoencoder(folded)
    average = copy.deepcopy(folded)
    optimisers = make_optimisers(net, args.lr)
    parameters, averaged = list(folded.parameters()), list(average.parameters())

    begun, step, last_score = time.monotonic(), 0, time.monotonic()
    while (share := (time.monotonic() - begun) / args.seconds) < 1:
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = args.lr * learning_rate(share)
        loss = loss_of(net, pool.sample(args.batch), device.type)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(averaged, parameters, 1 - min(0.998, (step + 1) / (step + 10)))
        step += 1
        if step % args.refresh_every == 0:
            pool.refresh()
        if step % args.log_every == 0:
            value, elapsed = loss.item(), time.monotonic() - begun
            log(event="step", step=step, seconds=round(elapsed, 1), loss=round(value, 5))
            if not math.isfinite(value):
                with torch.no_grad():
                    torch._foreach_copy_(parameters, averaged)
                args.lr *= 0.5
                log(event="diverged", step=step, new_lr=args.lr)
            if time.monotonic() - last_score > args.seconds / 10:
                score = held_out_psnr(FastAutoencoder(average), held_out)
                log(event="score", step=step, frames_rendered=pool.rendered, held_out_psnr_db=round(score, 3))
                save(average, out / "demo_vae.safetensors")
                last_score = time.monotonic()
    save(average, out / "demo_vae.safetensors")
    log(event="trained", steps=step, batch=args.batch, seconds=round(time.monotonic() - begun, 1))


@torch.no_grad()
def held_out_psnr(net: FastAutoencoder, frames: Tensor) -> float:
    """Mean colour PSNR in dB over frames [N, 4, H, W]."""
    scores = []
    for chunk in frames.split(16):
        with torch.autocast(chunk.device.type, torch.bfloat16, enabled=chunk.is_cuda):
            decoded = net.decode(net.encode(chunk))
        scores.append(psnr(decoded[:, :3].clamp(-1, 1), chunk[:, :3]))
    return torch.cat(scores).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=250, help="time of the training loop alone")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--config", type=Path, default=HERE / "demo_vae.yml")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--pool", type=int, default=16384, help="frames kept on the device")
    parser.add_argument("--refresh-every", type=int, default=16, help="steps between refreshes of 64 frames")
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--small", action="store_true", help="90x160 frames: a check of the script, not a useful model")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    with (args.out / "train_log.jsonl").open("w") as file:

        def log(**values) -> None:
            line = json.dumps({"at": round(time.monotonic() - begun, 1), **values})
            file.write(line + "\n")
            file.flush()
            if values["event"] != "step" or values["step"] % (10 * args.log_every) == 0:
                print(line, flush=True)

        try:
            train(args, log, args.out)
        except Exception:  # the weights so far are still worth measuring
            log(event="training failed", traceback=traceback.format_exc())
        if args.small:
            return
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.cuda.empty_cache()
        evaluate(args.config, args.out, held_out_frames(64, 4, device), log)


if __name__ == "__main__":
    main()
