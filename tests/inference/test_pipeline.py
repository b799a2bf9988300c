"""The interactive pipeline against the sampler, its beginnings, and its pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

import owl_wms
from owl_wms.configs import TAEHVConfig, load_world_config
from owl_wms.configs.paths import find_beside
from owl_wms.data.npy_table import NpyTableWriter
from owl_wms.errors import ConfigError, DataError
from owl_wms.inference.build import build_pipeline, latent_space
from owl_wms.inference.compress import encode_image
from owl_wms.inference.configured import frames_per_second
from owl_wms.inference.context import Context, load_contexts, render_context
from owl_wms.inference.pipeline import InteractivePipeline
from owl_wms.inference.pixels import to_uint8
from owl_wms.inference.source import WORLDS_APART, GameSource
from owl_wms.media.arrays import save_array
from owl_wms.media.facts import Facts
from owl_wms.runtime import StreamDecode
from owl_wms.sampling import AVCachingSampler
from owl_wms.vae import build_decoder, taehv
from tests.world import inputs, tiny_config, tiny_core

SCALE = 0.5


def decode(latents: torch.Tensor) -> torch.Tensor:
    """A decoder that can be undone: four channels, nearest pixels."""
    return (latents / 8).repeat_interleave(3, -1).repeat_interleave(3, -2)


def context(frames: int = 4, seed: int = 1) -> Context:
    x, _, mouse, btn = inputs(1, frames, seed=seed)
    return Context(latents=x, mouse=mouse, buttons=btn)


def test_a_pipeline_built_in_inference_mode_plays_outside_of_it() -> None:
    frames = []
    for built_in_inference_mode in (False, True):
        with torch.inference_mode(built_in_inference_mode):
            pipeline = InteractivePipeline(tiny_core(), decode, [context()], image_scale=SCALE, steps=2, max_window=6)
        frames.append([pipeline(torch.zeros(2), torch.ones(11)).image for _ in range(10)])
    np.testing.assert_array_equal(frames[1], frames[0])


def test_play_is_the_caching_sampler_one_frame_at_a_time() -> None:
    """Same noise, same controls, same pictures; for far more frames than there are positions."""
    core, begin, frames, window = tiny_core(n_frames=12), context(), 30, 6
    _, _, mouse, btn = inputs(1, 4 + frames)
    pipeline = InteractivePipeline(
        core, decode, [begin], image_scale=SCALE, steps=2, cfg_scale=1.5, max_window=window, seed=7
    )
    shown = [pipeline(mouse[0, 4 + i], btn[0, 4 + i]) for i in range(frames)]
    controls = torch.cat([begin.mouse, mouse[:, 4:]], 1), torch.cat([begin.buttons, btn[:, 4:]], 1)
    wanted = AVCachingSampler(2, 1.5, frames, 0.2, window)(
        core, begin.latents, *controls, generator=torch.Generator().manual_seed(7)
    ).latents[0, 4:]
    for frame, latent in zip(shown, wanted, strict=True):
        expected = to_uint8(decode(latent[None, None] * SCALE)[0, 0]).numpy()
        assert np.abs(frame.image.astype(int) - expected.astype(int)).max() <= 1
    assert [frame.index for frame in shown] == list(range(frames))
    assert shown[-1].image.shape == (6, 6, 3)
    assert len(pipeline._loop.ring) <= window
    assert all(frame.model_ms > 0 and frame.decode_ms > 0 for frame in shown)


def test_controls_change_the_picture_and_restart_forgets() -> None:
    core = tiny_core()

    def first(mouse: list[float], key: int, spoil: bool = False) -> np.ndarray:
        pipeline = InteractivePipeline(core, decode, [context()], steps=1, seed=3)
        if spoil:
            pipeline(torch.ones(2), torch.ones(11))
            pipeline._random.manual_seed(3)
            pipeline.restart(0)
        return pipeline(torch.tensor(mouse), torch.eye(11)[key]).image

    assert not np.array_equal(first([0.5, 0.0], 0), first([-0.5, 0.0], 0))
    assert not np.array_equal(first([0.5, 0.0], 0), first([0.5, 0.0], 1))
    assert np.array_equal(first([0.5, 0.0], 0), first([0.5, 0.0], 0, spoil=True))


def test_steps_stay_in_their_range_and_a_schedule_stays() -> None:
    pipeline = InteractivePipeline(tiny_core(), decode, [context()], steps=19)
    assert [pipeline.change_steps(1) for _ in range(3)] == [20, 20, 20]
    assert pipeline.change_steps(-30) == 1
    fixed = InteractivePipeline(tiny_core(), decode, [context()], schedule=[1.0, 0.5])
    assert (fixed.steps, fixed.change_steps(1)) == (2, 2)
    assert fixed.describe()["backend"] == "pytorch"


def test_bgr_is_rgb_backwards() -> None:
    images = [
        InteractivePipeline(tiny_core(), decode, [context()], bgr=bgr)(torch.zeros(2), torch.zeros(11)).image
        for bgr in (False, True)
    ]
    assert np.array_equal(images[0][..., ::-1], images[1])
    assert images[0].dtype == np.uint8


def test_a_decoder_of_bytes_gives_the_same_pictures() -> None:
    def decode_bytes(latents: torch.Tensor) -> torch.Tensor:
        frames = ((decode(latents).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        return frames.permute(0, 1, 3, 4, 2)

    for bgr in (False, True):
        images = [
            InteractivePipeline(tiny_core(), way, [context()], bgr=bgr)(torch.zeros(2), torch.zeros(11)).image
            for way in (decode, decode_bytes)
        ]
        assert images[1].shape == images[0].shape == (6, 6, 3)
        np.testing.assert_array_equal(images[0], images[1])


def test_a_world_is_its_seed_and_a_restart_repeats_it() -> None:
    made = []

    def new_context(seed: int) -> Context:
        made.append(seed)
        return context(seed=seed)

    def frames(pipeline: InteractivePipeline) -> list[np.ndarray]:
        return [pipeline(torch.zeros(2), torch.zeros(11)).image for _ in range(3)]

    pipeline = InteractivePipeline(tiny_core(), decode, [context()], steps=1, seed=3, new_context=new_context)
    first = frames(pipeline)
    pipeline.restart()
    np.testing.assert_array_equal(frames(pipeline), first)
    pipeline.new_world(8)
    other = frames(pipeline)
    assert (made, pipeline.describe()["seed"]) == ([8], 8)
    assert not np.array_equal(other, first)
    pipeline.new_world(9)
    frames(pipeline)
    pipeline.new_world(8)
    np.testing.assert_array_equal(frames(pipeline), other)
    listed = InteractivePipeline(tiny_core(), decode, [context(seed=s) for s in (1, 2)], steps=1)
    listed.new_world(5)
    assert torch.equal(listed._begin.latents, context(seed=2).latents)


def test_pixels_are_rounded_clamped_and_finite() -> None:
    frame = torch.tensor([-2.0, -1.0, 0.0, 1.0, 3.0, float("nan")]).view(1, 1, 6).expand(4, 1, 6)
    assert to_uint8(frame)[0, :, 0].tolist() == [0, 0, 128, 255, 255, 0]
    with pytest.raises(ValueError, match="C >= 3"):
        to_uint8(frame[:2])
    picture = np.zeros((8, 8, 3), dtype=np.uint8)
    assert encode_image(picture)[:2] == b"\xff\xd8"
    assert encode_image(picture, "webp")[8:12] == b"WEBP"


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"contexts": []}, "context"), ({"steps": 0}, "1 to 20"), ({"max_window": 99}, "max_window")],
)
def test_what_cannot_be_played_is_refused(changes: dict, message: str) -> None:
    values = {"contexts": [context()], **changes}
    with pytest.raises(ConfigError, match=message):
        InteractivePipeline(tiny_core(), decode, **values)
    with pytest.raises(ConfigError, match="causal"):
        InteractivePipeline(tiny_core(causal=False), decode, [context()])
    with pytest.raises(ConfigError, match="the model has 7 buttons"):
        InteractivePipeline(tiny_core(n_buttons=7), decode, [context()])


def test_beginnings_from_files(tmp_path: Path) -> None:
    x, _, mouse, btn = inputs(3, 5)
    options = {"channels": 4, "grid": (2, 2), "n_buttons": 11, "scale": SCALE}
    tensors = {"latents": x, "mouse": mouse, "buttons": btn}
    save_file(tensors, tmp_path / "a.safetensors")
    torch.save({name: tensor[0] for name, tensor in tensors.items()}, tmp_path / "b.pt")
    many, one = load_contexts(tmp_path / "a.safetensors", **options), load_contexts(tmp_path / "b.pt", **options)
    assert (len(many), len(one)) == (3, 1)
    assert torch.equal(many[2].latents, x[2:] / SCALE)
    assert torch.equal(one[0].mouse, mouse[:1])
    save_array(tmp_path / "c.pt", {**tensors, "latents": x / 4}, facts=Facts(vae_scale=4.0))
    assert torch.allclose(load_contexts(tmp_path / "c.pt", **options)[2].latents, many[2].latents)
    bad = {"missing.pt": None, "text.pt": b"text", "list.pt": [x], "part.pt": {"latents": x}}
    bad |= {"wide.pt": tensors | {"latents": x[:, :, :3]}, "nan.pt": tensors | {"mouse": mouse / 0}}
    for name, value in bad.items():
        if isinstance(value, bytes):
            (tmp_path / name).write_bytes(value)
        elif value is not None:
            torch.save(value, tmp_path / name)
        with pytest.raises(DataError, match=name):
            load_contexts(tmp_path / name, **options)


def test_beginnings_from_rows_of_a_table(tmp_path: Path) -> None:
    x, _, mouse, btn = inputs(2, 15)
    writer = NpyTableWriter(tmp_path / "t", ("depth_latent", "mouse", "buttons"))
    for row in range(2):
        writer.append({"depth_latent": x[row].numpy(), "mouse": mouse[row].numpy(), "buttons": btn[row].numpy()})
    options = {"channels": 4, "grid": (2, 2), "n_buttons": 11, "scale": SCALE}
    (begun,) = load_contexts(f"{tmp_path / 't'}#1", **options)
    assert torch.equal(begun.latents, x[1:, :12] / SCALE)
    assert torch.equal(begun.buttons, btn[1:, :12])
    later = begun.controls_after(7)
    assert later is not None
    assert torch.equal(later[0][0], mouse[1, [12, 13, 14, 12, 13, 14, 12]]), "begun again where the record ends"
    for name, message in (("t#2", r"t#1 is the last"), ("t", r"say which of its 2 rows"), ("none#0", "none#0")):
        with pytest.raises(DataError, match=message):
            load_contexts(tmp_path / name, **options)


def test_rendered_beginnings_pair_frames_with_their_controls() -> None:
    seen = []

    def encode(frames: torch.Tensor) -> torch.Tensor:
        seen.append(frames.shape)
        return frames[:, :, ::180, ::320]

    made = render_context(encode, frames=3, scale=2.0, repeat=3, seed=4)
    assert made.latents.shape == (1, 3, 4, 2, 2)
    assert (made.mouse.shape, made.buttons.shape) == ((1, 3, 2), (1, 3, 11))
    assert seen == [(1, 4, 360, 640)] * 3
    assert made.latents.abs().max() <= 0.5


def test_the_game_is_a_source() -> None:
    source = GameSource(5, height=36, width=64)
    images = [source(torch.tensor([0.8, 0.0]), torch.zeros(11)).image for _ in range(4)]
    assert images[0].shape == (36, 64, 3)
    assert not np.array_equal(images[0], images[3])
    source.restart()
    again = source(torch.zeros(2), torch.zeros(11))
    assert again.index == 0
    coded = GameSource(5, height=36, width=64, encode=lambda x: x, decode=lambda z: z.clamp(-1, 1))
    assert coded(torch.zeros(2), torch.zeros(11)).decode_ms > 0
    assert json.dumps(coded.describe())
    with pytest.raises(ValueError, match="together"):
        GameSource(encode=lambda x: x)


def test_paths_of_a_configuration_are_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "weights.pt").write_bytes(b"")
    monkeypatch.chdir("/")
    assert find_beside("weights.pt", tmp_path / "a" / "b" / "cfg.yml") == tmp_path / "weights.pt"
    assert find_beside("absent.pt", tmp_path / "cfg.yml") == Path("absent.pt")
    (tmp_path / "runs").mkdir()
    for name in ("runs/own.pt", "a/far.pt", "runs/both.pt", "a/both.pt"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "runs" / "cfg.yml").symlink_to(tmp_path / "a" / "b" / "cfg.yml")
    found = [find_beside(name, tmp_path / "runs" / "cfg.yml") for name in ("own.pt", "far.pt", "both.pt")]
    assert found == [tmp_path / "runs" / "own.pt", tmp_path / "a" / "far.pt", tmp_path / "a" / "both.pt"]
    assert find_beside(None, tmp_path / "cfg.yml") is None


def test_twins_share_a_model_and_nothing_of_what_is_played() -> None:
    core, frames = tiny_core(), [torch.full((2,), value) for value in (0.1, -0.7, 0.4)]
    x, _, mouse, btn = inputs(1, 3)
    begin = Context(latents=x, mouse=mouse, buttons=btn)
    options: dict[str, Any] = {
        "image_scale": 0.5, "cfg_scale": 1.3, "noise_prev": 0.1, "max_window": 4, "steps": 2, "bgr": True,
    }  # fmt: skip

    def decode(latents: torch.Tensor) -> torch.Tensor:
        return latents[:, :, :3].repeat(1, 1, 1, 4, 4)

    def play(pipeline: InteractivePipeline, moves: list[torch.Tensor]) -> list[np.ndarray]:
        return [pipeline(move, torch.zeros(11)).image for move in moves]

    def alone(seed: int) -> list[np.ndarray]:
        return play(InteractivePipeline(core, decode, [begin], seed=seed, **options), frames)

    first = InteractivePipeline(core, decode, [begin], seed=5, **options)
    second = first.twin(2)
    assert second._core is core
    taken: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for move in frames:  # in turns
        for images, pipeline in zip(taken, (first, second), strict=True):
            images += play(pipeline, [move])
    for images, wanted in zip(taken, (alone(5), alone(7)), strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(images, wanted, strict=True))
    assert not np.array_equal(taken[0][0], taken[1][0])
    second.change_steps(3)
    assert (first.steps, second.steps) == (2, 5)
    scheduled = InteractivePipeline(core, decode, [begin], schedule=[1.0, 0.6, 0.3], **options).twin(1)
    assert scheduled.steps == 3


def test_twins_of_the_game_are_in_worlds_of_their_own() -> None:
    first = GameSource(5, height=36, width=64, encode=lambda x: x, decode=lambda z: z.clamp(-1, 1))
    second = first.twin(1)
    assert vars(second).keys() == vars(first).keys()
    still = torch.zeros(2), torch.zeros(11)
    images = [source(*still).image for source in (first, second, GameSource(5 + WORLDS_APART, height=36, width=64))]
    assert images[1].shape == images[0].shape
    assert not np.array_equal(images[0], images[1])
    assert np.abs(images[1].astype(int) - images[2]).max() <= 1
    fast, once = GameSource(5, repeat=3, height=36, width=64).twin(1), GameSource(5, height=36, width=64).twin(1)
    forward = torch.tensor([0.8, 0.0]), torch.zeros(11)
    assert np.array_equal(fast(*forward).image, [once(*forward).image for _ in range(3)][-1])


def test_from_pretrained_and_pipeline_from_files(tmp_path: Path) -> None:
    """A tiny model over the shipped demo autoencoder, from files to a frame, and the same through owl_wms itself."""
    changes = {"sample_size": 8, "tokens_per_frame": 64, "channels": 128, "n_layers": 1, "n_frames": 16}
    core = tiny_core(**changes)
    root = Path(__file__).parents[2] / "examples" / "demo"
    model = {key: value for key, value in vars(tiny_config(**changes)).items()}
    train = {
        "vae_cfg_path": str(root / "demo_vae.yml"),
        "vae_ckpt_path": str(root / "demo_vae.safetensors"),
        "vae_scale": 0.8,
        "fps": 20,
        "sampler_kwargs": {"n_steps": 1, "max_window": 6, "noise_prev": 0.1},
    }
    (tmp_path / "world.yml").write_text(yaml.safe_dump({"model": model, "train": train, "wandb": {}}))
    torch.save({f"core.{key}": value for key, value in core.state_dict().items()}, tmp_path / "world.pt")
    x, _, mouse, btn = inputs(1, 3, channels=128, side=8)
    save_file({"latents": x, "mouse": mouse, "buttons": btn}, tmp_path / "context.safetensors")
    pipeline = build_pipeline(tmp_path / "world.yml", tmp_path / "world.pt", context=tmp_path / "context.safetensors")
    frame = pipeline(torch.zeros(2), torch.zeros(11))
    assert frame.image.shape == (360, 640, 3)
    assert frame.image.std() > 1
    assert (pipeline.steps, pipeline.image_scale, pipeline.noise_prev) == (1, 0.8, 0.1)
    assert pipeline.describe()["backend"] == "pytorch"
    loaded, decoder = owl_wms.from_pretrained(tmp_path / "world.yml", tmp_path / "world.pt", return_decoder=True)
    assert loaded.training
    assert next(loaded.parameters()).dtype == torch.float32
    assert not decoder.training
    with pytest.raises(AttributeError, match="nothing_here"):
        _ = owl_wms.nothing_here


def test_the_shipped_model_loads_from_any_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = Path(__file__).resolve().parents[2] / "examples" / "world"
    monkeypatch.chdir(tmp_path)
    model, decoder = owl_wms.from_pretrained(world / "game_rft.yml", world / "game_rft.safetensors", True)
    assert model.core.config.sample_size == 8
    assert decoder.latent_channels == 128
    space = latent_space(load_world_config(world / "game_rft.yml"), world / "game_rft.yml")
    assert space.whitener is not None
    assert space.stored_channels(model.core.config.channels) == decoder.latent_channels


def test_a_model_with_sound_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    model = vars(tiny_config(model_id="game_rft_audio"))
    (tmp_path / "world.yml").write_text(yaml.safe_dump({"model": model, "train": {}, "wandb": {}}))
    with pytest.raises(ConfigError, match="game_rft_audio; only game_rft") as caught:
        build_pipeline(tmp_path / "world.yml", tmp_path / "absent.pt")
    assert (caught.value.path, caught.value.key) == (tmp_path / "world.yml", "model.model_id")


# ---- a decoder whose frames depend on those before


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoders of a few thousand weights, where a step takes a millisecond."""
    monkeypatch.setattr(taehv, "WIDTHS", dict.fromkeys(taehv.WIDTHS, (16, 8, 8, 8)))


