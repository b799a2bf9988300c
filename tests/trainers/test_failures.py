"""Runs that fail: nothing broken is saved, whole steps are kept, evaluations cost clips, errors name what to change.

Run: python -m pytest tests/trainers/test_failures.py
"""

from __future__ import annotations

import errno
import io
import itertools
import json
import logging
import math
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

from owl_wms.configs import load_vae_config
from owl_wms.errors import CheckpointError, ConfigError, DataError, FastPathError, TrainingError
from owl_wms.models import get_model_cls
from owl_wms.trainers import distributed, get_trainer_cls
from owl_wms.trainers.checkpoints import latest_checkpoint, load_checkpoint, load_core_weights
from owl_wms.trainers.progress import Progress
from owl_wms.trainers.run_log import RunLog
from owl_wms.vae import read_state_dict
from tests.trainers.helpers import FixedLoader, batch_for, config, write_table
from tests.trainers.test_trainers import build
from tests.trainers.test_whole_steps import assert_same


def strict_lines(folder: Path) -> list[dict[str, object]]:
    """The run_log's lines, read as JSON without Python's extensions."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in (folder / "log.jsonl").read_text().splitlines()]


def table_with(folder: Path, row: int, column: str, change: object) -> None:
    write_table(folder)
    file = folder / "table" / f"{column}_{row}.npy"
    array = np.load(file)
    np.save(file, change(array) if callable(change) else change)  # type: ignore[operator]


def from_table(folder: Path, **changes: object):  # type: ignore[no-untyped-def]
    cfg = config(folder, "rft", **changes)
    return get_trainer_cls("rft")(cfg.train, None, cfg.model)


def test_a_nan_frame_ends_the_run_with_its_row_and_whole_checkpoints(tmp_path: Path) -> None:
    def spoil(array: np.ndarray) -> np.ndarray:
        array[3] = np.nan
        return array

    table_with(tmp_path, 2, "depth_latent", spoil)
    cfg = config(tmp_path, "rft", max_steps=20, seed=1)
    trainer = get_trainer_cls("rft")(cfg.train, None, cfg.model, sample_loader=FixedLoader(batch_for("rft")))
    with pytest.raises(DataError, match=r"depth_latent_2\.npy: frame 3") as caught:
        trainer.train()
    assert caught.value.index == 2
    assert trainer.step > 0
    assert all(math.isfinite(value) for values in trainer.losses for value in values.values())
    assert len(strict_lines(tmp_path / "run")) == trainer.step
    # The steps before it are kept, and continue at the batch that failed.
    state = load_checkpoint(tmp_path / "run" / f"step_{trainer.step}.pt")
    position = {"epoch": 0, "samples": 2 * trainer.step, "count": 8, "seed": 1}
    assert (state["steps"], state["data"]) == (trainer.step, position)
    assert all(value.isfinite().all() for value in state["model"].values())


@pytest.mark.parametrize("opt", [{}, {"opt": "Muon", "opt_kwargs": {"lr": 0.02, "adamw_lr": 0.01}}])
def test_a_loss_that_is_not_finite_is_never_applied_or_saved(tmp_path: Path, opt: dict[str, object]) -> None:
    trainer = build(tmp_path, "rft", max_steps=9, save_interval=2, output_path=str(tmp_path / "out.pt"), **opt)
    step = trainer.train_step
    before: dict[str, torch.Tensor] = {}

    def spoiled() -> dict[str, float]:
        if trainer.step == 3:
            before.update({k: v.clone() for k, v in trainer.model.state_dict().items()})
            trainer.loader.batch[0][0, 0] = float("nan")  # type: ignore[attr-defined]
        return step()

    trainer.train_step = spoiled  # type: ignore[method-assign]
    with pytest.raises(
        TrainingError, match=r"step 4: the gradient of the model is nan \(diffusion_loss nan\).*--resume"
    ):
        trainer.train()
    assert all(torch.equal(before[k], v) for k, v in trainer.model.state_dict().items())
    # Step 3 was whole and not yet on disk.
    assert latest_checkpoint(tmp_path / "run") == tmp_path / "run" / "step_3.pt"
    state = load_checkpoint(tmp_path / "run" / "step_3.pt")
    assert all(torch.equal(before[k], v) for k, v in state["model"].items())
    assert all(value.isfinite().all() for value in load_checkpoint(tmp_path / "out.pt").values())
    assert [line["step"] for line in strict_lines(tmp_path / "run")] == [1, 2, 3]


def test_a_reported_loss_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    trainer = build(tmp_path, "rft", max_steps=3)
    step = trainer.train_step
    trainer.train_step = lambda: {**step(), "diffusion_loss": float("inf")}  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match="step 1: diffusion_loss is inf"):
        trainer.train()
    assert strict_lines(tmp_path / "run")[0]["diffusion_loss"] == "inf"


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    trainer = build(tmp_path, "rft", max_steps=1)
    step = trainer.train_step

    def spoiled() -> dict[str, float]:
        values = step()
        with torch.no_grad():
            next(trainer.model.parameters()).fill_(float("nan"))
        return values

    trainer.train_step = spoiled  # type: ignore[method-assign]
    with pytest.raises(
        TrainingError, match=r"step 1: weight 'model\.core\..*' is NaN or infinite and nothing is saved"
    ):
        trainer.train()
    assert latest_checkpoint(tmp_path / "run") is None


@pytest.mark.parametrize(("place", "kept"), [("phases", 2), ("metrics", 3)])
def test_a_rank_that_does_not_answer_is_given_up(
    place: str, kept: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, whose event does not come: before the gradients are applied, or once they are."""
    write_table(tmp_path)
    cfg = config(tmp_path, "rft", max_steps=kept, checkpoint_dir=str(tmp_path / "whole"))
    get_trainer_cls("rft")(cfg.train, None, cfg.model).train()
    aborted: list[bool] = []
    monkeypatch.setattr(torch.distributed.distributed_c10d, "_abort_process_group", lambda: aborted.append(True))
    trainer = from_table(tmp_path, checkpoint_dir=str(tmp_path / "cut"))
    looks = itertools.cycle([False, True])

    def awaited(_device: torch.device) -> None:
        distributed._poll(lambda: next(looks), 60)
        if trainer.step == 2 + (place == "metrics"):
            distributed._poll(lambda: False, 0.01)

    if place == "metrics":
        monkeypatch.setattr("owl_wms.trainers.metrics.is_distributed", lambda: True)
        monkeypatch.setattr(torch.distributed, "all_reduce", lambda _: None)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    monkeypatch.setattr(f"owl_wms.trainers.{place}.await_ranks", awaited)
    with pytest.raises(TrainingError, match=rf"^another rank ended after step {kept} \(no answer in 0.01 s\); see"):
        trainer.train()
    assert aborted == [True]
    assert_same(*(load_checkpoint(tmp_path / run / f"step_{kept}.pt") for run in ("whole", "cut")))


