"""Train the small world model of the game by the clock, and measure whether it obeys its controls.

Episodes are rendered and encoded on the device, kept in memory, and given to the `rft` trainer. 38 % of
`--seconds` make data, the rest trains; measuring comes on top (about half a minute on an H200). The learning rate
follows the share of the time that has passed.

Usage:
    python examples/world/train.py --seconds 150 --out build/world
    python examples/world/train.py --small --seconds 40 --out build/world-small     # a toy, for a CPU
    python examples/world/train.py --measure examples/world/game_rft.safetensors --out build/world     # no training

Writes to --out: game_rft.safetensors (averaged weights, bfloat16), log.jsonl, metrics.json, sheet.png.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from control import Bench, Clips, Settings
from episodes import Episodes, MemoryLoader, record
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from owl_wms.configs.world import WorldConfig, load_world_config, with_files_found
from owl_wms.media.pictures import contact_sheet, to_bytes
from owl_wms.models import GameRFT
from owl_wms.trainers.objectives.rft import RFTTrainer
from owl_wms.vae import fold_weight_norm, load_decoder, load_encoder

HERE = Path(__file__).resolve().parent
FIRST_SEED = 10_000_000
DATA_SHARE = 0.38
WARM_UP_STEPS = 100
COOL_DOWN_FROM = 0.55  # share of the training time after which the learning rate falls to zero
LOG_EVERY = 20


class TimedTrainer(RFTTrainer):
    """The `rft` trainer with a learning rate by the clock, which starts after the first steps: those compile."""

    seconds = 0.0
    _since: float | None = None

    def train_step(self) -> dict[str, float]:
        groups = self.phases[0].optimiser.param_groups
        for group in groups:
            group["lr"] = group.setdefault("base_lr", group["lr"]) if self.step == 0 else group["base_lr"] * self.rate()
        values = super().train_step()
        if self.step == 3:
            self._since = time.monotonic()
        if self._since is not None and time.monotonic() - self._since > self.seconds:
            self._stop = True
        return {**values, "rate": self.rate()}

    def rate(self) -> float:
        """Factor on the learning rates: up over the first steps, down to zero at the end."""
        share = 0.0 if self._since is None else min(1.0, (time.monotonic() - self._since) / self.seconds)
        return min(1.0, (self.step + 1) / WARM_UP_STEPS, max(0.0, (1 - share) / (1 - COOL_DOWN_FROM)))

    def evaluate(self, journal: Any) -> None:
        """Left to `control.measure`, once, at the end."""


def make_codec(cfg: WorldConfig, device: torch.device) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """The demo autoencoder's halves in the device's working precision, frames <-> latents."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    paths = (None, cfg.train.vae_cfg_path, cfg.train.vae_ckpt_path)
    encoder, decoder = (
        fold_weight_norm(load(*paths)).to(device, dtype).eval() for load in (load_encoder, load_decoder)
    )
    return (lambda x: encoder(x.to(dtype))), (lambda z: decoder(z.to(dtype)))


def collect(
    seconds: float,
    players: int,
    frames: int,
    encode: Callable[[Tensor], Tensor],
    device: torch.device,
    size: tuple[int, int],
) -> Episodes:
    """Rounds of episodes until the next one would not fit into the time; at least one."""
    started, parts, longest = time.monotonic(), [], 0.0
    while not parts or time.monotonic() - started + longest < seconds:
        begun = time.monotonic()
        seed = FIRST_SEED + len(parts) * players
        parts.append(record(players=players, frames=frames, first_seed=seed, encode=encode, device=device, size=size))
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
    contact_sheet(rows, times=[f"+{k / 20:.2f} s" for k in shown], width=208).save(path)


def say(text: str) -> None:
    """One line of progress with the time since the start."""
    print(f"[{time.monotonic() - STARTED:6.1f} s] {text}", flush=True)


def smaller(cfg: WorldConfig) -> WorldConfig:
    """A toy of the same shape for a CPU."""
    model = cfg.model.model_copy(
        update={"n_layers": 2, "d_model": 64, "n_heads": 2, "n_frames": 24, "control_hidden": 32}
    )
    train = cfg.train.model_copy(update={"batch_size": 4, "target_batch_size": 4})
    return cfg.model_copy(update={"model": model, "train": train})


