"""Trains the world model of the game in stages, a piece at each call, and measures whether it obeys its controls.

A call renders and encodes new episodes for a share of `--seconds`, keeps them in memory, and trains for the rest. It
leaves everything that the next call needs in `--out`: that one continues where this one stopped, also on another
machine that was given `carry.safetensors`, `whitener.safetensors` and `state.json` alone. When all stages are done, the
next call writes the weights and measures them.

Usage:
    python examples/world/train.py --out build/world                 # again and again, until it says that all is done
    python examples/world/train.py --small --out build/world-small   # a toy, for a CPU
    python examples/world/train.py --measure examples/world/game_rft.safetensors --config examples/world/game_rft.yml \\
        --out build/world-measured                                   # no training

Writes to --out: world.safetensors (averaged weights, bfloat16), whitener.safetensors, log.jsonl, metrics.json,
sheet.webp. Exit status 75 while stages are left.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from control import Bench, Clips, Settings
from episodes import Episodes, MemoryLoader, record
from own_history import OwnHistoryLoader
from quick import Coder, Forms
from stages import STAGES, Progress, Stage, carry, make_trainer, sampler_of, smaller
from torch import Tensor, nn

from owl_wms.configs.world import WorldConfig, load_world_config, with_files_found
from owl_wms.media.pictures import contact_sheet, to_bytes
from owl_wms.models import GameRFT
from owl_wms.models.latents import LatentSpace, Whitener
from owl_wms.trainers.checkpoints import load_core_weights
from owl_wms.vae import fold_weight_norm, load_decoder, load_encoder

HERE = Path(__file__).resolve().parent
FIRST_SEED = 10_000_000
DATA_SHARE = 0.3
WHITENER_FRAMES = 20_000
SIZE = {False: (360, 640), True: (45, 80)}  # height and width of frames; True is the toy
WORLDS_PER_CALL = 1_000_000  # seeds between calls, so that no world comes twice


def make_codec(cfg: WorldConfig, device: torch.device) -> tuple[Coder, Coder]:
    """The demo autoencoder's halves in the device's working precision, frames <-> latents."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    paths = (None, cfg.train.vae_cfg_path, cfg.train.vae_ckpt_path)
    encoder, decoder = (
        fold_weight_norm(load(*paths)).to(device, dtype).eval() for load in (load_encoder, load_decoder)
    )
    return Coder(encoder, dtype), Coder(decoder, dtype)


def collect(
    seconds: float,
    players: int,
    frames: int,
    first_seed: int,
    forms: Forms,
    device: torch.device,
    size: tuple[int, int],
    places: int = 1_000_000,
) -> Episodes:
    """Rounds of episodes until the next one would not fit into the time or into `places` episodes; at least one."""
    parts: list[Episodes] = []
    started, longest = time.monotonic(), 0.0
    while not parts or (time.monotonic() - started + longest < seconds and (len(parts) + 1) * players <= places):
        begun = time.monotonic()
        seed = first_seed + len(parts) * players
        settings: dict[str, Any] = {"players": players, "frames": frames, "device": device, "size": size}
        parts.append(record(first_seed=seed, encode=forms.encode, draw=forms.draw, advance=forms.advance, **settings))
        if device.type == "cuda":
            torch.cuda.synchronize()
        longest = max(longest, time.monotonic() - begun)
        say(f"round {len(parts)}: {players * frames} frames in {time.monotonic() - begun:.1f} s")
    return Episodes.join(parts)


def write_sheet(clips: Clips, path: Path) -> None:
    """Real and generated frames of three held-out worlds, two turning and one walking, under the same commands."""
    shown = torch.linspace(0, clips.real.shape[1] - 1, 7).long().tolist()
    rows = {}
    last = len(clips.real) - 1
    for player in (0, 1, last):  # two turn, one walks
        rows[f"{player}: the game"] = to_bytes(clips.real[player, shown, :3])
        rows[f"{player}: the model"] = to_bytes(clips.generated[player, shown, :3])
    contact_sheet(rows, times=[f"+{k / 20:.2f} s" for k in shown], width=208).save(path, quality=90)


def say(text: str) -> None:
    """One line of progress with the time since the start."""
    print(f"[{time.monotonic() - STARTED:6.1f} s] {text}", flush=True)


def whiten(out: Path, data: Episodes, cfg: WorldConfig) -> WorldConfig:
    """The configuration with the transform of latents, which the first call fits."""
    path = out / "whitener.safetensors"
    if not path.exists():
        latents = data.latents.flatten(0, 1)
        picked = latents[torch.randperm(len(latents), device=latents.device)[:WHITENER_FRAMES]].float()
        Whitener.fit(picked / cfg.train.vae_scale, power=0.5, channels=cfg.model.channels).save(path)
        say(f"fitted the transform of latents to {len(picked)} frames")
    return cfg.model_copy(update={"train": cfg.train.model_copy(update={"latent_transform": str(path)})})