def streaming(**options: Any) -> StreamDecode:
    torch.manual_seed(2)
    decoder = build_decoder(TAEHVConfig(model_id="taehv", latent_channels=4, **options)).eval().requires_grad_(False)
    decoder[22].weight.data.mul_(10)
    decoder[22].bias.data.fill_(0.5)
    return StreamDecode(decoder)


def played(pipeline: InteractivePipeline, steps: int) -> list[np.ndarray]:
    frames = [pipeline(torch.full((2,), 0.3), torch.eye(11)[i % 3]) for i in range(steps)]
    each = len(frames[0].later) + 1
    assert [frame.index for frame in frames] == list(range(0, steps * each, each))
    return [image for frame in frames for image in (frame.image, *frame.later)]


@pytest.mark.parametrize(("time_upscale", "each"), [((False, True, True), 4), ((True, True, True), 8)])
@pytest.mark.usefixtures("narrow")
def test_pictures_of_a_stream_are_those_of_the_whole_clip(time_upscale: tuple[bool, ...], each: int) -> None:
    """What a player sees after the beginning is what decoding beginning and play in one clip gives."""
    core, begin, decode_video = tiny_core(), context(), streaming(time_upscale=time_upscale)
    pipeline = InteractivePipeline(core, decode_video, [begin], image_scale=SCALE, steps=1, seed=4)
    latents: list[torch.Tensor] = []
    plain = pipeline._loop.denoise
    pipeline._loop.denoise = lambda *given: latents.append(plain(*given)) or latents[-1]  # type: ignore[method-assign,func-returns-value]
    images = played(pipeline, 3)
    with torch.no_grad():
        whole = decode_video.decoder(torch.cat([begin.latents, *latents], 1) * SCALE)[0, -3 * each :]
    wanted = (whole * 255).round().permute(0, 2, 3, 1).numpy()
    assert len(images) == 3 * each
    assert np.abs(np.stack(images).astype(float) - wanted).max() <= 1
    assert np.stack(images).std() > 5
    assert pipeline.describe()["backend"] == "pytorch"


