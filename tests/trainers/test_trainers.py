"""All six trainers: steps lower the loss on a fixed batch, a killed run repeats its losses, evaluation writes clips.

Run: python -m pytest tests/trainers/test_trainers.py
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from owl_wms.errors import CheckpointError, ConfigError
from owl_wms.trainers import TRAINERS, BaseTrainer, get_trainer_cls
from owl_wms.trainers.checkpoints import latest_checkpoint, load_checkpoint, save_checkpoint
from tests.trainers.helpers import FixedLoader, batch_for, config, teacher_files, training, write_table

_DISTILLED = {"causvid_vid", "sforce_vid", "ode_distill_vid"}


def build(folder: Path, trainer_id: str, **changes: object) -> BaseTrainer:
    """A trainer on a fixed batch."""
    audio = trainer_id in ("av", "mixed_av")
    if audio:
        changes = {"audio_vae_scale": 0.5, "sampler_id": "av_causal", **changes}
        changes["sampler_kwargs"] = {"n_steps": 2, "cfg_scale": 1.0, "window_length": 4, "num_frames": 2}
    cfg = config(folder, trainer_id, audio=audio)
    if trainer_id in _DISTILLED:
        changes = {"opt_kwargs": {"lr": 3.0e-4}, **changes}  # students start near their teacher
        deep = 3 if trainer_id == "ode_distill_vid" else 2
        changes = {"rollout_steps": 2, **teacher_files(folder, cfg.model, deep), **changes}
        changes |= {"student_ckpt": changes["teacher_ckpt"], "d_opt_kwargs": {"lr": 1.0e-3}, "update_ratio": 2}
        changes |= {"min_rollout_frames": 2, "regression_weight": 0.5, "cfg_scale": 1.0, "subsample": 1.0, "gen_p": 0.5}
    cfg = config(folder, trainer_id, audio=audio, **changes)
    loader = FixedLoader(batch_for(trainer_id))
    return get_trainer_cls(trainer_id)(cfg.train, cfg.wandb, cfg.model, loader=loader, sample_loader=loader)


def loss_at(trainer: BaseTrainer, phase: int) -> float:
    """The phase's loss on the fixed batch under fixed random numbers."""
    torch.manual_seed(99)
    loss, _ = trainer.phases[phase]._step(tuple(part for part in trainer.loader.batch))  # type: ignore[attr-defined]
    return float(loss.detach())


@pytest.mark.parametrize("trainer_id", ["rft", "av", "mixed_av", "ode_distill_vid"])
def test_a_step_lowers_the_loss(tmp_path: Path, trainer_id: str) -> None:
    trainer = build(tmp_path, trainer_id)
    before = loss_at(trainer, -1)
    for _ in range(4):
        values = trainer.train_step()
    assert loss_at(trainer, -1) < before
    assert all(torch.isfinite(torch.tensor(v)) for v in values.values())


@pytest.mark.parametrize("trainer_id", ["causvid_vid", "sforce_vid"])
def test_critic_learns_and_the_student_is_trained(tmp_path: Path, trainer_id: str) -> None:
    trainer = build(tmp_path, trainer_id)
    start = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    before = loss_at(trainer, 0)
    # The critic alone: the student, whose clips it models, stands still meanwhile.
    for _ in range(12):
        trainer.phases[0].update(trainer._batches, trainer.metrics, 0)
    trainer.metrics.pop()
    assert loss_at(trainer, 0) < before
    values = trainer.train_step()
    assert {"critic_loss", "dmd_loss", "g_norm"} <= set(values)
    # That it moves towards the teacher is what test_dmd.py asserts of the loss.
    assert any(not torch.equal(start[k], v) for k, v in trainer.model.state_dict().items())


def test_causvid_student_regresses_to_real_clips_when_that_is_all_it_is_told(tmp_path: Path) -> None:
    trainer = build(tmp_path, "causvid_vid", regression_weight=1000.0)
    before = loss_at(trainer, 1)
    for _ in range(8):
        trainer.train_step()
    assert loss_at(trainer, 1) < before


