"""Tables and tars from elsewhere: the values, or one DataError that names the file; nothing outside is read."""

from __future__ import annotations

import errno
import gzip
import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from owl_wms.data import npy_table
from owl_wms.data.npy_table import NpyTable, NpyTableWriter
from owl_wms.data.s3 import BucketError, TarBucket, make_client, read_clips
from owl_wms.data.windows import WindowDataset
from owl_wms.errors import ConfigError, DataError
from tests.data.test_s3 import ClientError, clip, make_tar
from tests.only_ours import read_or_refuse


def table(folder: Path, rows: int = 3, dtype: str = "<f4") -> list[dict[str, Any]]:
    writer = NpyTableWriter(folder, ("z", "mouse"), ("seed",))
    for row in range(rows):
        writer.append({"z": np.full((4, 2), row, dtype), "mouse": np.zeros((4, 2), "f4")}, seed=row)
    rows_of: list[dict[str, Any]] = json.loads((folder / "manifest.json").read_text())
    return rows_of


def put(folder: Path, rows: Any) -> None:
    (folder / "manifest.json").write_text(json.dumps(rows) if not isinstance(rows, str) else rows)


@pytest.mark.parametrize("flag", ["False", "false", "0", "", 2, 0.0, [], {}, "nan"])
@pytest.mark.parametrize("name", ["missing", "truncated"])
def test_a_flag_is_true_or_false(tmp_path: Path, flag: Any, name: str) -> None:
    rows = table(tmp_path)
    rows[1][name] = flag
    put(tmp_path, rows)
    with pytest.raises(DataError, match=f"{name!r} of row 1 must be true or false") as caught:
        NpyTable(tmp_path)
    assert caught.value.index == 1


@pytest.mark.parametrize(
    ("flag", "kept"), [(True, [0, 2]), (1, [0, 2]), (False, [0, 1, 2]), (0, [0, 1, 2]), (None, [0, 1, 2])]
)
def test_flags_that_are_clear(tmp_path: Path, flag: Any, kept: list[int]) -> None:
    rows = table(tmp_path)
    rows[1]["missing"] = flag
    put(tmp_path, rows)
    assert [row.index for row in NpyTable(tmp_path).rows] == kept


@pytest.mark.parametrize("dtype", [">f4", ">f8", "<f2", ">i2", ">u4", "|u1", "|b1"])
def test_byte_orders_reach_a_window_as_numbers(tmp_path: Path, dtype: str) -> None:
    table(tmp_path)
    values = np.arange(8).reshape(4, 2).astype(dtype)
    np.save(tmp_path / "z_1.npy", values)
    window = WindowDataset(tmp_path, 4, ("z",))[1][0]
    assert np.array_equal(window.numpy(), values)


@pytest.mark.parametrize("order", ["C", "F"])
def test_a_slice_is_what_numpy_has(tmp_path: Path, order: str) -> None:
    table(tmp_path)
    values = np.asarray(np.random.default_rng(0).normal(size=(4, 2)), order=order)  # type: ignore[call-overload]
    np.save(tmp_path / "z_0.npy", values)
    for start in range(4):
        for stop in range(start + 1, 5):
            assert np.array_equal(NpyTable(tmp_path).slice(0, "z", start, stop), values[start:stop])


