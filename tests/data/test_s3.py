"""Tars from a bucket: bounded retries, whole clips, exact lengths, seeds per rank, no code from pickles.

Run: python -m pytest tests/data/test_s3.py
"""

from __future__ import annotations

import io
import itertools
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from botocore.exceptions import (
    ConfigParseError,
    EndpointConnectionError,
    FlexibleChecksumError,
    IncompleteReadError,
    InvalidConfigError,
    ReadTimeoutError,
)

from owl_wms.data.loaders import get_loader
from owl_wms.data.s3 import BucketError, TarBucket, list_tars, read_clips
from owl_wms.data.s3_windows import MixedS3Windows, S3Windows
from owl_wms.errors import ConfigError, DataError
from tests.process_state import set_in_process

MEMBERS = ("latent", "mouse", "buttons")


def make_tar(clips: dict[str, dict[str, Any]]) -> bytes:
    """A tar with `{base}.{member}.pt` files."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for base, members in clips.items():
            for member, value in members.items():
                data = io.BytesIO()
                torch.save(value, data)
                info = tarfile.TarInfo(f"{base}.{member}.pt")
                info.size = data.tell()
                data.seek(0)
                tar.addfile(info, data)
    return out.getvalue()


def clip(n: int, value: float = 0.0) -> dict[str, torch.Tensor]:
    return {
        "latent": torch.full((n, 4, 2, 2), value) + torch.arange(n)[:, None, None, None],
        "audiolatent": torch.zeros(n, 3),
        "mouse": torch.zeros(n, 2),
        "buttons": torch.zeros(n, 11),
    }


class FakeClient:
    """An S3 client that fails some times, then serves one tar for every key."""

    def __init__(self, data: bytes, failures: int = 0) -> None:
        self.data, self.failures, self.keys = data, failures, []

    def get_object(self, Bucket: str, Key: str) -> dict[str, Any]:
        self.keys.append(Key)
        if self.failures > 0:
            self.failures -= 1
            raise TimeoutError("the network is down")
        return {"Body": io.BytesIO(self.data)}


def bucket(client: FakeClient, waits: list[float] | None = None) -> TarBucket:
    waits = [] if waits is None else waits
    return TarBucket("b", "p", attempts=3, client_factory=lambda: client, sleep=waits.append)


def test_a_fetch_is_retried_with_growing_waits_and_then_refused() -> None:
    waits: list[float] = []
    assert bucket(FakeClient(b"tar", failures=2), waits).fetch("k") == b"tar"
    assert waits == [0.5, 1.0]
    client = FakeClient(b"tar", failures=99)
    with pytest.raises(DataError, match=r"s3://b/p/k: not read after 3 tries: the network is down"):
        bucket(client).fetch("k")
    assert len(client.keys) == 3


def test_windows_accept_a_clip_of_exactly_their_length() -> None:
    data = make_tar({"exact": clip(4), "short": clip(3)})
    latent, mouse, buttons = next(iter(S3Windows(bucket(FakeClient(data)), 4, MEMBERS, pool_windows=2)))
    assert (latent.shape, mouse.shape, buttons.shape) == ((4, 4, 2, 2), (4, 2), (4, 11))


def test_streams_repeat_for_a_rank_and_differ_between_ranks() -> None:
    data = make_tar({"a": clip(60)})

    def starts(rank: int) -> list[float]:
        stream = S3Windows(bucket(FakeClient(data)), 4, MEMBERS, seed=3, rank=rank, pool_windows=8)
        return [float(latent[0, 0, 0, 0]) for latent, *_ in itertools.islice(stream, 12)]

    assert starts(0) == starts(0)
    assert starts(0) != starts(1)


def test_a_bucket_without_usable_clips_ends_in_an_error() -> None:
    with pytest.raises(DataError, match="tars in a row"):
        next(iter(S3Windows(bucket(FakeClient(make_tar({"short": clip(2)}))), 4, MEMBERS)))
    with pytest.raises(DataError, match="tars in a row"):
        next(iter(S3Windows(bucket(FakeClient(b"not a tar")), 4, MEMBERS)))


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    with pytest.raises(DataError, match="not a readable tensor"):
        read_clips(make_tar({"x": {"latent": Evil()}}), source="x.tar", members=("latent",))
    assert not (tmp_path / "ran").exists()


def test_mixed_samples_are_tamed_and_say_whether_they_have_controls() -> None:
    wild = clip(4)
    wild["latent"][0] = float("nan")
    wild["latent"][1] = 99.0
    client = FakeClient(make_tar({"a": wild}))
    labelled = S3Windows(bucket(client), 4, ("latent", "audiolatent", "mouse", "buttons"), pool_windows=2)
    unlabelled = S3Windows(bucket(client), 4, ("latent", "audiolatent"), pool_windows=2)
    samples = list(itertools.islice(MixedS3Windows(labelled, unlabelled, 0.5), 40))
    shares = torch.stack([has for *_, has in samples]).float().mean()
    assert 0.2 < shares < 0.8
    for latent, _, _, buttons, _ in samples:
        assert latent.isfinite().all()
        assert latent.abs().max() <= 8
        assert buttons.dtype == torch.float32


def test_streams_stay_on_the_cpu_beside_another_default_device(monkeypatch: pytest.MonkeyPatch) -> None:
    client = FakeClient(make_tar({"a": clip(4)}))
    monkeypatch.setattr("owl_wms.data.loaders.TarBucket", lambda *_: bucket(client))
    loader = get_loader("cod_s3_mixed", 8, window_length=4, num_workers=0, unlabelled_frac=0.5)
    with set_in_process("meta"):
        batch = next(iter(loader))
    assert [part.device.type for part in batch] == ["cpu"] * 5
    assert batch[-1].any()
    assert not batch[-1].all()


class NoCredentialsError(Exception):
    """As botocore names it."""


class ClientError(Exception):
    """As botocore builds it."""

    def __init__(self, code: str, status: int) -> None:
        super().__init__(f"An error occurred ({code})")
        self.response = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}


@pytest.mark.parametrize(
    "refusal",
    [
        NoCredentialsError("no credentials"),
        *(ClientError(*answer) for answer in (("NoSuchBucket", 404), ("AccessDenied", 403), ("301", 301))),
        *(ClientError(*answer) for answer in (("ExpiredTokenException", 400), ("RequestExpired", 400))),
        *(ClientError(*answer) for answer in (("InvalidRequest", 400), ("MethodNotAllowed", 405))),
        *(ClientError(*answer) for answer in (("KeyTooLongError", 400), ("NotImplemented", 501))),
        ConfigParseError(path="config", error="line 3"),
        InvalidConfigError(error_msg="no such source_profile"),
    ],
    ids=str,
)
def test_what_no_other_try_can_change_is_said_at_once(refusal: Exception) -> None:
    asked, waits = [], []

    class Refusing:
        def get_object(self, Bucket: str, Key: str) -> dict[str, Any]:
            asked.append(Key)
            raise refusal

    with pytest.raises(BucketError, match=r"s3://b: cannot be read: .*AWS_ACCESS_KEY_ID"):
        next(iter(S3Windows(bucket(Refusing(), waits), 4, MEMBERS)))  # type: ignore[arg-type]
    assert (len(asked), waits) == (1, [])


@pytest.mark.parametrize(
    "trouble",
    [
        *(ClientError(*answer) for answer in (("SlowDown", 503), ("InternalError", 500), ("RequestTimeout", 400))),
        *(ClientError(*answer) for answer in (("ThrottlingException", 400), ("TemporaryRedirect", 307))),
        EndpointConnectionError(endpoint_url="https://s3"),
        ReadTimeoutError(endpoint_url="https://s3"),
        IncompleteReadError(actual_bytes=1, expected_bytes=2),
        FlexibleChecksumError(error_msg="Expected checksum a did not match b"),
        ConnectionResetError("reset"),
    ],
    ids=str,
)
def test_a_busy_server_and_a_broken_line_are_tried_again(trouble: Exception) -> None:
    class Once(FakeClient):
        def get_object(self, Bucket: str, Key: str) -> dict[str, Any]:
            if not self.keys:
                self.keys.append(Key)
                raise trouble
            return super().get_object(Bucket, Key)

    waits: list[float] = []
    client = Once(b"the object")
    assert bucket(client, waits).fetch("00/0000/0000.tar") == b"the object"
    assert (len(client.keys), len(waits)) == (2, 1)


@pytest.mark.parametrize(
    "name",
    ["@eaDir/a.latent.pt", ".Trashes/501/a.latent.pt", "#recycle/a.latent.pt", "d/$RECYCLE.BIN/a.latent.pt"],
)
def test_what_file_servers_and_systems_keep_is_passed_over(name: str) -> None:
    data = io.BytesIO(make_tar({"./a": clip(4)}))
    with tarfile.open(fileobj=data, mode="a") as tar:
        tar.addfile(tarfile.TarInfo(name))
    assert len(read_clips(data.getvalue(), source="s", members=MEMBERS)) == 1


def test_an_absent_tar_is_not_an_absent_bucket() -> None:
    class Sparse(FakeClient):
        def get_object(self, Bucket: str, Key: str) -> dict[str, Any]:
            if len(self.keys) < 3:
                self.keys.append(Key)
                raise ClientError("NoSuchKey", 404)
            return super().get_object(Bucket, Key)

    client = Sparse(make_tar({"a": clip(4)}))
    assert next(iter(S3Windows(bucket(client), 4, MEMBERS, pool_windows=2)))
    assert len(client.keys) > 3


def test_tars_are_listed_below_a_prefix_that_is_hidden_itself(caplog: pytest.LogCaptureFixture) -> None:
    keys = [".feats/a.tar", ".feats/._a.tar", ".feats/.old/b.tar", ".feats/a.txt", ".feats_old/a.tar"]
    pages = SimpleNamespace(paginate=lambda **_: [{"Contents": [{"Key": key} for key in keys]}, {}])
    client = SimpleNamespace(get_paginator=lambda _: pages)
    listed = TarBucket("b", client_factory=lambda: client)
    assert list_tars(listed, ".feats/") == list_tars(listed, ".feats") == [".feats/a.tar"]
    assert [record.getMessage() for record in caplog.records] == [
        "s3://b/.feats: is a folder; tars whose names only begin so are passed over (1, such as .feats_old/a.tar)"
    ]
    assert list_tars(listed, ".fea") == [".feats/a.tar", ".feats_old/a.tar"]
    keys[:] = ["feats/2024.01.tar", "feats/2024/._x.tar"]
    assert list_tars(listed, "feats/2024") == [keys[0]], "the dot behind the prefix begins no name"


def test_a_client_that_cannot_be_made_says_so_when_tars_are_listed() -> None:
    def absent() -> None:
        raise ConfigError("loaders that read S3 need boto3: pip install boto3")

    with pytest.raises(ConfigError, match=r"pip install boto3$"):
        list_tars(TarBucket("b", client_factory=absent), "feats")


def test_clips_that_are_not_finite_are_left_out() -> None:
    wild = clip(8, value=50.0)
    wild["mouse"][3] = float("inf")
    stream = S3Windows(bucket(FakeClient(make_tar({"wild": wild, "good": clip(8)}))), 4, MEMBERS, pool_windows=4)
    highest = [float(latent.max()) for latent, *_ in itertools.islice(stream, 20)]
    assert len(highest) == 20
    assert max(highest) < 50


def test_audio_comes_in_the_order_that_trainers_read(monkeypatch: pytest.MonkeyPatch) -> None:
    client = FakeClient(make_tar({"a": clip(8)}))
    monkeypatch.setattr("owl_wms.data.loaders.TarBucket", lambda *_: bucket(client))
    parts = next(iter(get_loader("cod_s3_audio", 2, window_length=4, num_workers=0)))
    assert [tuple(part.shape) for part in parts] == [(2, 4, 4, 2, 2), (2, 4, 3), (2, 4, 2), (2, 4, 11)]


def test_an_error_of_a_stream_leaves_its_worker_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("owl_wms.data.loaders.TarBucket", lambda *_: bucket(FakeClient(b"not a tar")))
    with pytest.raises(DataError, match=r"^8 tars in a row") as caught:
        next(iter(get_loader("cod_s3", 2, window_length=4, num_workers=1)))
    assert caught.value.path == Path("b")
