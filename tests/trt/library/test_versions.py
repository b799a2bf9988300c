"""The table of supported sets refuses others, leaves out settings, and agrees with the lists of requirements."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from owl_wms.errors import FastPathError
from owl_wms.request import Request
from owl_wms.trt.library import engines, importer, versions
from owl_wms.trt.spec import compile_settings
from tests.versions import page, run

ROOT = Path(__file__).parents[3]


def use(monkeypatch: pytest.MonkeyPatch, torch_version: str, **found: str) -> None:
    """Make these look like the installed versions; underscores stand for hyphens."""
    monkeypatch.setattr(torch, "__version__", torch_version)
    names = {name.replace("_", "-"): version for name, version in found.items()}
    monkeypatch.setattr(versions, "installed", lambda: names)


@pytest.mark.parametrize(
    ("torch_version", "found"),
    [
        ("2.11.0+cu130", {"torch_tensorrt_rtx": "2.11.0", "tensorrt_rtx": "1.4.0.76"}),
        ("2.11.0", {"torch_tensorrt": "2.11.0+cu130", "tensorrt": "10.15.1.29"}),
        ("2.11.1", {"torch_tensorrt_rtx": "2.11.0"}),
        ("2.13.0", {"torch_tensorrt_rtx": "2.13.0", "tensorrt_rtx": "1.5.0.114"}),
        ("2.14.1", {"torch_tensorrt_rtx": "2.14.0", "tensorrt_rtx": "1.6.1.120"}),
        ("2.15.0", {}),
    ],
)
def test_sets_of_the_table_pass(monkeypatch: pytest.MonkeyPatch, torch_version: str, found: dict[str, str]) -> None:
    use(monkeypatch, torch_version, **found)
    assert versions.refusal() is None


@pytest.mark.parametrize(
    ("torch_version", "found", "nearest"),
    [
        ("2.12.1", {"torch_tensorrt_rtx": "2.12.1", "tensorrt_rtx": "1.4.0.76"}, "2.13"),
        ("2.11.0", {"torch_tensorrt_rtx": "2.11.0", "tensorrt_rtx": "1.7.0.3"}, "2.11"),
        ("2.11.0", {"torch_tensorrt_rtx": "2.13.0", "tensorrt_rtx": "1.5.0.114"}, "2.11"),
        ("2.15.0", {"torch_tensorrt_rtx": "2.14.0", "tensorrt_rtx": "1.6.1.120"}, "2.14"),
        ("2.14.1", {"torch_tensorrt": "2.14.0", "tensorrt": "10.16.1"}, "2.14"),
        ("2.9.1", {"torch_tensorrt": "2.9.0"}, "2.11"),
        ("3.0.0", {"torch_tensorrt_rtx": "3.0.0"}, "2.14"),
    ],
)
def test_another_set_is_refused_before_it_is_imported(
    monkeypatch: pytest.MonkeyPatch, torch_version: str, found: dict[str, str], nearest: str
) -> None:
    use(monkeypatch, torch_version, **found)
    monkeypatch.setattr(importer, "installed_flavour", lambda: ("rtx", "some"))
    monkeypatch.setattr(importer, "_import", lambda _flavour: pytest.fail("imported a set that is not supported"))
    monkeypatch.setattr(engines, "_load_library", lambda _flavour: pytest.fail("loaded its library"))
    importer.forget()
    engines.forget()
    try:
        for state in (importer.status(), engines.status()):
            assert not state.available
            assert all(version in state.reason for version in (torch_version, *found.values()))
            assert f"'torch=={nearest}.*'" in state.remedy
            assert "\n" not in state.reason + state.remedy
        with pytest.raises(FastPathError, match="not supported"):
            importer.require()
    finally:
        importer.forget()
        engines.forget()


def test_a_torch_without_torch_tensorrt_gets_the_nearest_set(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, "2.15.0+cu130")
    assert versions.of_torch() is None
    assert versions.remedy().startswith("the nearest supported set is of torch 2.14: pip install 'torch==2.14.*' ")


@pytest.mark.parametrize("number", versions.RELEASES)
def test_settings_that_a_release_does_not_take_are_not_sent(monkeypatch: pytest.MonkeyPatch, number: str) -> None:
    use(monkeypatch, f"{number}.0")
    sent = compile_settings(Request(input_shape=(1, 3, 2, 2)), "fp16")
    assert not versions.RELEASES[number].not_settings & set(sent)
    assert {"immutable_weights", "disable_tf32", "pass_through_build_failures"} <= set(sent)
    assert ("use_explicit_typing" in sent) == (number == "2.11")


def test_a_library_of_another_interface_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    if not engines.attached():
        pytest.skip("Torch-TensorRT is not installed")
    engines.forget()
    monkeypatch.setattr(torch.ops.tensorrt, "ABI_VERSION", lambda: "7")
    try:
        assert not engines.attached()
    finally:
        engines.forget()


def test_extras_install_the_sets_of_the_table() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 brings it")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for release in versions.RELEASES.values():
        assert tuple(project["optional-dependencies"][release.extra]) == release.packages()
    today = (ROOT / "requirements-rtx.txt").read_text(encoding="utf-8").splitlines()
    assert versions.RELEASES["2.11"].packages()[1:] == tuple(line for line in today if "tensorrt" in line)[-2:]


def test_the_page_of_sets_is_made_from_the_stored_results() -> None:
    results = run.stored()
    assert next(iter(results)) == page.FIRST
    assert f"{page.BEGIN}\n\n{page.tables(results)}\n{page.END}" in page.PAGE.read_text(encoding="utf-8")
    assert set(results) <= set(run.SETS)
    for name, found in results.items():
        assert found["sound"], f"{name} is listed with a failure: {found['tests']}"


def test_the_matrix_names_every_flaw() -> None:
    first = {"engines": 1, "left": ["aten.add"], "parity": True, "reload_bit_equal": True}
    assert page.cell(None, first) == "-"
    assert page.cell(first, first) == "1, 1 left"
    assert page.cell({**first, "left": []}, first) == "1, 0 left **leaves others than 2.11**"
    assert page.cell({**first, "parity": False, "reload_bit_equal": False}, first) == "1, 1 left **parity** **reload**"
    assert page.cell({**first, "left": None, "engines": 0}, None) == "built"
    assert page.cell({"failed": "no engine"}, first) == "**failed**: no engine"


@pytest.mark.parametrize("arguments", [[], ["folder", "2.12"]])
def test_sets_that_are_not_in_the_table_are_not_run(arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match=r"2\.11 2\.13 2\.14 2\.15 python3\.13"):
        run.main(arguments)