def test_links(tmp_path: Path) -> None:
    inside, outside = tmp_path / "table", tmp_path / "elsewhere"
    outside.mkdir()
    rows = table(inside)
    np.save(outside / "private.npy", np.full((4, 2), 42.0))
    (inside / "z_0.npy").rename(inside / "real.npy")
    (inside / "z_0.npy").symlink_to("real.npy")
    assert NpyTable(inside).slice(0, "z", 0, 1).tolist() == [[0, 0]], "a link inside of the folder leads nowhere else"
    (tmp_path / "link").symlink_to(inside)
    assert len(NpyTable(tmp_path / "link").rows) == 3, "the folder itself may be a link"
    for target in (outside / "private.npy", "../elsewhere/private.npy", "/dev/zero", "/proc/self/environ"):
        (inside / "z_0.npy").unlink()
        (inside / "z_0.npy").symlink_to(target)
        with pytest.raises(DataError, match=r"z_0\.npy: cannot read array 'z' of row 0: is a link out of its folder"):
            NpyTable(inside)
    (inside / "z_0.npy").unlink()
    (inside / "deep").symlink_to(outside)
    for name in (
        "deep/private.npy",
        "../elsewhere/private.npy",
        str(outside / "private.npy"),
        "..",
        ".",
        "",
        "a\0b",
        3,
        None,
    ):
        rows[0]["z"] = name
        put(inside, rows)
        with pytest.raises(DataError, match="row 0"):
            NpyTable(inside)
    (outside / "manifest.json").write_text(json.dumps(rows))
    (inside / "manifest.json").unlink()
    (inside / "manifest.json").symlink_to(outside / "manifest.json")
    with pytest.raises(DataError, match="link out of its folder"):
        NpyTable(inside)


def test_pipes_are_refused_at_once(tmp_path: Path) -> None:
    table(tmp_path)
    (tmp_path / "z_2.npy").unlink()
    os.mkfifo(tmp_path / "z_2.npy")
    with pytest.raises(DataError, match=r"z_2\.npy: cannot read array 'z' of row 2: is a named pipe"):
        NpyTable(tmp_path)
    for name in ("manifest.json", "schema.json"):
        (tmp_path / name).unlink()
        os.mkfifo(tmp_path / name)
        with pytest.raises(DataError, match="is a named pipe"):
            NpyTable(tmp_path)


def test_an_array_that_is_cut_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    table(tmp_path)
    opened = NpyTable(tmp_path)
    with (tmp_path / "z_1.npy").open("r+b") as file:
        file.truncate(140)
    with pytest.raises(DataError, match=r"z_1\.npy: .*truncated"):
        opened.slice(1, "z", 0, 4)


@pytest.mark.parametrize("length", [3, 5, "4", 4.5, [4], {"n": 4}])
def test_rows_that_lie_about_their_length(tmp_path: Path, length: Any) -> None:
    rows = table(tmp_path)
    rows[1]["seq_len"] = length
    put(tmp_path, rows)
    with pytest.raises(DataError, match="row 1 differ in length"):
        NpyTable(tmp_path)


JSON = {
    "deep": "[" * 100_000, "digits": "9" * 10_000, "text": "hello", "empty": "", "rows": "[1, 2]", "null": "null",
    "object": "{}", "cut": '[{"z": "z_0.npy"', "utf-16": "\ud83d",
}  # fmt: skip


