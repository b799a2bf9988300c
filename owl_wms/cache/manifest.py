"""`manifest.json`: what an entry is, what its bytes must be, and a seal over all of it.

Why a byte-exact format: the file must be exactly the canonical JSON of what it says, and carries the SHA-256 of that.
So one flipped bit anywhere in it is noticed, there is nothing to be lenient about, and the parser can give up early on
hostile input. The seal is integrity; authenticity is the optional HMAC, whose secret is not stored in the cache
directory.

Usage:
    manifest = Manifest(name="dcae", key=key, material=material, size=n, sha256=digest, report={}, created_unix=0)
    data = manifest.to_bytes(hmac_key=None)
    assert parse(data, path) == manifest
"""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import json
import re
from pathlib import Path
from typing import Any

from owl_wms.cache.key import MAX_DEPTH, SCHEMA, cache_key, canonical
from owl_wms.errors import CacheCorruptError

FILE_NAME = "manifest.json"
PROGRAM = "program.pt2"
MAX_BYTES = 1 << 20
MAX_VALUES = 50_000

_HEX64 = re.compile(r"[0-9a-f]{64}\Z")
_LABEL = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}\Z")
_MAX_INT = 1 << 63
_FIELDS = {"schema", "name", "key", "material", "program", "report", "created_unix", "hmac_sha256", "seal"}


class ForeignSchemaError(CacheCorruptError):
    """The manifest says it was written by another version of this format; it may be sound, but not for us."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """One entry's facts.

    Attributes:
        name: model label, as in the directory name.
        key: 64 hex digits over `material`.
        material: everything the program depends on, in clear, so that a miss can be explained.
        size: bytes of `program.pt2`.
        sha256: 64 hex digits of `program.pt2`.
        report: what the build said (timings, parity numbers); informative.
        created_unix: seconds since 1970 by the writer's clock; informative, nothing is decided by it.
    """

    name: str
    key: str
    material: dict[str, Any]
    size: int
    sha256: str
    report: dict[str, Any]
    created_unix: int

    def to_bytes(self, hmac_key: bytes | None) -> bytes:
        """The file's bytes; with `hmac_key` they are signed.

        Raises:
            CacheCorruptError: it would not be readable again (too large, too deep), so it must not be written.
        """
        body = self._body()
        body["hmac_sha256"] = None if hmac_key is None else _sign(body, hmac_key)
        data = canonical({**body, "seal": _seal(body)})
        parse(data, FILE_NAME)
        return data

    def _body(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "name": self.name,
            "key": self.key,
            "material": self.material,
            "program": {"sha256": self.sha256, "size": self.size},
            "report": self.report,
            "created_unix": self.created_unix,
        }


def _seal(body: dict[str, Any]) -> str:
    """SHA-256 over everything else in the file, the signature included, so that no bit of it can change unnoticed."""
    return hashlib.sha256(canonical(body)).hexdigest()


def _sign(body: dict[str, Any], hmac_key: bytes) -> str:
    return hmac.new(hmac_key, canonical(body), hashlib.sha256).hexdigest()


def parse(data: bytes, path: Path | str) -> Manifest:
    """Read a manifest strictly.

    Work is bounded before it is done (1 MiB of text, 50,000 values, 32 levels), so any bytes take under 100 ms and
    64 MiB.

    Raises:
        CacheCorruptError: for any bytes that `Manifest.to_bytes` would not have written, and nothing else.
    """

    def refuse(why: str) -> CacheCorruptError:
        return CacheCorruptError(f"manifest {why}", path=path)

    if len(data) > MAX_BYTES:
        raise refuse(f"is larger than {MAX_BYTES} bytes")
    if data.count(b",") + data.count(b"[") + data.count(b"{") > MAX_VALUES:
        raise refuse(f"holds more than {MAX_VALUES} values")
    try:
        found = json.loads(data.decode("ascii"))
        if not isinstance(found, dict):
            raise refuse(f"must be a JSON object, is {type(found).__name__}")
        if not _depth_within(found, MAX_DEPTH + 2):
            raise refuse(f"is nested deeper than {MAX_DEPTH + 2}")
        exact = canonical(found) == data
    except (ValueError, RecursionError) as error:  # ValueError covers JSON, ASCII, NaN and over-long integers
        raise refuse(f"is not readable JSON: {type(error).__name__}: {str(error)[:200]}") from None
    schema = found.get("schema")
    if schema != SCHEMA or isinstance(schema, (bool, float)):
        raise ForeignSchemaError(f"manifest has schema {str(schema)[:40]}, this version reads {SCHEMA}", path=path)
    if set(found) != _FIELDS:
        raise refuse(f"has fields {sorted(set(found) ^ _FIELDS)[:5]} too many or too few")
    if not exact:
        raise refuse("is not in canonical form")
    return _checked(found, refuse)


def _checked(found: dict[str, Any], refuse: Any) -> Manifest:
    seal, signature = found.pop("seal"), found["hmac_sha256"]
    if not _is_hex(seal) or not (signature is None or _is_hex(signature)):
        raise refuse("has a malformed seal or signature")
    if not hmac.compare_digest(seal, _seal(found)):
        raise refuse("does not match its own SHA-256")
    program = found["program"]
    if not isinstance(program, dict) or set(program) != {"sha256", "size"} or not _is_hex(program["sha256"]):
        raise refuse("has a malformed program record")
    if not _is_count(program["size"]) or not _is_count(found["created_unix"]):
        raise refuse("has a size or time that is not a non-negative integer")
    if not isinstance(found["name"], str) or not _LABEL.fullmatch(found["name"]):
        raise refuse("has a malformed name")
    if not isinstance(found["material"], dict) or not isinstance(found["report"], dict):
        raise refuse("has a material or report that is not an object")
    if not _is_hex(found["key"]) or cache_key(found["material"]) != found["key"]:
        raise refuse("has a key that does not belong to its material")
    return Manifest(
        name=found["name"],
        key=found["key"],
        material=found["material"],
        size=program["size"],
        sha256=program["sha256"],
        report=found["report"],
        created_unix=found["created_unix"],
    )


def signature_problem(data: bytes, hmac_key: bytes) -> str | None:
    """Returns why a manifest (already parsed successfully) may not be used under `hmac_key`.

    None when its signature is right.
    """
    body = json.loads(data)
    del body["seal"]
    signature = body.pop("hmac_sha256")
    if signature is None:
        return "unsigned, and this cache was opened with a signing key"
    return None if hmac.compare_digest(signature, _sign(body, hmac_key)) else "signed with another key"


def _is_hex(value: Any) -> bool:
    return isinstance(value, str) and _HEX64.fullmatch(value) is not None


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MAX_INT


def _depth_within(value: Any, limit: int) -> bool:
    level = [value]
    for _ in range(limit + 1):
        following: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                following.extend(item.values())
            elif isinstance(item, list):
                following.extend(item)
        if not following:
            return True
        level = following
    return False
