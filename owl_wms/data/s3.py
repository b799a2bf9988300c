"""Fetching tars of latents from an S3 bucket, with bounded retries, and taking them apart.

A tar holds clips as members `{base}.latent.pt`, `{base}.mouse.pt`, `{base}.buttons.pt` and, with sound,
`{base}.audiolatent.pt`, each a tensor [n, ...]. boto3 is imported when a tar is fetched, and tensors are read with
`weights_only=True`: a bucket is not trusted to bring code. Credentials come from AWS_ENDPOINT_URL_S3,
AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_REGION.

Usage:
    bucket = TarBucket("cod-data-latent-360x640to5x8", prefix="feats")
    clips = read_clips(bucket.fetch("00/0000/0003.tar"), source="00/0000/0003.tar", members=("latent", "mouse",
    "buttons"))
"""

from __future__ import annotations

import io
import logging
import tarfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from owl_wms import env
from owl_wms.errors import ConfigError, DataError

SHARDS, SUBDIRS, TARS = 2, 1, 9  # how upstream's buckets are laid out
ATTEMPTS = 5
_FIRST_WAIT_SECONDS = 0.5
_LONGEST_WAIT_SECONDS = 8.0
# What another try cannot change: botocore's classes for credentials that are absent, and S3's codes for refusals.
_FINAL_ERRORS = {"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "InvalidRegionError"}
_FINAL_CODES = {
    "AccessDenied", "ExpiredToken", "InvalidAccessKeyId", "InvalidToken", "NoSuchBucket", "SignatureDoesNotMatch",
    "401", "403",
}  # fmt: skip
_log = logging.getLogger(__name__)


class BucketError(DataError):
    """A bucket that cannot be read at all, whichever of its objects is asked for."""


def tar_key(shard: int, subdir: int, tar: int) -> str:
    """Key of a tar below the prefix, for example `01/0000/0008.tar`."""
    return f"{shard:02d}/{subdir:04d}/{tar:04d}.tar"


def make_client() -> Any:
    """A boto3 S3 client from the environment.

    Raises:
        ConfigError: boto3 is not installed.
    """
    try:
        import boto3
    except ImportError as error:
        raise ConfigError("loaders that read S3 need boto3: pip install 'owl_wms[train]'") from error
    return boto3.client(
        "s3",
        endpoint_url=env.read("AWS_ENDPOINT_URL_S3"),
        aws_access_key_id=env.read("AWS_ACCESS_KEY_ID"),
        aws_secret_access_key=env.read("AWS_SECRET_ACCESS_KEY"),
        region_name=env.read("AWS_REGION") or "auto",
    )


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

    def fetch(self, key: str) -> bytes:
        """The object's bytes, tried `attempts` times with doubling waits.

        Raises:
            BucketError: the bucket refuses these credentials or does not exist; said after the first try.
            DataError: the last try failed; the message names bucket, key and reason.
            ConfigError: boto3 is missing.
        """
        full = f"{self.prefix}/{key}" if self.prefix else key
        if self._client is None:
            self._client = self._factory()
        wait = _FIRST_WAIT_SECONDS
        for attempt in range(1, self.attempts + 1):
            try:
                result: bytes = self._client.get_object(Bucket=self.bucket_name, Key=full)["Body"].read()
                return result
            except Exception as error:  # botocore makes its exception classes at run time: there is no base to name
                if _is_final(error):
                    raise BucketError(
                        f"s3://{self.bucket_name}: cannot be read: {error}; "
                        "check bucket_name, AWS_ENDPOINT_URL_S3, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
                        path=self.bucket_name,
                    ) from error
                if attempt == self.attempts:
                    raise DataError(
                        f"s3://{self.bucket_name}/{full}: not read after {attempt} tries: {error}; "
                        "check bucket, credentials and network",
                        path=full,
                    ) from error
                _log.warning(
                    "s3://%s/%s: try %d of %d failed: %s", self.bucket_name, full, attempt, self.attempts, error
                )
            self._sleep(wait)
            wait = min(2 * wait, _LONGEST_WAIT_SECONDS)
        raise AssertionError("unreachable: the last try returns or raises")


def _is_final(error: Exception) -> bool:
    """Whether trying again, or trying another key, would meet the same refusal."""
    response = getattr(error, "response", None)  # of botocore's ClientError
    found = response if isinstance(response, dict) else {}
    code = str(found.get("Error", {}).get("Code", ""))
    status = str(found.get("ResponseMetadata", {}).get("HTTPStatusCode", ""))
    return type(error).__name__ in _FINAL_ERRORS or code in _FINAL_CODES or status in _FINAL_CODES


def read_clips(data: bytes, *, source: str, members: Sequence[str]) -> list[dict[str, Tensor]]:
    """Clips of a tar that have all of `members`, each {member: tensor [n, ...]} of one length n.

    Args:
        data: the tar's bytes.
        source: its name, for messages.
        members: what comes between base name and `.pt`, for example `latent`.

    Raises:
        DataError: not a tar, a member that is no tensor, or a clip whose members differ in length.
    """
    clips: dict[str, dict[str, Tensor]] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            for entry in tar:
                base, _, member = entry.name.removesuffix(".pt").rpartition(".")
                if entry.isfile() and entry.name.endswith(".pt") and member in members:
                    clips.setdefault(base, {})[member] = _read_tensor(tar, entry, source)
    except tarfile.TarError as error:
        raise DataError(f"{source}: not a readable tar: {error}", path=source) from error
    whole = {base: clip for base, clip in clips.items() if len(clip) == len(members)}
    for base, clip in whole.items():
        lengths = {member: len(tensor) for member, tensor in clip.items()}
        if len(set(lengths.values())) != 1:
            raise DataError(f"{source}: members of clip {base!r} differ in length: {lengths}", path=source)
    return list(whole.values())


def _read_tensor(tar: tarfile.TarFile, entry: tarfile.TarInfo, source: str) -> Tensor:
    file = tar.extractfile(entry)
    try:
        value = torch.load(io.BytesIO(file.read() if file is not None else b""), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises whatever the unpickler trips over
        raise DataError(f"{source}: member {entry.name} is not a readable tensor file: {error}", path=source) from error
    if not isinstance(value, Tensor) or value.ndim == 0:
        raise DataError(
            f"{source}: member {entry.name} must hold a tensor with a frame axis, found {type(value).__name__}",
            path=source,
        )
    return value
