"""`owl-wms decode` and `encode`: a clip there and back, and one line with exit code 2 for every bad input."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from owl_wms.configs import TAEHVConfig
from owl_wms.errors import ConfigError
from owl_wms.media.arrays import load_array, save_array
from owl_wms.media.facts import Facts
from owl_wms.media.read_facts import file_digest, read_facts
from owl_wms.media.video import read_video
from owl_wms.media.watch import rate_of
from owl_wms.utils.owl_vae_bridge import make_batched_decode_fn
from owl_wms.vae import build_decoder
from tests.cli.conftest import CONFIG
from tests.cli.runner import call, run


def test_decode_writes_clip_sheet_and_depth(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = place / "new" / "out.mp4"
    assert call(place, "decode", "latents.pt", "--out", str(out), "--png", str(place / "new" / "s.png"), "--depth") == 0
    frames = list(read_video(out))
    assert len(frames) == 10
    assert frames[0].shape == (36, 64, 3)
    assert len(list(read_video(place / "new" / "out_depth.mp4"))) == 10
    assert (place / "new" / "s.png").stat().st_size > 1000
    said = capsys.readouterr().err
    assert "10 frames" in said
    assert "decoded by: pytorch" in said


def test_latents_of_another_size_are_said(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "sized.yml").write_text(CONFIG + "  latent_size: 8\n")
    torch.save(torch.randn(1, 16, 8, 12), place / "oblong.pt")
    for name, said in (("latents.pt", 0), ("oblong.pt", 1)):
        assert call(place, "decode", name, "--out", str(place / f"{name}.mp4"), config="sized.yml") == 0
        error = capsys.readouterr().err
        assert error.count("latents are 8x12, the autoencoder's own are 8x8: frames will be stretched to 36x64") == said


def test_encode_inverts_shapes_and_scales(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("encode", "clip.mp4", "--depth", str(place / "depth.mp4"), "--batch-size", "2")
    assert call(place, *arguments, "--out", str(place / "z.npy")) == 0
    assert call(place, *arguments, "--out", str(place / "half.safetensors"), "--scale", "2") == 0
    z = load_array(place / "z.npy")
    assert z.shape == (3, 16, 8, 8)
    assert torch.allclose(load_array(place / "half.safetensors") * 2, z, atol=1e-5)
    facts = read_facts(place / "half.safetensors")
    assert (facts.vae_scale, facts.layout, facts.vae) == (2, "n c h w", "vae.safetensors")
    assert facts.vae_sha256 == file_digest(place / "vae.safetensors")
    assert facts.fps == rate_of(place / "clip.mp4")
    assert call(place, "decode", "z.npy", "--out", str(place / "back.mp4")) == 0
    assert "cannot state" not in capsys.readouterr().err
    assert call(place, *arguments, "--out", str(place / "half.npy"), "--scale", "2") == 0
    assert "half.npy: .npy cannot state that these latents are divided by 2: decode with --scale 2" in (
        capsys.readouterr().err
    )


def test_bad_input_is_one_line_and_exit_code_2(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(torch.randn(2, 8, 8, 8), place / "narrow.pt")
    torch.save(torch.full((2, 16, 8, 8), torch.inf), place / "inf.pt")
    (place / "junk.pt").write_bytes(b"\x80junk")
    (place / "cut.pt").write_bytes((place / "latents.pt").read_bytes()[:-300])
    (place / "odd.yml").write_text(CONFIG.replace("ch_0", "ch_zero"))
    save_file({"x": torch.zeros(1)}, place / "other.safetensors")
    huge = {key: value * 1e3 for key, value in load_file(place / "vae.safetensors").items()}
    save_file(huge, place / "huge.safetensors")
    half = ("--depth", str(place / "depth.mp4"), "--out", str(place / "black.pt"), "--dtype", "fp16")
    cases = [
        (("decode", "none.pt"), {}, "no such file"),
        (("decode", "junk.pt"), {}, "junk.pt"),
        (("decode", "cut.pt"), {}, "cut.pt: cannot be read: its archive is damaged or cut short"),
        (("decode", "narrow.pt"), {}, "takes 16 latent channels, got 8"),
        (("decode", "inf.pt"), {}, "not finite"),
        (("decode", "latents.pt", "--out", "x.gif"), {}, "must end in .mp4"),
        (("decode", "latents.pt", "--dtype", "fp4"), {}, "--dtype"),
        (("decode", "latents.pt", "--fps", "0"), {}, "--fps"),
        (("decode", "latents.pt"), {"config": "odd.yml"}, "ch_zero"),
        (("decode", "latents.pt"), {"config": "none.yml"}, "none.yml"),
        (("decode", "latents.pt"), {"weights": "none.safetensors"}, "none.safetensors"),
        (("decode", "latents.pt"), {"weights": "other.safetensors"}, "other.safetensors"),
        (("encode", "clip.mp4"), {}, "takes 4 channels"),
        (("encode", "junk.pt"), {}, "junk.pt"),
        (("encode", "clip.mp4", "--scale", "0"), {}, "--scale"),
        (("encode", "clip.mp4", "--out", "z.bin"), {}, "must end in"),
        (
            ("encode", "clip.mp4", *half),
            {"weights": "huge.safetensors"},
            "not finite in float16; encode in a wider dtype",
        ),
    ]
    for arguments, files, message in cases:
        capsys.readouterr()
        assert call(place, *arguments, **files) == 2, arguments
        error = capsys.readouterr().err
        assert message in error, (arguments, error)
        assert "Traceback" not in error
        assert error.count("error:") == 1
    assert not (place / "black.pt").exists()


def test_an_error_that_a_variable_asked_for_names_it(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = ("--out", str(place / "o.mp4"))
    monkeypatch.setenv("TENSORRT_FALLBACK", "Error")
    assert call(place, "decode", "latents.pt", *out) == 2
    error = capsys.readouterr().err
    assert "the decoder is on the CPU" in error
    assert "TENSORRT_FALLBACK=error forbids PyTorch: unset it, or set it to pytorch" in error
    monkeypatch.setenv("TENSORRT_FALLBACK", "pytorch")
    assert call(place, "decode", "latents.pt", *out) == 0


def test_a_text_is_no_checkpoint_and_no_latents(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "text.pt").write_text("hello world")
    for arguments, weights in ((("decode", "text.pt"), "vae.safetensors"), (("decode", "latents.pt"), "text.pt")):
        assert call(place, *arguments, weights=weights) == 2
        error = capsys.readouterr().err
        assert "text.pt: " in error
        assert (
            "torch.save did not write this file: it is neither a zip archive nor a pickle and begins with 'hello world'"
            in error.replace("\n", " ")
        )


def test_a_family_needs_no_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two clips of three latents: each is 4 * 3 - 3 frames, decoded from its own beginning."""
    decoder = build_decoder(TAEHVConfig(model_id="taehv", latent_channels=4)).eval()
    torch.save({f"decoder.{key}": value for key, value in decoder.state_dict().items()}, tmp_path / "tae.pth")
    latents = torch.randn(2, 3, 4, 2, 3)
    torch.save(latents, tmp_path / "latents.pt")
    base = ["decode", str(tmp_path / "latents.pt"), "--checkpoint", str(tmp_path / "tae.pth"), "--device", "cpu"]
    assert run(*base, "--family", "taehv", "--out", str(tmp_path / "out.npy")) == 0, capsys.readouterr().err
    frames = np.load(tmp_path / "out.npy")
    with torch.no_grad():
        wanted = decoder(latents).mul(255).round().permute(0, 1, 3, 4, 2)
    assert frames.shape == (2, 9, 16, 24, 3)
    assert np.abs(frames.astype(float) - wanted.numpy()).max() <= 1
    other = ["--family", "taehv", "--vae-config", str(Path(__file__).parents[2] / "examples/demo/demo_vae.yml")]
    for wrong in ([], ["--family", "taesd"], other):
        assert run(*base, *wrong, "--out", str(tmp_path / "other.npy")) == 2
        assert "--family taehv" in capsys.readouterr().err


