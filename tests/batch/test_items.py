"""What a listing takes and what it passes over.

Run: python -m pytest tests/batch/test_items.py
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

import fsspec
import pytest

from owl_wms.batch import BlockWorker
from owl_wms.batch.items import LATENT_SUFFIXES, list_items
from owl_wms.batch.run import status
from owl_wms.errors import DataError
from tests.batch.fake import fake_job, make_inputs, outputs_of


def names(source: str, out: str = "") -> list[str]:
    return [item.name for item in list_items(source, LATENT_SUFFIXES, out)]


@pytest.mark.parametrize("inside", [".", "frames", "a"])
def test_an_output_inside_of_the_input_is_no_input(tmp_path: Path, inside: str) -> None:
    folder = make_inputs(tmp_path, {"a/one.pt": "one", "b.pt": "b"})
    job = fake_job(folder / inside)
    blocks = (
        ("block", [item]) for item in list_items(str(folder), LATENT_SUFFIXES, job.out)
    )  # listed as they are done
    assert [o.state for o in BlockWorker(job).run(blocks) if o.key] == ["done"] * 2
    assert set(outputs_of(job)) == {"a/one.pt.npy", "b.pt.npy"}
    assert status(job, str(folder), LATENT_SUFFIXES)[:3] == (2, 0, 0)


def test_generations_of_another_output_are_inputs_and_ledgers_are_not(tmp_path: Path) -> None:
    """So that `decode-dataset` takes what `encode-dataset` wrote."""
    latents = tmp_path / "latents"
    make_inputs(latents, {"generation-0/x.npy": "x", "generation-0/_ledger/staging/h/y.npy": "y", ".cache/z.npy": "z"})
    assert names(str(latents), str(tmp_path / "frames/generation-1")) == ["generation-0/x.npy"]
    assert names(str(latents / "generation-0")) == ["x.npy"]
    memory = fsspec.filesystem("memory")
    for name in ("a.npy", "out/generation-1/a.npy.npy", "_ledger/b.npy", ".c/d.npy"):
        memory.pipe_file(f"/listing/{name}", b"1")
    assert names("memory://listing", "memory://listing/out/generation-2") == ["a.npy"]
    memory.rm("/listing", recursive=True)


def test_a_link_to_a_folder_is_told_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_inputs(tmp_path, {"real/a.pt": "a", "in/b.pt": "b"})
    os.symlink("../real", tmp_path / "in/link")
    os.symlink("../real/a.pt", tmp_path / "in/file.pt")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert names(str(tmp_path / "in")) == ["b.pt", "file.pt"]
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [str(tmp_path / "in/link")]


def test_a_manifest_names_a_file_once_and_no_two_files_with_one_output(tmp_path: Path) -> None:
    make_inputs(tmp_path, {"a.pt": "a", "b/a.pt": "other", f"sub{tmp_path}/a.pt": "third"})
    manifest = tmp_path / "list.txt"
    manifest.write_text("a.pt\n./a.pt\nb/a.pt\na.pt\n", encoding="utf-8")
    assert names(str(manifest)) == ["a.pt", "b/a.pt"]
    clash = tmp_path / "sub/list.txt"
    clash.write_text(f"{tmp_path}/a.pt\n{str(tmp_path).lstrip('/')}/a.pt\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"line 2: outputs of .* would have one name"):
        names(str(clash))
