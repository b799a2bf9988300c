"""The supported version sets, and everything that differs between them.

Why one table: a difference between releases that is spelled out where it hurts is forgotten at the next release. Torch-
TensorRT takes torch's own number and is built for that torch alone, so the installed torch names the row. A set that
is in no row is refused before it is imported: `tensorrt-rtx` 1.7 beside Torch-TensorRT 2.11 fails in the middle of a
build, and Torch-TensorRT 2.12 leaves bf16 depthwise convolutions in PyTorch by a rule of its own that 2.13 took back.

All releases share the rest: every loaded program is run once before it is used (from 2.13 on, an engine makes its
execution context in its first run), and its inputs are contiguous (2.11 computes garbage from others).

Usage:
    versions.refusal()                    # ("torch-tensorrt-rtx 2.12.1 is not supported ...", remedy), or None
    versions.of_torch()                   # Release, or None where no Torch-TensorRT is supported for this torch
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch

FLAVOURS = {"torch-tensorrt-rtx": "rtx", "torch-tensorrt": "standard"}
"""Distribution name -> flavour; the first one installed is the one that owns the import name."""
_TENSORRT = {"rtx": "tensorrt-rtx", "standard": "tensorrt"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Release:
    """One release of Torch-TensorRT.

    Attributes:
        number: `major.minor`, of Torch-TensorRT and of the torch that it needs.
        tensorrt: flavour -> version of its TensorRT that was tried; a release with the same first two numbers passes.
        abi: what `torch.ops.tensorrt.ABI_VERSION()` returns.
        not_settings: keywords of `torch_tensorrt.compile` that it no longer takes.
        torch_libraries: files of torch's `lib` folder to load before Torch-TensorRT's library, when that library is
            loaded without the Python package.
        runtime_cache: whether engines hand out the kernels that TensorRT for RTX compiles at run time, and take them
            back (`jit_kernels`). Modules with engines keep them in a temporary file, unless told otherwise.
        extra: the extra of pyproject.toml that installs the set with TensorRT for RTX.
    """

    number: str
    tensorrt: Mapping[str, str]
    abi: str
    not_settings: frozenset[str] = frozenset()
    torch_libraries: tuple[str, ...] = ()
    runtime_cache: bool = False
    extra: str

    def packages(self, flavour: str = "rtx") -> tuple[str, ...]:
        """The requirements of this set, as pip takes them."""
        known = flavour if flavour in self.tensorrt else "rtx"
        distribution = next(name for name, of in FLAVOURS.items() if of == known)
        return (
            f"torch=={self.number}.*",
            f"{distribution}=={self.number}.0",
            f"{_TENSORRT[known]}=={self.tensorrt[known]}",
        )


_EXPLICIT = frozenset({"use_explicit_typing", "use_python_runtime"})  # the only way since 2.13, and no settings
RELEASES = {
    release.number: release
    for release in (
        Release(number="2.11", tensorrt={"rtx": "1.4.0.76", "standard": "10.15.*"}, abi="8", extra="rtx"),
        Release(
            number="2.13",
            tensorrt={"rtx": "1.5.0.114"},
            abi="9",
            not_settings=_EXPLICIT,
            runtime_cache=True,
            extra="rtx213",
        ),
        Release(
            number="2.14",
            tensorrt={"rtx": "1.6.1.120"},
            abi="10",
            not_settings=_EXPLICIT,
            torch_libraries=("libtorch_nvshmem.so",),
            runtime_cache=True,
            extra="rtx214",
        ),
    )
}
"""`major.minor` -> release."""


def number(version: str) -> str:
    """`2.11` out of `2.11.0+cu130`; the text itself where it does not begin with two numbers."""
    found = re.match(r"\d+\.\d+", version)
    return found[0] if found else version


def of_torch() -> Release | None:
    """Returns the release for the installed torch; None where none is supported."""
    return RELEASES.get(number(torch.__version__))


def nearest(version: str) -> Release:
    """Returns the supported release whose number is nearest to `version`'s; of two as near, the newer one."""
    major, minor = ([int(part) for part in re.findall(r"\d+", version)[:2]] + [0, 0])[:2]

    def distance(release: Release) -> tuple[int, int]:
        its_major, its_minor = map(int, release.number.split("."))
        return abs(100 * (its_major - major) + its_minor - minor), -its_minor

    return min(RELEASES.values(), key=distance)


def installed() -> dict[str, str]:
    """Distribution -> version of each Torch-TensorRT and TensorRT that is installed, from metadata alone."""
    found = {}
    for name in (*FLAVOURS, *_TENSORRT.values()):
        try:
            found[name] = metadata.version(name)
        except Exception:  # not installed, or damaged metadata, which raises whatever its parser raises
            continue
    return found


def refusal() -> tuple[str, str] | None:
    """Returns `(reason, remedy)`, one line each, if the installed set is in no row.

    None if it is in one, or if no Torch-TensorRT is installed according to package metadata.
    """
    found = installed()
    distribution = next((name for name in FLAVOURS if name in found), None)
    if distribution is None:
        return None
    flavour, release = FLAVOURS[distribution], of_torch()
    beside = found.get(_TENSORRT[flavour])
    fits = release is not None and number(found[distribution]) == release.number and flavour in release.tensorrt
    # TensorRT's front package may be missing where the libraries are the system's; then the import decides.
    if fits and release is not None and (beside is None or number(beside) == number(release.tensorrt[flavour])):
        return None
    parts = [f"torch {torch.__version__}", f"{distribution} {found[distribution]}"]
    parts += [] if beside is None else [f"{_TENSORRT[flavour]} {beside}"]
    return f"{', '.join(parts)}: this set is not supported", remedy(flavour)


def remedy(flavour: str = "rtx") -> str:
    """Returns how to install the supported set that is nearest to the installed torch."""
    release = nearest(torch.__version__)
    command = " ".join(f"'{package}'" for package in release.packages(flavour))
    if of_torch() is None:
        return f"the nearest supported set is of torch {release.number}: pip install {command}"
    return f"pip install {command}"


def accepted(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the compile settings that the installed release takes."""
    release = of_torch()
    return {key: value for key, value in settings.items() if release is None or key not in release.not_settings}