def test_the_log_is_json_whatever_it_is_told(tmp_path: Path) -> None:
    run_log = RunLog(tmp_path, None, {})
    run_log.log(1, {"a": float("nan"), "b": float("-inf"), "c": None, "d": 1.0})
    run_log.close()
    line = strict_lines(tmp_path)[0]
    assert [line[name] for name in "abcd"] == ["nan", "-inf", None, 1.0]


def decoder_files(folder: Path) -> dict[str, object]:
    """A tiny decoder for the tiny model's latents."""
    from owl_wms.vae import build_decoder

    vae = {"model_id": "dcae", "sample_size": [8, 8], "channels": 3, "latent_size": 2, "latent_channels": 4}
    vae |= {"ch_0": 8, "ch_max": 16, "encoder_blocks_per_stage": [1, 1], "decoder_blocks_per_stage": [1, 1]}
    cfg_path, ckpt = folder / "vae.yml", folder / "vae.pt"
    cfg_path.write_text(yaml.safe_dump({"model": vae}))
    torch.save(build_decoder(load_vae_config(cfg_path).model).state_dict(), ckpt)
    return {"vae_cfg_path": str(cfg_path), "vae_ckpt_path": str(ckpt)}


def test_a_decoder_that_is_not_there_is_said_before_the_first_step(tmp_path: Path) -> None:
    files = {**decoder_files(tmp_path), "vae_ckpt_path": str(tmp_path / "gone.pt")}
    trainer = build(tmp_path, "rft", max_steps=3, **files)
    with pytest.raises(CheckpointError, match=r"gone\.pt"):
        trainer.train()
    assert trainer.step == 0


def test_a_resumed_run_looks_for_its_decoder_before_it_trains_on(tmp_path: Path) -> None:
    # Resumed between two evaluations: the next one is steps away, and those steps would be lost with it.
    build(tmp_path, "rft", max_steps=1).train()
    files = {**decoder_files(tmp_path), "vae_ckpt_path": str(tmp_path / "gone.pt")}
    trainer = build(tmp_path, "rft", max_steps=6, sample_interval=4, resume_ckpt="latest", **files)
    with pytest.raises(CheckpointError, match=r"gone\.pt"):
        trainer.train()
    assert (trainer.step, trainer.losses) == (1, [])


