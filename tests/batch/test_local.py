"""Local workers: each item once, whatever dies, hangs or fails; a second run does what is missing.

Run: python -m pytest tests/batch/test_local.py
"""

from __future__ import annotations

import ctypes
import errno
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from owl_wms import env
from owl_wms.batch import BlockWorker, Job
from owl_wms.batch import local as local_module
from owl_wms.batch.items import LATENT_SUFFIXES, Item, cut, list_items
from owl_wms.batch.ledger import Part, run_name
from owl_wms.batch.lock import held
from owl_wms.batch.progress import Tally
from owl_wms.batch.run import run, status, verify
from owl_wms.batch.store import Store, digest_of
from owl_wms.batch.worker import Outcome
from owl_wms.errors import BatchError, ConfigError, DataError
from tests.batch.fake import FakeClips, FakeSource, fake_job, frames_of, make_inputs, outputs_of, parts

FORK: Any = multiprocessing.get_context("fork")


def go(job: Job, folder: Path, workers: int = 1) -> list[Outcome]:
    return [o for o in run(job, str(folder), LATENT_SUFFIXES, engine="local", workers=workers) if o.key]


@pytest.fixture(autouse=True)
def _forked(request: pytest.FixtureRequest) -> None:
    """Spares each worker the import of torch; one test has workers as users have them."""
    if "spawned" not in request.function.__name__:
        request.getfixturevalue("forked")


def plain(job: Job, folder: Path) -> list[Outcome]:
    """The core without an engine."""
    worker, name = BlockWorker(job), run_name()
    blocks = ((f"{name}-{n}", block) for n, block in enumerate(cut(list_items(str(folder), LATENT_SUFFIXES))))
    return [o for o in worker.run(blocks) if o.key]


def test_workers_end_before_the_output_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []
    stop = local_module._Worker.stop

    @contextmanager
    def until(job: Job, rank: int | None = None) -> Iterator[Callable[[], None]]:
        try:
            with held(job, rank) as check:
                yield check
        finally:
            happened.append("free")

    monkeypatch.setattr("owl_wms.batch.run.held", until)
    monkeypatch.setattr(local_module._Worker, "stop", lambda worker: (happened.append("stopped"), stop(worker)))
    folder = make_inputs(tmp_path / "in", {f"{number}.pt": str(number) for number in range(3)})
    outcomes = run(fake_job(tmp_path / "out"), str(folder), LATENT_SUFFIXES, engine="local", workers=1)
    next(outcomes)
    outcomes.close()  # type: ignore[attr-defined]
    assert happened == ["stopped", "free"]


@pytest.mark.parametrize(
    ("name", "line", "said"),
    [
        ("m.txt", "\0" * (1 << 20), "line 1 has 65536 characters or more"),
        ("m.jsonl", "x" * (1 << 20), "line 1 has 65536 characters or more"),
        ("m.jsonl", "[" * 60_000, "line 1 is no object with a path"),
    ],
)
def test_a_manifest_of_one_endless_line_is_not_read_to_its_end(tmp_path: Path, name: str, line: str, said: str) -> None:
    (tmp_path / name).write_text(line)
    with pytest.raises(DataError, match=said):
        list(list_items(str(tmp_path / name), LATENT_SUFFIXES))


@pytest.mark.parametrize("workers", [-1, env.MOST_PROCESSES + 1, 2**31])
def test_more_workers_than_a_machine_can_bear_are_not_begun(tmp_path: Path, workers: int) -> None:
    folder, job = make_inputs(tmp_path / "in", {"0.pt": "item"}), fake_job(tmp_path / "out")
    with pytest.raises(ConfigError, match=f"workers must be 1 to {env.MOST_PROCESSES} on this machine, got {workers}"):
        go(job, folder, workers)


