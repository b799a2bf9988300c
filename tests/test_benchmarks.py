"""What benchmarks do when something goes wrong: limits that hold, results that belong together, rows with a reason."""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import importlib
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import owl_wms
from benchmarks import (
    accuracy,
    baselines,
    community,
    dataset,
    decoder,
    decoders,
    harness,
    hidden,
    kernels,
    ops,
    ops8,
    ops_sana,
    ours,
    pictures,
    play,
    play_page,
    plot,
    report,
    road,
    road_report,
    sana,
    sana_parts,
    table,
    taehv,
    trt_matrix,
    wrapper,
)
from owl_wms.ops import resize
from owl_wms.ops.common import gpu, nvrtc
from tests.ops.decoders import dcae
from tests.runtime.sana import LATENTS, autoencoder
from tests.runtime.toolchains import ExportToolchain
from tests.versions.page import page
from tests.versions.run import summary

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
RENDERED = {
    "dataset": dataset.render,
    "decoder": report.report,
    "kernels": kernels.render,
    "ops": ops.render,
    "play": play.markdown,
    "road": lambda result: road_report.page(result, result["decoders"]),
    "sana": sana.markdown,
    "taehv": taehv.markdown,
    "trt_matrix": trt_matrix.render,
    "wrapper": wrapper.markdown,
}


def test_a_time_limit_holds_although_the_interrupted_code_wraps_it() -> None:
    def compile_something() -> None:
        try:
            time.sleep(5)
        except TimeoutError as error:
            raise RuntimeError("the compiler's own words") from error

    with pytest.raises(TimeoutError, match="not ready after 1 s"), baselines.time_limit(1):
        compile_something()


def test_errors_within_the_limit_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="does not compile"), baselines.time_limit(5):
        raise RuntimeError("does not compile")


def result(commit: str, decoder: str, gpu: str = "card") -> dict[str, Any]:
    figures = {"median_ms": 2.0, "p20_ms": 1.9, "p80_ms": 2.1, "floor_ms": 1.0}
    shared: dict[str, Any] = {"decoder": decoder, "batch": 8}
    return {
        "theme": "decoder",
        "machine": {"gpu": gpu},
        "commit": commit,
        "ceilings": {"matmul_tflops": 700.0, "copy_tbps": 3.0},
        "rows": [
            {**shared, "candidate": "eager bf16", "refused": "", "figures": figures},
            {**shared, "candidate": "ours fp8", "refused": "PSNR is low", "figures": {}},
        ],
    }


def test_runs_side_by_side_become_one_document() -> None:
    merged = report.merge([result("aaa", "dist"), result("bbb", "base")])
    assert merged["commit"] == "aaa, bbb"
    assert [row["decoder"] for row in merged["rows"]] == ["dist", "dist", "base", "base"]
    later = report.merge([merged, result("aaa", "sana")])
    assert later["parts"] == [*merged["parts"], {**later["parts"][0], "decoders": ["sana at batch 8"]}]
    assert later["commit"] == "aaa, bbb"
    text = report.report(merged)
    assert "copy 3.00 TB/s (dist at batch 8); " in text
    assert "| ours fp8 | refused: PSNR is low |" in text


def test_a_panel_that_two_runs_have_is_told() -> None:
    merged = report.merge([result("aaa", "dist"), result("bbb", "base")])
    with pytest.raises(ValueError, match="eager bf16 of base at batch 8"):
        report.merge([merged, result("ccc", "base")])


def test_readme_s_table_has_dashes_where_nothing_was_measured() -> None:
    document = result("aaa", "dist")
    ours = {"median_ms": 1.0, "over_eager": 2.0, "over_compiled": None, "relative_l2": 5e-3}
    for batch in (8, 1):
        row = {"decoder": "dist", "batch": batch, "candidate": "ours bf16", "refused": "", "figures": dict(ours)}
        document["rows"].append(row)
    text = report.readme_table(document)
    assert "| dist, bf16 | 2.0 ms | – | **1.00 ms** | 2.00x | – | –, 5.0e-03 |" in text
    assert text.count("dist, bf16") == 1, "batch 8 alone"
    del document["rows"][0]  # eager was refused
    assert "| dist, bf16 | – | – | **1.00 ms** |" in report.readme_table(document)