@pytest.mark.usefixtures("narrow")
def test_every_player_has_a_stream_and_a_restart_begins_it_again() -> None:
    core, decode_video = tiny_core(), streaming()
    options: dict[str, Any] = {"image_scale": SCALE, "steps": 1, "seed": 4}

    def new(number: int = 0) -> InteractivePipeline:
        made = InteractivePipeline(core, decode_video, [context(), context(seed=5)], **options)
        return made.twin(number) if number else made

    first, alone = new(), played(new(), 3)
    second = first.twin(1)
    taken: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for i in range(3):  # in turns
        for images, pipeline in zip(taken, (first, second), strict=True):
            frame = pipeline(torch.full((2,), 0.3), torch.eye(11)[i % 3])
            images += [frame.image, *frame.later]
    for got, wanted in zip(taken, (alone, played(new(1), 3)), strict=True):
        np.testing.assert_array_equal(np.stack(got), np.stack(wanted))
    first.restart()
    np.testing.assert_array_equal(np.stack(played(first, 3)), np.stack(alone))
    first.new_world(1)
    other = played(first, 3)
    assert not np.array_equal(np.stack(other), np.stack(alone))
    first.restart()
    np.testing.assert_array_equal(np.stack(played(first, 3)), np.stack(other))
    first.restart(0)
    assert not np.array_equal(np.stack(played(first, 3)), np.stack(other))
    reds = new()
    reds.bgr = True
    np.testing.assert_array_equal(np.stack(played(reds, 3))[..., ::-1], np.stack(alone))