def test_outputs_of_spawned_workers_are_right_and_a_second_run_has_nothing_to_do(tmp_path: Path) -> None:
    texts = {f"{n % 3}/{n}.pt": f"item {n}" for n in range(30)}
    folder, job = make_inputs(tmp_path / "in", texts), fake_job(tmp_path / "out")
    done = go(job, folder, workers=2)
    assert sorted(o.item for o in done) == sorted(str(folder / name) for name in texts)
    assert {o.state for o in done} == {"done"}
    found = outputs_of(job)
    assert set(found) == {f"{name}.npy" for name in texts}
    assert not (Path(job.out) / "_ledger/staging").exists()
    for name, text in texts.items():
        assert np.array_equal(np.load(Path(job.out) / f"{name}.npy"), frames_of(text).numpy())
    assert go(job, folder) == []
    state = status(job, str(folder), LATENT_SUFFIXES)
    assert (state.done, state.failed, state.left, state.frames) == (30, 0, 0, 60)
    assert state.rate is not None
    (folder / "0/0.pt").write_text("changed", encoding="utf-8")
    assert [o.item for o in go(job, folder)] == [str(folder / "0/0.pt")]
    assert np.array_equal(np.load(Path(job.out) / "0/0.pt.npy"), frames_of("changed").numpy())


def test_an_input_that_is_again_what_it_was_is_decoded_again(tmp_path: Path) -> None:
    """Its outputs were replaced by those of the state between."""
    folder, job = make_inputs(tmp_path / "in", {"0.pt": "first"}), fake_job(tmp_path / "out")
    place = folder / "0.pt"
    first = place.stat().st_mtime_ns
    for text, at in (("first", first), ("other", first + 10**9), ("first", first)):
        place.write_text(text, encoding="utf-8")
        os.utime(place, ns=(at, at))
        assert [o.state for o in go(job, folder)] == ["done"]
        assert np.array_equal(np.load(Path(job.out) / "0.pt.npy"), frames_of(text).numpy())
        assert go(job, folder) == []
        assert list(verify(job)) == []
        assert status(job, str(folder), LATENT_SUFFIXES)[:4] == (1, 0, 0, 2)


def test_outputs_that_were_only_placed_count_as_older_than_those_of_a_changed_input(tmp_path: Path) -> None:
    folder, job = make_inputs(tmp_path / "in", {"0.pt": "first"}), fake_job(tmp_path / "out")
    go(job, folder)
    (part,) = (Path(job.out) / "_ledger/parts").iterdir()
    lines = part.read_text(encoding="utf-8").splitlines(keepends=True)
    part.write_text("".join(line for line in lines if json.loads(line)["event"] != "done"), encoding="utf-8")  # killed
    (folder / "0.pt").write_text("other state", encoding="utf-8")
    assert [o.state for o in go(job, folder)] == ["done"]
    assert go(job, folder) == []
    assert list(verify(job)) == []


def test_a_bad_item_a_hanging_one_and_a_deadly_one_fail_alone(tmp_path: Path) -> None:
    texts = {f"{n}.pt": f"item {n}" for n in range(12)}
    texts |= {"03.pt": "bad", "05.pt": "hang", "07.pt": "die", "09.pt": f"die-once:{tmp_path / 'died'}"}
    folder, job = make_inputs(tmp_path / "in", texts), fake_job(tmp_path / "out", time_limit=3.0)
    outcomes = {Path(o.item).name: o for o in go(job, folder)}
    assert set(outcomes) == set(texts)
    failed = {name: o.reason for name, o in outcomes.items() if o.state == "failed"}
    assert failed == {
        "03.pt": "it is bad",
        "05.pt": "took longer than 3 s",
        "07.pt": "3 workers ended while they had it",
    }
    told = [json.loads(line) for line in (Path(job.out) / "_ledger/failed.jsonl").read_text().splitlines()]
    assert {Path(line["item"]).name: line["reason"] for line in told} == failed
    assert all(line["remedy"] for line in told)
    assert set(outputs_of(job)) == {f"{name}.npy" for name in texts if name not in failed}
    make_inputs(folder, {"03.pt": "good now", "05.pt": "good too", "07.pt": "and this"})
    assert {o.state for o in go(job, folder)} == {"done"}
    assert (Path(job.out) / "_ledger/failed.jsonl").read_text() == ""