def test_power_that_cannot_be_read_is_a_dash() -> None:
    assert report.cell({"watts": float("nan")}, "watts", "{:.0f}") == "–"


def test_readme_and_picture_show_bf16_and_one_decoder_in_every_precision() -> None:
    rows = [
        {"decoder": name, "batch": 8, "candidate": f"ours {at}", "refused": "", "figures": {"median_ms": 1.0}}
        for name in ("dist", "base")
        for at in ("bf16", "int8")
    ]
    assert [group["name"] for group in report.batch_8(rows)] == ["dist, bf16", "base, bf16", "base, int8"]


def test_a_report_of_several_commits_says_of_each_panel_which() -> None:
    text = report.report(report.merge([result("aaa", "dist"), result("bbb", "base")]))
    assert "## dist, batch 8 (floor of bf16 products 1.00 ms), commit aaa" in text
    assert "## base, batch 8 (floor of bf16 products 1.00 ms), commit bbb" in text
    assert "commit aaa" not in report.report(result("aaa", "dist")).partition("## ")[2]


def test_readme_shows_one_result_and_other_reports_leave_it_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (report.ROOT / "README.md").read_text(encoding="utf-8")
    path = tmp_path / "other.json"
    path.write_text(json.dumps({**result("aaa", "dist"), "ceilings": {"copy_tbps": 3.0, "matmul_tflops": 700.0}}))
    monkeypatch.setattr("sys.argv", ["report", str(path), "--check"])
    with pytest.raises(SystemExit, match="2"):
        report.main()
    assert "other.md does not match other.json" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["report", str(path)])
    report.main()
    assert path.with_suffix(".md").read_text(encoding="utf-8").startswith("# ")
    for known in (str(path), *(str(found) for found in sorted(RESULTS.glob("decoder_*.json")))):
        monkeypatch.setattr("sys.argv", ["report", known, "--check"])
        report.main()
    assert (report.ROOT / "README.md").read_text(encoding="utf-8") == before


def test_runs_of_two_machines_are_not_one_document() -> None:
    with pytest.raises(ValueError, match="runs differ in machine"):
        report.merge([result("aaa", "dist"), result("aaa", "base", gpu="another")])
    other = copy.deepcopy(result("aaa", "base"))
    other["theme"] = "ops"
    with pytest.raises(ValueError, match="runs differ in theme"):
        report.merge([result("aaa", "dist"), other])


def test_cases_of_8_bit_ops_run_and_agree_with_themselves() -> None:
    found = list(ops8.code_cases(2, "cpu", ((4, 32),)))
    assert len({case.name for case in found}) == len(found) == 8
    for case in found:
        assert case.compare is not None
        assert case.compare(case.make(1)) == 0, case.name
        out = case.run(*case.make(2))
        assert out is not None
        assert 3 < out.float().abs().mean() < 100, f"{case.name}: codes say little"


def test_cases_of_sana_run_and_are_what_they_say() -> None:
    found = list(ops_sana.sana_cases(2, "cpu", torch.float32, ((4, 8, 16, False), (6, 8, 8, True)), ((4, 8),)))
    assert len({case.name for case in found}) == len(found) == 7
    for case in found:
        assert ops.error_of(case) < 1e-6, case.name
        values = case.make(2)
        out = case.run(*values)
        assert out is not None
        tensors = [out, *(value for value in values if isinstance(value, torch.Tensor) and value.dim() == 4)]
        moved = sum(2 * tensor.numel() for tensor in tensors)  # of 16-bit elements
        assert case.bytes_moved == pytest.approx(moved, rel=0.2), case.name


