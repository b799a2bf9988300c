"""Folders of torch.distributed.checkpoint, read by one process and without running code from them.

Why a file of its own: the library reads the folder's `.metadata` with full pickle, so it is replaced here by a reader
that knows the dozen classes which such a file consists of; and importing the library takes a second.

Usage:
    state = read_distributed(Path("checkpoints/step_100"))        # {"model.conv_in.bias": tensor, ...}
"""

from __future__ import annotations

import math
import pickle
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from owl_wms.errors import CheckpointError
from owl_wms.interrupts import raise_interrupt
from owl_wms.memory import is_out_of_memory
from owl_wms.vae.layouts import is_training_state

MAX_METADATA_BYTES = 1 << 28
_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
}


class _MetadataUnpickler(pickle.Unpickler):
    """Refuses every class and function that no `.metadata` file of the library needs."""

    def find_class(self, module: str, name: str) -> Any:
        known = name in _CLASSES.get(module, ())
        if module in ("pathlib", "pathlib._local") and name.endswith("Path"):  # the folder that was written
            return PurePosixPath
        if known or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which would run code")


class _Reader(FileSystemReader):
    """The library's reader of folders, except for the way in which it reads `.metadata`."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(f"it holds a {type(metadata).__name__}")
        for info in metadata.storage_data.values():
            if Path(info.relative_path).name != info.relative_path:
                raise pickle.UnpicklingError(f"it names a file outside of the folder, {info.relative_path!r}")
        if getattr(metadata, "storage_meta", None) is None:  # the library's next step wants one
            metadata.storage_meta = StorageMeta()
        return metadata


def read_distributed(path: Path) -> dict[str, torch.Tensor]:
    """Returns the tensors of the folder by their full names, without those of optimisers and schedulers.

    Raises:
        CheckpointError: damaged, incomplete, claims more than its files hold, or objects that would run code.
    """
    try:
        size = (path / ".metadata").stat().st_size
        if size > MAX_METADATA_BYTES:
            raise ValueError(f".metadata has {size} bytes")
        metadata = _Reader(path).read_metadata()
        state = {}
        for key, entry in metadata.state_dict_metadata.items():
            if isinstance(entry, TensorStorageMetadata) and not is_training_state(key):
                # The library leaves a value that no part of the file covers as it was in memory.
                if sum(math.prod(chunk.sizes) for chunk in entry.chunks) != math.prod(entry.size):
                    raise ValueError(f"its parts of {key} do not make up {list(entry.size)}")
                with torch.device("meta"):
                    state[key] = torch.empty(entry.size, dtype=entry.properties.dtype)
        claimed = sum(tensor.nbytes for tensor in state.values())
        held = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
        if claimed > held:
            raise ValueError(f"its tensors claim {claimed} bytes, its files have {held}")
        state = {key: torch.empty_like(tensor, device="cpu") for key, tensor in state.items()}
        load(state, storage_reader=_Reader(path), no_dist=True)
    except (Exception, CheckpointException) as error:  # the library's own error is no Exception
        raise_interrupt(error)
        inner = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        if is_out_of_memory(inner):
            raise inner from error
        reason = " ".join(str(inner).split())[:200] or type(inner).__name__
        text = f"{path}: cannot be read as a folder of torch.distributed.checkpoint: {reason}"
        raise CheckpointError(text, path=path) from error
    return state