@pytest.mark.parametrize("trainer_id", ["rft", "causvid_vid"])
def test_a_killed_run_resumes_to_the_same_losses(tmp_path: Path, trainer_id: str) -> None:
    whole = build(tmp_path, trainer_id, max_steps=4, checkpoint_dir=str(tmp_path / "whole"))
    whole.train()
    first = build(tmp_path, trainer_id, max_steps=2, checkpoint_dir=str(tmp_path / "cut"))
    first.train()
    rest = build(tmp_path, trainer_id, max_steps=4, checkpoint_dir=str(tmp_path / "cut"), resume_ckpt="latest")
    rest.train()
    assert [*first.losses, *rest.losses] == whole.losses
    for a, b in zip(whole.ema.model.parameters(), rest.ema.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_resume_continues_the_data_where_it_was(tmp_path: Path) -> None:
    write_table(tmp_path)

    def run(steps: int, folder: str, resume: str | None) -> list[dict[str, float]]:
        cfg = config(tmp_path, "rft", max_steps=steps, checkpoint_dir=str(tmp_path / folder), resume_ckpt=resume)
        trainer = get_trainer_cls("rft")(cfg.train, None, cfg.model)
        trainer.train()
        return trainer.losses

    # 8 windows in batches of 2: the cut lies inside the second epoch.
    assert run(6, "cut", None) + run(9, "cut", "latest") == run(9, "whole", None)


def test_muon_trains_and_resumes(tmp_path: Path) -> None:
    muon = {"opt": "Muon", "opt_kwargs": {"lr": 0.02, "adamw_lr": 0.01, "adamw_keys": ["core.proj_in", "gate"]}}
    whole = build(tmp_path, "rft", max_steps=3, checkpoint_dir=str(tmp_path / "whole"), **muon)
    before = loss_at(whole, 0)
    whole.train()
    assert loss_at(whole, 0) < before
    build(tmp_path, "rft", max_steps=1, checkpoint_dir=str(tmp_path / "cut"), **muon).train()
    rest = build(tmp_path, "rft", max_steps=3, checkpoint_dir=str(tmp_path / "cut"), resume_ckpt="latest", **muon)
    rest.train()
    assert rest.losses == whole.losses[1:]


def test_checkpoint_has_upstreams_entries_and_clean_keys(tmp_path: Path) -> None:
    trainer = build(tmp_path, "rft", max_steps=1, output_path=str(tmp_path / "out.pt"))
    trainer.train()
    state = load_checkpoint(tmp_path / "run" / "step_1.pt")
    assert {"model", "ema", "opt", "steps"} <= set(state)
    assert all(key.startswith("core.") for key in state["model"])
    assert {"initted", "step"} <= set(state["ema"])
    assert {k.removeprefix("ema_model.") for k in state["ema"]} - {"initted", "step"} == set(state["model"])
    assert set(load_checkpoint(tmp_path / "out.pt")) == set(state["model"])
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert lines[0]["step"] == 1
    assert lines[0]["diffusion_loss"] > 0


def test_upstreams_compiled_and_parallel_prefixes_resume(tmp_path: Path) -> None:
    trainer = build(tmp_path, "rft", max_steps=1)
    trainer.train()
    state = load_checkpoint(tmp_path / "run" / "step_1.pt")
    state["model"] = {f"_orig_mod.module.{k}": v for k, v in state["model"].items()}
    state["ema"] = {k.replace("ema_model.", "ema_model._orig_mod.module."): v for k, v in state["ema"].items()}
    del state["data"]
    save_checkpoint(tmp_path / "theirs.pt", state)
    resumed = build(tmp_path, "rft", resume_ckpt=str(tmp_path / "theirs.pt"))
    resumed.resume()
    assert resumed.step == 1
    assert all(torch.equal(v, trainer.model.state_dict()[k]) for k, v in resumed.model.state_dict().items())


def test_a_torn_checkpoint_is_refused(tmp_path: Path) -> None:
    trainer = build(tmp_path, "rft", max_steps=1)
    trainer.train()
    path = latest_checkpoint(tmp_path / "run")
    assert path is not None
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="cannot read"):
        build(tmp_path, "rft", resume_ckpt=str(path)).resume()