def test_an_item_that_is_being_written_does_not_fail_with_a_deadly_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that takes long to hash, and behind it an item that ends the worker at once, three times."""

    def slow(file: Any) -> str:
        time.sleep(0.1)
        return digest_of(file)

    monkeypatch.setattr("owl_wms.batch.worker.digest_of", slow)
    folder = make_inputs(tmp_path / "in", {"a.pt": "a", "b.pt": "die", **{f"{n}.pt": "c" for n in "cdef"}})
    outcomes = {Path(o.item).name: o.state for o in go(fake_job(tmp_path / "out"), folder)}
    assert outcomes == {"a.pt": "done", "b.pt": "failed", **{f"{n}.pt": "done" for n in "cdef"}}


def test_an_item_is_told_once_though_its_block_was_given_out_twice(tmp_path: Path) -> None:
    texts = {"a.pt": "a", "b.pt": "bad", "c.pt": "slow:0.3", "d.pt": f"die-once:{tmp_path / 'died'}", "e.pt": "e"}
    folder = make_inputs(tmp_path / "in", {**texts, **{f"f{n:02}.pt": str(n) for n in range(30)}})
    tally = Tally()
    found = run(fake_job(tmp_path / "out"), str(folder), LATENT_SUFFIXES, engine="local", workers=1, tally=tally)
    items = [outcome.item for outcome in found if outcome.key]
    assert sorted(items) == sorted(map(str, folder.iterdir()))
    assert tally.sum()[:2] == (34, 1)


def test_what_was_placed_and_not_recorded_is_not_decoded_again(tmp_path: Path) -> None:
    folder = make_inputs(tmp_path / "in", {f"{n}.pt": f"item {n}" for n in range(4)})
    job = fake_job(tmp_path / "out")
    plain(job, folder)
    for part in (Path(job.out) / "_ledger/parts").iterdir():
        kept = [line for line in part.read_text().splitlines() if '"done"' not in line]
        part.write_text("\n".join(kept) + '\n{"event": "do')  # killed while it wrote
    (Path(job.out) / "2.pt.npy").unlink()  # killed before it had its name
    before = {name: (Path(job.out) / name).stat().st_ino for name in outputs_of(job)}
    assert [Path(o.item).name for o in go(job, folder)] == ["2.pt"]
    assert {name: (Path(job.out) / name).stat().st_ino for name in before} == before
    assert status(job, str(folder), LATENT_SUFFIXES).done == 4


def test_other_settings_are_another_generation(tmp_path: Path) -> None:
    from owl_wms.batch import prepare

    folder, job = make_inputs(tmp_path / "in", {"a.pt": "a"}), fake_job(tmp_path / "out")
    plain(job, folder)
    other, others = prepare(FakeClips, str(tmp_path / "out"), form="npy", settings={"fake": 2})
    assert other.out != job.out
    assert others == [job.generation]
    assert status(other, str(folder), LATENT_SUFFIXES).left == 1


def test_verify_finds_what_changed_and_the_next_run_mends_it(tmp_path: Path) -> None:
    folder = make_inputs(tmp_path / "in", {f"{n}.pt": f"item {n}" for n in range(4)})
    job = fake_job(tmp_path / "out")
    plain(job, folder)
    assert list(verify(job)) == []
    good, frames = outputs_of(job), status(job, str(folder), LATENT_SUFFIXES).frames
    (Path(job.out) / "1.pt.npy").write_bytes(b"\0" + good["1.pt.npy"][1:])
    (Path(job.out) / "2.pt.npy").unlink()
    wrong = dict(verify(job))
    assert wrong == {"1.pt.npy": "its hash is not the one that was recorded", "2.pt.npy": "is not there"}
    assert status(job, str(folder), LATENT_SUFFIXES).frames == frames // 2, "two of four are lost"
    assert len(go(job, folder)) == 2
    assert outputs_of(job) == good
    assert status(job, str(folder), LATENT_SUFFIXES).frames == frames, "each is counted once"


def test_another_input_never_replaces_outputs_of_a_file_that_is_still_there(tmp_path: Path) -> None:
    one, other = (make_inputs(tmp_path / name, {"a.pt": name, "b.pt": name}) for name in ("one", "other"))
    job = fake_job(tmp_path / "out")
    assert len(go(job, one)) == 2
    made = outputs_of(job)
    said = r"has outputs of .*/one/a.pt, which those of .*/other/a.pt would replace; give another --out"
    with pytest.raises(BatchError, match=said):
        go(job, other)
    assert outputs_of(job) == made
    one.rename(tmp_path / "moved")  # the same files, or so it may be
    assert len(go(job, tmp_path / "moved")) == 2
    assert outputs_of(job) == made


def test_an_output_with_the_name_of_a_folder_fails_alone(tmp_path: Path) -> None:
    folder = make_inputs(tmp_path / "in", {"a.pt": "a", "a.pt.npy/b.pt": "b", "c.pt": "c"})
    outcomes = go(fake_job(tmp_path / "out"), folder)
    (failed,) = (o for o in outcomes if o.state == "failed")
    lost = str(Path(failed.item).relative_to(folder))  # items are finished side by side, so either may be first
    assert (
        failed.reason == f"its output {lost}.npy needs the name of another input's file or folder; rename one of them"
    )
    placed = {str(Path(o.item).relative_to(folder)) for o in outcomes if o.state == "done"}
    assert placed == {"a.pt", "a.pt.npy/b.pt", "c.pt"} - {lost}
    assert {"c.pt"} < placed


def test_an_item_that_needs_more_memory_is_not_to_be_mended(tmp_path: Path) -> None:
    job = fake_job(tmp_path / "out")
    (outcome,) = plain(job, make_inputs(tmp_path / "in", {"a.pt": "large"}))
    assert "can't allocate memory" in outcome.reason
    (line,) = (line for line in parts(job) if line["event"] == "failed")
    assert line["remedy"].startswith("free memory, or give a smaller --batch-size")


@pytest.mark.parametrize("clips", [["x", "y"], ["x", "x.npy/z"]], ids=["another's", "its own"])
def test_outputs_of_one_item_appear_all_or_none(
    tmp_path: Path, clips: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, job = make_inputs(tmp_path / "in", {"a.tar": "a"}), fake_job(tmp_path / "out")
    before = make_inputs(Path(job.out), {"a.tar/y.npy/z.npy": "of another input", "a.tar/x.npy": "of an earlier run"})
    if len(clips[1]) > 1:
        (before / "a.tar/x.npy").unlink()
    made = outputs_of(job)
    monkeypatch.setattr(FakeClips, "sources", lambda *_: [FakeSource(clip, (1, 2), clip) for clip in clips])
    (outcome,) = plain(job, folder)
    assert "needs the name of another input's file or folder" in outcome.reason
    assert outputs_of(job) == made


def test_an_output_that_cannot_be_asked_about_ends_the_run_and_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, job = make_inputs(tmp_path / "in", {"a.pt": "a"}), fake_job(tmp_path / "out")
    items = list(list_items(str(folder), LATENT_SUFFIXES))
    (done,) = [line for line in _lines_after(BlockWorker(job), items) if line["event"] == "done"]
    part = Part(job.ledger().store, "again")
    part.add("placing", done["key"], item=done["item"], outputs=done["outputs"])
    part.close()

    def away(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patched:
        patched.setattr(Store, "digest", away)
        with pytest.raises(BatchError, match="Input/output error"):  # else worker after worker would end with a trace
            list(BlockWorker(job).run([("again", items)]))
    with monkeypatch.context() as patched:
        patched.setattr(Store, "download", away)
        with pytest.raises(BatchError, match="Input/output error"):
            list(verify(job))
    assert [line for line in job.ledger().lines() if line["event"] == "lost"] == []
    assert list(verify(job)) == []


def _lines_after(worker: BlockWorker, items: list[Item]) -> list[dict[str, Any]]:
    assert len(list(worker.run([("first", items)]))) == 2
    return list(worker._job.ledger().lines())


@pytest.mark.parametrize(
    ("clips", "reason"),
    [
        (["../../x"], "a part of its output's name means a folder: 'a.tar/../../x.npy'"),
        (["/etc/x"], "a part of its output's name is empty: 'a.tar//etc/x.npy'"),
        (["x" * 252], "a part of its output's name is longer than 255 bytes: 'a.tar/xxx"),
        (["x", "x"], "two clips inside it have the same name"),
    ],
)
def test_clips_of_an_archive_stay_in_its_folder(
    tmp_path: Path, clips: list[str], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, job = make_inputs(tmp_path / "in", {"a.tar": "a"}), fake_job(tmp_path / "out")
    monkeypatch.setattr(FakeClips, "sources", lambda *_: [FakeSource(clip, (1, 2), "a") for clip in clips])
    (outcome,) = plain(job, folder)
    assert outcome.reason.startswith(reason)
    assert outputs_of(job) == {}


def test_names_that_shells_and_encodings_do_not_like(tmp_path: Path) -> None:
    names = ["\u65e5 \u672c.pt", "new\nline.pt", "-dash.pt", "[x]*?.pt", "a::b.pt", "~.pt", "%41.pt", "\udcff.pt"]
    folder = make_inputs(tmp_path / "in::put", dict.fromkeys(names, "text"))
    job = fake_job(tmp_path / "out::put")
    assert {(Path(o.item).name, o.state) for o in go(job, folder)} == {(name, "done") for name in names}
    assert set(outputs_of(job)) == {f"{name}.npy" for name in names}
    assert list(verify(job)) == []
    assert go(job, folder) == []


def test_a_clock_that_was_set_back_hides_no_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, job = make_inputs(tmp_path / "in", {"a.pt": "a"}), fake_job(tmp_path / "out")
    assert len(go(job, folder)) == 1
    (Path(job.out) / "a.pt.npy").write_bytes(b"damaged")
    monkeypatch.setattr(time, "time_ns", lambda: 1)
    assert dict(verify(job)) == {"a.pt.npy": "its hash is not the one that was recorded"}
    assert len(go(job, folder)) == 1
    assert list(verify(job)) == []
    assert go(job, folder) == []


def test_lines_of_the_ledger_that_a_disk_has_damaged_are_passed_over(tmp_path: Path) -> None:
    folder, job = make_inputs(tmp_path / "in", {"a.pt": "a", "b.pt": "bad"}), fake_job(tmp_path / "out")
    go(job, folder)
    part = max((Path(job.out) / "_ledger/parts").iterdir())
    with part.open("ab") as file:
        for event in ("begin", "placing", "done", "failed", "lost"):
            file.write(json.dumps({"key": "k", "event": event}).encode() + b"\n")
        file.write(b'{"key": "k", "event": "done", "at": 1, "item": "i", "outputs": [], "frames": "x"}\n')
        for odd in (1, {}, {"name": "a"}, {"name": "a\0b", "sha256": "0"}, {"name": "a", "sha256": 1}):
            facts = {"key": "o", "event": "placing", "at": 1, "item": "i", "outputs": [odd]}
            file.write(json.dumps(facts).encode() + b"\n")
        file.write(b'{"key": "k", "event": "done", "at": NaN, "item": "i", "outputs": [], "frames": 1}\n')
        file.write(b'{"key": "\\ud800", "event": "lost", "at": 1}\n\xff\n[]\n' + b"[" * 100_000)
    (Path(job.out) / "_ledger/settings.json").write_bytes(b"[" * 100_000)
    state = status(job, str(folder), LATENT_SUFFIXES)
    assert (state.done, state.failed, state.left, state.frames) == (1, 1, 1, 2)
    assert [o.state for o in go(job, folder)] == ["failed"]
    assert list(verify(job)) == []


def test_a_second_run_on_the_same_output_refuses(tmp_path: Path) -> None:
    folder, job = make_inputs(tmp_path / "in", {"a.pt": "a"}), fake_job(tmp_path / "out")
    with held(job), pytest.raises(BatchError, match="another run is writing here"):
        go(job, folder)
    assert len(go(job, folder)) == 1


def on_a_disk_of_its_own(folder: Path, body: Callable[[Callable[[str], None]], None]) -> None:
    """Runs the body in a fork that sees a RAM disk at `folder`; it is given what sets the disk's size."""

    def child() -> None:
        libc, options = ctypes.CDLL(None, use_errno=True), ["size=1m"]
        user, group = os.getuid(), os.getgid()
        new_user, new_mounts, private, remount = 0x10000000, 0x20000, 0x44000, 0x20  # <sched.h>, <sys/mount.h>
        refused = libc.unshare(new_mounts | (new_user if user else 0))
        if not refused and user:
            Path("/proc/self/setgroups").write_text("deny")
            Path("/proc/self/uid_map").write_text(f"0 {user} 1")
            Path("/proc/self/gid_map").write_text(f"0 {group} 1")
        refused = refused or libc.mount(None, b"/", None, private, None)
        if refused or libc.mount(b"none", os.fsencode(folder), b"tmpfs", 0, options[0].encode()):
            os._exit(77)

        def resize(size: str) -> None:
            assert not libc.mount(b"none", os.fsencode(folder), b"tmpfs", remount, f"size={size}".encode())

        body(resize)

    folder.mkdir()
    process = FORK.Process(target=child)
    process.start()
    process.join(60)
    if process.exitcode == 77:
        pytest.skip("this system lets tests mount no RAM disk")
    assert process.exitcode == 0