def test_checks_of_sana_hold_and_its_table_has_every_row() -> None:
    """On the CPU an operator is its reference, so only arguments and rounding are tried."""
    names = []
    for name, run, wanted in ops_sana.checks(torch.bfloat16, "cpu", 48):
        assert accuracy.relative_l2(run().float(), wanted) < 1.2e-2, name
        names.append(name.split()[0])
    assert {"conv3x3", "conv3x3_norm", "nearest_up", "linear_attention", "multiscale_attention"} <= set(names)
    ours = {
        "median_ms": 1.0,
        "p20_ms": 1.0,
        "p80_ms": 1.0,
        "error": 1e-3,
        "watts": 3.0,
        "wanted_ms": 19.0,
        "reason": "",
    }
    rows = [
        {"size": "1 x 8x8", "candidate": "eager", **ours, "median_ms": 4.0},
        {"size": "1 x 8x8", "candidate": "ours", **ours},
        {"size": "1 x 8x8", "candidate": "torch.compile", "reason": "TimeoutError: not ready"},
    ]
    lines = sana.table(rows).splitlines()
    assert len(lines) == 5
    assert "4.00x" in lines[3]
    assert "TimeoutError" in lines[4]


def test_the_wrapper_is_measured_beside_its_program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    fast: Any = owl_wms.accelerate(autoencoder().decoder, cache_dir=tmp_path, toolchain=ExportToolchain())
    row = wrapper.measure(fast, torch.randn(1, LATENTS, 4, 4), rounds=3)
    for key in ("waited_us", "latency_us", "launch_us", "returned_us", "queued_us"):
        whole, program, added = row[key]
        assert whole > 0 < program
        assert added == whole - program
    assert 0 < row["before_launch_us"] < row["waited_us"][0]
    assert row["gpu_us"] == [0, 0, 0]  # there is none
    assert row["stamp_us"] > 0
    assert row["wrong"] in ("", "more than 30 us added to a call that is waited for")
    assert wrapper.table([{**row, "precision": "bf16"}]).count("|") == 3 * 11
    assert fast.stats().pytorch == {}


# The one page there that is prose: it says how others add their results.
REPORTS = sorted(path for path in RESULTS.glob("*.md") if path.stem != "community")


@pytest.mark.parametrize("path", REPORTS, ids=lambda path: path.stem)
def test_no_figure_of_a_report_was_typed(path: Path) -> None:
    document = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    render = page if path.stem == "versions" else RENDERED[document["theme"]]
    assert render(document) == path.read_text(encoding="utf-8")


def test_the_table_of_play_is_that_of_its_file(tmp_path: Path) -> None:
    row = {"way": "captured", "model": "shipped", "parts": [{"second": 20, "page_fps": 9.5, "key_ms_p50": 1.0}]}
    play.write(
        {"theme": "play", "machine": {"torch": "2", "gpu": "X"}, "commit": "c", "rows": [row]}, tmp_path / "p.json"
    )
    assert (tmp_path / "p.md").read_text() == play.markdown(json.loads((tmp_path / "p.json").read_text()))


BENCH: dict[str, Any] = {
    "schema": 1, "owl_wms": "0.1.0", "date": "2026-11-30", "device": "cuda", "batch_size": 8,
    "machine": {"gpu": "NVIDIA X", "driver": "580.1", "torch": "torch 2.11.0", "os": "Linux"},
    "rows": [
        {"way": "eager", "ms": 4.0, "relative_error": 4e-3, "joules": 2.1},
        {"way": "torch.compile", "failed": "no compiler"},
        {"way": "owl_wms (tensorrt)", "ms": 1.234, "relative_error": 5e-3, "joules": None},
    ],
    "programs": [{"plan": "tensorrt+ops", "precision": "fp16"}],
}  # fmt: skip