def test_frames_of_a_stream_are_not_decoded_in_batches() -> None:
    decoder = build_decoder(TAEHVConfig(model_id="taehv", latent_channels=4))
    with pytest.raises(ConfigError, match=r"use owl_wms\.runtime\.StreamDecode"):
        make_batched_decode_fn(decoder, 1)


def test_what_the_file_says_is_the_default_and_another_word_is_told(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(place))
    latents = torch.randn(3, 16, 8, 8)
    facts = Facts(fps=24, vae_scale=0.5, vae_sha256="0" * 64)
    save_array(place / "said.safetensors", latents, facts=facts)
    save_array(place / "silent.safetensors", latents)
    assert call(place, "decode", "said.safetensors", "--out", str(place / "said.mp4")) == 0
    assert rate_of(place / "said.mp4") == 24
    assert "vae_sha256 is" in capsys.readouterr().err, "these weights are not those that made the latents"
    for source, scale, out in (("said", (), "a"), ("silent", ("--scale", "0.5"), "b"), ("said", ("--scale", "2"), "c")):
        more = ("--out", str(place / f"{out}.npy"), *scale)
        home = Path("~") if out == "a" else place  # as text in quotes, which no shell replaces
        assert call(home, "decode", f"{source}.safetensors", *more) == 0
    told = capsys.readouterr().err.replace("\n", " ")
    assert "vae_scale is 2.0, and the file says 0.5" in told
    first, second, third = (np.load(place / f"{name}.npy") for name in "abc")
    assert np.array_equal(first, second)
    assert not np.array_equal(first, third)