@pytest.mark.parametrize("name", JSON)
def test_manifests(tmp_path: Path, name: str) -> None:
    table(tmp_path)
    (tmp_path / "manifest.json").write_text(JSON[name], encoding="utf-8", errors="surrogatepass")
    with pytest.raises(DataError) as caught:
        NpyTable(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_byte_order_mark_is_no_fault(tmp_path: Path) -> None:
    rows = table(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps(rows, indent=1).replace("\n", "\r\n"), encoding="utf-8-sig")
    assert len(NpyTable(tmp_path).rows) == 3


@pytest.mark.parametrize(
    ("value", "stored"),
    [(np.int64(7), 7), (np.float32(0.5), 0.5), (np.bool_(True), True), (torch.tensor(3), 3), (np.array(2.5), 2.5),
     (np.str_("a"), "a"), ("ü", "ü"), (None, None), ([1, 2], [1, 2])],
)  # fmt: skip
def test_fields_of_numpy_are_written_as_json(tmp_path: Path, value: Any, stored: Any) -> None:
    NpyTableWriter(tmp_path, ("z",), ("seed",)).append({"z": np.zeros((2, 1))}, seed=value)
    assert NpyTable(tmp_path).rows[0].fields["seed"] == stored


@pytest.mark.parametrize("value", [float("nan"), np.float64("inf"), b"x", object(), np.arange(3), {1j: 2}, 1j])
def test_fields_that_are_no_json_leave_nothing_behind(tmp_path: Path, value: Any) -> None:
    writer = NpyTableWriter(tmp_path, ("z",), ("seed",))
    with pytest.raises(DataError, match="'seed' of row 0 cannot be written as JSON"):
        writer.append({"z": np.zeros((2, 1))}, seed=value)
    assert not list(tmp_path.glob("*.npy"))
    assert len(writer) == 0


@pytest.mark.parametrize("array", [np.array(["a"]), np.array([None]), np.zeros((2,), "M8[s]"), np.float32(1),
                                   [[1, 2], [3]],
                                   np.zeros(2, "g"), np.zeros(2, "c8")], ids=repr)  # fmt: skip
def test_arrays_that_are_no_numbers(tmp_path: Path, array: Any) -> None:
    writer = NpyTableWriter(tmp_path, ("z",))
    with pytest.raises(DataError, match="row 0"):
        writer.append({"z": array})
    assert not list(tmp_path.glob("*.npy"))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_no_reader_takes_is_not_written(tmp_path: Path, value: float) -> None:
    writer = NpyTableWriter(tmp_path, ("mouse",))
    with pytest.raises(DataError, match=r"'mouse' of row 0 must be finite numbers \[n, ...\], got float64 \[2\]"):
        writer.append({"mouse": np.array([1.0, value])})
    assert not len(writer)


def test_what_is_written_is_native_and_whole(tmp_path: Path) -> None:
    values = np.arange(12, dtype=">f4").reshape(4, 3)[:, ::-1]
    NpyTableWriter(tmp_path, ("z",)).append({"z": values})
    assert np.load(tmp_path / "z_0.npy").dtype.isnative
    assert np.array_equal(np.load(tmp_path / "z_0.npy"), values)


def test_a_row_that_was_taken_out_of_the_manifest_costs_no_other_row(tmp_path: Path) -> None:
    rows = table(tmp_path)
    put(tmp_path, [rows[0], rows[2]])
    writer = NpyTableWriter(tmp_path, ("z", "mouse"), ("seed",))
    for seed in (7, 8):
        writer.append({"z": np.full((4, 2), seed, "f4"), "mouse": np.zeros((4, 2), "f4")}, seed=seed)
    found = NpyTable(tmp_path)
    assert [float(found.slice(row, "z", 0, 1)[0, 0]) for row in range(4)] == [0, 2, 7, 8]


def test_two_writers_of_one_table_take_nothing_from_each_other(tmp_path: Path) -> None:
    first, second = (NpyTableWriter(tmp_path, ("z",), ("seed",)) for _ in range(2))
    first.append({"z": np.zeros((4, 2), "f4")}, seed=0)
    with pytest.raises(DataError, match="another program has added rows since this one opened the table; run this one"):
        second.append({"z": np.ones((4, 2), "f4")}, seed=1)
    os.utime(tmp_path / "manifest.json", ns=(1, 1))  # by a network drive
    first.append({"z": np.zeros((4, 2), "f4")}, seed=2)
    NpyTableWriter(tmp_path, ("z",), ("seed",)).append({"z": np.ones((4, 2), "f4")}, seed=1)
    found = NpyTable(tmp_path)
    assert [row.fields["seed"] for row in found.rows] == [0, 2, 1]
    assert [float(found.slice(row, "z", 0, 1).max()) for row in range(3)] == [0, 0, 1]


@pytest.mark.parametrize("name", ["manifest.json", "schema.json"])
@pytest.mark.parametrize("late", [False, True])
def test_a_writer_goes_on_after_an_append_that_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, late: bool
) -> None:
    """By a full disk, or by Ctrl-C when the manifest has the row already: none names files that are not there."""
    writer = NpyTableWriter(tmp_path, ("z",), ("seed",), begin=False)
    replace = npy_table._replace_json
    ended = []

    def replaced(path: Path, value: Any) -> None:
        if late or path.name != name:
            replace(path, value)
        if path.name == name and not ended:
            ended.append(name)
            raise KeyboardInterrupt if late else OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(npy_table, "_replace_json", replaced)
    with pytest.raises(KeyboardInterrupt if late else DataError):
        writer.append({"z": np.zeros((4, 2), "f4")}, seed=0)
    assert json.loads((tmp_path / "manifest.json").read_text()) == []
    monkeypatch.undo()
    writer.append({"z": np.ones((4, 2), "f4")}, seed=1)
    assert NpyTable(tmp_path).slice(0, "z", 0, 4).all()