def test_a_result_from_elsewhere_becomes_a_row_once_unless_its_frames_are_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page, file = tmp_path / "community.md", tmp_path / "result.json"
    page.write_text((RESULTS / "community.md").read_text(encoding="utf-8"))
    columns = page.read_text().split("| device |")[1].splitlines()[0].count("|")
    monkeypatch.setattr(community, "PAGE", page)
    monkeypatch.setattr("sys.argv", ["community", str(file), "--source", "#31"])
    file.write_text(json.dumps(BENCH))
    community.main()
    added = page.read_text().splitlines()[-1]
    assert added == (
        "| NVIDIA X | 580.1 | 2.11.0 | tensorrt+ops, fp16 | 4.00 | - | 1.23 | 2.10, -, - | 4.0e-03, 5.0e-03 | "
        "2026-11-30, owl_wms 0.1.0, batch 8; #31 |"
    )
    assert added.count("|") == columns + 2
    wrong = {**BENCH, "rows": [BENCH["rows"][0], {**BENCH["rows"][2], "relative_error": 9e-3}]}
    untimed = {**BENCH, "rows": BENCH["rows"][:2]}
    for result, said in ((BENCH, "already"), (wrong, "bug report"), (untimed, "owl_wms"), ([], "schema 1")):
        file.write_text(json.dumps(result))
        with pytest.raises(SystemExit):
            community.main()
        assert said in capsys.readouterr().err
    assert page.read_text().splitlines()[-1] == added


def matrix(commit: str, *rows: str, gpu: str = "card") -> dict[str, Any]:
    failed = [{"row": row, "error": f"failed at {commit}"} for row in rows]
    return {"theme": "trt_matrix", "machine": {"gpu": gpu}, "commit": commit, "batch": 8, "rows": failed}


def test_rows_of_several_matrices_become_one_and_the_last_counts() -> None:
    merged = trt_matrix.merge([matrix("aaa", "dist", "sana"), matrix("bbb", "sana", "base")])
    assert {row["row"]: row["commit"] for row in merged["rows"]} == {"dist": "aaa", "sana": "bbb", "base": "bbb"}
    assert merged["commit"] == "aaa, bbb"
    with pytest.raises(ValueError, match="runs differ in machine"):
        trt_matrix.merge([matrix("aaa", "dist"), matrix("aaa", "base", gpu="another")])


def test_a_row_names_decoder_precision_and_plan() -> None:
    asked = {"batch": 2, "precision": "auto", "plans": ["tensorrt+ops"], "seconds": 9.0}
    for row, precision, plans in (
        ("demo", "auto", ("tensorrt+ops",)),
        ("demo:bf16", "bf16", ("tensorrt+ops",)),
        ("demo:bf16:tensorrt", "bf16", ("tensorrt",)),
    ):
        _, spec = trt_matrix.spec_of(row, argparse.Namespace(**asked))
        assert (spec.precision, spec.plans, spec.input_shape) == (precision, plans, (2, 128, 8, 8))


def test_bars_are_labelled_with_three_digits() -> None:
    values = (2.631, 9.996, 11.0, 34.0, 99.96, 221.6)
    assert [plot.three_digits(value) for value in values] == ["2.63", "10.0", "11.0", "34.0", "100", "222"]


