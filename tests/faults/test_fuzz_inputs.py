"""Configuration files, latent files, checkpoints and player messages that nobody would write."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from owl_wms.configs import load_vae_config, load_world_config
from owl_wms.errors import CheckpointError, ConfigError, DataError
from owl_wms.inference.messages import MessageError, parse_message
from owl_wms.media.arrays import load_latents
from owl_wms.vae.checkpoint import read_state_dict
from tests.faults.conftest import Fault
from tests.faults.test_codes import Payload
from tests.faults.test_fuzz import MEMORY, SECONDS, mutations, peak_memory, slowest_of

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
YAML_BOMBS = {
    "aliases": b"a: &a [x,x,x,x,x,x,x,x,x]\n"
    + b"".join(b"%c: &%c [%s]\n" % (98 + i, 98 + i, b",".join([b"*%c" % (97 + i)] * 9)) for i in range(12)),
    "brackets": b"[" * 16_000,
    "flow": b"a: " + b"{b: " * 900,
    "indent": b"".join(b" " * i + b"a:\n" for i in range(170)),
    "large": b"a: 1\n" * 100_000,
    "number": b"a: " + b"9" * 16_000,
    "sexagesimal": b"a: " + b"1:" * 8_000 + b"1",
    "tag": b"!!python/object/apply:os.mkdir ['ran']",
    "merge": b"a: &a {<<: *a}",
    "date": b"a: 2001-99-99",
    "binary": b"a: !!binary |\n  not base64 \xff",
    "null key": b"? \n: 1",
    "list key": b"? [1, 2]\n: 1",
    "nul": b"a: \0",
}


@pytest.mark.timeout(900)
def test_configurations(fault: Fault, folder: Path) -> None:
    path = folder / "config.yml"
    seeds = [file.read_bytes() for file in sorted(CONFIGS.rglob("*.yml"))]
    assert seeds
    tried = 0
    slowest = 0.0
    peak = 0
    for load in (load_vae_config, load_world_config):

        def read(data: bytes, load: Any = load) -> None:
            path.write_bytes(data)
            load(path)

        inputs = [*YAML_BOMBS.values(), *mutations(seeds, fault.count(10_000), random.Random(2))]
        count, _, took = slowest_of(read, inputs, ConfigError)
        tried, slowest = tried + count, max(slowest, took)
        peak = max(peak, *(peak_memory(read, data, ConfigError) for data in YAML_BOMBS.values()))
    assert not Path("ran").exists()
    assert slowest < SECONDS
    assert peak < MEMORY
    fault.record(
        "fuzz-config",
        f"{tried} inputs: ConfigError only, slowest {slowest * 1e3:.0f} ms, at most {peak / 2**20:.0f} MiB",
    )


def _latent_files(folder: Path) -> dict[str, bytes]:
    z = torch.randn(1, 2, 4, 2, 2)
    torch.save(z, folder / "a.pt")
    np.save(folder / "a.npy", z.numpy())
    save_file({"latents": z}, folder / "a.safetensors")
    return {name: (folder / f"a.{name}").read_bytes() for name in ("pt", "npy", "safetensors")}


def _hostile_latents(marker: Path) -> dict[str, bytes]:
    """Files that lie about their size, or run code when unpickled."""
    npy = io.BytesIO()
    np.save(npy, np.zeros(1, np.float32))
    huge = npy.getvalue().replace(b"'shape': (1,)", b"'shape': (9999999999999,)"[: len(b"'shape': (1,)")])
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1, 99999999, 4, 999, 999), }"
    lie = b"\x93NUMPY\x01\x00" + (len(header) + 1).to_bytes(2, "little") + header + b"\n"
    objects = io.BytesIO()
    np.save(objects, np.array([Payload(marker)], dtype=object), allow_pickle=True)
    tensors = b'{"latents":{"dtype":"F32","shape":[1,9999999,4,99,99],"data_offsets":[0,4]}}'
    return {
        "huge.npy": huge,
        "lie.npy": lie,
        "objects.npy": objects.getvalue(),
        "lie.safetensors": len(tensors).to_bytes(8, "little") + tensors + b"0000",
        "header.safetensors": (1 << 62).to_bytes(8, "little"),
        "code.pt": pickle.dumps(Payload(marker)),
        "empty.pt": b"",
        "empty.npy": b"",
        "empty.safetensors": b"",
    }


@pytest.mark.timeout(900)
def test_latent_files(fault: Fault, folder: Path) -> None:
    tried, slowest, peak, marker = 0, 0.0, 0, folder / "ran"
    for suffix, good in _latent_files(folder).items():
        path = folder / f"fuzzed.{suffix}"

        def read(data: bytes, path: Path = path) -> None:
            path.write_bytes(data)
            load_latents(path, channels=4)

        count, _, took = slowest_of(read, mutations([good], fault.count(10_000), random.Random(4)), DataError)
        tried, slowest = tried + count, max(slowest, took)
    for name, data in _hostile_latents(marker).items():

        def read_named(data: bytes, name: str = name) -> None:
            (folder / name).write_bytes(data)
            load_latents(folder / name)

        peak = max(peak, peak_memory(read_named, data, DataError))
        tried += 1
    assert not marker.exists()
    assert slowest < SECONDS
    assert peak < MEMORY
    fault.record(
        "fuzz-latents",
        f"{tried} files: DataError only, slowest {slowest * 1e3:.0f} ms, at most {peak / 2**20:.0f} MiB, no code ran",
    )


def test_checkpoints_that_run_code(fault: Fault, folder: Path) -> None:
    marker = folder / "ran"
    evil = {
        "bare.pt": pickle.dumps(Payload(marker)),
        "old.pth": pickle.dumps({"model": Payload(marker)}, protocol=2),
        "nested.ckpt": pickle.dumps({"ema": {"conv_in.weight": Payload(marker)}}),
    }
    buffer = io.BytesIO()
    torch.save({"model": {"conv_in.weight": torch.zeros(1), "evil": Payload(marker)}}, buffer)
    evil["zip.pt"] = buffer.getvalue()
    with zipfile.ZipFile(io.BytesIO(evil["zip.pt"])) as archive:
        names = archive.namelist()
    assert any(name.endswith("data.pkl") for name in names)
    for name, data in evil.items():
        (folder / name).write_bytes(data)
        with pytest.raises(CheckpointError):
            read_state_dict(folder / name)
        assert not marker.exists()
        # Control: the file is dangerous when read without care.
        with contextlib.suppress(RuntimeError):
            torch.load(folder / name, weights_only=False)
        assert marker.exists()
        os.rmdir(marker)
    fault.record(
        "codes-checkpoint",
        f"{len(evil)} files (bare, nested, zipped), each dangerous when loaded carelessly: nothing ran",
    )


def test_player_messages(fault: Fault) -> None:
    seeds = [
        b'{"type":"input","buttons":["W","LMB"],"mouse":[0.1,-0.2],"sent":12.5}',
        b'{"type":"ack","index":7}',
        b'{"type":"command","name":"restart"}',
    ]

    def read(data: bytes) -> None:
        message = parse_message(data.decode("utf-8", "replace"))
        assert message.type in ("input", "ack", "command")
        if message.type == "input":
            assert all(-100 <= move <= 100 for move in message.mouse), "out of range, or not a number"

    hostile = [
        b"[" * 2048,
        b'{"type":' * 250,
        b'{"type":"ack","index":-1}',
        b'{"type":"ack","index":1e99}',
        b"NaN",
        b"",
    ]
    hostile += [seeds[0].replace(b"0.1", number) for number in (b"NaN", b"Infinity", b"1e999", b"101", b'"1"', b"null")]
    tried, accepted, slowest = slowest_of(read, hostile, MessageError)
    assert accepted == 0
    count, _, took = slowest_of(read, mutations(seeds, fault.count(200_000), random.Random(9)), MessageError)
    peak = max(peak_memory(read, data, MessageError) for data in hostile)
    assert max(slowest, took) < SECONDS
    assert peak < MEMORY
    fault.record(
        "fuzz-messages", f"{tried + count} messages: MessageError only, slowest {max(slowest, took) * 1e3:.0f} ms"
    )
