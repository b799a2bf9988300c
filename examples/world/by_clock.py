"""Trains the world model of the game in one call of 21 minutes on one GPU, and measures how long it holds.

Whatever the speed of the machine, the call ends in `--seconds`: rendering and encoding episodes, training whose levels,
rates and own history follow the share of its time that has passed, and the measures. A process of its own goes on to
render new worlds while the model trains, on a second GPU if there is one (`rendering.py`). Weights are written every
minute, so that a run that is killed leaves some; `--init` continues from those, or from any others, in new worlds.

Usage:
    python examples/world/by_clock.py --out build/world
    python examples/world/by_clock.py --out build/on --init build/world/world.safetensors --config build/world/world.yml
    python examples/world/by_clock.py --small --seconds 120 --out build/world-small      # a toy, for a CPU

Writes to --out: world.safetensors (averaged weights, 8 bits each), world.yml, whitener.safetensors, log.jsonl,
rendering.log, metrics.json, sheet.webp.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from clock_trainer import CONTINUED, ClockTrainer, Plan, export
from holding import Player, Truth, measure
from own_history import playing
from quick import Coder, Forms, quicker_forms
from rendering import Order, Renderer
from stages import sampler_of, smaller
from survival import FPS
from torch import Tensor, nn
from train import FIRST_SEED, SIZE, WORLDS_PER_CALL, collect, make_codec, save_report, say, whiten

from owl_wms.configs.world import WorldConfig, load_world_config, with_files_found
from owl_wms.media.pictures import contact_sheet, to_bytes
from owl_wms.models import GameRFT
from owl_wms.models.latents import LatentSpace
from owl_wms.models.load import load_model
from owl_wms.vae.eight_bits import packed, unpacked

HERE = Path(__file__).resolve().parent
DATA_SHARE, MEASURE_SHARE = 0.1, 0.14  # of the time; the rest is training
ROUND = {False: (128, 144), True: (6, 36)}  # worlds and frames of each; True is the toy
MEASURED = {False: 600, True: 30}  # frames
SHARED = 0.25  # of the time in which new worlds are rendered on the GPU that trains
PLACES = 6_144  # episodes in memory, 14.5 GB; new ones take the places of the oldest
SHEET_SECONDS = (0, 1, 5, 15, 30)
SHEET_BYTES = 50_000


def write_configuration(cfg: WorldConfig, out: Path) -> None:
    """world.yml beside the weights, with paths as it needs them there."""
    plain = {name: getattr(cfg, name).model_dump(mode="json", exclude_unset=True) for name in ("model", "train")}
    plain["train"] |= {"latent_transform": "whitener.safetensors"}
    plain["train"].pop("init_ckpt", None)
    (out / "world.yml").write_text(yaml.safe_dump(plain, sort_keys=False))


def write_sheet(truth: Truth, frames: Tensor, path: Path) -> None:
    """The game and the model at 0, 1, 5, 15 and 30 s: one world at rest, one that turns, one that walks."""
    last = truth.shown[-1]
    steps = [min(s * FPS, last) for s in SHEET_SECONDS] if last >= 600 else [0, 1, last // 2, last]
    at = truth.at([max(truth.shown[0], min(truth.shown, key=lambda k: abs(k - s))) for s in steps])
    rows = {}
    for index, kind in enumerate(("at rest", "turning", "walking")):
        world = index * truth.worlds
        rows[f"{kind}: the game"] = to_bytes(truth.drawn[world, at, :3].float())
        rows[f"{kind}: the model"] = to_bytes(frames[world, at, :3].float())
    sheet = contact_sheet(rows, times=[f"{s / FPS:g} s" for s in steps], width=224)
    for quality in (88, 80, 70, 55, 40, 25):
        sheet.save(path, quality=quality, method=6)
        if path.stat().st_size <= SHEET_BYTES:
            return


def begun_from(cfg: WorldConfig, weights: Path, out: Path) -> WorldConfig:
    """The configuration of a run that begins with these weights and keeps their transform of latents."""
    transform, kept = Path(cfg.train.latent_transform or ""), out / "whitener.safetensors"
    if not kept.exists():
        shutil.copyfile(transform, kept)
    return cfg.model_copy(update={"train": cfg.train.model_copy(update={"init_ckpt": str(weights)})})


def shipped(device: torch.device) -> Player:
    """The model that is in this folder, played as it is configured."""
    path = HERE / "game_rft.yml"
    cfg = with_files_found(load_world_config(path), path)
    model = load_model(path, HERE / "game_rft.safetensors")
    return Player(playing(model.core.to(device), device), LatentSpace.of(cfg.train).to(device), sampler_of(cfg))


def eight_bits(trainer: ClockTrainer) -> nn.Module:
    """The averaged core as it is read from a file with 8 bits per weight."""
    model = GameRFT(trainer.model_cfg)
    model.load_state_dict(unpacked(packed(trainer.ema.model.state_dict()), "8 bits"))
    return playing(model.core.to(trainer.device), trainer.device)


def judge(
    trainer: ClockTrainer,
    cfg: WorldConfig,
    codec: tuple[Coder, Coder],
    args: argparse.Namespace,
    report: dict[str, Any],
    until: float,
    truth: Truth | None,
) -> None:
    """Measure the new weights as they are stored, with 1 to 8 steps, and the shipped ones; what does not fit into the
    time is left out. `truth`: the held-out worlds, if they have been played."""
    encode, decode = codec
    device = trainer.device
    size, frames = SIZE[args.small], MEASURED[args.small]
    begun = time.monotonic()
    if truth is None:
        truth = Truth.play(worlds=args.worlds, frames=frames, encode=encode, decode=decode, device=device, size=size)
    report["worlds"], report["frames"] = 3 * truth.worlds, frames
    report["game_decoded"], report["game_under_other_commands"] = truth.ceiling.values()
    save_report(report, args.out)
    say(f"played {3 * truth.worlds} held-out worlds for {frames / FPS:g} s in {time.monotonic() - begun:.1f} s")
    sampler = sampler_of(cfg) | {"max_window": trainer.window}
    core = eight_bits(trainer)
    as_played = f"{sampler['n_steps']} steps"

    def played(seed: int = 11, **change: Any) -> Callable[[], Player]:
        return lambda: Player(core, trainer.space, sampler | change, seed)

    players = {as_played: played()}  # the most wanted first, as time may end
    if not args.small:
        players["shipped before"] = lambda: shipped(device)
    players |= {f"{as_played}, seed {seed}": played(seed) for seed in (12, 13)}
    others = [steps for steps in (5, 4, 8, 3, 2, 1) if steps != sampler["n_steps"]]
    players |= {f"{steps} steps": played(n_steps=steps) for steps in others}
    players["other order"] = played(order=3 - sampler.get("order", 1))
    levels = [level for level in (0.1, 0.15, 0.2, 0.25) if level != sampler["noise_prev"]]
    players |= {f"history at {level}": played(noise_prev=level) for level in levels}
    longest = 0.0
    for name, make in players.items():
        begun = time.monotonic()
        if begun + longest > until:
            say(f"no time left for: {name}")
            continue
        try:
            report[name], seen = measure(make(), truth, decode)
        except Exception as error:  # one row is lost, not the others
            say(f"{name}: {type(error).__name__}: {error}")
            continue
        longest = max(longest, time.monotonic() - begun)
        rows = [row for key, row in report.items() if key.startswith(as_played)]
        report["survival_over_seeds"] = {
            form: [row[form]["median_seconds"] for row in rows] for form in ("survival", "survival_by_path")
        }
        save_report(report, args.out)
        say(f"{name} ({time.monotonic() - begun:.1f} s): {json.dumps(report[name])}")
        if "seed" not in name:
            write_sheet(truth, seen, args.out / ("sheet.webp" if name == as_played else f"sheet, {name}.webp"))


def order_of(args: argparse.Namespace, device: torch.device) -> Order | None:
    """Returns what the process makes that renders while the model trains, if it is wanted."""
    where = args.data_device
    if where is None and device.type == "cuda":
        where = "cuda:1" if torch.cuda.device_count() > 1 else "cuda:0"
    if where in (None, "none"):
        return None
    alone = where == "cpu" or torch.device(where).index not in (None, device.index or 0)
    players, frames = ROUND[args.small]
    height, width = SIZE[args.small]
    return Order(
        config=str(args.config.resolve()),
        device=where,
        share=1.0 if alone else SHARED,
        players=args.round_players or players,
        frames=frames,
        first_seed=first_seed(args) + WORLDS_PER_CALL // 2,
        height=height,
        width=width,
        # In a quarter of a GPU run 5 had not played them after 330 s, and meanwhile no new worlds came.
        truth_worlds=args.worlds if alone else 0,
        truth_frames=MEASURED[args.small],
    )


def first_seed(args: argparse.Namespace) -> int:
    """Seed of the first world of this run; half of a run's seeds are its process's that renders."""
    run = args.run if args.run is not None else int(args.init is not None)
    return FIRST_SEED + run * WORLDS_PER_CALL


def run(
    args: argparse.Namespace,
    cfg: WorldConfig,
    codec: tuple[Coder, Coder],
    forms: Forms,
    renderer: Renderer | None,
    device: torch.device,
    started: float,
) -> None:
    """Make the first episodes, train while the renderer makes more, measure."""
    alone = renderer is not None and renderer.share == 1
    # One round is enough where others follow. Making the forms took its part of the time, at most half of it.
    share = DATA_SHARE * args.seconds
    seconds = 0.0 if alone else max(share / 2, share - (time.monotonic() - started))
    with torch.no_grad():
        data = collect(seconds, *ROUND[args.small], first_seed(args), forms, device, SIZE[args.small], PLACES)
    cfg = whiten(args.out, data, cfg)
    write_configuration(cfg, args.out)
    if renderer is not None:
        renderer.data = data = data.with_room(64 if args.small else PLACES)
    trainer = ClockTrainer(cfg, data, args.out, say, fresh=renderer)
    report: dict[str, Any] = {
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "first_seed": first_seed(args),
        "gpu": torch.cuda.get_device_name() if device.type == "cuda" else "none",
        "seconds_of_data": round(time.monotonic() - started, 1),
    }
    say(f"{len(data)} worlds to begin with; {report['parameters']} parameters")
    if device.type == "cuda":
        report["attention"] = trainer.compile_blocks()
    until = started + (1 - MEASURE_SHARE) * args.seconds
    begun = time.monotonic()
    plan = Plan() if args.init is None else CONTINUED
    trainer.run(replace(plan, warm_up=20, renew_seconds=2.0, clips=6, own_frames=24) if args.small else plan, until)
    worlds = len(data) if data.added is None else data.added
    report |= {
        "training_frames": worlds * data.mouse.shape[1],
        "training_worlds": worlds,
        "rounds_of_new_worlds": 0 if renderer is None else renderer.rounds,
        "steps": trainer.step,
        "seconds_of_training": round(time.monotonic() - begun, 1),
        "recovered": trainer.recovered,
        "renewals": len(trainer.renewals),
        "seconds_of_renewals": round(sum(trainer.renewals), 1),
    }
    export(trainer.ema.model, args.out)
    save_report(report, args.out)
    say(f"{worlds} worlds, {report['training_frames']} frames; {trainer.step} steps")
    truth = None
    if renderer is not None:
        renderer.stop()
        truth = renderer.truth(device)
    judge(trainer, cfg, codec, args, report, started + args.seconds - 4, truth)
    say("done")


def main() -> None:
    """Parse arguments, start the renderer, and run."""
    started = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1260, help="from the start to the last file")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--config", type=Path, default=HERE / "world_11m.yml")
    parser.add_argument("--init", type=Path, help="weights to begin with; --config is theirs")
    parser.add_argument("--small", action="store_true", help="a toy run for a CPU")
    parser.add_argument("--run", type=int, help="number of the run, for worlds of its own; default 0, or 1 with --init")
    parser.add_argument(
        "--data-device",
        help="where new worlds are rendered during the training: cuda:1, cpu, none; default: a second GPU if there is "
        "one, else the same GPU in a quarter of the time",
    )
    parser.add_argument("--round-players", type=int, help="worlds in each round that is rendered during the training")
    parser.add_argument("--worlds", type=int, default=12, help="held-out worlds of each kind to measure in")
    args = parser.parse_args()
    if args.init is not None and not args.init.is_file():
        parser.error(f"--init {args.init}: no such file")
    args.worlds = 1 if args.small else args.worlds
    args.out.mkdir(parents=True, exist_ok=True)
    cfg = with_files_found(load_world_config(args.config), args.config)
    if args.init is not None:
        if cfg.train.latent_transform is None:
            parser.error(f"--config {args.config} names no transform of latents, so it is not that of --init")
        cfg = begun_from(cfg, args.init, args.out)
    cfg = smaller(cfg) if args.small else cfg
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = True
    codec, order = make_codec(cfg, device), order_of(args, device)
    forms = Forms(encode=codec[0])
    if device.type == "cuda" and (order is None or order.share < 1):  # else one round is made here, and compiled there
        seed, players = first_seed(args), ROUND[args.small][0]
        forms = quicker_forms(codec[0], players=players, seed=seed, size=SIZE[args.small], device=device, say=say)
    renderer = None if order is None else Renderer(order, say)  # now, as it finds there what has been compiled
    try:
        run(args, cfg, codec, forms, renderer, device, started)
    finally:
        if renderer is not None:
            renderer.close(args.out / "rendering.log")


if __name__ == "__main__":
    main()