def test_a_clip_runs_at_the_game_s_speed_and_repeats(tmp_path: Path) -> None:
    shots = [Image.new("RGB", (16, 9), (80 * number, 0, 0)) for number in range(3)]
    pictures.save_clip(shots, tmp_path / "clip.webp")
    with Image.open(tmp_path / "clip.webp") as clip:
        assert (clip.size, clip.n_frames, clip.info["loop"]) == ((16, 9), 3, 0)
        for number in range(3):
            clip.seek(number)
            clip.load()
            assert clip.info["duration"] == 67
            assert abs(clip.convert("RGB").getpixel((8, 4))[0] - 80 * number) < 8


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        (plot, ["FILE", "o.png"]),
        (report, ["FILE"]),
        (report, ["o.json", "--merge", "FILE"]),
        (kernels, ["--render", "FILE"]),
        (ops, ["--render", "FILE"]),
        (trt_matrix, ["--render", "FILE"]),
        (trt_matrix, ["--render", "o.json", "--merge", "FILE"]),
    ],
    ids=lambda value: value.__name__ if hasattr(value, "__name__") else " ".join(value),
)
@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot be read: No such file"), ("{", "is not JSON"), ("[1]", "is not the result of a benchmark")],
)
def test_a_result_that_cannot_be_read_is_one_line(
    module: Any,
    arguments: list[str],
    content: str | None,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / "FILE").write_text(content)
    monkeypatch.setattr("sys.argv", ["benchmark", *arguments])
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == 2
    assert f"error: FILE: {message}" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ([] if content is None else ["FILE"])


def test_merging_what_does_not_belong_together_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, card in zip(files, ("card", "another"), strict=True):
        path.write_text(json.dumps(matrix("aaa", "dist", gpu=card)))
    for module, out in ((report, []), (trt_matrix, ["--render"])):
        monkeypatch.setattr("sys.argv", ["x", *out, str(tmp_path / "o.json"), "--merge", *map(str, files)])
        with pytest.raises(SystemExit):
            module.main()
        assert "error: runs differ in machine" in capsys.readouterr().err
    assert not (tmp_path / "o.json").exists()


def test_every_benchmark_can_be_imported() -> None:
    for path in sorted((RESULTS.parent).glob("*.py")):
        importlib.import_module(f"benchmarks.{path.stem}")


