"""`owl-wms train`: a training run from a YAML file, alone or under torchrun.

Usage:
    owl-wms train examples/world/game_rft.yml --set train.max_steps=1000
    torchrun --nproc-per-node 8 -m owl_wms train configs/dit_v4.yml --resume
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any

import typer

from owl_wms.cli import _bounds as bounds
from owl_wms.cli._disk import described, disk_failure


def train(
    config: Annotated[Path, typer.Argument(help="YAML file with the sections model, train and wandb.")],
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Replace a value, such as train.batch_size=4; repeatable."),
    ] = None,
    resume: bool = typer.Option(False, "--resume", help="Continue from the newest checkpoint, if there is one."),
    nccl_timeout: float = typer.Option(1800.0, min=1, help="Seconds that ranks wait for each other."),
) -> None:
    """Train a world model; a killed run continues with --resume and repeats the losses it would have had."""
    from owl_wms.cli import _shared as shared

    bounds.check_number("--nccl-timeout", nccl_timeout, bounds.TIMEOUT_SECONDS)
    cfg = load_changed(config, changes or [])
    from owl_wms.errors import ConfigError, OwlError, TrainingError
    from owl_wms.trainers import cleanup, get_trainer_cls, setup
    from owl_wms.trainers.checkpoints import latest_checkpoint
    from owl_wms.trainers.distributed import barrier

    if cfg.train.trainer_id is None:
        raise ConfigError(f"{config}: train.trainer_id is missing", path=config, key="train.trainer_id")
    folder, section = Path(cfg.train.checkpoint_dir), cfg.train
    # A run that branches off another one's checkpoint begins there, until it has one of its own.
    if resume and (section.resume_ckpt is None or latest_checkpoint(folder) is not None):
        section = section.model_copy(update={"resume_ckpt": "latest"})
    shared.check_folder(folder, key="train.checkpoint_dir")
    if section.output_path is not None:
        shared.check_destination(Path(section.output_path), key="train.output_path")
        read = (section.vae_ckpt_path, section.audio_vae_ckpt_path, section.teacher_ckpt)
        shared.check_not_read(Path(section.output_path), *(Path(file) for file in read if file is not None))
    if section.eval_sample_dir is not None:
        shared.check_folder(Path(section.eval_sample_dir), key="train.eval_sample_dir")
    rank, local_rank, world_size = setup(nccl_timeout)
    starting = logging.getLogger("owl_wms.trainers.progress")
    level = starting.level
    try:
        if logging.getLogger().level <= logging.WARNING:  # a start may take minutes; -q hides it
            starting.setLevel(logging.INFO)
        trainer = get_trainer_cls(cfg.train.trainer_id)(section, cfg.wandb, cfg.model, rank, local_rank, world_size)
        try:
            trainer.train()
        except (OSError, RuntimeError) as error:
            failure = None if isinstance(error, OwlError) else disk_failure(error)
            if failure is None:
                raise
            reason = f"{folder}: step {trainer.step} cannot be saved: {described(failure)}"
            remedy = "checkpoints of earlier steps are whole: make room, then go on with --resume"
            raise TrainingError(f"{reason}; {remedy}", step=trainer.step) from error
        last = trainer.losses[-1] if trainer.losses else {}
        values = "".join(f", {name} {value:.4f}" for name, value in last.items())
        if rank == 0:
            typer.echo(f"{folder}: step {trainer.step}{values}")
        del trainer  # data parallelism's reducers must go before the process group does
        barrier()
    finally:
        starting.setLevel(level)
        cleanup()


def load_changed(path: Path, changes: list[str]) -> Any:
    """The file's configuration with `section.key=value` replaced; values are YAML, and everything is validated again.

    Files that it names relative to a folder above itself are found from any working directory.

    Raises:
        ConfigError: a change without `=` or with a value that is not YAML, or whatever the changed configuration is
            refused for.
    """
    from owl_wms.configs.strict import read_yaml
    from owl_wms.configs.world import parse_world, with_files_found

    data = read_yaml(path, changes=changes)
    return with_files_found(parse_world(data, path=path), path)
