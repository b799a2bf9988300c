"""`owl-wms data import`: every form gives the same table; an import that is killed goes on; bad clips are named."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save, save_file

from owl_wms.configs import TAEHVConfig
from owl_wms.data.importing import FrameEncoder, Imported, import_clips
from owl_wms.data.npy_table import NpyTable, NpyTableWriter
from owl_wms.data.sources import clips_of
from owl_wms.data.statistics import describe_table
from owl_wms.errors import ConfigError, DataError
from owl_wms.media.arrays import save_array
from owl_wms.media.facts import Facts
from owl_wms.media.read_facts import read_facts
from owl_wms.media.video import VideoWriter
from owl_wms.vae import build_decoder
from tests.cli.runner import run
from tests.media.test_video import gradient


def clip(seed: int, n: int = 5) -> dict[str, torch.Tensor]:
    """A clip of 3x5 latents of 6 channels and 7 buttons."""
    draw = torch.Generator().manual_seed(seed)
    return {
        "latent": torch.randn(n, 6, 3, 5, generator=draw) * 2 + 1,
        "mouse": torch.randn(n, 2, generator=draw),
        "buttons": (torch.rand(n, 7, generator=draw) > 0.5).float(),
    }


CLIPS = {name: clip(seed) for seed, name in enumerate(("a 2", "a 10", "b.c"))}


def pt(tensor: torch.Tensor) -> bytes:
    out = io.BytesIO()
    torch.save(tensor, out)
    return out.getvalue()


def npy(tensor: torch.Tensor) -> bytes:
    out = io.BytesIO()
    np.save(out, tensor.numpy())
    return out.getvalue()


def tar(encode: Callable[[torch.Tensor], bytes], suffix: str) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for base, members in CLIPS.items():
            for member, tensor in members.items():
                entry = tarfile.TarInfo(f"{base}.{member}{suffix}")
                data = encode(tensor)
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))
            note = tarfile.TarInfo(f"{base}.json")
            archive.addfile(note, io.BytesIO(b""))
    return out.getvalue()


def make_source(form: str, place: Path) -> str:
    """The clips in one of the forms; returns the source."""
    place.mkdir()
    if form in (".pt", ".npy", ".safetensors"):
        for base, members in CLIPS.items():
            for member, tensor in members.items():
                save_array(place / f"{base}.{member}{form}", tensor)
    elif form == "one file each":
        for base, members in CLIPS.items():
            save_file({k: v.contiguous() for k, v in members.items()}, place / f"{base}.safetensors")
    elif form == "one file":
        stacked = {key: torch.stack([members[key] for members in CLIPS.values()]) for key in CLIPS["b.c"]}
        save_array(place / "all.pt", {"latents": stacked.pop("latent"), **stacked})
        return str(place / "all.pt")
    elif form == "arrow":
        pyarrow = pytest.importorskip("pyarrow")
        rows = pyarrow.Table.from_pylist([{k: v.tolist() for k, v in members.items()} for members in CLIPS.values()])
        path = str(place / "data-00000-of-00001.arrow")
        with pyarrow.OSFile(path, "wb") as file, pyarrow.ipc.new_stream(file, rows.schema) as writer:
            writer.write_table(rows)
        (place / "state.json").write_text("{}")
    elif form == "parquet":
        pytest.importorskip("pyarrow")
        import pyarrow.parquet

        rows = pyarrow.Table.from_pylist([{k: v.tolist() for k, v in members.items()} for members in CLIPS.values()])
        pyarrow.parquet.write_table(rows, place / "train.parquet")
    else:
        encode = {"tar": pt, "tar of npy": npy, "tar of safetensors": lambda t: save({"x": t})}[form]
        (place / "0000.tar").write_bytes(tar(encode, {"tar": ".pt", "tar of npy": ".npy"}.get(form, ".safetensors")))
    return str(place)


FORMS = [".pt", ".npy", ".safetensors", "one file each", "one file", "tar", "tar of npy", "tar of safetensors", "arrow",
         "parquet"]  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_table(tmp_path: Path, form: str) -> None:
    source = make_source(form, tmp_path / "source")
    done = import_clips(source, tmp_path / "table", fps=12)
    assert done == Imported(added=3, frames=15)
    table = NpyTable(tmp_path / "table")
    assert table.columns == ("depth_latent", "buttons", "mouse")
    found = [table.slice(row, "depth_latent", 0, 5) for row in range(3)]
    for members in CLIPS.values():
        row = next(i for i, latents in enumerate(found) if np.allclose(latents, members["latent"], atol=1e-6))
        assert np.array_equal(table.slice(row, "buttons", 0, 5), members["buttons"])
        assert np.allclose(table.slice(row, "mouse", 0, 5), members["mouse"])
    assert {row.fields["fps"] for row in table.rows} == {12}
    assert import_clips(source, tmp_path / "table", fps=12) == Imported(present=3)
    assert len(NpyTable(tmp_path / "table").rows) == 3


def test_clips_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    source = make_source(".npy", tmp_path / "source")
    assert [found.name for found in clips_of(source)] == ["a 2", "a 10", "b.c"]


def test_a_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Client:
        def get_paginator(self, name: str) -> Any:
            return self

        def paginate(self, Bucket: str, Prefix: str) -> list[dict[str, Any]]:
            keys = ["feats/0001.tar", "feats/readme.md", "feats/0000.tar"]
            return [{"Contents": [{"Key": key} for key in keys if key.startswith(Prefix)]}]

        def get_object(self, Bucket: str, Key: str) -> dict[str, Any]:
            return {"Body": io.BytesIO(tar(pt, ".pt"))}

    monkeypatch.setattr("owl_wms.data.s3.TarBucket.client", Client())
    assert import_clips("s3://b/feats", tmp_path / "table", fps=12).added == 6
    with pytest.raises(DataError, match=r"no \.tar below this prefix"):
        import_clips("s3://b/other", tmp_path / "other", fps=12)


def spoilt(**changes: Any) -> dict[str, torch.Tensor]:
    made: dict[str, Any] = {**clip(9), **changes}
    return {key: value for key, value in made.items() if value is not None}


BAD = {
    "nan": (spoilt(latent=torch.full((5, 6, 3, 5), float("nan"))), "depth_latent holds NaN"),
    "length": (spoilt(mouse=torch.zeros(4, 2)), r"mouse has \[4, 2\] for 5 frames"),
    "buttons": (spoilt(buttons=torch.full((5, 7), 0.5)), "buttons must be 0 or 1"),
    "axes": (spoilt(mouse=torch.zeros(5, 3)), r"mouse must be \[n, 2\]"),
    "integers": (spoilt(latent=torch.zeros(5, 6, 3, 5, dtype=torch.int32)), "must be floating point"),
    "rank": (spoilt(latent=torch.zeros(5, 6)), "must be floating point"),
    "empty": (spoilt(latent=torch.zeros(0, 6, 3, 5)), "for 0 frames"),
    "no latents": (spoilt(latent=None), "has no latents"),
    "other size": (spoilt(latent=torch.zeros(5, 6, 4, 4)), "those of the table"),
    "no mouse": (spoilt(mouse=None), "those of the table"),
    "other buttons": (spoilt(buttons=torch.zeros(5, 8)), "those of the table"),
}


@pytest.mark.parametrize("name", BAD)
def test_clips_that_cannot_be_used_are_named_or_left_out(tmp_path: Path, name: str) -> None:
    members, words = BAD[name]
    source = tmp_path / "source"
    source.mkdir()
    save_array(source / "a.safetensors", CLIPS["a 2"])
    save_array(source / "b.safetensors", members)
    save_array(source / "c.safetensors", CLIPS["b.c"])
    with pytest.raises(DataError, match=words) as caught:
        import_clips(str(source), tmp_path / "table", fps=12)
    assert "\n" not in str(caught.value)
    assert len(NpyTable(tmp_path / "table").rows) == 1, "what came before is a whole table"
    if name == "no latents":  # a file without them is an error of the source, not of one of its clips
        return
    said: list[DataError] = []
    done = import_clips(str(source), tmp_path / "table", fps=12, skip_bad=said.append)
    assert (done.added, done.present, done.skipped, len(said)) == (1, 1, 1, 1)


def test_refusals(tmp_path: Path) -> None:
    source = make_source(".pt", tmp_path / "source")
    with pytest.raises(ConfigError, match="frames per second; say them with --fps"):
        import_clips(source, tmp_path / "table")
    assert not (tmp_path / "table" / "schema.json").exists(), "no table without a clip"
    import_clips(source, tmp_path / "table", fps=12)
    save_array(tmp_path / "source" / "z.pt", CLIPS["b.c"])
    with pytest.raises(DataError, match=r"has 13 frames per second, the rows of the table have 12"):
        import_clips(source, tmp_path / "table", fps=13)
    (tmp_path / "none").mkdir()
    (tmp_path / "x.doc").write_text("")
    for bad, words in {
        "none": "holds no clips",
        "nowhere": "no such file",
        "x.doc": "ending in",
        "table": "a table already",
    }.items():
        with pytest.raises(DataError, match=words):
            import_clips(str(tmp_path / bad), tmp_path / "t", fps=12)
    import filelock

    with filelock.FileLock(tmp_path / "table" / ".import.lock"), pytest.raises(DataError, match="another import"):
        import_clips(source, tmp_path / "table", fps=12)


def test_facts_of_a_file_are_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    facts = Facts(fps=15, vae="v.safetensors", vae_sha256="b" * 64, vae_scale=0.5, layout="n c h w")
    save_array(tmp_path / "x.safetensors", CLIPS["b.c"]["latent"], facts=facts)
    import_clips(str(tmp_path / "x.safetensors"), tmp_path / "table")
    assert NpyTable(tmp_path / "table").rows[0].fields["fps"] == 15
    assert read_facts(tmp_path / "table").vae_sha256 == "b" * 64
    # A table holds what the decoder takes: the file's latents were divided by 0.5.
    stored = NpyTable(tmp_path / "table").slice(0, "depth_latent", 0, 2)
    assert np.array_equal(stored, np.asarray(CLIPS["b.c"]["latent"])[:2] * 0.5)
    assert read_facts(tmp_path / "table").vae_scale == 1.0
    caplog.clear()
    import_clips(str(tmp_path / "x.safetensors"), tmp_path / "faster", fps=30)
    assert NpyTable(tmp_path / "faster").rows[0].fields["fps"] == 30
    assert caplog.messages[0] == "x.safetensors: states 15 frames per second, and --fps says 30, which is stored"


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_facts_of_a_member_of_a_tar_are_taken(tmp_path: Path, suffix: str) -> None:
    save_array(tmp_path / f"x.latent{suffix}", CLIPS["b.c"]["latent"], facts=Facts(fps=15, vae_scale=0.5))
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.add(tmp_path / f"x.latent{suffix}", f"x.latent{suffix}")
    import_clips(str(tmp_path / "x.tar"), tmp_path / "table")
    table = NpyTable(tmp_path / "table")
    assert table.rows[0].fields["fps"] == 15
    assert np.array_equal(table.slice(0, "depth_latent", 0, 2), np.asarray(CLIPS["b.c"]["latent"])[:2] * 0.5)


def test_videos_are_encoded_with_their_controls(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = tmp_path / "source"
    source.mkdir()
    frames = gradient(6)
    with VideoWriter(source / "a.mp4", 12) as video:
        video.write(frames)
    rows = "\n".join(f"{i / 2},{-i},{i % 2},0,1" for i in range(6))
    (source / "a.csv").write_text(f"mouse_x,mouse_y,W,A,S\r\n{rows}\r\n", encoding="utf-8-sig")
    encoder = FrameEncoder(encode=lambda x: x[:, :, ::12, ::16], channels=3, size=(36, 64), batch=4)
    with pytest.raises(ConfigError, match="is a video; give the autoencoder"):
        import_clips(str(source), tmp_path / "table")
    done = import_clips(str(source), tmp_path / "table", encoder=encoder)
    assert (done.added, done.frames) == (1, 6)
    table = NpyTable(tmp_path / "table")
    assert table.rows[0].fields["fps"] == 12
    assert table.slice(0, "mouse", 0, 6).tolist() == [[i / 2, -i] for i in range(6)]
    assert table.slice(0, "buttons", 3, 4).tolist() == [[1, 0, 1]]
    shown = frames.permute(0, 3, 1, 2)[:, :, ::12, ::16].float() / 127.5 - 1
    assert np.abs(table.slice(0, "depth_latent", 0, 6) - shown.numpy()).mean() < 0.05
    # Without a mouse: one at rest where it is asked for; a table without a header is no list of buttons.
    (source / "a.csv").write_text("GRIP,LIFT\n" + "1,0\n" * 6)
    import_clips(str(source), tmp_path / "still", encoder=encoder, no_mouse=True)
    still = NpyTable(tmp_path / "still")
    assert still.slice(0, "mouse", 0, 6).tolist() == [[0, 0]] * 6
    assert still.slice(0, "buttons", 0, 1).tolist() == [[1, 0]]
    assert json.loads((tmp_path / "still" / "source.json").read_text())["buttons"] == ["GRIP", "LIFT"]
    (source / "a.csv").write_text("1,0\n" * 6)
    with pytest.raises(DataError, match="must begin with mouse_x"):
        import_clips(str(source), tmp_path / "other", encoder=encoder, no_mouse=True)
    (source / "a.csv").write_text("mouse_x,mouse_y,W\n0,0,no\n")
    with pytest.raises(DataError, match=r"a\.csv: cannot be read as controls"):
        import_clips(str(source), tmp_path / "other", encoder=encoder)
    assert not caplog.messages
    (source / "a.csv").unlink()
    import_clips(str(source), tmp_path / "uncontrolled", encoder=encoder)
    assert caplog.messages == ["a.mp4: has no controls, which training needs; for NAME.mp4, NAME.csv holds them"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", "it is empty"),
        (b"mouse_x;mouse_y;UP\n0;0;1\n", "its columns must be separated by commas"),
        (b"mouse_x,mouse_y,UP\n0,0,1\n0,0\n", "row 3 has 2 values, the header 3"),
        (b"\xff\xfem\0", "it is no text in UTF-8"),
    ],
)
def test_a_table_of_controls_that_cannot_be_used_says_why(tmp_path: Path, text: bytes, reason: str) -> None:
    save_array(tmp_path / "a.pt", torch.randn(2, 6, 3, 5))
    (tmp_path / "a.csv").write_bytes(text)
    with pytest.raises(DataError, match=rf"a\.csv: cannot be read as controls: {reason}$"):
        list(clips_of(str(tmp_path)))


def test_empty_lines_at_the_end_of_a_table_of_controls_are_none(tmp_path: Path) -> None:
    save_array(tmp_path / "a.pt", torch.randn(2, 6, 3, 5))
    (tmp_path / "a.csv").write_text("mouse_x,mouse_y,UP\n0,0,1\n0,0,0\n\n\n")
    assert [found.arrays["buttons"].tolist() for found in clips_of(str(tmp_path))] == [[[1], [0]]]


@pytest.mark.parametrize("name", ["a.pt", "a.latents.npy"])
def test_latents_have_their_controls_in_a_table_beside_them_too(tmp_path: Path, name: str) -> None:
    source = tmp_path / "source"
    save_array(source / name, torch.randn(4, 6, 3, 5))
    (source / "a.csv").write_text("mouse_x,mouse_y,UP,DOWN\n" + "0.5,0,1,0\n" * 4)
    given = [str(source)] + ([str(source / name)] if name == "a.pt" else [])
    for number, where in enumerate(given):
        import_clips(where, tmp_path / f"table{number}", fps=12)
        table = NpyTable(tmp_path / f"table{number}")
        assert table.slice(0, "mouse", 0, 1).tolist() == [[0.5, 0]]
        assert table.slice(0, "buttons", 3, 4).tolist() == [[1, 0]]
        assert json.loads((table.path / "source.json").read_text())["buttons"] == ["UP", "DOWN"]
    (source / "a.csv").write_text("mouse_x,mouse_y,UP\n0,0,1\n")
    with pytest.raises(DataError, match=r"mouse has \[1, 2\] for 4 frames of latents"):
        import_clips(str(source), tmp_path / "short", fps=12)


def test_statistics(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    writer = NpyTableWriter(tmp_path, ("depth_latent", "buttons", "mouse"), ("fps",))
    centre = np.array([1e4, -3.0])
    latents = [draw.normal(size=(50, 2, 3, 3)) * [[[0.5]], [[2.0]]] + centre[:, None, None] for _ in range(4)]
    for part in latents:
        held = np.tile(np.array([[1, 0], [0, 0]], np.uint8), (25, 1))
        writer.append(
            {"depth_latent": part.astype(np.float32), "buttons": held, "mouse": draw.normal(size=(50, 2))}, fps=20
        )
    whole = np.concatenate(latents)
    found = describe_table(NpyTable(tmp_path))
    assert np.allclose(found.mean, whole.mean(axis=(0, 2, 3)), rtol=1e-4)
    assert np.allclose(found.std, whole.std(axis=(0, 2, 3)), rtol=1e-3)
    assert found.vae_scale == pytest.approx(whole.std(), rel=0.01)
    assert found.pressed.tolist() == [0.5, 0]
    assert (found.clips, found.frames, found.sampled, found.rates) == (4, 200, 200, (20.0,))
    assert describe_table(NpyTable(tmp_path), limit=40).sampled == 40


@pytest.mark.parametrize("rate", ["20", True, -5, 0, [20]])
def test_a_rate_that_is_no_number_is_named(tmp_path: Path, rate: Any) -> None:
    """A tool that goes by way of a CSV file writes texts into a manifest."""
    torch.save(clip(0), tmp_path / "a.pt")
    import_clips(str(tmp_path / "a.pt"), tmp_path / "table", fps=20)
    manifest = tmp_path / "table" / "manifest.json"
    rows = json.loads(manifest.read_text())
    manifest.write_text(json.dumps([{**row, "fps": rate} for row in rows]))
    for read in (describe_table, lambda table: import_clips(str(tmp_path / "a.pt"), table.path, fps=20)):
        with pytest.raises(DataError, match=r"'fps' of row 0 must be a number above 0, got "):
            read(NpyTable(tmp_path / "table"))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_source("tar", tmp_path / "source")
    assert run("data", "import", source, "--out", str(tmp_path / "table"), "--fps", "12") == 0
    assert "3 clips, 15 frames added" in capsys.readouterr().out
    assert run("data", "show", str(tmp_path / "table"), "--sheet", str(tmp_path / "s.png")) == 2
    assert "--sheet needs the autoencoder" in capsys.readouterr().err
    assert run("data", "show", str(tmp_path / "table")) == 0
    shown = capsys.readouterr().out
    for words in ("3 clips, 15 frames", "depth_latent: float32 [6, 3, 5]", "frames per second: 12", "channel 5: mean",
                  "vae_scale: 2", "buttons held, share of the frames: B0 "):  # fmt: skip
        assert words in shown


def test_a_table_of_a_streaming_decoder_is_shown(tmp_path: Path) -> None:
    model = TAEHVConfig(model_id="taehv", latent_channels=6)
    save_file(build_decoder(model).state_dict(), tmp_path / "v.safetensors")
    (tmp_path / "v.yml").write_text(json.dumps({"model": {"model_id": "taehv", "latent_channels": 6}}))
    import_clips(make_source(".npy", tmp_path / "source"), tmp_path / "table", fps=12)
    files = ["--vae-config", str(tmp_path / "v.yml"), "--vae-checkpoint", str(tmp_path / "v.safetensors")]
    sheet = tmp_path / "s.png"
    assert run("data", "show", str(tmp_path / "table"), *files, "--sheet", str(sheet), "--device", "cpu") == 0
    assert sheet.stat().st_size > 1000


SCRIPT = """
import sys, time
from owl_wms.data import npy_table
from owl_wms.data.importing import import_clips
replace = npy_table._replace_json
def slowly(*a):
    time.sleep(0.02); replace(*a); time.sleep(0.02)