@pytest.mark.parametrize(
    "module", [decoder, hidden, kernels, ops, sana_parts, table, trt_matrix], ids=lambda module: module.__name__
)
def test_without_a_gpu_nothing_is_measured_or_written(
    module: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    out = tmp_path / "o.json"
    out.write_text("kept")
    monkeypatch.setattr("sys.argv", ["benchmark", *([] if module is sana_parts else ["--out", str(out)])])
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == 2
    assert "CUDA device" in capsys.readouterr().err
    assert out.read_text() == "kept"
    assert list(tmp_path.iterdir()) == [out]


ROAD = {
    "rate dist": {
        "frames_per_second": {"function, bf16": 3000.0, "function, bytes": 3010.0, "stream": 2900.0,
                              "stream to .npy": 2000.0},
        "same_bytes": True,
    },
    "npy dist": road._said(
        "clip.npy: 4000 frames, 2500.5 frames/s\n  time: 1.60 s; read 0.10 s, decode 1.31 s, copy 0.20 s, write\n"
        "0.90 s (at the same time)\n  decoded by: tensorrt"
    ),
    "mp4 dist": {"skipped": "PyAV is not installed here"},
    "training dist": {
        "ms": {"eager": 37.0, "torch.compile": 11.0, "compile_for_training": 2.7},
        "relative_error": {"eager": 5e-3, "compile_for_training": 6e-3},
    },
    "first dist built": {"failed": "not done after 150 s"},
}  # fmt: skip


def test_the_road_says_what_was_met_and_what_was_not_measured(tmp_path: Path) -> None:
    rows = {what: (found, met) for what, found, _, met in road.table(ROAD, ["dist"])}
    assert rows["dist: decode_stream"] == ("97% of the decode function (2900.0 of 3000.0 frames/s)", "yes")
    assert rows["dist: decode_stream to .npy"][1] == "NO"
    assert rows["dist: owl-wms decode to .npy"] == ("83% of the decode function (2500.5 of 3000.0 frames/s)", "yes")
    assert rows["dist: owl-wms decode to .mp4"] == ("PyAV is not installed here", "-")
    assert rows["dist: compile_for_training"][0].startswith("4.07x torch.compile, 2.70 ms, error 6.0e-03")
    assert rows["dist: first decode, built, after import torch"] == ("not done after 150 s", "-")
    assert ROAD["npy dist"]["spent"] == {"read": 0.1, "decode": 1.31, "copy": 0.2, "write": 0.9}
    builds = {
        "first dist built": {"failed": "later", "build_stages": {"import": 3.0, "compile tensorrt+ops": 8.25}},
        "first base built": {"failed": "later", "build_stages": {"import": 3.5, "isolation tensorrt": 1.0}},
    }
    document = {"parts": {**ROAD, **builds}, "machine": {"gpu": "none"}, "cores": 2}
    road_report.write(document, ["dist"], tmp_path / "road")
    page = (tmp_path / "road.md").read_text()
    assert "| npy dist, 4000 frames | 1.60 | 0.10 | 1.31 | 0.20 |  | 0.90 |" in page
    assert all("| " + what + " |" in page for what in rows)
    for line in ("| import | 3.00 | 3.50 |", "| compile tensorrt+ops | 8.25 |  |", "| isolation tensorrt |  | 1.00 |"):
        assert line in page


def test_the_road_tells_wrong_from_slow() -> None:
    assert road.wrong(ROAD) == []
    broken = copy.deepcopy(ROAD)
    broken["rate dist"]["same_bytes"] = False
    broken["training dist"]["relative_error"]["compile_for_training"] = 0.2
    assert len(road.wrong(broken)) == 2


def test_every_step_on_a_gpu_runs_something_that_is_there() -> None:
    root = Path(__file__).parents[1]
    script = (root / "benchmarks" / "on_gpu.sh").read_text(encoding="utf-8")
    folders = set(re.findall(r"\btests/[\w/.]+", script))
    modules = set(re.findall(r"-m benchmarks\.(\w+)", script))
    assert len(folders) > 8
    assert len(modules) > 8
    assert not [name for name in folders if not (root / name).exists()]
    assert not [name for name in modules if not (root / "benchmarks" / f"{name}.py").is_file()]
    steps = re.search(r"\$\{\*:-([^}]+)\}", script)
    assert steps is not None
    assert sorted(steps[1].split()) == sorted(re.findall(r"^    (\w+)\) +run", script, re.M))


@pytest.mark.parametrize(
    ("plans", "each", "built"),
    [
        ([], False, [("ours bf16", "bf16", ())]),
        (["ops", "tensorrt"], False, [("ours bf16", "bf16", ("ops", "tensorrt"))]),
        (
            ["ops", "tensorrt"],
            True,
            [("ours bf16 ops", "bf16", ("ops",)), ("ours bf16 tensorrt", "bf16", ("tensorrt",))],
        ),
    ],
)
def test_plans_are_rows_or_compete(plans: list[str], each: bool, built: list[tuple]) -> None:
    asked = argparse.Namespace(precision=["bf16"], plans=plans, each_plan=each)
    assert decoder.built(asked) == built
    assert decoder.built(argparse.Namespace(precision=[], plans=plans, each_plan=each)) == []


def test_8_bit_products_are_those_of_wide_stages_without_the_first_of_each() -> None:
    model = dcae(ch_0=64, ch_max=256, stages=(2, 1, 1))
    wide = [[(256, 512), (512, 256), (256, 512), (512, 256)]]  # the deepest stage of two blocks; the next has 128
    stages = [[conv for block in stage.blocks for conv in (block.conv1, block.conv3)] for stage in model.blocks]
    found = [[(conv.in_channels, conv.out_channels) for conv in convs] for convs in stages]
    assert [convs for convs in found if convs[1][1] >= 256] == wide
    expected = 2 * 3 * 8 * 8 * (3 * 256 * 512) / 1e9  # latents of 4x4, enlarged once, batch 3
    assert decoders.eight_bit_gigaflop(model, 3, 4) == pytest.approx(expected)
    assert decoders.eight_bit_gigaflop(torch.nn.Conv2d(1, 1, 1), 3, 4) == 0


class FakeFamily:
    """A family's process: what it says, whether it is done in time, and what it was asked."""

    def __init__(self, *said: Any, late: bool = False) -> None:
        self.said, self.late, self.asked, self.closed = list(said), late, [], False

    def begin(self, *asked: Any) -> None:
        self.asked.append(asked)

    def done(self, seconds: float) -> bool:
        return not self.late

    def end(self) -> Any:
        found = self.said.pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    def ask(self, *asked: Any) -> Any:
        self.begin(*asked)
        return self.end()

    def close(self, seconds: float = 0) -> None:
        self.closed = True


def test_one_sitting_keeps_what_it_has_when_a_family_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    ceilings = harness.Ceilings(matmul_tflops=700.0, copy_tbps=3.0)
    rows = [{**row, "refused": ""} for row in result("aaa", "dist")["rows"][:1]]
    compiled = {**rows[0], "candidate": table.COMPILED, "figures": {**rows[0]["figures"], "ready_seconds": 2.0}}
    families = {
        "dist": FakeFamily(None, ceilings, [*copy.deepcopy(rows), compiled], [*copy.deepcopy(rows)]),
        "base": FakeFamily(None, RuntimeError("the process ended with status -11")),
        "sana": FakeFamily(RuntimeError("OutOfMemoryError: all of it")),
        "demo": FakeFamily(None, late=True),
    }
    monkeypatch.setattr(table.Sitting, "_start", lambda sitting, name: families[name])
    monkeypatch.setenv("OWL_COMMIT", "c0ffee")
    panels = [table.Panel(decoder=name, batch=8, precisions=("bf16",)) for name in families]
    sitting = table.Sitting(panels, "cpu", 0.1)
    families["demo"].late = False
    sitting.wait(time.monotonic())
    families["demo"].late = True
    for panel in (*panels, dataclasses.replace(panels[0], batch=1)):
        sitting.measure(panel, {("dist", 8, table.COMPILED): 31.0}, time.monotonic() + 5)
    told = {(row["decoder"], row["batch"], row["candidate"]): row for row in sitting.rows}
    assert told["dist", 8, table.COMPILED]["figures"]["ready_seconds"] == 31.0, "without a cache, not the 2 s with one"
    assert told["dist", 1, table.COMPILED]["refused"] == "not compiled in the time there was"
    assert families["dist"].asked[-1][1].rivals == (), "a rival that would compile for half a minute is not asked for"
    assert told["base", 8, "ours bf16"]["refused"] == "the process ended with status -11"
    assert told["sana", 8, "ours bf16"]["refused"] == "its process did not start"
    assert told["demo", 8, "ours bf16"]["refused"] == "not measured in the time there was"
    assert [families[name].closed for name in families] == [False, True, True, True]
    assert {row["commit"] for row in sitting.rows} == {"c0ffee"}
    document = harness.document("decoder", ceilings, sitting.rows)
    assert document["commit"] == "c0ffee"
    assert "not measured in the time there was" in report.report(document)


def test_compiling_ends_in_time_and_tells_what_was_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[FakeFamily] = []

    def process(make: Any) -> FakeFamily:
        said = ((None, 25.0), (RuntimeError("no compiler"),), ())[len(made)]
        made.append(FakeFamily(*said, late=not said))
        return made[-1]

    monkeypatch.setattr(table, "Aside", process)
    monkeypatch.setattr(table.os, "cpu_count", lambda: 32)
    clock = iter(range(100))
    monkeypatch.setattr(table, "time", argparse.Namespace(monotonic=lambda: next(clock), sleep=lambda seconds: None))
    shapes = [("dist", 8, table.COMPILED), ("base", 8, table.COMPILED), ("sana", 8, table.COMPILED)]
    assert table.compile_all(shapes, "cuda", 5) == {shapes[0]: 25.0}
    assert all(process.closed for process in made)
    assert made[0].asked == [("new", *shapes[0], "cuda"), ("seconds",)]


def test_panels_wait_for_another_measurement_and_not_for_ever(tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.touch()
    table.wait_for(there, time.monotonic() + 60)
    table.wait_for(tmp_path / "never", time.monotonic())


def test_every_panel_asks_for_what_there_is() -> None:
    panels = [(panel.decoder, panel.batch) for panel in table.PANELS]
    families = {"base", "dist", "base_learned", "dist_learned", "distill_vae", "demo", "sana"}
    assert sorted(panels) == sorted((name, batch) for name in families for batch in (8, 4, 1))
    for panel in table.PANELS:
        decoders.subject(panel.decoder)
        assert set(panel.rivals) <= set(baselines.candidates(torch.nn.Identity(), 0))


@pytest.mark.parametrize("captured", [True, False])
def test_an_older_gpu_s_kernels_are_taken_from_fusing_to_capture(
    captured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU, with the graph's place taken: what a kernel would be compiled for, while it is captured and after."""
    asked = []

    def graph(module: torch.nn.Module, z: torch.Tensor) -> argparse.Namespace:
        asked.append(gpu.architecture(torch.device("cuda", 0)))
        with contextlib.suppress(Exception):  # there is no driver; the launch is noted before it is needed
            resize.kernel_of(torch.bfloat16, pad=4).launch(torch.device("cuda", 0), grid=1, block=1, arguments=())
        return argparse.Namespace(graphed=captured, reason="no graphs here", shape=module(z).shape)

    real = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *shape, device=None, **rest: real(*shape, **rest))
    monkeypatch.setattr(torch.nn.Module, "cuda", lambda module: module)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(ours.trt, "GraphedProgram", graph)
    model = dcae()
    if not captured:
        with pytest.raises(RuntimeError, match="no graphs here"):
            ours.build_graph(model, (1, model.latent_channels, 4, 4), "bf16", decoder.capability("8.9"))
    else:
        run, said = ours.build_graph(model, (1, model.latent_channels, 4, 4), "bf16", decoder.capability("8.9"))
        assert run.shape[0] == 1  # type: ignore[attr-defined]
        assert said == {"plan": "ops", "targets": ["resize compute_89"], "psnr_gate_db": None}
    assert asked == ["compute_89"]
    assert gpu.architecture(torch.device("cuda", 0)) == "sm_90"
    assert nvrtc.architecture_of(resize.kernel_of(torch.bfloat16, pad=4), 0) == "sm_90"


@pytest.mark.parametrize(
    ("printed", "status", "said"),
    [
        ("..F\n== 1 failed, 2 passed in 3.10s ==\n", 1, "1 failed, 2 passed in 3.10s"),
        ("2 skipped in 1.00s", 0, "2 skipped in 1.00s"),
        ("EEE...F", -9, "ended with status -9 before its last line"),
        ("", 4, "ended with status 4 before its last line"),
    ],
)
def test_tests_that_were_cut_short_are_not_passed_off_as_done(printed: str, status: int, said: str) -> None:
    assert summary(printed, status) == said


def test_the_page_counts_rate_keys_and_memory_of_what_arrived() -> None:
    record = play_page.Record(torch.device("cpu"))
    for picture in range(600):
        record.picture(picture / 60, 1000)
        if picture % 6 == 0:
            record.key(picture / 60, 11.0)
    record.memory["rss"] = [100.0 + 2 * sample for sample in range(30)]
    row = record.whole(10.0, [])
    assert row["page_frames"] == 600
    assert row["page_fps"] == pytest.approx(60)
    assert row["worst_second_fps"] == 60
    assert row["key_ms_p50"] == pytest.approx(11)
    assert row["rss_mib_per_1000_frames"] == pytest.approx(2 * 19 / 400 * 1000)  # over the last two thirds