def test_evaluation_data_that_does_not_fit_is_said_before_the_first_step(tmp_path: Path) -> None:
    cfg = config(tmp_path, "rft", max_steps=2)
    video, mouse, buttons = batch_for("rft")
    loader, sample = FixedLoader((video, mouse, buttons)), FixedLoader((video[:, :, :3], mouse, buttons))
    trainer = get_trainer_cls("rft")(cfg.train, None, cfg.model, loader=loader, sample_loader=sample)
    with pytest.raises(DataError, match=r"train\.sample_data_kwargs"):
        trainer.train()
    assert trainer.step == 0


def test_a_failing_evaluation_costs_its_clips_and_not_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = build(tmp_path, "rft", max_steps=3, sample_interval=1, **decoder_files(tmp_path))
    sample = trainer.sample

    def failing(*arguments: object) -> object:
        if trainer.step == 1:
            raise RuntimeError("no memory for this")
        return sample(*arguments)  # type: ignore[arg-type]

    trainer.sample = failing  # type: ignore[assignment,method-assign]
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert "step 1: evaluation failed on rank 0, training goes on: no memory for this" in caplog.text
    lines = strict_lines(tmp_path / "run")
    assert [line["step"] for line in lines if line.get("evaluation_error") == "no memory for this"] == [1]
    assert {clip.stem.split("_")[1] for clip in (tmp_path / "run" / "samples").iterdir()} == {"0", "2", "3"}
    plain = build(tmp_path, "rft", max_steps=3, checkpoint_dir=str(tmp_path / "plain"))
    plain.train()
    assert plain.losses == trainer.losses


def test_a_time_limit_of_the_caller_ends_an_evaluation_and_the_run(tmp_path: Path) -> None:
    class TimeLimit(Exception):
        pass

    def limit(*_: object) -> None:
        raise TimeLimit

    trainer = build(tmp_path, "rft", max_steps=3, sample_interval=1)
    sample = trainer.sample
    late = lambda *given: sample(*given) if trainer.step < 2 else signal.raise_signal(signal.SIGALRM)  # noqa: E731
    trainer.sample = late  # type: ignore[method-assign]
    before = signal.signal(signal.SIGALRM, limit)
    try:
        with pytest.raises(TimeLimit):
            trainer.train()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert latest_checkpoint(trainer.folder) == trainer.folder / "step_2.pt"


def test_clips_that_are_not_finite_are_reported_and_not_written(tmp_path: Path) -> None:
    """A decoder may overflow on latents that no encoder makes: a black clip would say nothing."""
    trainer = build(tmp_path, "rft", max_steps=1, **decoder_files(tmp_path))
    trainer.evaluator.prepare()
    decoder = trainer.evaluator._decode.decoder  # type: ignore[union-attr]
    decoder.register_forward_hook(lambda module, given, frames: frames * torch.nan)
    found = trainer.evaluator.run()
    assert "not finite" in str(found.error)
    assert not found.paths
    assert list((trainer.folder / "samples").iterdir()) == []
    next(trainer.ema.model.parameters()).data.fill_(math.nan)
    found = trainer.evaluator.run()
    assert "what the averaged model sampled: frame " in str(found.error)