def test_a_full_disk_ends_the_run_and_nothing_is_lost(tmp_path: Path) -> None:
    folder = make_inputs(tmp_path / "in", {f"{n}.pt": f"item {n}" for n in range(40)})
    plain(fake_job(tmp_path / "quiet"), folder)
    wanted, job = outputs_of(fake_job(tmp_path / "quiet")), fake_job(tmp_path / "out")

    def body(resize: Callable[[str], None]) -> None:
        resize("128k")  # a file takes a page of 4 KiB
        for _ in range(2):
            with pytest.raises(BatchError, match="No space left on device; make room"):
                go(job, folder, workers=2)
        there = {name: data for name, data in outputs_of(job).items() if "staging" not in name}
        assert 0 < len(there) < len(wanted)
        assert there.items() <= wanted.items(), "what has its name is whole"
        resize("1m")
        assert len(go(job, folder)) >= len(wanted) - len(there)
        assert outputs_of(job) == wanted

    on_a_disk_of_its_own(tmp_path / "out", body)


def test_two_runs_at_once_share_nothing_and_lose_nothing(tmp_path: Path) -> None:
    folder = make_inputs(tmp_path / "in", {f"{n:02}.pt": f"item {n}" for n in range(40)})
    plain(fake_job(tmp_path / "quiet"), folder)
    wanted = outputs_of(fake_job(tmp_path / "quiet"))
    for kind in ("threads", "processes"):
        job = fake_job(tmp_path / kind)
        barrier: Any = threading.Barrier(3) if kind == "threads" else FORK.Barrier(3)
        said: Any = [] if kind == "threads" else FORK.Manager().list()

        def one(job: Job = job, barrier: Any = barrier, said: Any = said) -> None:
            barrier.wait(30)
            try:
                said.append(len(go(job, folder)))
            except BatchError as error:
                said.append(str(error))

        both = [(threading.Thread if kind == "threads" else FORK.Process)(target=one) for _ in range(3)]
        for each in both:
            each.start()
        for each in both:
            each.join(60)
        # Each did all of it, found it done, or was refused.
        assert sorted(outcome for outcome in said if isinstance(outcome, int))[-1] == 40
        assert all(outcome in (0, 40) or "another run is writing here" in outcome for outcome in said)
        assert len(said) == 3
        assert outputs_of(job) == wanted
        done = [line["key"] for line in parts(job) if line["event"] == "done"]
        assert len(done) == len(set(done)) == 40