def test_an_append_writes_through_no_link(tmp_path: Path) -> None:
    """A copy of a table may consist of links to the files of the original."""
    table(tmp_path / "copy", rows=1)
    np.save(tmp_path / "original.npy", np.zeros(3))
    (tmp_path / "copy" / "z_1.npy").symlink_to(tmp_path / "original.npy")
    writer = NpyTableWriter(tmp_path / "copy", ("z", "mouse"), ("seed",))
    writer.append({"z": np.ones((4, 2), "f4"), "mouse": np.zeros((4, 2), "f4")}, seed=1)
    assert np.array_equal(np.load(tmp_path / "original.npy"), np.zeros(3))
    assert NpyTable(tmp_path / "copy").slice(1, "z", 0, 4).all()


def test_an_interrupted_append_leaves_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table(tmp_path)
    writer = NpyTableWriter(tmp_path, ("z", "mouse"), ("seed",))

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("owl_wms.data.npy_table._replace_json", interrupt)
    with pytest.raises(KeyboardInterrupt):
        writer.append({"z": np.zeros((4, 2), "f4"), "mouse": np.zeros((4, 2), "f4")}, seed=9)
    assert not (tmp_path / "z_3.npy").exists()
    assert len(NpyTable(tmp_path).rows) == 3


MEMBERS = ("latent", "mouse", "buttons")


def tar_of(members: dict[str, bytes], mode: str = "w", **options: Any) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode, **options) as tar:  # type: ignore[call-overload]
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return out.getvalue()


def members_of(tar: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(tar)) as opened:
        return {entry.name: opened.extractfile(entry).read() for entry in opened}  # type: ignore[union-attr]


@pytest.mark.parametrize("beside", ["._{}", "PaxHeader/{}", "PaxHeaders.123/{}", "__MACOSX/._{}", "__MACOSX/{}",
                                    "a/._{}", ".{}", "./._{}"])  # fmt: skip
@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_members_that_archivers_add(beside: str, form: int) -> None:
    good = members_of(make_tar({"./day one/ü": clip(3)}))
    bad = {beside.format(name.split("/")[-1]): b"\0\5\26\7\0\2\0\0Mac OS X        " for name in good}
    clips = read_clips(tar_of({**bad, **good}, format=form), source="x.tar", members=MEMBERS)
    assert [len(found["latent"]) for found in clips] == [3]


@pytest.mark.parametrize("packed", [gzip.compress, __import__("bz2").compress, __import__("lzma").compress])
def test_compressed_tars_are_refused_by_name(packed: Any) -> None:
    with pytest.raises(DataError, match=r"x\.tar: not a readable tar \(it is compressed"):
        read_clips(packed(make_tar({"a": clip(3)})), source="x.tar", members=MEMBERS)


def test_a_sparse_member_claims_more_than_there_is() -> None:
    entry = tarfile.TarInfo("a.latent.pt")
    entry.size = 1 << 40
    data = entry.tobuf(tarfile.GNU_FORMAT) + b"\0" * 1024
    with pytest.raises(DataError, match="claims more bytes"):
        read_clips(data, source="x.tar", members=MEMBERS)