npy_table._replace_json = slowly
print("begun", flush=True)
import_clips(sys.argv[1], sys.argv[2], fps=12)
"""


def test_an_import_that_is_killed_goes_on(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for index in range(12):
        save_array(source / f"{index}.safetensors", clip(index))
    command = [sys.executable, "-c", SCRIPT, str(source), str(tmp_path / "table")]
    draw = np.random.default_rng(0)
    for _ in range(4):
        with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            child.stdout.readline()
            time.sleep(float(draw.uniform(0.01, 0.3)))
            child.send_signal(signal.SIGKILL)
        if (tmp_path / "table" / "schema.json").exists():
            assert len(NpyTable(tmp_path / "table").rows) >= 1, "a table has its clips"
    import_clips(str(source), tmp_path / "table", fps=12)
    rows = NpyTable(tmp_path / "table").rows
    assert sorted(row.fields["source"] for row in rows) == sorted(str(index) for index in range(12))
    assert json.loads((tmp_path / "table" / "source.json").read_text())["imported"] == str(source)
    named = {name for row in rows for name in row.fields.values() if str(name).endswith(".npy")}
    assert {name for name in os.listdir(tmp_path / "table") if name.endswith(".npy")} == named


def test_tensors_with_a_gradient_or_a_negative_bit_are_their_values(tmp_path: Path) -> None:
    mouse = torch.randn(5, 2)
    held = {"latent": torch.nn.Parameter(torch.ones(5, 4, 2, 2)), "mouse": torch._neg_view(mouse)}
    torch.save(held, tmp_path / "a.pt")
    (found,) = clips_of(str(tmp_path / "a.pt"))
    assert (found.arrays["depth_latent"] == 1).all()
    assert np.array_equal(found.arrays["mouse"], -mouse.numpy())


@pytest.mark.parametrize("dtype", [torch.complex32, torch.float4_e2m1fn_x2, torch.bits8])
def test_tensors_that_numpy_cannot_have_are_named(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.save(torch.zeros(5, 4, 2, 4, dtype=torch.uint8).view(dtype), tmp_path / "a.latent.pt")
    with pytest.raises(DataError, match=rf"a\.latent\.pt: tensors of {dtype} cannot be read"):
        list(clips_of(str(tmp_path)))


def test_clips_of_one_name_in_two_folders_are_not_taken_for_each_other(tmp_path: Path) -> None:
    for day in range(2):
        (tmp_path / str(day)).mkdir()
        torch.save(clip(day), tmp_path / str(day) / "a.pt")
    import_clips(str(tmp_path / "0"), tmp_path / "table", fps=20)
    assert import_clips(str(tmp_path / "0"), tmp_path / "table", fps=20) == Imported(present=1)
    with pytest.raises(DataError, match=r"1: clip a: row 0 of the table is another clip of this name: rename one"):
        import_clips(str(tmp_path / "1"), tmp_path / "table", fps=20)
    (tmp_path / "1" / "a.pt").rename(tmp_path / "1" / "b.pt")
    assert import_clips(str(tmp_path / "1"), tmp_path / "table", fps=20).added == 1


def test_clips_that_are_present_may_lack_what_an_earlier_import_added(tmp_path: Path) -> None:
    save_array(tmp_path / "a.pt", clip(0)["latent"], facts=Facts(fps=20, vae_scale=0.5))
    import_clips(str(tmp_path / "a.pt"), tmp_path / "table", no_mouse=True)
    for no_mouse in (False, True):
        assert import_clips(str(tmp_path / "a.pt"), tmp_path / "table", no_mouse=no_mouse) == Imported(present=1)
    save_array(tmp_path / "a.pt", clip(0)["latent"][:, :, :1, :1], facts=Facts(fps=20, vae_scale=0.5))
    with pytest.raises(DataError, match=r"clip a\.pt: row 0 of the table is another clip of this name"):
        import_clips(str(tmp_path / "a.pt"), tmp_path / "table", no_mouse=True)


def test_latents_of_two_encoders_do_not_share_a_table(tmp_path: Path) -> None:
    for name, digest in (("a", "0"), ("b", "1"), ("c", "0")):
        save_array(tmp_path / f"{name}.pt", clip(1), facts=Facts(vae=f"vae{digest}.pt", vae_sha256=digest * 64))
    import_clips(str(tmp_path / "a.pt"), tmp_path / "table", fps=20)
    text = r"clip b\.pt: was encoded with vae1\.pt \(SHA-256 11111111\), the rows of the table with vae0"
    with pytest.raises(DataError, match=text):
        import_clips(str(tmp_path / "b.pt"), tmp_path / "table", fps=20)
    assert import_clips(str(tmp_path / "c.pt"), tmp_path / "table", fps=20).added == 1


def test_frames_beside_latents_are_not_taken_for_them(tmp_path: Path) -> None:
    """`video` means latents in upstream's tars, and pixels elsewhere."""
    torch.save({**clip(0), "video": torch.zeros(5, 3, 16, 16)}, tmp_path / "a.pt")
    with pytest.raises(DataError, match=r"a\.pt: has latents twice, 'video' too; keep one"):
        list(clips_of(str(tmp_path / "a.pt")))