@pytest.mark.usefixtures("narrow")
def test_a_model_of_a_streaming_decoder_from_files(tmp_path: Path) -> None:
    """The rate of its pictures is a multiple of the model's; a beginning has to be given, for there is no encoder."""
    decoder = streaming().decoder
    torch.save({f"decoder.{key}": value for key, value in decoder.state_dict().items()}, tmp_path / "tae.pth")
    (tmp_path / "tae.yml").write_text("model: {model_id: taehv, latent_channels: 4}")
    world, weights = tmp_path / "world.yml", tmp_path / "world.pt"
    torch.save(tiny_core().state_dict(), weights)
    x, _, mouse, btn = inputs(1, 3)
    save_file({"latents": x, "mouse": mouse, "buttons": btn}, tmp_path / "context.safetensors")
    shown = []
    for named in ({"vae_cfg_path": "tae.yml"}, {"vae_id": "taehv"}):
        train = {"fps": 15, "vae_ckpt_path": "tae.pth", "vae_scale": SCALE, "sampler_kwargs": {"n_steps": 1}, **named}
        world.write_text(yaml.safe_dump({"model": vars(tiny_config()), "train": train, "wandb": {}}))
        assert frames_per_second(load_world_config(world), world) == 60
        pipeline = build_pipeline(world, weights, context=tmp_path / "context.safetensors")
        shown.append(played(pipeline, 2))
        assert len(shown[-1]) == 8
        assert pipeline.describe()["backend"] == "pytorch"
        with pytest.raises(ConfigError, match="give a file with --context"):
            build_pipeline(world, weights)
    np.testing.assert_array_equal(np.stack(shown[0]), np.stack(shown[1]))