@pytest.mark.parametrize(
    "value",
    [torch.zeros(3, dtype=torch.complex64), torch.zeros(()), [1], torch.zeros(1).expand(9, 9), torch.eye(3).to_sparse(),
     {"latent": torch.zeros(3)}],
    ids=repr,
)  # fmt: skip
def test_members_that_are_no_clips(value: Any) -> None:
    with pytest.raises(DataError, match=r"x\.tar: member a\.latent\.pt") as caught:
        read_clips(make_tar({"a": {"latent": value}}), source="x.tar", members=("latent",))
    assert "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value)


def test_float8_members_are_widened() -> None:
    (found,) = read_clips(
        make_tar({"a": {"latent": torch.ones(3, 2).to(torch.float8_e5m2)}}), source="x", members=("latent",)
    )
    assert found["latent"].dtype == torch.float32


@pytest.mark.parametrize("code", ["NoSuchKey", "404", "NoSuchVersion", "InvalidObjectState"])
def test_an_object_that_is_not_there_is_asked_for_once(code: str) -> None:
    asked, waits = [], []

    class Client:
        def get_object(self, **where: str) -> None:
            asked.append(where)
            raise ClientError(code, 404)

    with pytest.raises(DataError, match="s3://b/k: no such object") as caught:
        TarBucket("b", client_factory=Client, sleep=waits.append).fetch("k")
    assert not isinstance(caught.value, BucketError)
    assert (len(asked), waits) == (1, [])


@pytest.mark.parametrize(
    "name", ["ProfileNotFound", "NoRegionError", "UnauthorizedSSOTokenError", "TokenRetrievalError"]
)
def test_refusals_of_the_credential_chain_are_final(name: str) -> None:
    class Client:
        def get_object(self, **_: str) -> None:
            raise type(name, (Exception,), {})("no\nway")

    with pytest.raises(BucketError, match="cannot be read: no way"):
        TarBucket("b", client_factory=Client).fetch("k")


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    return tmp_path


def signed() -> str:
    return str(make_client().generate_presigned_url("get_object", Params={"Bucket": "b", "Key": "k.tar"}))


def test_the_whole_chain_of_credentials(aws: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("boto3")
    (aws / "credentials").write_text(
        "[other]\naws_access_key_id=AKOTHER\naws_secret_access_key=s\naws_session_token=tok\n"
    )
    (aws / "config").write_text("[profile other]\nregion=eu-west-3\n")
    monkeypatch.setenv("AWS_PROFILE", "other")
    assert "AKOTHER" in signed()
    assert "eu-west-3" in signed()
    assert "tok" in signed()
    monkeypatch.setenv("AWS_REGION", "eu-central-1")
    assert "eu-central-1" in signed()
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "https://store.example:9000")
    assert signed().startswith("https://store.example:9000/")
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(ConfigError, match="nobody"):
        make_client()


def test_a_program_for_keys_that_is_not_there(aws: Path) -> None:
    pytest.importorskip("boto3")
    (aws / "config").write_text("[default]\ncredential_process = /no/such/program\n")
    with pytest.raises(ConfigError, match=r"configuration of AWS: .*/no/such/program"):
        make_client()


