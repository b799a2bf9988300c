"""Fetching tars of latents from an S3 bucket, with bounded retries, and taking them apart.

A tar holds clips as members `{base}.latent.pt`, `{base}.mouse.pt`, `{base}.buttons.pt` and, with sound,
`{base}.audiolatent.pt`, each a tensor [n, ...]. boto3 is imported when a tar is fetched, and tensors are read with
`weights_only=True`: a bucket is not trusted to bring code. Credentials, region and address are found by boto3's own
search: variables, shared files, profiles, single sign-on, roles of containers and instances.

Usage:
    bucket = TarBucket("cod-data-latent-360x640to5x8", prefix="feats")
    clips = read_clips(bucket.fetch("00/0000/0003.tar"), source="00/0000/0003.tar", members=("latent", "mouse",
    "buttons"))
"""

from __future__ import annotations

import io
import logging
import re
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from http.client import HTTPException
from typing import Any

from torch import Tensor

from owl_wms import env
from owl_wms.errors import ConfigError, DataError
from owl_wms.files import is_foreign, one_line
from owl_wms.interrupts import raise_interrupt
from owl_wms.media.arrays import ARRAY_SUFFIXES, load_tensor_bytes

SHARDS, SUBDIRS, TARS = 2, 1, 9  # how upstream's buckets are laid out
ATTEMPTS = 5
_FIRST_WAIT_SECONDS = 0.5
_LONGEST_WAIT_SECONDS = 8.0
# Classes of botocore's and urllib3's errors that another try can change: the network's. All others are of settings.
_OF_NETWORK = {"HTTPClientError", "ConnectionError", "IncompleteReadError", "HTTPError", "FlexibleChecksumError"}
# The same of S3's answers: a server that is busy. Any other answer from 300 to 499 stays the same.
_BUSY_STATUS = {307, 408, 409, 429}
_BUSY_CODE = re.compile("Throttl|SlowDown|RequestTimeout$|LimitExceeded|TooManyRequests|PriorRequestNotComplete")
# Answers about one object: it is not there, or lies in an archive.
_ABSENT_CODES = {"NoSuchKey", "NoSuchVersion", "InvalidObjectState", "404"}
_BLOCK = 512  # bytes; a tar ends in two blocks of zeros
_PACKED = {"gzip": b"\x1f\x8b", "bzip2": b"BZh", "xz": b"\xfd7zXZ", "zstandard": b"\x28\xb5\x2f\xfd", "zip": b"PK"}
_log = logging.getLogger(__name__)


class BucketError(DataError):
    """Says that a bucket cannot be read at all, whichever of its objects is asked for."""


def tar_key(shard: int, subdir: int, tar: int) -> str:
    """Key of a tar below the prefix, for example `01/0000/0008.tar`."""
    return f"{shard:02d}/{subdir:04d}/{tar:04d}.tar"


def make_client() -> Any:
    """Make a boto3 S3 client; boto3 itself finds credentials, region and address.

    AWS_REGION, which boto3 does not read, counts before AWS_DEFAULT_REGION and the profile's region. With none of them
    the region is `auto`, which stores other than AWS take.

    Raises:
        ConfigError: boto3 is not installed, or its configuration cannot be used (no such profile, a broken file).
    """
    try:
        import boto3
        from botocore.exceptions import BotoCoreError
    except ImportError as error:
        raise ConfigError("loaders that read S3 need boto3: pip install boto3") from error
    try:
        session = boto3.session.Session()
        return session.client("s3", region_name=env.read("AWS_REGION") or session.region_name or "auto")
    except (BotoCoreError, ValueError, OSError) as error:  # OSError: of the program that a profile names for its keys
        raise_interrupt(error)
        raise ConfigError(f"S3 cannot be reached with this configuration of AWS: {one_line(error)}") from error