def main() -> None:
    """Parse arguments, make data, train, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=150, help="time for data and training")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--config", type=Path, default=HERE / "game_rft.yml")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="a toy run for a CPU, measured on 4 worlds and 16 frames")
    parser.add_argument("--measure", type=Path, help="measure these weights instead of training")
    parser.add_argument("--players", type=int, default=48, help="held-out worlds to measure in; even")
    parser.add_argument("--frames", type=int, default=60, help="frames to generate in each")
    parser.add_argument("--variants", type=int, default=3, help="how many sampler settings to measure")
    args = parser.parse_args()
    if args.measure is not None and not args.measure.is_file():
        parser.error(f"--measure {args.measure}: no such file")
    if args.small:
        args.players, args.frames = 4, 16
    args.out.mkdir(parents=True, exist_ok=True)
    cfg = with_files_found(load_world_config(args.config), args.config)
    cfg = smaller(cfg) if args.small else cfg
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = True
    players, frames, window = (6, 10, 6) if args.small else (256, 48, 24)
    size = (45, 80) if args.small else (360, 640)
    encode, decode = make_codec(cfg, device)
    if args.measure is not None:
        measure_shipped(args.measure, cfg, encode, decode, device, args)
        return
    with torch.no_grad():
        data = collect(DATA_SHARE * args.seconds, players, frames, encode, device, size)
    std = (data.latents[:64].float() / cfg.train.vae_scale).std().item()
    say(f"{data.mouse.shape[0]} episodes of {frames} frames; latents have std {std:.3f} after scaling")

    with tempfile.TemporaryDirectory() as folder:
        train_cfg = cfg.train.model_copy(
            update={"checkpoint_dir": folder, "save_interval": 10**9, "seed": args.seed, "max_steps": 10**9}
        )
        loader = MemoryLoader(data, window, train_cfg.batch_size, args.seed)
        trainer = TimedTrainer(train_cfg, None, cfg.model, loader=loader, sample_loader=loader)
        trainer.seconds = (1 - DATA_SHARE) * args.seconds
        if device.type == "cuda":
            torch._dynamo.config.suppress_errors = True  # a block that cannot be compiled runs as it is
            for block in trainer.model.core.transformer.blocks:
                block.compile()
        begun = time.monotonic()
        trainer.train()
        log = (Path(folder) / "log.jsonl").read_text().splitlines()
    (args.out / "log.jsonl").write_text("\n".join(log[::LOG_EVERY] + log[-1:]) + "\n")
    weights = trainer.ema.model.state_dict()
    save_file({k: v.bfloat16().contiguous().cpu() for k, v in weights.items()}, args.out / "game_rft.safetensors")
    tail = trainer.losses[-min(50, len(trainer.losses)) :]
    report: dict[str, Any] = {
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "training_frames": data.mouse.shape[0] * frames,
        "training_worlds": data.mouse.shape[0],
        "steps": trainer.step,
        "training_seconds": round(time.monotonic() - begun, 1),
        "loss_first": round(trainer.losses[0]["diffusion_loss"], 4),
        "loss_last": round(sum(v["diffusion_loss"] for v in tail) / len(tail), 4),
        "latent_std_scaled": round(std, 4),
        "gpu": torch.cuda.get_device_name() if device.type == "cuda" else "none",
    }
    save_report(report, args.out)
    say(f"trained {trainer.step} steps, loss {report['loss_first']} -> {report['loss_last']}")

    judge(trainer.ema.model.core, cfg, encode, decode, device, args, report)


def judge(
    core: nn.Module,
    cfg: WorldConfig,
    encode: Callable[[Tensor], Tensor],
    decode: Callable[[Tensor], Tensor],
    device: torch.device,
    args: argparse.Namespace,
    report: dict[str, Any],
) -> None:
    """Measure obedience under three settings of the sampler; writes metrics.json after each, and sheet.png."""
    base = {key: value for key, value in (cfg.train.sampler_kwargs or {}).items() if key != "num_frames"}
    base["max_window"] = min(base["max_window"], cfg.model.n_frames // 4)
    settings = Settings(
        players=args.players,
        context=4 if args.small else 12,
        frames=args.frames,
        vae_scale=cfg.train.vae_scale,
        size=(45, 80) if args.small else (360, 640),
    )
    bench = Bench(decode, encode, device, settings)
    report["control"] = bench.report
    say(f"the game itself: {json.dumps(bench.report['real'])}")
    variants = {"guided": {}, "plain": {"cfg_scale": 1.0}, "cleaner_history": {"noise_prev": 0.05}}
    for name, change in list(variants.items())[: args.variants]:
        bench.report[name], clips = bench.roll(core, {**base, **change})
        save_report(report, args.out)
        say(f"{name}: {json.dumps(bench.report[name])}")
        if name == "guided":
            write_sheet(clips, args.out / "sheet.png")


def measure_shipped(
    weights: Path,
    cfg: WorldConfig,
    encode: Callable[[Tensor], Tensor],
    decode: Callable[[Tensor], Tensor],
    device: torch.device,
    args: argparse.Namespace,
) -> None:
    """Measure stored weights; what metrics.json in --out says about training is kept."""
    model = GameRFT(cfg.model)
    model.load_state_dict(load_file(weights))
    known = args.out / "metrics.json"
    report = json.loads(known.read_text()) if known.exists() else {}
    judge(model.float().to(device).eval().core, cfg, encode, decode, device, args, report)


def save_report(report: dict[str, Any], out: Path) -> None:
    """Write metrics.json; called after each part, so that an interrupted run leaves what it has."""
    (out / "metrics.json").write_text(json.dumps(report, indent=2) + "\n")


STARTED = time.monotonic()

if __name__ == "__main__":
    main()
