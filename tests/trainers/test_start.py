"""A start that fails leaves the disk as it was, and mistakes in data, model, autoencoder and scale are one line.

Run: python -m pytest tests/trainers/test_start.py
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from owl_wms.configs.world import TrainingConfig
from owl_wms.errors import ConfigError, DataError, TrainingError
from owl_wms.models.latents import Whitener
from owl_wms.trainers import get_trainer_cls
from owl_wms.trainers.batches import batches_per_update
from owl_wms.trainers.checkpoints import load_checkpoint
from tests.trainers.helpers import CHANNELS, SIDE, FixedLoader, batch_for, config
from tests.trainers.test_failures import decoder_files
from tests.trainers.test_trainers import build


class NoCredentials:
    """A bucket that refuses the first read, as boto3 does."""

    epoch = 0

    def __iter__(self) -> Iterator[Any]:
        raise DataError("s3://bucket: no credentials")
        yield

    def state_dict(self) -> dict[str, int]:
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        pass


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def no_gradient(trainer: Any) -> None:
    trainer.loader.batch[0][0, 0] = float("nan")


def no_memory(trainer: Any) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    trainer.phases[0].optimiser.step = full


@pytest.mark.parametrize("fault", ["credentials", "gradient", "memory"])
@pytest.mark.parametrize("files", [{}, {"sample_interval": 1}], ids=["no evaluation", "evaluation"])
def test_a_start_that_fails_leaves_everything_as_it_was(tmp_path: Path, fault: str, files: dict[str, Any]) -> None:
    build(tmp_path, "rft", max_steps=3).train()
    files = {**files, **decoder_files(tmp_path), "eval_sample_dir": str(tmp_path / "eval")}
    before = tree(tmp_path / "run")
    cfg = config(tmp_path, "rft", max_steps=9, seed=4, **files)
    loader = NoCredentials() if fault == "credentials" else FixedLoader(batch_for("rft"))
    trainer = get_trainer_cls("rft")(
        cfg.train, None, cfg.model, loader=loader, sample_loader=FixedLoader(batch_for("rft"))
    )
    {"gradient": no_gradient, "memory": no_memory}.get(fault, lambda _: None)(trainer)
    with pytest.raises((DataError, TrainingError, torch.OutOfMemoryError)):
        trainer.train()
    assert tree(tmp_path / "run") == before
    assert not (tmp_path / "eval").exists()
    # The run that was there goes on as if nothing had been tried.
    rest = build(tmp_path, "rft", max_steps=4, resume_ckpt="latest")
    rest.train()
    assert rest.step == 4
    assert len(rest.losses) == 1


def test_clips_of_the_first_evaluation_arrive_once_the_run_has_begun(tmp_path: Path) -> None:
    latents = tmp_path / "eval"
    trainer = build(tmp_path, "rft", max_steps=1, eval_sample_dir=str(latents), **decoder_files(tmp_path))
    trainer.train()
    assert {path.stem for path in (tmp_path / "run" / "samples").iterdir()} == {"step_0_0", "step_0_1"}
    assert [path.name for path in latents.iterdir()] == ["vid.0.pt"]
    assert '"samples": "step_0_0.mp4, step_0_1.mp4"' in (tmp_path / "run" / "log.jsonl").read_text()


def test_a_decoder_of_other_latents_is_one_line(tmp_path: Path) -> None:
    files = decoder_files(tmp_path)
    whitener = Whitener(mean=torch.zeros(6), forward=torch.randn(CHANNELS, 6), inverse=torch.randn(6, CHANNELS))
    whitener.save(tmp_path / "w.safetensors")
    trainer = build(tmp_path, "rft", latent_transform=str(tmp_path / "w.safetensors"), **files)
    trainer.evaluator._batches = iter(())
    with pytest.raises(ConfigError, match="the decoder takes latents of 4 channels, and the model makes 6; name the"):
        trainer.evaluator._load_decoders()


@pytest.mark.parametrize(
    ("scale", "spread", "told"), [(0.34, 1.0, "to 1"), (1.0, 0.1, "to 0.1"), (0.5, 1.0, None), (1.0, 0.0, None)]
)
def test_a_scale_that_does_not_fit_is_one_line(
    tmp_path: Path, scale: float, spread: float, told: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    video, *controls = batch_for("rft")
    loader = FixedLoader((spread * video / video.std(), *controls))
    cfg = config(tmp_path, "rft", max_steps=3, vae_scale=scale)
    trainer = get_trainer_cls("rft")(cfg.train, None, cfg.model, loader=loader, sample_loader=loader)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    said = [r.getMessage() for r in caplog.records if "set train.vae_scale" in r.getMessage()]
    if told is None:
        assert not said
    else:
        assert len(said) == 2, "training's data and evaluation's"
        assert f"set train.vae_scale {told} instead of {scale:g}" in said[0]


def test_a_run_on_whitened_latents_trains_and_decodes_in_stored_ones(tmp_path: Path) -> None:
    stored = 6
    torch.manual_seed(0)
    video = torch.randn(2, 6, stored, SIDE, SIDE)
    Whitener.fit(video / 0.5, channels=CHANNELS).save(tmp_path / "w.safetensors")
    _, *controls = batch_for("rft")
    loader = FixedLoader((video, *controls))
    changes = {"latent_transform": str(tmp_path / "w.safetensors"), "eval_sample_dir": str(tmp_path / "eval")}
    cfg = config(tmp_path, "rft", max_steps=2, **changes)
    trainer = get_trainer_cls("rft")(cfg.train, None, cfg.model, loader=loader, sample_loader=loader)
    trainer.train()
    assert torch.load(tmp_path / "eval" / "vid.0.pt", weights_only=True).shape[2] == stored
    assert trainer.losses[0]["latent_error"] > 0
    with pytest.raises(DataError, match=r"gives \[2, 6, 4, 2, 2\] as latents, and the model wants \[2, 6, 6, 2, 2\]"):
        get_trainer_cls("rft")(cfg.train, None, cfg.model, loader=FixedLoader(batch_for("rft"))).train_step()


def test_latent_error_does_not_depend_on_the_scale(tmp_path: Path) -> None:
    """A model that predicts nothing errs by the same in stored latents, whatever they are divided by."""
    errors = []
    for scale in (0.5, 2.0):
        trainer = build(tmp_path, "rft", vae_scale=scale)
        video = trainer.loader.batch[0]  # type: ignore[attr-defined]
        x = trainer.to_latents(video)
        ones = torch.ones(x.shape[:2])
        found = {"ts": ones, "pred_video": 0 * x, "z_video": 0 * x, "counted": ones.bool()}
        errors.append(float(trainer.space.error(x, found)))
        assert errors[-1] == pytest.approx(float(video.square().mean()), rel=1e-5)


def test_the_checkpoint_says_how_and_where_it_was_made(tmp_path: Path) -> None:
    build(tmp_path, "rft", max_steps=1).train()
    state = load_checkpoint(tmp_path / "run" / "step_1.pt")
    assert state["config"]["train"]["opt_kwargs"]["lr"] == 1e-2
    assert state["config"]["model"]["d_model"] == 32
    assert {"torch", "gpu", "driver"} <= set(state["environment"])


@pytest.mark.parametrize(
    ("target", "batch", "ranks", "count", "made"),
    [(8, 2, 2, 2, None), (8, 2, 1, 4, None), (8, 3, 1, 2, 6), (8, 2, 3, 1, 6), (2, 4, 1, 1, 4), (8, 2, 8, 1, 16)],
)
def test_a_step_of_another_size_than_configured_is_told(
    target: int, batch: int, ranks: int, count: int, made: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    """More ranks, or a batch that does not divide the target, would else change what is trained without a word."""
    cfg = TrainingConfig(target_batch_size=target, batch_size=batch)
    assert batches_per_update(cfg, ranks) == count
    assert not caplog.records
    batches_per_update(cfg, ranks, logs=True)
    told = f"a step takes {made} windows, not the {target} of train.target_batch_size"
    assert [record.getMessage().startswith(told) for record in caplog.records] == [True] * (made is not None)
