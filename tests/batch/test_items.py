"""What a listing takes and what it passes over.

Run: python -m pytest tests/batch/test_items.py
"""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

import fsspec
import pytest

from owl_wms.batch import BlockWorker
from owl_wms.batch.items import LATENT_SUFFIXES, is_there, list_items
from owl_wms.batch.run import status
from owl_wms.errors import ConfigError, DataError
from tests.batch.fake import fake_job, make_inputs, outputs_of


def names(source: str, out: str = "") -> list[str]:
    return [item.name for item in list_items(source, LATENT_SUFFIXES, out)]


@pytest.mark.parametrize("name", ["ETag", "mtime", "last_modified", "blob_id"])
def test_a_file_that_changed_and_kept_its_size(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Latents of one shape have one size, and not every store has ETags."""
    memory, state = fsspec.filesystem("memory"), {name: "one"}
    listed = type(memory).ls
    monkeypatch.setattr(type(memory), "ls", lambda *given, **options: [x | state for x in listed(*given, **options)])
    memory.pipe_file("/states/a.pt", b"1")
    (before,) = list_items("memory://states", LATENT_SUFFIXES)
    assert [before] == list(list_items("memory://states", LATENT_SUFFIXES))
    state[name] = "two"
    (after,) = list_items("memory://states", LATENT_SUFFIXES)
    assert before.key("") != after.key("")
    memory.rm("/states", recursive=True)


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
    for name in ("a::b.npy", "out/generation-1/a.npy.npy", "_ledger/b.npy", ".c/d.npy"):
        memory.pipe_file(f"/listing/{name}", b"1")
    assert names("memory://listing", "memory://listing/out/generation-2") == ["a::b.npy"]
    memory.rm("/listing", recursive=True)


@pytest.mark.parametrize("error", [OSError(5, "Internal Error"), TimeoutError(), RuntimeError("no route")], ids=repr)
def test_a_store_that_cannot_be_asked_has_lost_nothing(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/asked/a.pt", b"1")
    assert is_there("memory://asked/a.pt")
    assert not is_there("memory://asked/b.pt")

    def away(*_: object, **__: object) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(type(memory), "info", away)
        with pytest.raises(DataError, match=r"^memory://asked/b.pt: its store cannot be asked: .*network") as said:
            is_there("memory://asked/b.pt")
        assert "\n" not in str(said.value)
        with pytest.raises(DataError, match="cannot be listed") as said:
            names("memory://asked")
        assert "there is nothing" not in str(said.value)
    memory.rm("/asked", recursive=True)


def test_a_link_to_a_folder_is_told_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_inputs(tmp_path, {"real/a.pt": "a", "in/b.pt": "b"})
    os.symlink("../real", tmp_path / "in/link")
    os.symlink("../real/a.pt", tmp_path / "in/file.pt")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert names(str(tmp_path / "in")) == ["b.pt", "file.pt"]
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [str(tmp_path / "in/link")]


def test_a_link_to_nothing_is_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_inputs(tmp_path, {"a.pt": "a"})
    (tmp_path / "b.pt").symlink_to(tmp_path / "gone.pt")
    (tmp_path / "c.pt").symlink_to(tmp_path / "a.pt")
    assert names(str(tmp_path)) == ["a.pt", "c.pt"]
    assert [r.getMessage() for r in caplog.records] == [
        f"{tmp_path}/b.pt: is a link to nothing and is passed over; mend or remove it"
    ]


def test_what_goes_while_it_is_listed_is_passed_over(tmp_path: Path) -> None:
    make_inputs(tmp_path, {"a.pt": "a", "b.pt": "b", "c/d.pt": "d", "e.pt": "e"})
    found = list_items(str(tmp_path), LATENT_SUFFIXES)
    first = next(found).name
    (tmp_path / "b.pt").unlink()
    shutil.rmtree(tmp_path / "c")
    assert [first, *(item.name for item in found)] == ["a.pt", "e.pt"]


def test_folders_that_systems_and_file_servers_make_hold_no_inputs(tmp_path: Path) -> None:
    for folder in ("a", "#recycle", "@eaDir", "PaxHeader", "__MACOSX", "$RECYCLE.BIN"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.pt").write_bytes(b"x")
    assert names(str(tmp_path)) == ["a/x.pt"]


def test_a_link_to_a_file_without_an_ending_keeps_its_own(tmp_path: Path) -> None:
    """As in Hugging Face's cache, whose files are named by their digests."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "0a1b").write_bytes(b"x")
    (tmp_path / "snapshot").mkdir()
    link = tmp_path / "snapshot" / "a.pt"
    link.symlink_to("../blobs/0a1b")
    (tmp_path / "list.txt").write_text("snapshot/a.pt\n")
    for source in (link, tmp_path / "snapshot", tmp_path / "list.txt"):
        (item,) = list_items(str(source), LATENT_SUFFIXES)
        assert item.url == str(link)


def test_no_input_is_not_the_folder_that_one_is_in() -> None:
    """As of a variable that a shell does not have."""
    with pytest.raises(DataError, match=r"^INPUT: cannot be listed: its name is empty; check the path"):
        names("")
    with pytest.raises(ConfigError, match=r"^--out : cannot be used: its name is empty; check it"):
        fake_job("")


@pytest.mark.parametrize(("name", "line"), [("list.txt", "a.pt"), ("list.jsonl", '{"path": "a.pt"}')])
def test_a_manifest_may_be_of_windows(tmp_path: Path, name: str, line: str) -> None:
    make_inputs(tmp_path, {"a.pt": "a"})
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + line.encode() + b"\r\n")
    assert names(str(tmp_path / name)) == ["a.pt"]


def test_a_manifest_names_a_file_once_and_no_two_files_with_one_output(tmp_path: Path) -> None:
    make_inputs(tmp_path, {"a.pt": "a", "b/a.pt": "other", f"sub{tmp_path}/a.pt": "third"})
    manifest = tmp_path / "list.txt"
    manifest.write_text("a.pt\n./a.pt\nb/a.pt\na.pt\n", encoding="utf-8")
    assert names(str(manifest)) == ["a.pt", "b/a.pt"]
    clash = tmp_path / "sub/list.txt"
    clash.write_text(f"{tmp_path}/a.pt\n{str(tmp_path).lstrip('/')}/a.pt\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"line 2: outputs of .* would have one name"):
        names(str(clash))