def test_a_failing_write_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "step_1.pt"
    save_checkpoint(path, {"steps": 1})
    with pytest.raises(Exception, match=r"pickle|local object"):  # the latter are the words of Python 3.13
        save_checkpoint(path, {"steps": 2, "bad": lambda: None})
    assert load_checkpoint(path) == {"steps": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["step_1.pt"]


def test_drafts_of_killed_processes_go_with_a_later_save(tmp_path: Path) -> None:
    dead, living = tmp_path / ".step_3.pt.77.tmp", tmp_path / ".step_4.pt.78.tmp"
    for draft in (dead, living):
        draft.write_bytes(b"half")
    two_hours_ago = dead.stat().st_mtime - 7200
    os.utime(dead, (two_hours_ago, two_hours_ago))
    save_checkpoint(tmp_path / "step_5.pt", {"steps": 5})
    assert sorted(path.name for path in tmp_path.iterdir()) == [living.name, "step_5.pt"]


def test_sigterm_ends_the_run_with_a_checkpoint(tmp_path: Path) -> None:
    trainer = build(tmp_path, "rft")
    done = trainer.train_step

    def step() -> dict[str, float]:
        if trainer.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return done()

    trainer.train_step = step  # type: ignore[method-assign]
    before = signal.getsignal(signal.SIGTERM)
    trainer.train()
    assert signal.getsignal(signal.SIGTERM) is before
    assert latest_checkpoint(tmp_path / "run") == tmp_path / "run" / f"step_{trainer.step}.pt"
    assert trainer.step == 3


@pytest.mark.parametrize("trainer_id", sorted(TRAINERS))
def test_evaluation_keeps_latents_and_leaves_training_alone(tmp_path: Path, trainer_id: str) -> None:
    watched = build(tmp_path, trainer_id, max_steps=2, sample_interval=1, eval_sample_dir=str(tmp_path / "eval"))
    watched.train()
    assert torch.load(tmp_path / "eval" / "vid.1.pt", weights_only=True).isfinite().all()
    assert (tmp_path / "eval" / "aud.1.pt").exists() == (trainer_id in ("av", "mixed_av"))
    plain = build(tmp_path, trainer_id, max_steps=2, checkpoint_dir=str(tmp_path / "plain"))
    plain.train()
    assert plain.losses == watched.losses


def test_evaluation_takes_every_sampler_of_a_model_without_sound(tmp_path: Path) -> None:
    sampler = {"n_steps": 2, "cfg_scale": 1.0, "window_length": 4, "num_frames": 2}
    changes = {"sampler_id": "av_window", "sampler_kwargs": sampler, "eval_sample_dir": str(tmp_path / "eval")}
    build(tmp_path, "rft", max_steps=1, sample_interval=1, **changes).train()
    assert torch.load(tmp_path / "eval" / "vid.1.pt", weights_only=True).isfinite().all()


def test_evaluation_writes_decoded_clips(tmp_path: Path) -> None:
    from owl_wms.configs import load_vae_config
    from owl_wms.vae import build_decoder

    vae = {
        "model_id": "dcae",
        "sample_size": [8, 8],
        "channels": 3,
        "latent_size": 2,
        "latent_channels": 4,
        "ch_0": 8,
        "ch_max": 16,
        "encoder_blocks_per_stage": [1, 1],
        "decoder_blocks_per_stage": [1, 1],
        "use_middle_block": False,
    }
    cfg_path, ckpt = tmp_path / "vae.yml", tmp_path / "vae.pt"
    cfg_path.write_text(yaml.safe_dump({"model": vae}))
    torch.save(build_decoder(load_vae_config(cfg_path).model).state_dict(), ckpt)
    trainer = build(
        tmp_path, "rft", max_steps=1, sample_interval=1, vae_cfg_path=str(cfg_path), vae_ckpt_path=str(ckpt)
    )
    trainer.train()
    clips = sorted((tmp_path / "run" / "samples").iterdir())
    assert [clip.stem for clip in clips] == ["step_0_0", "step_0_1", "step_1_0", "step_1_1"]
    av = pytest.importorskip("av")
    with av.open(str(clips[0])) as video:
        assert len(list(video.decode(video=0))) == 8  # six frames of context, two generated


def test_evaluation_clips_of_a_streaming_decoder_have_its_rate(tmp_path: Path) -> None:
    """Eight latents at 15 per second: 4 * 8 - 3 frames at 60 per second."""
    from owl_wms.configs import TAEHVConfig
    from owl_wms.vae import build_decoder

    decoder = build_decoder(TAEHVConfig(model_id="taehv", latent_channels=4))
    torch.save({f"decoder.{key}": value for key, value in decoder.state_dict().items()}, tmp_path / "tae.pth")
    trainer = build(tmp_path, "rft", max_steps=1, fps=15, vae_id="taehv", vae_ckpt_path=str(tmp_path / "tae.pth"))
    trainer.evaluator.prepare()
    result = trainer.evaluator.run()
    assert result.decoded_by.startswith("pytorch: ")
    av = pytest.importorskip("av")
    with av.open(str(result.paths[0])) as video:
        assert video.streams.video[0].average_rate == 60
        assert len(list(video.decode(video=0))) == 29


def test_unknown_names_list_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="causvid_vid"):
        get_trainer_cls("causvid")
    with pytest.raises(ConfigError, match="unknown optimiser"):
        build(tmp_path, "rft", opt="AdamX", opt_kwargs=None)
    cfg = config(tmp_path, "rft", scheduler="Cosine")
    with pytest.raises(ConfigError, match="LinearWarmup"):
        get_trainer_cls("rft")(training(cfg), None, cfg.model)