def test_the_next_item_is_computed_while_the_files_of_several_blocks_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three blocks, [2, 1, 1]: no file of the first two is finished before the last item has begun."""
    folder = make_inputs(tmp_path / "in", {f"{n}.pt": f"item {n}" for n in range(4)})
    job, end = fake_job(tmp_path / "out"), time.monotonic() + 60

    def late(file: Any) -> str:
        while sum(line["event"] == "begin" for line in parts(job)) < 4 and time.monotonic() < end:
            time.sleep(0.01)
        return digest_of(file)

    monkeypatch.setattr("owl_wms.batch.worker.digest_of", late)
    assert len(go(job, folder)) == 4
    assert time.monotonic() < end
    (stages,) = {tuple(line["stages"]) for line in parts(job) if line["event"] == "done"}
    assert stages == ("open", "write", "hash")


def test_blocks_are_cut_by_bytes_and_become_smaller_at_the_end() -> None:
    items = [Item(str(n), str(n), 10, "") for n in range(1000)]
    sizes = [len(block) for block in cut(items, 2)]
    assert sum(sizes) == 1000
    assert sizes[:20] == [16] * 20
    assert sizes[-4:] == [1, 1, 1, 1]
    assert [item for block in cut(items, 2) for item in block] == items
    assert max(len(block) for block in cut(items, 1, most_bytes=45)) == 4
    assert [len(block) for block in cut([Item("a", "a", 100, "")], 1, most_bytes=45)] == [1]