class TarBucket:
    """Objects of one bucket below one prefix."""

    def __init__(
        self,
        bucket_name: str,
        prefix: str = "",
        *,
        attempts: int = ATTEMPTS,
        client_factory: Callable[[], Any] = make_client,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Remember where to read; nothing is contacted yet.

        Args:
            bucket_name: the bucket.
            prefix: put before every key, with a slash.
            attempts: tries per object before giving up, at least 1.
            client_factory: makes the client on first use, in the process that uses it.
            sleep: waits between tries, seconds.
        """
        self.bucket_name, self.prefix, self.attempts = bucket_name, prefix.strip("/"), attempts
        self._factory, self._sleep = client_factory, sleep
        self._client: Any = None

    @property
    def client(self) -> Any:
        """Return the client, made when it is first asked for."""
        if self._client is None:
            self._client = self._factory()
        return self._client

    def fetch(self, key: str) -> bytes:
        """Return the object's bytes, tried `attempts` times with doubling waits.

        Raises:
            BucketError: the bucket refuses these credentials or does not exist; said after the first try.
            DataError: there is no such object, said after the first try, or the last try failed.
            ConfigError: boto3 is missing, or its configuration cannot be used.
        """
        full = f"{self.prefix}/{key}" if self.prefix else key
        wait = _FIRST_WAIT_SECONDS
        for attempt in range(1, self.attempts + 1):
            client = self.client
            try:
                result: bytes = client.get_object(Bucket=self.bucket_name, Key=full)["Body"].read()
                return result
            except Exception as error:  # botocore makes its exception classes at run time: there is no base to name
                raise_interrupt(error)
                said = one_line(error) or type(error).__name__
                codes = _codes(error)
                absent = codes & _ABSENT_CODES and "NoSuchBucket" not in codes
                if not absent and _is_final(error, codes):
                    raise BucketError(
                        f"s3://{self.bucket_name}: cannot be read: {said}; check bucket_name and AWS's credentials, "
                        "region and address (AWS_PROFILE, AWS_ACCESS_KEY_ID, AWS_REGION, AWS_ENDPOINT_URL_S3)",
                        path=self.bucket_name,
                    ) from error
                if absent:
                    raise DataError(f"s3://{self.bucket_name}/{full}: no such object: {said}", path=full) from error
                if attempt == self.attempts:
                    raise DataError(
                        f"s3://{self.bucket_name}/{full}: not read after {attempt} tries: {said}; "
                        "check bucket, credentials and network",
                        path=full,
                    ) from error
                _log.warning(
                    "s3://%s/%s: try %d of %d failed: %s", self.bucket_name, full, attempt, self.attempts, said
                )
            self._sleep(wait)
            wait = min(2 * wait, _LONGEST_WAIT_SECONDS)
        raise AssertionError("unreachable: the last try returns or raises")


def list_tars(bucket: TarBucket, prefix: str) -> list[str]:
    """Keys of the tars below a prefix, in the order of their names.

    Of a prefix that is a folder's name these are the folder's own: `clips` is not the beginning of `clips_old` too.

    Raises:
        BucketError: the bucket cannot be listed.
        DataError: it has none there.
        ConfigError: boto3 is missing, or its configuration cannot be used.
    """
    client = bucket.client
    try:
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket.bucket_name, Prefix=prefix)
        keys = [entry["Key"] for page in pages for entry in page.get("Contents", [])]
    except Exception as error:  # see `fetch`
        raise_interrupt(error)
        text = f"s3://{bucket.bucket_name}: cannot be listed: {one_line(error)}; check bucket and AWS's credentials"
        raise BucketError(text, path=bucket.bucket_name) from error
    # The prefix itself may be hidden: it was named. A name that it begins is not hidden by a dot that follows there.
    begun = "-" if prefix and not prefix.endswith("/") else ""
    below = {key: (begun + key.removeprefix(prefix)).split("/") for key in keys}
    tars = sorted(key for key in keys if key.endswith(".tar") and not is_foreign(below[key]))
    if not tars:
        raise DataError(f"s3://{bucket.bucket_name}/{prefix}: no .tar below this prefix", path=prefix)
    folder = f"{prefix.removesuffix('/')}/" if prefix else ""
    own = [key for key in tars if key.startswith(folder)] or tars
    if len(own) < len(tars):
        other = next(key for key in tars if not key.startswith(folder))
        text = "s3://%s/%s: is a folder; tars whose names only begin so are passed over (%d, such as %s)"
        _log.warning(text, bucket.bucket_name, prefix, len(tars) - len(own), other)
    return own


def _codes(error: Exception) -> set[str]:
    """Return S3's code and the HTTP status of an error, as botocore's ClientError carries them."""
    response = getattr(error, "response", None)
    found = response if isinstance(response, dict) else {}
    status = found.get("ResponseMetadata", {}).get("HTTPStatusCode", "")
    return {str(found.get("Error", {}).get("Code", "")), str(status)} - {""}


def _is_final(error: Exception, codes: set[str]) -> bool:
    """Return whether another try would end in the same way."""
    if codes:
        if any(_BUSY_CODE.search(code) for code in codes):
            return False
        numbers = {int(code) for code in codes if code.isdecimal()}
        return any(300 <= number < 500 or number == 501 for number in numbers - _BUSY_STATUS)
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return not kinds & {*_OF_NETWORK, "ClientError"} and not isinstance(error, (OSError, HTTPException))


def read_clips(data: bytes, *, source: str, members: Sequence[str]) -> list[dict[str, Tensor]]:
    """Returns the clips of a tar that have all of `members`, each {member: tensor [n, ...]} of one length n.

    Args:
        data: the tar's bytes.
        source: its name, for messages.
        members: what comes between base name and `.pt`, for example `latent`.

    Raises:
        DataError: not a tar, a member that is no tensor, or a clip whose members differ in length.
    """
    clips: dict[str, dict[str, Tensor]] = {}
    for name, member_bytes in tar_members(data, source=source):
        base, _, member = name.removesuffix(".pt").rpartition(".")
        if name.endswith(".pt") and member in members:
            clips.setdefault(base, {})[member] = _read_tensor(member_bytes, name, source)
    whole = {base: clip for base, clip in clips.items() if len(clip) == len(members)}
    for base, clip in whole.items():
        lengths = {member: len(tensor) for member, tensor in clip.items()}
        if len(set(lengths.values())) != 1:
            raise DataError(f"{source}: members of clip {base!r} differ in length: {lengths}", path=source)
    return list(whole.values())


def tar_members(data: bytes, *, source: str) -> Iterator[tuple[str, bytes]]:
    """Names and bytes of a tar's files, without those that archivers add on their own.

    Passed over are AppleDouble files (`._clip.latent.pt`, `__MACOSX/`), `PaxHeader/`, what file servers keep beside
    files (`@eaDir/`) and other hidden names, which are no data.

    Raises:
        DataError: not a plain tar (one that is compressed or sparse can claim any size), one that breaks off, goes on
            behind its end, or has a link in place of a file.
    """
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            for entry in tar:
                if is_foreign(entry.name.split("/")):
                    continue
                if entry.islnk() or (entry.issym() and entry.name.lower().endswith(ARRAY_SUFFIXES)):
                    # GNU tar stores a file's second name so. Passed over, its clip would be missing in silence.
                    raise ValueError(f"member {entry.name} is a link; pack with --dereference --hard-dereference")
                if not entry.isfile():
                    continue
                if entry.issparse() or entry.size > len(data):
                    raise ValueError(f"member {entry.name} claims more bytes than the tar has")
                file = tar.extractfile(entry)
                yield entry.name, b"" if file is None else file.read()
            # tarfile ends in silence where data end, at a damaged header, and at an end with another tar behind it.
            if data[tar.offset : tar.offset + _BLOCK] != bytes(_BLOCK):
                raise ValueError("it breaks off, or is damaged: no mark of its end follows its last member")
            if data.count(0, tar.offset) != len(data) - tar.offset:
                raise ValueError("something follows its end; tars that were joined must be packed anew as one")
    except Exception as error:  # damaged headers lead tarfile to raise more than its own errors
        raise_interrupt(error)
        if isinstance(error, DataError):
            raise
        packed = next((f" (it is compressed: {kind})" for kind, head in _PACKED.items() if data.startswith(head)), "")
        raise DataError(f"{source}: not a readable tar{packed}: {one_line(error)}", path=source) from error


def _read_tensor(data: bytes, name: str, source: str) -> Tensor:
    try:
        value = load_tensor_bytes(data)
    except ValueError as error:
        raise DataError(f"{source}: member {name} is not a readable tensor file: {error}", path=source) from error
    if not isinstance(value, Tensor) or value.ndim == 0 or value.is_complex():
        found = f"one of {value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise DataError(f"{source}: member {name} must hold a tensor with a frame axis, found {found}", path=source)
    return value.float() if value.is_floating_point() and value.element_size() == 1 else value
