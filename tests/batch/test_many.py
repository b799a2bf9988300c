"""Many small items: bookkeeping is quick, a resumed run begins soon, and memory does not grow with their number.

Run: python -m pytest tests/batch/test_many.py [--full-counts]
"""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from owl_wms.batch import BlockWorker
from owl_wms.batch.items import LATENT_SUFFIXES, cut, list_items
from owl_wms.batch.ledger import Index, Line, run_name
from owl_wms.batch.run import run, status
from tests.batch.fake import fake_job, make_inputs


@pytest.mark.timeout(1500)
def test_bookkeeping_of_many_items(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    full = request.config.getoption("--full-counts", default=False)
    count = 100_000 if full else 2_000
    folder = make_inputs(tmp_path / "in", {f"{n // 1000}/{n}.pt": str(n) for n in range(count)})
    job, name = fake_job(tmp_path / "out"), run_name()
    worker = BlockWorker(job)
    blocks = ((f"{name}-{n}", block) for n, block in enumerate(cut(list_items(str(folder), LATENT_SUFFIXES))))
    began, cpu, done = time.perf_counter(), [time.process_time()], 0
    for outcome in worker.run(blocks):
        done += outcome.state == "done"
        cpu.append(time.process_time())
    seconds = time.perf_counter() - began
    assert done == count
    # Processor time, and of the quickest quarter: another process may have the machine, and its caches, for a while.
    quarter = count // 4
    quickest = quarter / min(later - first for first, later in zip(cpu, cpu[quarter:], strict=False))
    assert quickest > 500, f"{quickest:.0f} items per second of processor time, {count / seconds:.0f} of the clock"
    began, resumed_cpu = time.perf_counter(), time.process_time()
    assert [o for o in run(job, str(folder), LATENT_SUFFIXES, engine="local") if o.key] == []
    resumed, resumed_cpu = time.perf_counter() - began, time.process_time() - resumed_cpu
    assert resumed_cpu < 20 * count / 100_000 + 2
    assert status(job, str(folder), LATENT_SUFFIXES).done == count
    print(f"{count} items: {count / seconds:.0f}/s ({quickest:.0f}/s of CPU), resumed in {resumed:.1f} s")


def test_the_index_s_memory_is_flat() -> None:
    def lines(first: int, count: int) -> Iterator[Line]:
        for number in range(first, first + count):
            for event in ("begin", "placing", "done"):
                yield {"event": event, "key": f"{number:032x}", "frames": 1, "item": "x" * 100, "outputs": []}

    index = Index()
    index.take(lines(0, 20_000))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    index.take(lines(20_000, 60_000))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 16 << 10, "KiB"
    assert index.is_done(f"{79_999:032x}")
    assert index.frames == 80_000
    index.close()
