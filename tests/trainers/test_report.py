"""`owl-wms report`: one page, complete and safe, from whole, resumed and torn runs.

Run: python -m pytest tests/trainers/test_report.py
"""

from __future__ import annotations

import json
import re
import zipfile
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from owl_wms.errors import CheckpointError, DataError
from owl_wms.trainers.checkpoints import LOG, load_checkpoint
from owl_wms.trainers.report import CLIP_BYTES, chart, read_run, report, thinned
from tests.cli.runner import run
from tests.trainers.test_failures import decoder_files
from tests.trainers.test_trainers import build


class Page(HTMLParser):
    """Tags, texts and links of a page; refuses tags that do not nest."""

    VOID = ("meta", "path", "polyline", "circle")
    OPTIONAL = ("tr", "td")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.texts, self.sources, self.counts = [], [], [], {}  # type: ignore[var-annotated]
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.sources += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action")]
        assert not any(name.startswith("on") for name, _ in attrs)
        if tag not in (*self.VOID, *self.OPTIONAL):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in (*self.VOID, *self.OPTIONAL):
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_a_run_becomes_one_page_that_needs_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build(tmp_path, "rft", max_steps=4, sample_interval=2, **decoder_files(tmp_path)).train()
    folder = tmp_path / "run"
    assert run("report", str(folder)) == 0
    assert f"{folder / 'report.html'}: " in capsys.readouterr().out.replace("\n", "")
    page = Page((folder / "report.html").read_text())
    assert page.counts["svg"] == 5, "diffusion_loss, latent_error, rate, gradient norm, pace"
    assert page.counts["video"] == 6, "two clips at steps 0, 2 and 4"
    assert all(source.startswith("data:video/mp4;base64,") for source in page.sources)
    text = " ".join(page.texts)
    for expected in ("diffusion_loss", "learning rate", "gradient norm", "train.opt_kwargs.lr", "torch", "Step 4"):
        assert expected in text
    assert run("report", str(folder)) == 0, "an older report is replaced"
    (tmp_path / "mine.html").write_text("mine")
    assert run("report", str(folder), "--out", str(tmp_path / "mine.html")) == 2
    assert (tmp_path / "mine.html").read_text() == "mine"
    assert run("report", str(folder), "--out", str(tmp_path / "mine.html"), "--overwrite") == 0


def test_a_folder_without_a_run_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"log\.jsonl: no log of a training run: No such file.*checkpoint_dir"):
        report(tmp_path)
    assert run("report", str(tmp_path)) == 2
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(DataError, match="no log of a training run: embedded null byte"):
        report(Path("a\0b"))
    with pytest.raises(CheckpointError, match="cannot read this checkpoint: File name too long"):
        load_checkpoint("n" * 300 + ".pt")


def write_log(folder: Path, *lines: object) -> None:
    texts = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / "log.jsonl").write_text("\n".join(texts))


def test_resumed_and_torn_logs(tmp_path: Path) -> None:
    write_log(
        tmp_path,
        {"step": 1, "seconds": 5.0, "loss": 3.0},
        {"step": 2, "seconds": 9.0, "loss": 9.0},
        {"step": 2, "seconds": 2.0, "loss": 2.0},  # another start of the run
        {"step": 3, "seconds": 3.0, "loss": "nan"},
        "[1, 2]",
        '{"step": 4, "lo',
    )
    found = read_run(tmp_path)
    assert found.series["loss"] == [(1, 3.0), (2, 2.0)]
    assert (found.seconds, found.broken) == (12.0, 2)
    assert "lines of the log that could not be read" in report(tmp_path)


@pytest.mark.parametrize(
    "line",
    [
        '{"step": 1e400}',
        '{"step": 2, "seconds": NaN}',
        f'{{"step": 2, "x": {10**400}}}',
        "[" * 100_000,
        '{"step": 1e300}',
    ],
    ids=["endless step", "no time", "a number too large", "nested", "a step too large"],
)
def test_numbers_of_a_log_that_are_none(tmp_path: Path, line: str) -> None:
    (tmp_path / LOG).write_text(f'{{"step": 1, "loss": 0.5, "seconds": 3}}\n{line}\n')
    assert read_run(tmp_path).broken == 1
    assert "lines of the log that could not be read" in report(tmp_path)


def test_a_checkpoint_of_the_other_byte_order_is_described_too(tmp_path: Path) -> None:
    state = {"model": {"weight": torch.ones(3)}, "config": {"train": {"batch_size": 4321}}}
    torch.save(state, tmp_path / "little.pt")
    with zipfile.ZipFile(tmp_path / "little.pt") as archive:
        records = {name: archive.read(f"little/{name}") for name in ("data.pkl", "data/0")}
    records["data/0"] = torch.ones(3).numpy().astype(">f4").tobytes()
    writer = torch._C.PyTorchFileWriter(str(tmp_path / "step_3.pt"))
    for name, data in {**records, "byteorder": b"big"}.items():
        writer.write_record(name, data, len(data))
    writer.write_end_of_file()
    (tmp_path / LOG).write_text('{"step": 1, "loss": 0.5}\n')
    texts = Page(report(tmp_path)).texts
    assert "train.batch_size" in texts
    assert "4321" in texts


def test_nothing_in_a_log_becomes_markup(tmp_path: Path) -> None:
    evil = '"><script>alert(1)</script>'
    write_log(
        tmp_path,
        {"step": 1, f"{evil}loss": 1.0},
        {"step": 1, "samples": f"../../{evil}.mp4", "decoded_by": evil},
        {"step": 2, "evaluation_error": evil},
    )
    page = Page(report(tmp_path))
    assert "script" not in page.counts


def test_clips_outside_the_folder_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "secret.mp4").write_bytes(b"secret")
    folder = tmp_path / "run"
    folder.mkdir()
    write_log(folder, {"step": 1, "samples": "../../secret.mp4"})
    text = report(folder)
    assert "not found" in text
    assert "base64" not in text


def test_a_page_holds_the_newest_clips_and_names_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("owl_wms.trainers.report.CLIP_BYTES", 25)
    assert CLIP_BYTES > 1 << 20
    (tmp_path / "samples").mkdir()
    for step in (1, 2, 3):
        (tmp_path / "samples" / f"step_{step}.mp4").write_bytes(bytes([step]) * 10)
    write_log(tmp_path, *({"step": step, "samples": f"step_{step}.mp4"} for step in (1, 2, 3)))
    text = report(tmp_path)
    assert text.count("base64") == 2
    assert "step_1.mp4: not shown here" in text


def test_curves_are_thinned_by_means_and_logarithmic_when_they_must_be() -> None:
    points = [(step, float(step % 2)) for step in range(1, 4001)]
    assert len(thinned(points, 500)) == 500
    assert all(value == 0.5 for _, value in thinned(points, 500))
    assert thinned([(1, float("inf"))]) == []
    assert "logarithmic" in chart("x", {"x": [(1, 100.0), (2, 1.0)]})
    assert "logarithmic" not in chart("x", {"x": [(1, 10.0), (2, 1.0)]})
    assert chart("x", {}) == chart("x", {"x": []}) == ""
    assert "circle" in chart("x", {"x": [(7, 0.0)]})
    heights = [
        float(pair.split(",")[1])
        for pair in re.search('points="([^"]*)"', chart("x", {"x": [(1, 2.0), (2, 1.0), (3, 0.0)]}))[1].split()
    ]  # type: ignore[index]
    assert heights == sorted(heights), "larger values stand higher"
    assert heights[1] == pytest.approx((heights[0] + heights[2]) / 2, abs=0.1)
