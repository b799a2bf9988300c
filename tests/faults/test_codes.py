"""Files that run code when they are unpickled: they are never unpickled."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from owl_wms.cache import CacheStore, Entry, Key
from tests.faults.conftest import Fault, Spy
from tests.faults.tools import MATERIAL, NAME, Builder, entry_path, read


class Payload:
    """Unpickling this makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.marker),))


class Constants(torch.nn.Module):
    """Has a constant and a buffer that is not saved, so that every slot of the archive is there."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Conv2d(4, 12, 3, padding=1)
        self.register_buffer("scale", torch.ones(1), persistent=False)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.inner(z) * self.scale + torch.tensor([2.0])


def _archive() -> dict[str, bytes]:
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(Constants().eval(), (torch.zeros(1, 4, 2, 2),)), buffer)
    with zipfile.ZipFile(buffer) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _pack(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def _pickled(files: dict[str, bytes], folder: str, evil: bytes) -> None:
    """Mark the first payload of a folder as pickled and replace it."""
    (config_name,) = [name for name in files if name.endswith(f"model_{folder}_config.json")]
    config = json.loads(files[config_name])
    first = next(iter(config["config"].values()))
    first["use_pickle"] = True
    files[config_name] = json.dumps(config).encode()
    files[f"archive/data/{folder}/{first['path_name']}"] = evil


def _custom_object(files: dict[str, bytes], evil: bytes) -> None:
    (config_name,) = [name for name in files if name.endswith("model_constants_config.json")]
    config = json.loads(files[config_name])
    next(iter(config["config"].values()))["path_name"] = "custom_obj_0"
    files[config_name] = json.dumps(config).encode()
    files["archive/data/constants/custom_obj_0"] = evil


SLOTS = {
    "weight": lambda files, evil: _pickled(files, "weights", evil),
    "constant": lambda files, evil: _pickled(files, "constants", evil),
    "sample inputs": lambda files, evil: files.update({"archive/data/sample_inputs/model.pt": evil}),
    "legacy weights": lambda files, evil: files.update({"archive/data/weights/model.pt": evil}),
    "legacy constants": lambda files, evil: files.update({"archive/data/constants/model.pt": evil}),
    "custom object": _custom_object,
}
# torch's own C++ unpickler reads this slot; it builds TorchScript objects and does not call what a pickle names.
HARMLESS_WHEN_LOADED = ("custom object",)


@pytest.mark.parametrize("slot", SLOTS)
def test_nothing_runs(slot: str, fault: Fault, folder: Path, program: bytes, deserializers: Spy) -> None:
    directory, marker = folder / "cache", folder / "ran"
    files = _archive()
    SLOTS[slot](files, pickle.dumps(Payload(marker)))
    evil = _pack(files)
    with contextlib.suppress(Exception):
        torch.export.load(io.BytesIO(evil))
    assert marker.exists() is (slot not in HARMLESS_WHEN_LOADED), "control: is the crafted file dangerous at all?"
    shutil.rmtree(marker, ignore_errors=True)
    deserializers.calls = 0
    # The program is replaced; the manifest cannot be made to fit by somebody who may not write here.
    read(CacheStore(directory), Builder(program))
    (entry_path(directory) / "program.pt2").write_bytes(evil)
    store = CacheStore(directory)
    found = store.lookup(NAME, Key.of(MATERIAL))
    assert not isinstance(found, Entry)
    assert read(store, Builder(program)) == program
    assert not marker.exists()
    assert deserializers.calls == 0
    # Everything fits, but others can write the directory: all of it is refused.
    read(CacheStore(directory), Builder(evil), {**MATERIAL, "slot": slot})
    directory.chmod(0o777)
    store = CacheStore(directory)
    found = store.lookup(NAME, Key.of({**MATERIAL, "slot": slot}))
    assert not isinstance(found, Entry)
    assert "everybody" in found.reason
    assert read(store, Builder(program), {**MATERIAL, "slot": slot}) == program
    assert not marker.exists()
    assert deserializers.calls == 0
    if slot == "weight":
        dangerous = len(SLOTS) - len(HARMLESS_WHEN_LOADED)
        told = f"{len(SLOTS)} slots ({dangerous} of them run code when loaded directly): nothing ran"
        fault.record("codes", told)
        fault.record("codes-open", told)