def train(out: Path, stage: Stage, state: Progress, cfg: WorldConfig, data: Episodes, seconds: float) -> None:
    """Train a stage for so long, or to its end; leaves checkpoint, weights to carry, log and state."""
    device = data.mouse.device
    window = min(24, cfg.model.n_frames // 4)
    space = LatentSpace.of(cfg.train).to(device)
    settings: dict[str, Any] = {"window": window, "batch_size": cfg.train.batch_size, "seed": state.calls}
    loader = OwnHistoryLoader(data, space, **settings) if stage.own else MemoryLoader(data, **settings)
    trainer = make_trainer(out, stage, state, cfg, loader, seconds)
    if device.type == "cuda":
        torch._dynamo.config.suppress_errors = True  # a block that cannot be compiled runs as it is
        for block in trainer.model.core.transformer.blocks:
            block.compile()
    begun = time.monotonic()
    trainer.train()
    if not trainer.losses:
        raise SystemExit("no time was left for a step: give more --seconds")
    tail = trainer.losses[-min(50, len(trainer.losses)) :]
    means = {name: sum(values[name] for values in tail) / len(tail) for name in tail[-1]}
    pace = len(trainer.losses) / (time.monotonic() - begun)
    say(f"{stage.name}: step {trainer.step} of {stage.steps}, {pace:.1f} steps/s, {json.dumps(means)}")
    carry(out, stage, state, trainer)


def main() -> None:
    """Parse arguments, make data, train a piece of a stage, or measure what is done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=530, help="time for data and training in this call")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--config", type=Path, default=HERE / "world_28m.yml")
    parser.add_argument("--small", action="store_true", help="a toy run for a CPU, measured on 4 worlds and 16 frames")
    parser.add_argument("--measure", type=Path, help="measure these weights instead of training")
    parser.add_argument("--players", type=int, default=48, help="held-out worlds to measure in; even")
    parser.add_argument("--frames", type=int, default=60, help="frames to generate in each")
    parser.add_argument("--variants", type=int, default=2, help="how many sampler settings to measure")
    args = parser.parse_args()
    if args.measure is not None and not args.measure.is_file():
        parser.error(f"--measure {args.measure}: no such file")
    if args.small:
        args.players, args.frames = 4, 16
    args.out.mkdir(parents=True, exist_ok=True)
    cfg = with_files_found(load_world_config(args.config), args.config)
    cfg = smaller(cfg) if args.small else cfg
    stages = [stage.smaller() for stage in STAGES] if args.small else STAGES
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = True
    size = SIZE[args.small]
    encode, decode = make_codec(cfg, device)
    if args.measure is not None:
        transform = args.measure.parent / "whitener.safetensors"
        if transform.exists() and cfg.model.channels != 128:
            cfg = cfg.model_copy(update={"train": cfg.train.model_copy(update={"latent_transform": str(transform)})})
        measure(args.measure, cfg, encode, decode, device, args)
        return
    state = Progress.read(args.out)
    stage = next((stage for stage in stages if stage.name not in state.done), None)
    if stage is None:
        cfg = whiten(args.out, record(players=1, frames=2, first_seed=0, encode=encode, device=device, size=size), cfg)
        measure(args.out / "world.safetensors", cfg, encode, decode, device, args)
        say("all stages are done; world.safetensors, metrics.json and sheet.webp are written")
        return
    players, frames = (6, 14) if args.small else (256, 120)
    seed = FIRST_SEED + state.calls * WORLDS_PER_CALL
    with torch.no_grad():
        data = collect(DATA_SHARE * args.seconds, players, frames, seed, Forms(encode=encode), device, size)
    cfg = whiten(args.out, data, cfg)
    spread = LatentSpace.of(cfg.train).to(device).to_model(data.latents[:64].float()).std().item()
    say(f"{len(data)} episodes of {frames} frames; latents have a spread of {spread:.3f} for the model")
    train(args.out, stage, state, cfg, data, args.seconds - (time.monotonic() - STARTED))
    left = [stage.name for stage in stages if stage.name not in state.done]
    say(f"stages left: {', '.join(left) or 'none; call once more to measure'}")
    if left:
        sys.exit(75)  # "try again" of sysexits.h: a loop in the shell calls until this is not the answer


def judge(
    core: nn.Module,
    cfg: WorldConfig,
    encode: Callable[[Tensor], Tensor],
    decode: Callable[[Tensor], Tensor],
    device: torch.device,
    args: argparse.Namespace,
    report: dict[str, Any],
) -> None:
    """Measure obedience under `--variants` settings of the sampler; writes metrics.json after each, and sheet.webp."""
    base = sampler_of(cfg)
    base["max_window"] = min(base["max_window"], cfg.model.n_frames // 4)
    settings = Settings(
        players=args.players,
        context=4 if args.small else 12,
        frames=args.frames,
        space=LatentSpace.of(cfg.train).to(device),
        size=SIZE[args.small],
    )
    bench = Bench(decode, encode, device, settings)
    report["control"] = bench.report
    say(f"the game itself: {json.dumps(bench.report['real'])}")
    variants = {"as_configured": {}, "no_guidance": {"cfg_scale": 1.0}, "cleaner_history": {"noise_prev": 0.05}}
    for name, change in list(variants.items())[: args.variants]:
        bench.report[name], clips = bench.roll(core, {**base, **change})
        save_report(report, args.out)
        say(f"{name}: {json.dumps(bench.report[name])}")
        if name == "as_configured":
            write_sheet(clips, args.out / "sheet.webp")


def measure(
    weights: Path,
    cfg: WorldConfig,
    encode: Callable[[Tensor], Tensor],
    decode: Callable[[Tensor], Tensor],
    device: torch.device,
    args: argparse.Namespace,
) -> None:
    """Measure stored weights; what metrics.json in --out says besides is kept."""
    model = GameRFT(cfg.model)
    load_core_weights(model.core, weights)
    known = args.out / "metrics.json"
    report: dict[str, Any] = json.loads(known.read_text()) if known.exists() else {}
    report["parameters"] = sum(p.numel() for p in model.parameters())
    report["gpu"] = torch.cuda.get_device_name() if device.type == "cuda" else "none"
    judge(model.float().to(device).eval().core, cfg, encode, decode, device, args, report)


def save_report(report: dict[str, Any], out: Path) -> None:
    """Write metrics.json; called after each part, so that an interrupted run leaves what it has."""
    (out / "metrics.json").write_text(json.dumps(report, indent=2) + "\n")


STARTED = time.monotonic()

if __name__ == "__main__":
    main()
