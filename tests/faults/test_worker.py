"""The real building child, killed by the fault that a plan's engine can have: a segmentation fault."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.conftest import Fault
from tests.trt import build_child
from tests.trt.build.test_parent import run


@pytest.mark.slow
def test_a_segfault_in_the_real_child_costs_an_attempt(fault: Fault, tmp_path: Path) -> None:
    report, session, _ = run(
        tmp_path, "sana", precision="bf16", plans=("tensorrt",), seed=build_child.SEGFAULT, min_block_size=1
    )
    assert session.restarts == 3
    assert "SIGSEGV" in report["kept_reason"]
    assert len(report["kept_modules"]) == 2
    assert report["parity"]["passed"]
    fault.record(
        "build-segfault",
        f"{session.restarts} children died and were replaced; {len(report['kept_modules'])} modules kept in PyTorch "
        "with SIGSEGV as the reason, the program passed parity",
    )