@pytest.mark.gpu
def test_a_gpu_plays_what_the_cpu_plays() -> None:
    """fp32 on both, the same noise: a GPU's pictures differ by its rounding only; bf16 plays on without a hitch."""
    frames = {}
    for device in ("cpu", "cuda"):
        core = tiny_core(n_frames=12).to(device)
        pipeline = InteractivePipeline(core, decode, [context()], steps=1, max_window=6)
        # Noise of its own on every device would hide the comparison.
        pipeline._random = torch.Generator(device)
        noise = torch.Generator().manual_seed(1)
        original = torch.randn

        def shared(*size, noise=noise, original=original, device=device, **options):
            options.pop("generator", None)
            options.pop("device", None)
            return original(*size, generator=noise, **options).to(device)

        torch.randn = shared
        try:
            frames[device] = [pipeline(torch.tensor([0.3, 0.0]), torch.eye(11)[0]).image for _ in range(20)]
        finally:
            torch.randn = original
    for a, b in zip(frames["cpu"], frames["cuda"], strict=True):
        assert np.abs(a.astype(int) - b.astype(int)).max() <= 8
    half = InteractivePipeline(tiny_core(n_frames=12).cuda().bfloat16(), decode, [context()], steps=2, max_window=6)
    played = [half(torch.zeros(2), torch.zeros(11)) for _ in range(30)]
    assert all(frame.model_ms > 0 and frame.image.std() > 0 for frame in played)
