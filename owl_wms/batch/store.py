"""Puts finished files into a local folder or an object store, whole or not at all.

Local: the file is written into a staging folder of the same file system, flushed to the disk, and renamed. An object
store makes an object visible when its upload is complete, so there the staged file is uploaded. fsspec does the rest.

Usage:
    store = Store("s3://bucket/frames")
    store.place(staged, "clips/a.npy")
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec

from owl_wms.process import Process, is_left

FOLDER = "_ledger"
"""Folder of a generation that holds its ledger and unfinished files."""
GENERATION = "generation-"
"""What the names of generations begin with."""
_PIECE = 256 << 10
_TAKEN = (FileExistsError, IsADirectoryError, NotADirectoryError)


def own_name() -> str:
    """Returns a name that no other caller gets; it says which process this is."""
    return Process.current().unique_name()


def is_local(fs: Any) -> bool:
    """Returns whether a file system of fsspec is this machine's own, or shared and mounted here."""
    return "file" in ((fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol)


def located(url: str) -> tuple[Any, str]:
    """Returns the file system and the path in it that a URL or a local path names.

    fsspec reads `a::b` as two file systems, one inside of the other; here it is a name, unless URLs stand behind `::`.

    Raises:
        ValueError, ImportError: a protocol that fsspec does not know, or whose library is missing.
    """
    if not url:
        raise ValueError("its name is empty")
    inner = url.split("::")[1:]
    if "://" in url and all("://" in part for part in inner):
        found: tuple[Any, str] = fsspec.core.url_to_fs(url)
        return found
    fs = fsspec.filesystem(url.partition("://")[0] if "://" in url else "file")
    return fs, str(fs._strip_protocol(url))


class Store:
    """A folder or prefix that outputs go to.

    Attributes:
        url: as given.
        is_local: whether it is a folder of this machine or of a shared file system.
    """

    def __init__(self, url: str) -> None:
        """Remembers where to write; nothing is made yet.

        Raises:
            ValueError, ImportError: a protocol that fsspec does not know, or whose library is missing.
        """
        self.fs: Any
        self.url = url
        self.fs, root = located(url)
        self.is_local = is_local(self.fs)
        self.root = os.path.realpath(root) if self.is_local else root.rstrip("/")

    def path(self, name: str) -> str:
        """Returns the path of a name inside this store."""
        return f"{self.root}/{name}"

    def staging(self, owner: str) -> Path:
        """Returns the folder for unfinished files of one owner, a name of `own_name`; `""` is the folder of all."""
        if self.is_local:
            return Path(self.path(f"{FOLDER}/staging")) / owner
        digest = hashlib.sha256(self.url.encode()).hexdigest()[:16]
        return Path(tempfile.gettempdir()) / f"owl-wms-staging-{digest}" / owner

    def remove_abandoned(self) -> None:
        """Removes staging folders of processes that are gone; of other machines and containers those of a month ago."""
        place = self.staging("")
        for folder in place.glob("*"):
            owner = Process.parse(folder.name)
            lives = True if owner is None else owner.lives()
            with suppress(OSError):
                if lives is False or (lives is None and is_left(folder.lstat(), place.stat())):
                    shutil.rmtree(folder, ignore_errors=True)

    def place(self, staged: Path, name: str) -> None:
        """Makes a staged file, already flushed, visible under its name, in the place of one that is there.

        Raises:
            OSError: the store refuses it.
        """
        if self.is_local:
            target = Path(self.path(name))
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(staged, target)
            sync(target.parent)
        else:
            self.fs.put_file(str(staged), self.path(name))
            staged.unlink()

    def place_all(self, files: list[tuple[Path, str]]) -> str | None:
        """Places files that belong together, each staged and with its name: all of them or none.

        Returns:
            None, or the name that cannot be had, since a folder has it or a file has the name of its folder.

        Raises:
            OSError: the store refuses one for another reason.
        """
        taken = next((name for _, name in files if self.is_local and self._is_taken(name)), None)
        placed: list[str] = []
        for path, name in files if taken is None else ():
            try:
                self.place(path, name)
            except _TAKEN:  # by another process since, or by one of these files
                for earlier in placed:
                    self.fs.rm_file(self.path(earlier))
                return name
            placed.append(name)
        return taken

    def _is_taken(self, name: str) -> bool:
        target = Path(self.path(name))
        around = next((folder for folder in target.parents if folder.exists()), None)
        return (target.is_dir() and not target.is_symlink()) or (around is not None and not around.is_dir())

    def write(self, name: str, data: bytes) -> None:
        """Writes a small file whole."""
        if not self.is_local:
            self.fs.pipe_file(self.path(name), data)
            return
        folder = self.staging(own_name())  # of this call alone: threads write at the same time
        folder.mkdir(parents=True)
        try:
            staged = folder / "file"
            staged.write_bytes(data)
            sync(staged)
            self.place(staged, name)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def read(self, name: str) -> bytes | None:
        """Returns a file's bytes, or None where there is none."""
        try:
            return bytes(self.fs.cat_file(self.path(name)))
        except FileNotFoundError:
            return None

    def names(self, folder: str) -> list[str]:
        """Returns the sorted names of the files in a folder of this store."""
        if self.is_local:
            try:
                with os.scandir(self.path(folder)) as found:
                    return sorted(entry.name for entry in found if entry.is_file())
            except FileNotFoundError:
                return []
        try:
            self.fs.invalidate_cache()
            return sorted(path.rpartition("/")[2] for path in self.fs.ls(self.path(folder), detail=False))
        except FileNotFoundError:
            return []

    def digest(self, name: str) -> str | None:
        """Returns the SHA-256 of a file, or None where there is none."""
        try:
            with self.fs.open(self.path(name), "rb") as file:
                return digest_of(file)
        except FileNotFoundError:
            return None

    def download(self, name: str, to: Path) -> Path:
        """Returns a local path with the file's bytes: its own, or `to` filled with a copy."""
        if self.is_local:
            return Path(self.path(name))
        self.fs.get_file(self.path(name), str(to))
        return to


def digest_of(file: Any) -> str:
    """Returns the SHA-256 of what an open binary file has left, as hexadecimal digits."""
    digest = hashlib.sha256()
    for piece in _pieces(file):
        digest.update(piece)
    return digest.hexdigest()


def _pieces(file: Any) -> Iterator[memoryview]:
    buffer = bytearray(_PIECE)
    view = memoryview(buffer)
    while got := file.readinto(view):
        yield view[:got]


def sync(path: Path) -> None:
    """Flushes a file, or the names in a folder, to the disk.

    Raises:
        OSError: the disk is full or gone.
    """
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