def steps_in(folder: Path) -> list[int]:
    """Steps of the log's lines that report a loss."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if "diffusion_loss" in line]


def test_a_fresh_run_and_its_resume_leave_an_earlier_run_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """--resume once went on from the latest step in the folder, which was another run's."""
    folder = tmp_path / "run"

    def run(steps: int, **changes: Any) -> list[dict[str, float]]:
        trainer = build(tmp_path, "rft", max_steps=steps, checkpoint_dir=str(folder), **changes)
        trainer.train()
        return [{k: v for k, v in loss.items() if k != "time"} for loss in trainer.losses]

    run(5)
    first = run(3, seed=9)
    assert "held checkpoints of another run, with steps after 0: they are in set_aside_1" in caplog.text
    assert {path.name for path in (folder / "set_aside_1").iterdir()} >= {"step_5.pt", "log.jsonl"}
    caplog.clear()
    rest = run(6, seed=9, resume_ckpt="latest")
    assert "held checkpoints" not in caplog.text
    assert steps_in(folder) == [1, 2, 3, 4, 5, 6]
    whole = build(tmp_path, "rft", max_steps=6, checkpoint_dir=str(tmp_path / "whole"), seed=9)
    whole.train()
    assert first + rest == [{k: v for k, v in loss.items() if k != "time"} for loss in whole.losses]
    assert steps_in(folder / "set_aside_1") == [1, 2, 3, 4, 5]


def test_going_back_to_an_earlier_step_sets_the_later_ones_aside(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    build(tmp_path, "rft", max_steps=4, checkpoint_dir=str(folder), save_interval=2).train()
    back = {"resume_ckpt": str(folder / "step_2.pt"), "save_interval": 100}
    build(tmp_path, "rft", max_steps=3, checkpoint_dir=str(folder), **back).train()
    assert sorted(path.name for path in folder.glob("step_*.pt")) == ["step_2.pt", "step_3.pt"]
    assert [path.name for path in (folder / "set_aside_1").iterdir()] == ["step_4.pt"]