def test_frames_beside_latents_in_a_tar_are_not_taken_for_them(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, value in (("x.latent.pt", clip(0)["latent"]), ("x.video.pt", torch.zeros(5, 3, 16, 16))):
            torch.save(value, tmp_path / name)
            archive.add(tmp_path / name, name)
    with pytest.raises(DataError, match=r"a\.tar: member x\.video\.pt: has latents twice, 'video' too; keep one"):
        list(clips_of(str(tmp_path / "a.tar")))


def test_a_link_to_a_folder_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("clips", "elsewhere"):
        (tmp_path / name).mkdir()
        torch.save(clip(0), tmp_path / name / "a.pt")
    (tmp_path / "clips" / "part").symlink_to(tmp_path / "elsewhere")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert [found.name for found in clips_of("~/clips")] == ["a"]
    assert "part: is a link to a folder and is passed over; import that folder too" in caplog.text
    import_clips("~/clips", "~/table", fps=20)
    assert (tmp_path / "table" / "manifest.json").is_file()


def test_a_folder_that_may_not_be_read_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("", "closed"):
        save_array(tmp_path / name / "a.latent.npy", torch.zeros(5, 4, 2, 2))
    looked, closed = os.scandir, [tmp_path / "closed"]

    def refuse(folder: Any) -> Any:
        if Path(folder) in closed:  # root may read everything
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
        return looked(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    assert [found.name for found in clips_of(str(tmp_path))] == ["a"]
    assert caplog.messages == [f"{tmp_path / 'closed'}: cannot be read and is passed over: Permission denied"]
    closed.append(tmp_path)
    with pytest.raises(DataError, match=rf"^{tmp_path}: cannot be read: Permission denied"):
        import_clips(str(tmp_path), tmp_path / "table", fps=12)


def test_a_table_is_not_made_among_its_clips(tmp_path: Path) -> None:
    source = make_source(".pt", tmp_path / "source")
    with pytest.raises(DataError, match="source: holds the clips; a table wants a folder of its own"):
        import_clips(source, tmp_path / "x" / ".." / "source", fps=12)
    assert not (tmp_path / "source" / ".import.lock").exists()


def test_folders_that_systems_and_file_servers_make_hold_no_clips(tmp_path: Path) -> None:
    for name in ("", "#recycle", "@eaDir", "__MACOSX", "$RECYCLE.BIN", ".hidden"):
        save_array(tmp_path / name / "a.latent.npy", torch.zeros(5, 4, 2, 2))
    assert [found.name for found in clips_of(str(tmp_path))] == ["a"]


@pytest.mark.parametrize("again", [False, True])
def test_buttons_in_another_order_are_not_mixed(tmp_path: Path, again: bool) -> None:
    source, table = tmp_path / "source", tmp_path / "table"
    for name, head in (("a", "UP,DOWN"), ("b", "DOWN,UP")):
        save_array(source / f"{name}.pt", torch.randn(4, 6, 3, 5))
        (source / f"{name}.csv").write_text(f"mouse_x,mouse_y,{head}\n" + "0,0,1,0\n" * 4)
        if again and name == "a":
            import_clips(str(source), table, fps=12)
    with pytest.raises(DataError, match=r"clip b: its buttons are DOWN, UP, those of the table UP, DOWN; give all"):
        import_clips(str(source), table, fps=12)
    assert len(NpyTable(table).rows) == 1
    (source / "b.csv").write_text("mouse_x,mouse_y,UP,DOWN\n" + "0,0,0,1\n" * 4)
    assert import_clips(str(source), table, fps=12).added == 1


@pytest.mark.parametrize(("first", "second"), [("a.npy", "a.pt"), ("a.latent.pt", "a.latent.safetensors")])
def test_two_files_of_one_name(tmp_path: Path, first: str, second: str) -> None:
    for name in (first, second):
        save_array(tmp_path / "source" / name, torch.randn(4, 6, 3, 5))
    with pytest.raises(DataError, match=f"{first} and {second} are two files of one name; keep"):
        import_clips(str(tmp_path / "source"), tmp_path / "table", fps=12)


def test_two_files_beside_a_video_that_are_no_controls_of_it(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "a.mp4", 12) as video:
        video.write(gradient(6))
    for name in ("a.pt", "a.npy", "a.latent.pt", "a.latent.npy"):
        save_array(tmp_path / name, torch.randn(6, 6, 3, 5))
    assert [found.name for found in clips_of(str(tmp_path))] == ["a.mp4"]


def test_controls_of_a_video_in_two_files(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "a.mp4", 12) as video:
        video.write(gradient(6))
    for suffix in (".pt", ".npy"):
        save_array(tmp_path / f"a.mouse{suffix}", torch.randn(6, 2))
    with pytest.raises(DataError, match=r"a\.mouse\.pt and a\.mouse\.npy are two files of one name; keep"):
        import_clips(str(tmp_path / "a.mp4"), tmp_path / "table")


def test_caches_of_maps_beside_a_data_set_are_no_clips(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    names = ("data-00000-of-00001.arrow", "cache-d19493523d95e2dc.arrow", "cache-5b86abacd4b42434_00001_of_00002.arrow")
    for number, name in enumerate(names):
        rows = pyarrow.Table.from_pylist([{key: value.tolist() for key, value in clip(number).items()}])
        with pyarrow.OSFile(str(tmp_path / name), "wb") as file, pyarrow.ipc.new_stream(file, rows.schema) as writer:
            writer.write_table(rows)
    assert [found.name for found in clips_of(str(tmp_path))] == ["data-00000-of-00001.arrow#0"]
    assert "caches of `datasets` are passed over (2, such as cache-" in caplog.text
