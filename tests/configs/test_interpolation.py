"""References are replaced as OmegaConf replaces them, or refused by name; paths are those that a shell would give."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest

from owl_wms.configs import load_vae_config, load_vae_model
from owl_wms.configs.paths import expanded, find_beside
from owl_wms.configs.strict import StrictModel, parse, read_yaml
from owl_wms.errors import ConfigError

FILE = """
train: {dir: /ckpt, lr: 0.1, betas: [0.9, 0.95], on: true, VALUE}
data: {root: /data, train: "${.root}/train"}
"""


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OWL_ROOT", "/runs")
    monkeypatch.setenv("OWL_SECRET", "hunter2")
    monkeypatch.delenv("OWL_UNSET", raising=False)


def read(folder: Path, value: str) -> Any:
    path = folder / "c.yml"
    path.write_text(FILE.replace("VALUE", f"x: {value}").replace("on:", '"on":'))
    return read_yaml(path)["train"]["x"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("'${oc.env:OWL_ROOT}/a'", "/runs/a"), ("'${env:OWL_ROOT}/a'", "/runs/a"),
        ("'${oc.env:OWL_UNSET,/b}/a'", "/b/a"),
        ("'${oc.env:OWL_ROOT,/b}'", "/runs"), ("'${oc.env:OWL_UNSET, \"/b\"}'", "/b"),
        ("'${oc.env:OWL_UNSET,null}'", None),
        ("'${train.dir}/out.pt'", "/ckpt/out.pt"), ("'${.dir}/out.pt'", "/ckpt/out.pt"), ("'${..data.root}'", "/data"),
        ("'${data.train}'", "/data/train"), ("'${.lr}'", 0.1),
        ("'${train.betas[1]}'", 0.95), ("'${train.betas.0}'", 0.9),
        ("'${.betas}'", [0.9, 0.95]), ("'${.on}'", True), ("'lr ${.lr}'", "lr 0.1"), ("'\\${x}'", "${x}"), ("$5", "$5"),
    ],
)  # fmt: skip
def test_values(tmp_path: Path, text: str, value: Any) -> None:
    found = read(tmp_path, text)
    assert found == value
    assert isinstance(found, type(value))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("'${oc.env:OWL_UNSET}'", "OWL_UNSET, which is not set"), ("'${oc.decode:1}'", r"uses \$\{oc.decode:1\}"),
        ("'${now:%Y}'", "the forms that are replaced are"), ("'${}'", "the forms"), ("'${a b}'", "the forms"),
        ("'${nowhere.x}'", "does not have"), ("'${.x}'", "refers to itself"), ("'${train.x}'", "refers to itself"),
        ("'${.betas.7}'", "does not have"), ("'${.....x}'", "above the top"), ("'${${a}}'", "nested or not closed"),
        ("'${train.dir'", "nested or not closed"), ("'a ${.betas}'", "puts a list into text"),
        ("'???'", "must be given"),
        ("1e999", "finite number"), (".inf", "finite number"),
    ],
)  # fmt: skip
def test_refusals_name_the_key(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        read(tmp_path, text)
    assert caught.value.key == "train.x"


def test_circles_are_refused(tmp_path: Path) -> None:
    (tmp_path / "c.yml").write_text("a: ${b}\nb: ${c.d}\nc: {d: '${a}'}\ne: '${e}'\n")
    with pytest.raises(ConfigError, match="refers to itself"):
        read_yaml(tmp_path / "c.yml")


def test_changes_come_before_references(tmp_path: Path) -> None:
    path = tmp_path / "c.yml"
    path.write_text("train: &t {dir: /a, out: '${.dir}/x', lr: '???'}\nother: {<<: *t}\n")
    found = read_yaml(
        path, changes=["train.dir=/b", "train.lr=1e-4", "other.lr=0", "train.opt.eps=0", "wandb.name='${train.out}'"]
    )
    assert found["train"] == {"dir": "/b", "out": "/b/x", "lr": 1e-4, "opt": {"eps": 0}}
    assert found["wandb"] == {"name": "/b/x"}
    for change, words in (("x", "KEY=VALUE"), ("train.lr=yes", "write true"), ("train.dir.x=1", "is a value, not a"),
                          ("train.lr=[" + "[" * 990, "not YAML"),
                          ("train.lr=" + "x" * 99_999, "longer than")):  # fmt: skip
        with pytest.raises(ConfigError, match=words):
            read_yaml(path, changes=[change])


def test_a_change_that_yaml_would_drop_is_refused(tmp_path: Path) -> None:
    """A shell leaves nothing of a variable that is not set, and `#` after a space begins a comment."""
    path = tmp_path / "c.yml"
    path.write_text("train: {dir: /a}\n")
    kept = {"train.dir='a #2'": "a #2", 'train.dir="#3"': "#3", "train.dir=a#b": "a#b", "train.dir=null": None}
    for change, value in kept.items():
        assert read_yaml(path, changes=[change]) == {"train": {"dir": value}}
    for text, words in (("", "write null"), (" ", "write null"), ("runs/try #2", "is a comment"), ("#2", "a comment")):
        with pytest.raises(ConfigError, match=rf"^--set train\.dir.*{words}") as caught:
            read_yaml(path, changes=[f"train.dir={text}"])
        assert caught.value.key == "train.dir"


def test_a_secret_stays_out_of_the_message(tmp_path: Path) -> None:
    class Section(StrictModel):
        size: int
        kind: str

    path = tmp_path / "c.yml"
    path.write_text("size: '${oc.env:OWL_SECRET}'\nkind: 'a${env:OWL_SECRET}'\n")
    data = read_yaml(path)
    assert data["size"] == "hunter2"
    with pytest.raises(ConfigError, match=r"received '\$\{oc\.env:OWL_SECRET\}'") as caught:
        parse(Section, data, path=path)
    assert "hunter2" not in str(caught.value)
    assert type(parse(Section, {**data, "size": 1}).kind) is str
    path.write_text("model: {model_id: '${env:OWL_SECRET}'}\n")
    with pytest.raises(ConfigError, match="unknown autoencoder") as caught:
        load_vae_config(path)
    assert "hunter2" not in str(caught.value)
    assert pickle.loads(pickle.dumps(data)) == data


def test_a_decoder_reads_its_model_alone(tmp_path: Path) -> None:
    path = tmp_path / "c.yml"
    model = (
        "{model_id: distill_vae, sample_size: 64, latent_channels: 4, ch_0: 4, ch_max: 64, "
        "encoder_blocks_per_stage: [1], decoder_blocks_per_stage: [1]}"
    )
    path.write_text(f"model: {model}\ntrain: {{skip_ind: 1, dir: '${{oc.env:OWL_UNSET}}'}}\nelse: 3\n")
    assert load_vae_model(path).latent_channels == 4
    path.write_text("train: {}\n")
    with pytest.raises(ConfigError, match=r"model\.model_id: is missing"):
        load_vae_model(path)


def test_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    for text, path in {
        "~": "/home/me", "~/a b": "/home/me/a b", "$OWL_ROOT/x": "/runs/x", "${OWL_ROOT}": "/runs", "a~b": "a~b",
        "/x/~": "/x/~", "cost$5": "cost$5", "x" * 255: "x" * 255, "größe/ü": "größe/ü", "10:30.mp4": "10:30.mp4",
        "100%/x": "100%/x", "a%20b%20c": "a%20b%20c", "caf%C3%A9": "caf%C3%A9", "5%h/x": "5%h/x",
        "a/%C3%A9t%C3%A9": "a/%C3%A9t%C3%A9", "d%C3%A9j%C3%A0": "d%C3%A9j%C3%A0", "50%old_50%new": "50%old_50%new",
    }.items():  # fmt: skip
        assert expanded(text) == Path(path)
        assert expanded(Path(text)) == Path(path)


@pytest.mark.parametrize(
    "text",
    ["", " ", "a\0b", "a\nb", "a\r", "$OWL_UNSET/x", "${OWL_UNSET}", "${oc.env:X}", "${a.b}/x", "$(date)",
     "`date`", "/runs/`hostname`", "a`b", "'/a'", '"/a b"',
     "s3://bucket/x", "file:///x", "hf://a/b", "~nobody-of-that-name/x", "x" * 256,
     "/a/" + "ü" * 128, os.fsdecode(b"\xff"), "$$HOME/x", "$${HOME}/x", "%HOME%/x", "/a/%USER%", "%h/.cache",
     "{{ home }}/x"],
)  # fmt: skip
def test_odd_paths_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"^(which|whose|of which)"):
        expanded(text)


def test_a_secret_in_a_path_stays_out_of_the_message(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OWL_SECRET", "x" * 300)
    with pytest.raises(ValueError, match="longer than the 255 bytes"):
        expanded("$OWL_SECRET")


def test_a_place_that_cannot_be_looked_at_is_not_an_error() -> None:
    assert find_beside("x" * 300, "/c.yml") == Path("x" * 300)
    assert find_beside(None, "/c.yml") is None