@given(
    st.binary(max_size=200),
    st.integers(0, 10**6),
    st.integers(0, 60),
    st.sampled_from(["manifest.json", "schema.json", "z_1.npy"]),
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_only_our_own_errors_for_damaged_tables(tmp_path: Path, put: bytes, at: int, cut: int, name: str) -> None:
    if not (tmp_path / "schema.json").exists():
        table(tmp_path)
    whole = (tmp_path / name).read_bytes()
    at %= len(whole)
    try:
        (tmp_path / name).write_bytes(whole[:at] + put + whole[at + cut :])
        read_or_refuse(lambda folder: NpyTable(folder).slice(1, "z", 0, 1), tmp_path)
    finally:
        (tmp_path / name).write_bytes(whole)


@given(st.binary(max_size=200), st.integers(0, 10**6), st.integers(0, 600))
@settings(max_examples=100, deadline=None)
@pytest.mark.filterwarnings("ignore")
def test_only_our_own_errors_for_damaged_tars(put: bytes, at: int, cut: int) -> None:
    whole = make_tar({"a": clip(2)})
    at %= len(whole)
    data = whole[:at] + put + whole[at + cut :]
    read_or_refuse(lambda path: read_clips(data, source=str(path), members=MEMBERS), Path("x.tar"))


def test_masked_values_are_not_written_as_numbers(tmp_path: Path) -> None:
    writer = NpyTableWriter(tmp_path, ("mouse",))
    with pytest.raises(DataError, match="'mouse' of row 0 has masked values; fill them first"):
        writer.append({"mouse": np.ma.masked_array([1.0, 2.0], [False, True])})
    assert writer.append({"mouse": np.ma.masked_array([1.0, 2.0], [False, False])}) == 0


def test_a_table_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    NpyTableWriter("~/table", ("mouse",)).append({"mouse": np.arange(3.0)})
    assert NpyTable(tmp_path / "table").slice(0, "mouse", 0, 3).tolist() == [0, 1, 2]
    assert NpyTable("~/table").slice(0, "mouse", 0, 3).tolist() == [0, 1, 2]


def test_a_row_whose_file_was_replaced(tmp_path: Path) -> None:
    table(tmp_path)
    opened = NpyTable(tmp_path)
    whole = np.load(tmp_path / "z_1.npy")
    for other in (whole[:2], np.concatenate([whole, whole], axis=-1)):
        np.save(tmp_path / "new.npy", other)
        os.replace(tmp_path / "new.npy", tmp_path / "z_1.npy")
        with pytest.raises(DataError, match=r"z_1\.npy: frames 1 to 4 of 'z' in row 1 are \[.*open the table anew"):
            opened.slice(1, "z", 1, 4)


@pytest.mark.parametrize("name", ["manifest.json", "schema.json"])
def test_a_key_that_stands_twice(tmp_path: Path, name: str) -> None:
    table(tmp_path)
    text = (tmp_path / name).read_text()
    (tmp_path / name).write_text(text.replace("{", '{"missing": true, "missing": false, ', 1))
    with pytest.raises(DataError, match=rf"{name}: .*the key 'missing' stands twice in one object"):
        NpyTable(tmp_path)


def with_link(kind: bytes) -> bytes:
    out = io.BytesIO()
    good = members_of(make_tar({"a": clip(3)}))
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in good.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
        link = tarfile.TarInfo("b.latent.pt")
        link.type, link.linkname = kind, "a.latent.pt"
        tar.addfile(link)
    return out.getvalue()


def second_member(tar: bytes) -> int:
    with tarfile.open(fileobj=io.BytesIO(tar)) as opened:
        return opened.getmembers()[1].offset


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (with_link(tarfile.LNKTYPE), r"member b\.latent\.pt is a link"),
        (with_link(tarfile.SYMTYPE), r"member b\.latent\.pt is a link"),
        (make_tar({"a": clip(3)}) + make_tar({"b": clip(3)}), "something follows its end"),
        ((whole := make_tar({"a": clip(3), "b": clip(3)}))[: second_member(whole)], "breaks off"),
        (whole[: second_member(whole) + 100], "breaks off"),
        (whole[: second_member(whole)] + b"?" * 512 + whole[second_member(whole) + 512 :], "damaged"),
    ],
    ids=["hard-link", "symbolic-link", "joined", "cut", "cut-header", "damaged-header"],
)
def test_clips_that_a_tar_would_lose_in_silence(data: bytes, words: str) -> None:
    with pytest.raises(DataError, match=words):
        read_clips(data, source="x.tar", members=MEMBERS)