def test_first_clips_that_cannot_be_put_in_place_cost_no_run(tmp_path: Path) -> None:
    """They are made before the run has its folder, and moved there after its first step."""
    (tmp_path / "file").write_text("in the way")
    trainer = build(tmp_path, "rft", max_steps=2, eval_sample_dir=str(tmp_path / "file" / "eval"))
    trainer.train()
    lines = [json.loads(line) for line in (trainer.folder / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "Not a directory" in line.get("evaluation_error", "")] == [0]
    assert (trainer.step, trainer.saved_step) == (2, 2)


def test_a_decoder_that_must_not_fall_back_ends_the_run_with_a_checkpoint(tmp_path: Path) -> None:
    trainer = build(tmp_path, "rft", max_steps=3, sample_interval=2, **decoder_files(tmp_path))

    load = trainer.evaluator._load_decoders

    class Strict:
        """The real decode function, which fails from the first step on."""

        def __init__(self, real: object) -> None:
            self._real = real

        def __getattr__(self, name: str) -> object:
            return getattr(self._real, name)

        def __call__(self, *arguments: object, **more: object) -> object:
            if trainer.step == 0:
                return self._real(*arguments, **more)  # type: ignore[operator]
            raise FastPathError("run", "the program failed")

    def load_strict() -> None:
        load()
        trainer.evaluator._decode = Strict(trainer.evaluator._decode)  # type: ignore[assignment]

    trainer.evaluator._load_decoders = load_strict  # type: ignore[method-assign]
    with pytest.raises(FastPathError):
        trainer.train()
    assert latest_checkpoint(tmp_path / "run") == tmp_path / "run" / "step_2.pt"


@pytest.mark.parametrize("trainer_id", ["causvid_vid", "sforce_vid"])
def test_log_predictions_decodes_student_teacher_and_critic(tmp_path: Path, trainer_id: str) -> None:
    changes = {"max_steps": 2, "sample_interval": 2, "log_predictions": True}
    build(tmp_path, trainer_id, **changes, **decoder_files(tmp_path)).train()
    names = {clip.stem for clip in (tmp_path / "run" / "samples").iterdir()}
    assert {"step_2_student_0", "step_2_teacher_0", "step_2_critic_0"} <= names
    assert not {name for name in names if name.startswith("step_0") and "critic" in name}


COLUMNS = [
    (["depth_latent", "buttons", "mouse"], r"gives \[2, 6, 11\] as mouse, and the model wants \[2, 6, 2\]"),
    (["depth_latent", "mouse"], "has 2 parts, and the trainer reads latents, mouse, buttons"),
    (["mouse", "depth_latent", "buttons"], r"gives \[2, 6, 2\] as latents, and the model wants \[2, 6, 4, 2, 2\]"),
]


@pytest.mark.parametrize(("columns", "words"), COLUMNS)
def test_columns_that_do_not_fit_name_table_and_key(tmp_path: Path, columns: list[str], words: str) -> None:
    table = write_table(tmp_path)
    data = {"dataset_path": str(table), "window_length": 6, "batch_columns": columns, "num_workers": 0}
    trainer = from_table(tmp_path, max_steps=1, data_kwargs=data)
    with pytest.raises(DataError, match=rf"table: a batch of train\.data_kwargs {words}") as caught:
        trainer.train()
    assert caught.value.path == table
    assert f"batch_columns: {', '.join(columns)}" in str(caught.value)


def test_a_row_of_another_encoder_is_named(tmp_path: Path) -> None:
    table_with(tmp_path, 3, "depth_latent", np.zeros((12, 64, 2, 2), np.float32))
    with pytest.raises(DataError, match=r"depth_latent_3\.npy.*row 3 are \[64, 2, 2\]"):
        from_table(tmp_path)


def core(folder: Path) -> torch.nn.Module:
    return get_model_cls("game_rft")(config(folder, "rft").model).core


LAYOUTS = {
    "core.safetensors": lambda w: w,
    "wrapper.safetensors": lambda w: {f"core.{k}": v for k, v in w.items()},
    "compiled.pt": lambda w: {f"_orig_mod.module.core.{k}": v for k, v in w.items()},
    "ema.pt": lambda w: {f"ema_model.core.{k}": v for k, v in w.items()},
    "training.pt": lambda w: {"model": {f"core.{k}": v * 0 for k, v in w.items()}, "ema": w, "steps": 3},
    "model.pt": lambda w: {"model": {f"core.{k}": v for k, v in w.items()}, "steps": 3},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_distillation_starts_from_every_layout_that_inference_reads(tmp_path: Path, name: str) -> None:
    source, target = core(tmp_path), core(tmp_path)
    state = LAYOUTS[name](dict(source.state_dict()))  # type: ignore[no-untyped-call]
    (save_file if name.endswith(".safetensors") else torch.save)(state, tmp_path / name)  # type: ignore[arg-type]
    load_core_weights(target, tmp_path / name)
    assert all(torch.equal(v, target.state_dict()[k]) for k, v in source.state_dict().items())


def test_the_shipped_weights_can_be_a_teacher() -> None:
    from owl_wms.configs import load_world_config

    world = Path(__file__).parents[2] / "examples" / "world"
    with torch.device("meta"):
        net = get_model_cls("game_rft")(load_world_config(world / "game_rft.yml").model).core
    load_core_weights(net.to_empty(device="cpu"), world / "game_rft.safetensors")
    read = read_state_dict(world / "game_rft.safetensors")
    stored = {key.removeprefix("core."): value for key, value in read.items()}
    assert set(stored) == set(net.state_dict())
    assert all(torch.equal(value, stored[key].to(value.dtype)) for key, value in net.state_dict().items())


@pytest.mark.parametrize("read", [load_checkpoint, lambda path: load_core_weights(torch.nn.Linear(1, 1), path)])
def test_damaged_and_dangerous_files_say_so_without_torchs_advice(tmp_path: Path, read: object) -> None:
    buffer = io.BytesIO()
    torch.save({"weight": torch.zeros(9000)}, buffer)
    cut, evil = tmp_path / "cut.pt", tmp_path / "evil.pt"
    cut.write_bytes(buffer.getvalue()[:-2000])
    torch.save({"weight": print}, evil)
    for path, words in ((cut, "truncated"), (evil, "would run code when unpickled"), (tmp_path / "gone.pt", "no such")):
        with pytest.raises(CheckpointError, match=words) as caught:
            read(path)  # type: ignore[operator]
        assert "weights_only=False" not in str(caught.value)


def test_folders_that_links_lead_to_are_made(tmp_path: Path) -> None:
    """A run's folder is often a link to a larger disk, on which nothing is yet."""
    for name in ("run", "latents"):
        (tmp_path / name).symlink_to(tmp_path / "disk" / name)
    trainer = build(tmp_path, "rft", max_steps=1, eval_sample_dir=str(tmp_path / "latents"))
    trainer.train()
    assert {path.name for path in (tmp_path / "disk" / "run").iterdir()} >= {"log.jsonl", "step_1.pt"}
    assert not any("evaluation_error" in line for line in strict_lines(tmp_path / "run"))
    assert list((tmp_path / "disk" / "latents").iterdir())


def test_a_checkpoint_may_hold_numbers_of_numpy(tmp_path: Path) -> None:
    torch.save({"steps": 3, "best_loss": np.float64(0.25), "curve": np.zeros(3)}, tmp_path / "step_3.pt")
    assert load_checkpoint(tmp_path / "step_3.pt")["best_loss"] == 0.25


@pytest.mark.parametrize("part", ["ema", "critic"])
def test_a_checkpoint_that_is_not_finite_is_not_resumed(tmp_path: Path, part: str) -> None:
    """Its trained weights may be fine; the run would end at its first save, and lose the steps before."""
    build(tmp_path, "causvid_vid", max_steps=1).train()
    path = tmp_path / "run" / "step_1.pt"
    state = torch.load(path, weights_only=True)
    key = next(key for key, value in state[part].items() if value.is_floating_point())
    state[part][key].fill_(math.nan)
    torch.save(state, path)
    with pytest.raises(CheckpointError, match=rf"step_1\.pt: weight '{part}\..* is NaN or infinite; use a checkpoint"):
        build(tmp_path, "causvid_vid", max_steps=2, resume_ckpt="latest").resume()


def test_a_folder_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is a folder; name one of its step_N\.pt, or set .* to latest"):
        load_checkpoint(tmp_path)


def test_resuming_from_bare_weights_says_what_is_needed(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=r"weights alone.*step_N\.pt"):
        build(tmp_path, "rft", resume_ckpt=str(tmp_path / "w.safetensors")).resume()


def test_progress_is_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setenv("TERM", "xterm")
    with Progress(total=5, done=2) as progress:
        progress.show(3, {"diffusion_loss": 0.5, "g_norm": 9.0, "time": 0.25})
    assert "3/5" in shown.getvalue()
    assert "diffusion_loss 0.5000" in shown.getvalue()
    assert "4.00 steps/s" in shown.getvalue()
    for quiet, enabled in ((io.StringIO(), True), (Terminal(), False)):
        monkeypatch.setattr(sys, "stderr", quiet)
        with Progress(total=5, enabled=enabled) as progress:
            progress.show(1, {"time": 1.0})
        assert quiet.getvalue() == ""


def test_a_terminal_that_was_closed_ends_no_run() -> None:
    class Closed:
        def start(self) -> None:
            pass

        def stop(self, *_: Any, **__: Any) -> None:
            raise OSError(errno.EIO, "Input/output error")

        update = stop

    progress = Progress(total=5, enabled=False)
    progress._bar, progress._task = Closed(), 0  # type: ignore[assignment]
    with progress:
        progress.show(1, {"time": 1.0})


def test_a_scale_of_zero_is_refused(tmp_path: Path) -> None:
    for key in ("vae_scale", "audio_vae_scale"):
        with pytest.raises(ConfigError, match=r"must be above 0, received 0\.0") as caught:
            config(tmp_path, "rft", **{key: 0.0})
        assert caught.value.key == f"train.{key}"
