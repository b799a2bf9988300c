"""Files that are not configurations at all: each gives ConfigError, quickly and in little memory."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from owl_wms.configs import load_vae_config, load_world_config
from owl_wms.configs.strict import read_yaml
from owl_wms.errors import ConfigError

BOMB = "a0: &a0 [1,1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)
FILES = {
    "list": (b"- 1\n", "mapping of sections, found list"),
    "empty": (b"", "found nothing"),
    "syntax": (b"model: [1,\n", "not valid YAML: line 2: the text ends here, and a bracket is not closed$"),
    "twice": (b"model: 1\nmodel: 2\n", "the key 'model' appears twice"),
    "code": (b"model: !!python/object/apply:os.system ['true']\n", "not valid YAML"),
    "date": (b"model: 2020-99-99\n", "must be a mapping, received '2020-99-99'"),
    "half": (rb'model: "x\ud83d"', "a text holds half of a character"),
    "binary": (b"\xff\xfe\x00\x01", "cannot read this configuration: it is no text in UTF-8"),
    "nul": (b"\x00", "not valid YAML"),
    "deep": (b"- " * 5000, "nested too deeply"),
    "brackets": (b"[" * 5000, "brackets"),
    "entries": (b"a: [" + b"1," * 7900 + b"]", "more than 2000 commas, colons, dashes and brackets"),
    "rows": (b"a:\n" + b"- b: 1\n" * 2200, "more than 2000 commas"),
    "open": (b"[" * 900, "nested too deeply|not valid YAML"),
    "loop": (b"model: &a [*a]\n", "recursive"),
    "bomb": (BOMB.encode(), "values or"),
    "huge": (b"# " + b"x" * (1 << 16), "larger than"),
}


@pytest.mark.parametrize("name", FILES)
def test_hostile_files(tmp_path: Path, name: str) -> None:
    data, words = FILES[name]
    path = tmp_path / "c.yml"
    path.write_bytes(data)
    began = time.thread_time()  # of this thread alone: other programs on the machine do not count
    with pytest.raises(ConfigError, match=words) as caught:
        load_vae_config(path)
    assert time.thread_time() - began < 1
    assert len(str(caught.value)) < 2000
    assert caught.value.path == path


def test_no_file_and_a_folder(tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "absent.yml", "No such file or directory"), (tmp_path, "Is a directory")):
        with pytest.raises(ConfigError, match=f"{path}: cannot read this configuration: {reason}$"):
            load_vae_config(path)


def test_numbers_without_a_point_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "c.yml"
    path.write_text("a: 1e-4\nb: 1.5e3\nc: -2E+1\nd: 1e\ne: 12\nf: '1e-4'\n")
    assert read_yaml(path) == {"a": 1e-4, "b": 1500.0, "c": -20.0, "d": "1e", "e": 12, "f": "1e-4"}


_LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
_TREES = st.recursive(
    _LEAVES, lambda t: st.lists(t, max_size=3) | st.dictionaries(st.text(max_size=6), t, max_size=3), max_leaves=12
)
_KEYS = st.sampled_from(["model", "train", "wandb", "model_id", "sample_size", "opt_kwargs", "trainer_id"])


@given(tree=st.dictionaries(_KEYS, st.dictionaries(_KEYS, _TREES, max_size=4) | _TREES, max_size=3))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_only_our_own_errors_for_any_tree(tmp_path: Path, tree: dict) -> None:
    path = tmp_path / "c.yml"
    path.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8", errors="surrogatepass")
    for load in (load_vae_config, load_world_config):
        with pytest.raises(ConfigError):
            load(path)


@given(data=st.binary(max_size=200))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_only_our_own_errors_for_any_bytes(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "c.yml"
    path.write_bytes(b"model: " + data)
    with pytest.raises(ConfigError):
        load_vae_config(path)
