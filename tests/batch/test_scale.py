"""The numbers of docs/scale.md are what its own formulas give.

Run: python -m pytest tests/batch/test_scale.py
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

PAGE = (Path(__file__).parents[2] / "docs/scale.md").read_text(encoding="utf-8")
UNITS = {"": 1.0, "million": 1e6, "billion": 1e9, "GB": 1e9, "TB": 1e12, "PB": 1e15, "h": 1.0, "days": 24.0,
         "min": 1 / 60, "USD": 1.0}  # fmt: skip
(BLOCK,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
NAMES: dict[str, Any] = {}
exec(compile(BLOCK, "docs/scale.md", "exec"), NAMES)
needs = NAMES["needs"]


def cells(name: str) -> list[str]:
    (row,) = re.findall(rf"^\| {name} \| (.*) \|$", PAGE, re.M)
    return [cell.strip() for cell in row.split("|")]


def is_rounded(text: str, value: float) -> bool:
    """Whether a cell such as `3.5 TB` is the value, to the digits that it shows."""
    found = re.match(r"([\d.,]+) ?(\w*)", text)
    assert found is not None, text
    number, unit = found[1].rstrip(",."), UNITS[found[2]]
    step = 10.0 ** -len(number.partition(".")[2])
    return abs(float(number.replace(",", "")) - value / unit) <= step / 2 * 1.001


def test_the_table() -> None:
    rows = {name: name for name in ("frames", "latents in", "npy out", "H.264 out", "GPU hours", "cost")}
    rows |= {"on 8 GPUs": "hours", "on 512 GPUs": "hours"}
    for name, key in rows.items():
        gpus = int(re.findall(r"\d+", name)[0]) if name.startswith("on ") else 8
        for text, hours in zip(cells(name), (1_000, 1_000_000), strict=True):
            assert is_rounded(text, needs(hours, gpus)[key]), (name, text, needs(hours, gpus)[key])


def test_the_rates() -> None:
    one, eight, many = needs(1, 1), needs(1, 8), needs(1, 512)
    found = {
        r"A GPU writes ([\d.]+) GB/s": one["npy bytes per second"] / 1e9,
        r"eight write ([\d.]+) GB/s": eight["npy bytes per second"] / 1e9,
        r"\(([\d.]+) Gbit/s\)": eight["npy bytes per second"] * 8 / 1e9,
        r"512 write ([\d.]+) TB/s": many["npy bytes per second"] / 1e12,
        r"eight GPUs at ([\d.]+) %": 100e9 / (eight["npy bytes per second"] * 8) * 100,
        r"A GPU needs ([\d.]+) cores": one["cores for mp4 per GPU"],
        r"A GPU reads ([\d.]+) MB/s": one["latent bytes per second"] / 1e6,
        r"eight read ([\d.]+) GB/s": eight["latent bytes per second"] / 1e9,
        r"512 read ([\d.]+) GB/s": many["latent bytes per second"] / 1e9,
    }
    for pattern, value in found.items():
        ((text),) = re.findall(pattern, " ".join(PAGE.split()))
        assert is_rounded(text, value), (pattern, text, value)


def test_the_constants() -> None:
    constants = {name: cells(name)[0] for name in ("frames per hour", "bytes of one latent frame")}
    assert constants == {"frames per hour": f"{60 * 3600:,}", "bytes of one latent frame": f"{128 * 8 * 8 * 2:,}"}
    assert cells("bytes of one decoded frame")[0] == f"{360 * 640 * 4:,}"
    for constant in ("216_000", "16_384", "921_600", "1_917", "2138", "143", "0.98", "3.0"):
        assert constant in BLOCK
