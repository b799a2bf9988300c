"""The scripts of examples/world: what they name is found from any directory, what is missing is one line.

Run: python -m pytest tests/test_example_world.py
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
import weakref
from argparse import Namespace
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from time import monotonic
from types import ModuleType

import pytest
import torch

from owl_wms.configs.vae import DCAEConfig
from owl_wms.configs.world import load_world_config
from owl_wms.models.gamerft import GameRFT
from owl_wms.models.latents import LatentSpace
from owl_wms.models.load import load_model
from owl_wms.nn.attention import Masks
from owl_wms.nn.limits import FrameLimits
from owl_wms.nn.mask import FrameMask
from owl_wms.nn.ring_cache import RingCache
from owl_wms.sampling.frames import FrameLoop
from owl_wms.sampling.guidance import Guidance
from owl_wms.sampling.schedule import get_sd3_euler
from owl_wms.vae import fold_weight_norm, load_weights, read_state_dict
from owl_wms.vae.blocks import Downsample
from owl_wms.vae.build import build_encoder
from tests.world import tiny_core

WORLD = Path(__file__).parents[1] / "examples" / "world"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """examples/world/train.py as a module; its neighbours are imported by their bare names."""
    monkeypatch.syspath_prepend(str(WORLD))
    spec = importlib.util.spec_from_file_location("world_train", WORLD / "train.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    for name in (path.stem for path in WORLD.glob("*.py")):
        sys.modules.pop(name, None)


def test_the_autoencoder_is_found_from_any_directory(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = WORLD / "game_rft.yml"
    cfg = script.with_files_found(load_world_config(path), path)
    encode, decode = script.make_codec(cfg, torch.device("cpu"))
    with torch.no_grad():
        assert decode(encode(torch.zeros(1, 4, 360, 640))).shape == (1, 4, 360, 640)


def test_missing_weights_are_one_line(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train.py", "--measure", "none.safetensors", "--out", "out"])
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code == 2
    assert "error: --measure none.safetensors: no such file" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_trained_weights_get_limits(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was in the file stays bit for bit, and the limits are those of the frames that were played."""
    module, cfg = importlib.import_module("fit_limits"), tiny(script, tmp_path)
    played = episodes(script, frames=8)
    monkeypatch.setattr(module, "record", lambda **_: played)
    monkeypatch.setattr(module, "make_codec", lambda *_: (None, None))
    monkeypatch.setattr(module, "load_world_config", lambda _: cfg)
    before = GameRFT(cfg.model)
    importlib.import_module("clock_trainer").export(before, tmp_path)
    arguments = ["fit_limits.py", "--weights", str(tmp_path / "world.safetensors"), "--config", "tiny.yml"]
    monkeypatch.setattr("sys.argv", [*arguments, "--out", str(tmp_path / "out"), "--rounds", "2"])
    module.main()
    assert "limits of 96 frames of 128 worlds" in capsys.readouterr().out
    old, weights = (read_state_dict(path / "world.safetensors") for path in (tmp_path, tmp_path / "out"))
    assert old
    assert all(torch.equal(weights.pop(name), value) for name, value in old.items())
    limits = FrameLimits(4, 2, 2)
    limits.fit(played.latents.flatten(0, 1).float().repeat(2, 1, 1, 1))
    assert torch.equal(weights.pop("core.limits.reach").float(), limits.reach.bfloat16().float())
    assert list(weights) == ["core.limits.middle"]
    monkeypatch.setattr("sys.argv", [*arguments, "--out", str(tmp_path), "--rounds", "2"])
    module.main()
    made = [(path / "world.safetensors").read_bytes() for path in (tmp_path, tmp_path / "out")]
    assert made[0] == made[1], "in the place of the weights themselves too"


def episodes(script: ModuleType, count: int = 6, frames: int = 24) -> object:
    """Latents that say where they are from: episode + frame / 100; every second episode rests at its end."""
    value = torch.arange(count)[:, None] + torch.arange(frames)[None] / 100
    mouse = torch.ones(count, frames, 2)
    mouse[::2, 8:] = 0
    buttons = torch.zeros(count, frames, 11)
    latents = value[..., None, None, None].expand(-1, -1, 4, 2, 2).half()
    return script.Episodes(latents=latents, mouse=mouse, buttons=buttons)


class Marks(torch.nn.Module):
    """A model whose frames are all far above the true ones."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))


class MarkedFrames:
    """Stands in for `OwnFrames`."""

    def __init__(self, core: object, **settings: object) -> None:
        pass

    def make(self, x: torch.Tensor, *_: object) -> torch.Tensor:
        return 50 + x

    def keep(self, *_: object) -> None:
        pass


def own_loader(script: ModuleType, monkeypatch: pytest.MonkeyPatch, window: int = 6, sinks: int = 0) -> object:
    monkeypatch.setattr(sys.modules["own_history"], "OwnFrames", MarkedFrames)
    space, settings = LatentSpace(2.0), {"window": window, "batch_size": 32, "sinks": sinks}
    return script.OwnHistoryLoader(episodes(script), space, **settings)


def test_own_frames_are_history_and_true_frames_are_targets(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = own_loader(script, monkeypatch)
    loader.renew(Marks(), clips=20, keep=2, frames=16, step=0, steps=2, noise=(0.1, 0.2))  # type: ignore[attr-defined]
    batches = iter(loader)  # type: ignore[call-overload]
    lengths = set()
    for _ in range(20):
        latents, mouse, buttons, history = next(batches)
        assert (latents.shape, mouse.shape, buttons.shape) == ((32, 6, 4, 2, 2), (32, 6, 2), (32, 6, 11))
        assert (history[:16] == -1).all()
        assert ((history[16:] >= 1) & (history[16:] <= 5)).all()
        lengths |= set(history[16:].tolist())
        own = latents[:, :, 0, 0, 0] > 40
        assert not own[:16].any(), "true windows are true"
        for row, count in zip(own[16:], history[16:].tolist(), strict=True):
            assert not row[count:].any(), "targets are the game's"
            assert row[count - 1], "the frame before the first target is the model's"
            assert (row[:count].diff().int() >= 0).all(), "own frames follow the real ones"
        # Time goes on by one frame between targets, and between the last real and the first target too.
        for values, mine in zip(latents[16:, :, 0, 0, 0].float(), own[16:], strict=True):
            real = [(k, float(v)) for k, (v, m) in enumerate(zip(values, mine, strict=True)) if not m]
            assert all(b[1] - a[1] == pytest.approx((b[0] - a[0]) / 100, abs=5e-3) for a, b in pairwise(real))
    assert lengths == {1, 2, 3, 4, 5}


def test_windows_begin_with_frames_that_play_would_not_forget(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two earlier frames of the same episode, or the last ones of a history; before own frames the last real ones."""
    loader = own_loader(script, monkeypatch, window=8, sinks=2)
    data = loader._data  # type: ignore[attr-defined]
    loader.renew(Marks(), clips=20, keep=2, frames=16, step=0, steps=2, noise=(0.1, 0.2))  # type: ignore[attr-defined]
    made = loader._clips.latents[:, :, 0, 0, 0].float()  # type: ignore[attr-defined]
    assert made.shape == (20, 6 + 16)
    data.latents.fill_(7)  # the episodes are others now, the clips keep what they are of
    assert next(iter(loader))[0][:16].eq(7).all()  # type: ignore[call-overload]
    data.latents.copy_(episodes(script).latents)  # type: ignore[attr-defined]
    data.mouse.copy_(data.latents[:, :, 0, 0, :2])  # controls that say where they are from, too
    batches, gaps, told, lengths = iter(loader), set(), 0, set()  # type: ignore[call-overload]
    for _ in range(30):
        latents, mouse, _, history = next(batches)
        value = latents[:, :, 0, 0, 0].float()
        assert value.shape == (32, 8)
        for row, keys, count in zip(value[:16], mouse[:16, :, 0].float(), history[:16].tolist(), strict=True):
            assert torch.equal(row, keys), "controls travel with their frames"
            frames = ((row - row[2].floor()) * 100).round().int().tolist()
            assert len({int(v) for v in (row + 0.005).tolist()}) == 1, "one episode"
            assert [frames[1] - frames[0], *(b - a for a, b in pairwise(frames[2:]))] == [1] * 6
            if count < 0:
                gaps.add(frames[2] - frames[1])
            else:
                told += 1
                assert 4 <= count <= 7
                assert frames[:2] == frames[count - 2 : count], "the last two of the history"
        for row, count in zip(value[16:], history[16:].tolist(), strict=True):
            own = [k for k in range(8) if row[k] > 40]
            assert own
            assert own[-1] == count - 1
            assert own == list(range(own[0], count))
            assert own[0] >= 2
            if own[0] > 3:
                assert torch.equal(row[:2], row[own[0] - 2 : own[0]]), "the last real ones"
            lengths.add(count)
    assert min(gaps) == 1
    assert max(gaps) >= 16, "nothing between them, or nearly the whole episode"
    assert 60 < told < 180, "a quarter"
    assert lengths == {3, 4, 5, 6, 7}


@pytest.mark.parametrize(("near", "reached"), [(0.0, 2), (1.0, 6)])
def test_clips_that_move_end_sooner_unless_they_stay_near_the_truth(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, near: float, reached: int
) -> None:
    loader = own_loader(script, monkeypatch)
    monkeypatch.setattr(sys.modules["own_history"], "NEAR_SHARE", near)
    monkeypatch.setattr(loader, "horizon", sys.modules["own_history"].Horizon(moving=2))
    for step in range(2):
        settings = {"clips": 40, "keep": 2, "frames": 16, "steps": 2, "noise": (0.1, 0.2)}
        loader.renew(Marks(), step=step, **settings)  # type: ignore[attr-defined]
    places = loader._clips.known  # type: ignore[attr-defined]
    assert len(places) == 80
    reach: dict[bool, int] = {True: 0, False: 0}
    batches = iter(loader)  # type: ignore[call-overload]
    for _ in range(30):
        latents, _, _, history = next(batches)
        for clip, count in zip(latents[16:, :, 0, 0, 0].float(), history[16:].tolist(), strict=True):
            last = float(clip[-1])
            moving = int(last + 0.005) % 2 == 1
            real = int((clip[:count] < 40).sum())
            reach[moving] = max(reach[moving], 6 - real)
    assert reach[True] == reached, "a moving clip of the model alone ends two own frames behind its last real one"
    assert reach[False] == 6


def test_histories_drift_and_nothing_else_does(script: ModuleType) -> None:
    """Towards their end, in some windows; sinks and the frames to be learnt stay as they are."""
    torch.manual_seed(0)
    data, space = episodes(script), LatentSpace(2.0)
    data.latents += torch.randn_like(data.latents)  # type: ignore[attr-defined]
    drift = sys.modules["drift"].Drift.of(space, data.latents)  # type: ignore[attr-defined]
    torch.testing.assert_close(drift.std[:, 0, 0], data.latents.float().std((0, 1, 3, 4)) / 2, rtol=1e-3, atol=0)  # type: ignore[attr-defined]
    settings = {"window": 10, "batch_size": 64, "sinks": 2}
    plain, drifting = (iter(script.OwnHistoryLoader(data, space, drift=d, **settings)) for d in (None, drift))
    lengths, changes = set(), []
    for _ in range(10):
        true, moved = next(plain), next(drifting)
        assert all(torch.equal(a, b) for a, b in zip(true[1:3], moved[1:3], strict=True))
        change = (moved[0].float() - true[0].float()).abs().mean((2, 3, 4))
        drifted = change.any(dim=1)
        assert 0 < drifted.sum() < 64
        assert torch.equal(moved[3][~drifted], true[3][~drifted])
        for row, length in zip(change[drifted], moved[3][drifted].tolist(), strict=True):
            assert not row[:2].any()
            assert not row[length:].any()
            lengths.add(length)
            changes.append(row[[2, length - 1]])
    assert lengths == set(range(3, 10))
    begin, end = torch.stack(changes).unbind(dim=1)
    assert begin.mean() < 0.8 * end.mean(), "more towards the end"
    assert end.min() < 0.1 < 0.5 < end.max() < 3


@pytest.mark.parametrize("sinks", [0, 2])
def test_own_frames_are_those_of_play(script: ModuleType, sinks: int) -> None:
    """Begun as noise alone they are the frames that play makes of the same noise; history is stored clean in both."""
    core = tiny_core(sink_frames=sinks, sink_noise=0.0 if sinks else None, frame_limits=bool(sinks))
    generator = torch.Generator().manual_seed(0)
    if sinks:
        core.limits.fit(torch.randn(100, 4, 2, 2, generator=generator))
    x, mouse = torch.randn(2, 5, 4, 2, 2, generator=generator), torch.randn(2, 8, 2, generator=generator)
    btn = torch.zeros(2, 8, 11)
    loop = FrameLoop(Guidance(model=core), deltas=get_sd3_euler(3), noise_prev=0.0, max_window=4)
    none, all_of_it = torch.zeros(2), torch.ones(2)
    maker = sys.modules["own_history"].OwnFrames(core, steps=3, window=4, noise=none, start=all_of_it)
    draws = [torch.Generator().manual_seed(1) for _ in range(2)]
    with torch.no_grad():
        loop.begin(x, mouse, btn)
        for k in [*range(5 - sinks, 5), *range(5)]:
            maker.keep(x[:, k : k + 1], mouse[:, k : k + 1], btn[:, k : k + 1], generator)
        for k in range(5, 8):
            controls = mouse[:, k : k + 1], btn[:, k : k + 1]
            wanted = loop.denoise(*controls, draws[0])
            made = maker.make(wanted, *controls, draws[1])
            torch.testing.assert_close(made, wanted)
            loop.remember(wanted, *controls, draws[0])
            maker.keep(wanted, *controls, draws[1])


def test_own_frames_end_at_the_data_from_any_level(script: ModuleType) -> None:
    """With the velocity that points from every sample to one picture, whatever the level that frames begin at."""

    class Straight(Marks):
        config = tiny_core().config

        def forward(self, x: torch.Tensor, t: torch.Tensor, *_: object, kv_cache: RingCache) -> torch.Tensor:
            kv_cache.begin(1, 4, tiny_core().transformer.rope)
            return (x - 3) / t[..., None, None, None]

    starts = torch.tensor([1.0, 0.6, 0.25])
    maker = sys.modules["own_history"].OwnFrames(Straight(), steps=4, window=4, noise=starts, start=starts)
    x, controls = torch.zeros(3, 1, 4, 2, 2), (torch.zeros(3, 1, 2), torch.zeros(3, 1, 11))
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        made = maker.make(x, *controls, generator)
        torch.testing.assert_close(made, torch.full_like(made, 3.0))
        maker.keep(made, *controls, generator)
    gone = weakref.ref(maker)
    del maker
    assert gone() is None, "it is in no circle: its graphs on a GPU must not wait for the collector"


def test_some_players_rest_to_the_end(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["episodes"], "_STOPS", (3, 5))
    settings = {"players": 4, "frames": 7, "first_seed": 5, "device": "cpu", "size": (9, 16)}
    free, data = (script.record(encode=lambda x: x[:, :1, :1, :1], resting=share, **settings) for share in (0.0, 0.5))
    stop = torch.tensor([3, 4, 7, 7])
    going = torch.arange(7)[None] < stop[:, None]
    torch.testing.assert_close(data.mouse, free.mouse * going[..., None])
    assert torch.equal(data.buttons[~going], torch.zeros_like(data.buttons[~going]))
    assert free.mouse[:2, 4:].any(), "they would have moved"


def tiny(script: ModuleType, folder: Path) -> object:
    cfg = script.smaller(load_world_config(WORLD / "world_28m.yml"))
    model = cfg.model.model_copy(update={"channels": 4, "sample_size": 2, "tokens_per_frame": 4})
    train = cfg.train.model_copy(
        update={"vae_cfg_path": None, "vae_ckpt_path": None, "vae_scale": 1.0, "latent_transform": None}
    )
    return cfg.model_copy(update={"model": model, "train": train})


def test_stages_continue_from_call_to_call_and_on_another_machine(script: ModuleType, tmp_path: Path) -> None:
    """A stage's first call ends after one step, a later one at its end; the second has carried files alone."""
    cfg = tiny(script, tmp_path)
    stages = [stage.smaller() for stage in script.STAGES]
    data = episodes(script, frames=20)
    done = []
    for call in range(60):
        state = script.Progress.read(tmp_path)
        stage = next((stage for stage in stages if stage.name not in state.done), None)
        if stage is None:
            break
        if call == 1:
            shutil.rmtree(tmp_path / stage.name)
        continued = state.stage == stage.name
        before = state.step if continued else 0
        script.train(tmp_path, stage, state, cfg, data, 600.0 if continued and call > 1 else 0.0)
        after = script.Progress.read(tmp_path)
        assert after.step > before, "no step is lost or made twice"
        done.append((stage.name, after.step))
    assert script.Progress.read(tmp_path).done == ["base", "settle", "own"]
    assert [steps for name, steps in done if name == "own"][-1] == 12
    written = load_world_config(tmp_path / "world.yml")
    assert written.model == cfg.model
    assert written.train.latent_transform == "whitener.safetensors"
    load_model(tmp_path / "world.yml", tmp_path / "world.safetensors")
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert any('"own_error"' in line for line in lines)


def test_rates_levels_and_own_frames_follow_the_clock(script: ModuleType) -> None:
    plan = importlib.import_module("clock_trainer").Plan()
    shares = [k / 100 for k in range(101)]
    rates = [plan.rate(share, 10_000) for share in shares]
    assert rates[0] == 1
    assert rates[-1] == 0
    assert all(a >= b for a, b in pairwise(rates)), "rates only fall"
    assert plan.rate(0.7, 10_000) == pytest.approx(plan.low)
    assert plan.rate(0.0, 0) == pytest.approx(1 / 300)
    assert [plan.prefix(share) for share in (0.0, 0.39, 0.4, 1.0)] == [0.5, 0.5, 0.8, 0.8]
    assert [plan.horizon(share) for share in (0.58, 0.71, 0.72, 0.86, 1.0)] == [8, 8, 16, 24, 24]


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_attention_of_the_clock_sees_what_the_models_own_sees(script: ModuleType) -> None:
    built = importlib.import_module("clock_trainer").BuiltMasks(6, 4, 3, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, 24, 16, generator=generator) for _ in range(3))
    for window in (3, None):
        mask = FrameMask(queries=6, keys=6, tokens=4, window=window, causal=True)
        wanted = Masks(torch.device("cpu"), "sdpa").attend(q, k, v, mask)
        torch.testing.assert_close(built.attend(q, k, v, mask), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sinks", [0, 2])
def test_training_by_the_clock_learns_from_own_frames_and_leaves_weights(
    script: ModuleType, tmp_path: Path, sinks: int
) -> None:
    module = importlib.import_module("clock_trainer")
    said: list[str] = []
    cfg = tiny(script, tmp_path)
    cfg = cfg.model_copy(update={"model": cfg.model.model_copy(update={"sink_frames": sinks})})
    data, asked = episodes(script, frames=20), []
    trainer = module.ClockTrainer(cfg, data, tmp_path, said.append, lambda: asked.append(len(data)))
    plan = module.Plan(clips=4, own_frames=4)
    trainer.run(plan, monotonic() - 1)
    assert trainer.step == 1, "one step at least, whatever the time"
    assert asked == [6]
    trainer._renew(plan, 0.6)
    *_, history = next(trainer._batches)
    assert (history >= 0).sum() == 2, "half of the windows"
    good = trainer._copied()
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    trainer._step(next(trainer._batches), 0.8)
    assert any(not torch.equal(value, before[key]) for key, value in trainer.model.state_dict().items())
    trainer._look([(2, 1.0, 1.0, torch.tensor([torch.nan]))], good)
    assert trainer.recovered == 1
    assert "not finite" in said[-1]
    assert all(torch.equal(value, before[key]) for key, value in trainer.model.state_dict().items())
    module.export(trainer.ema.model, tmp_path)
    written = GameRFT(cfg.model)
    load_weights(written, read_state_dict(tmp_path / "world.safetensors"), "world.safetensors")
    train = cfg.train.model_copy(update={"init_ckpt": str(tmp_path / "world.safetensors")})
    further = module.ClockTrainer(
        cfg.model_copy(update={"train": train}), episodes(script, frames=20), tmp_path, said.append
    )
    for model in (further.model, further.ema.model):
        assert all(torch.equal(value, written.state_dict()[key]) for key, value in model.state_dict().items())
    if sinks:
        assert written.core.transformer.sink_mark.any(), "it is learnt"
        return
    changed = cfg.model.model_copy(update={"sink_frames": 2, "frame_limits": True})
    more, data = cfg.model_copy(update={"train": train, "model": changed}), episodes(script, frames=20)
    trainer = module.ClockTrainer(more, data, tmp_path, said.append)
    begun, limits = trainer.model, trainer.model.core.limits
    assert not begun.core.transformer.sink_mark.any(), "weights without sinks may begin a model with them"
    added = {name: value for name, value in begun.state_dict().items() if "sink_mark" in name or ".limits." in name}
    begun.load_state_dict(written.state_dict() | added)
    frames = data.latents.flatten(0, 1).float()
    torch.testing.assert_close(limits(frames), frames, msg="and limits are those of the episodes")
    assert not torch.allclose(limits(2 * frames), 2 * frames)
    assert torch.equal(trainer.ema.model.core.limits.reach, limits.reach)


def test_new_episodes_take_free_places_then_the_oldest(script: ModuleType) -> None:
    data = episodes(script, count=4).with_room(6)  # type: ignore[attr-defined]
    latents = data.latents
    given = next(iter(script.MemoryLoader(data, 6, 32)))[0]
    assert len(data) == 4
    assert int(given[..., 0, 0, 0].max()) == 3, "free places are never drawn"
    new = episodes(script, count=3)
    new.latents += 10  # type: ignore[attr-defined]
    before = given.clone()
    data.add(new)
    data.add(script.Episodes(latents=new.latents[:2] + 10, mouse=new.mouse[:2], buttons=new.buttons[:2]))
    assert len(data) == 6
    assert data.latents is latents, "in place"
    assert data.latents[:, 0, 0, 0, 0].tolist() == [12.0, 20.0, 21.0, 3.0, 10.0, 11.0]
    assert torch.equal(given, before)
    with pytest.raises(ValueError, match=r"there are 6 places, got 7 episodes"):
        data.add(episodes(script, count=7))
    with pytest.raises(ValueError, match=r"episodes are \[24, 4, 2, 2\], got \[20, 4, 2, 2\]"):
        data.add(episodes(script, frames=20))


class Killed:
    """Stands in for the process that renders."""

    status: int | None = None

    def poll(self) -> int | None:
        return self.status


def test_rounds_of_new_worlds_are_taken_and_a_dead_renderer_is_one_line(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rendering = importlib.import_module("rendering")
    said: list[str] = []
    renderer = object.__new__(rendering.Renderer)
    renderer.__dict__.update(
        data=None, share=1.0, rounds=0, dropped=0, folder=tmp_path, process=Killed(), _say=said.append
    )
    renderer.__dict__.update(_look_at=0.0, _last=monotonic(), _ended=False, _late=False)
    monkeypatch.setattr(rendering, "LOOK_SECONDS", 0.0)
    renderer()
    renderer.data = data = episodes(script, count=4).with_room(8)  # type: ignore[attr-defined]
    part = episodes(script, count=4)
    tensors = {name: getattr(part, name).contiguous() for name in ("latents", "mouse", "buttons")}
    rendering.finish(tmp_path / "round_00000.safetensors", lambda path: rendering.save_file(tensors, path))
    broken = {**tensors, "latents": torch.full_like(tensors["latents"], torch.nan)}
    rendering.save_file(broken, tmp_path / "round_00001.safetensors")
    (tmp_path / "round_00002.safetensors").write_bytes(b"half")
    (tmp_path / ".round_00003.safetensors").write_bytes(b"being written")
    (tmp_path / "rendering.log").write_text("round 1\nout of memory\n")
    renderer()
    assert (len(data), renderer.rounds, renderer.dropped) == (8, 1, 2)
    assert [path.name for path in tmp_path.glob("*.safetensors")] == [".round_00003.safetensors"]
    assert "round_00001.safetensors is left out: ValueError: latents have a spread of nan" in said[0]
    assert "round_00002.safetensors is left out" in said[1]
    renderer.process.status = -9
    for _ in range(3):
        renderer()
    assert said[2:] == ["no new worlds any more, as their process ended with status -9; its last line: out of memory"]
    renderer.process.status, renderer._ended, renderer._last = None, False, monotonic() - 1_000
    for _ in range(3):
        renderer()
    assert said[3:] == ["no new worlds for 240 s; training goes on with 8"], "a slow one is said once as well"


def truth_of(frames: torch.Tensor, shown: list[int], views: object = None) -> object:
    """Held-out worlds [3] whose frames are those."""
    holding, survival, n = importlib.import_module("holding"), importlib.import_module("survival"), 1
    looks = survival.Looks.of(frames, torch.ones(3, len(shown)))
    first = shown.index(1)
    return holding.Truth(
        latents=torch.zeros(3, 1, 1, 1, 1),
        mouse=torch.zeros(3, 11 + len(shown), 2),
        buttons=torch.zeros(3, 11 + len(shown), 11),
        shown=shown,
        drawn=frames,
        looks=looks,
        still_db=torch.stack([survival.decibels(clip, clip[first, None]) for clip in frames[:n]]),
        views=importlib.import_module("views").Views.none(2, looks.sharp) if views is None else views,
        windows=[0, 20, 40],
        ceiling={},
    )


def test_a_world_holds_until_its_first_bound_breaks(script: ModuleType) -> None:
    """Three worlds, of which the still one loses its picture after a second and the one that walks its sharpness."""
    holding = importlib.import_module("holding")
    generator = torch.Generator().manual_seed(0)
    shown = list(range(61))
    frames = torch.rand(3, 1, 4, 40, 64, generator=generator).expand(-1, len(shown), -1, -1, -1).clone()
    spread = torch.ones(3, len(shown))
    truth = truth_of(frames, shown)
    for form in ("survival", "survival_by_path"):
        assert holding.looks_of(frames, spread, truth)[form]["median_seconds"]["all"] == 3.5, "the game: to the end"
    made = frames.clone()
    made[0, 25:] = made[0, 25:].flip(-1)  # the colours stay, the picture does not
    made[2, 45:] = 0.5 * made[2, 45:] + 0.25
    found = holding.looks_of(made, spread, truth)
    for form in ("survival", "survival_by_path"):
        assert found[form]["median_seconds"] == {"all": 2.5, "still": 1.5, "turn": 3.5, "walk": 2.5}
    assert found["still_db_to_own_first"][20] == 60
    assert found["sharpness"]["walk"]["1s"] == 1
    shifted = holding.looks_of(frames + 0.05, spread, truth)
    for form in ("survival", "survival_by_path"):
        assert shifted[form]["median_seconds"]["walk"] == 0.5, "a shift of colours breaks at once"


def test_what_the_game_itself_breaks_does_not_count_and_views_are_frames_of_a_world(script: ModuleType) -> None:
    holding = importlib.import_module("holding")
    generator = torch.Generator().manual_seed(0)
    shown = list(range(61))
    one, other = (torch.rand(3, 1, 4, 40, 64, generator=generator) for _ in range(2))
    other = 0.5 * other
    spread = torch.ones(3, len(shown))
    path = one.expand(-1, len(shown), -1, -1, -1).clone()
    path[0, 30:45] = other[0]  # something walks into the picture of the world at rest, and out again
    looks = importlib.import_module("survival").Looks.of(other[1:], torch.ones(2, 1))
    views = importlib.import_module("views").Views(colour=looks.colour, sharp=looks.sharp, spread=looks.spread)
    made = path.clone()
    made[0, 30:45] = one[0]  # the model did not know
    made[1, 15:] = other[1]  # it looks elsewhere in the same world
    found = holding.looks_of(made, spread, truth_of(path, shown, views))
    assert found["survival"]["median_seconds"] == {"all": 3.5, "still": 3.5, "turn": 3.5, "walk": 3.5}
    assert found["survival"]["share_counted_at_rest"] == pytest.approx(4 / 6, abs=1e-3)
    assert found["survival_by_path"]["median_seconds"] == {"all": 1.5, "still": 1.5, "turn": 1.0, "walk": 3.5}
    made[0, 20:30] = other[0]  # at a moment at which nothing does
    assert holding.looks_of(made, spread, truth_of(path, shown, views))["survival"]["median_seconds"]["still"] == 1.0
    blurred = made.clone()
    blurred[1] = 0.7 * blurred[1] + 0.3 * blurred[1].mean()
    found = holding.looks_of(blurred, spread, truth_of(path, shown, views))
    assert found["survival"]["median_seconds"]["turn"] == 0.5


def tiny_encoder(script: ModuleType) -> object:
    """An encoder of 45x80 frames whose every weight matters, in fp32."""
    config = DCAEConfig(
        model_id="dcae",
        sample_size=(45, 80),
        channels=4,
        latent_channels=16,
        ch_0=16,
        ch_max=32,
        encoder_blocks_per_stage=(1,),
        decoder_blocks_per_stage=(1,),
        use_middle_block=False,
        skip_logvar=True,
    )
    torch.manual_seed(0)
    return script.Coder(fold_weight_norm(build_encoder(config, "tiled")).eval(), torch.float32)


@pytest.fixture
def quick(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The quicker forms, each of which is taken for quicker than those before."""
    module = sys.modules["quick"]
    times = iter(range(1_000, 0, -1))
    monkeypatch.setattr(module, "seconds_of", lambda function, inputs: next(times))
    monkeypatch.setattr(module, "CHUNK", 2)
    monkeypatch.setattr(sys.modules["episodes"], "CHUNK", 2)
    return module


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_quicker_forms_make_the_same_episodes_and_are_compiled_once(script: ModuleType, quick: ModuleType) -> None:
    """Other worlds, seeds, frames and chunks reuse the two graphs, neither of which is broken."""
    said: list[str] = []
    graphs: list[object] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        graphs.append(graph)
        return graph.forward

    encode, cpu = tiny_encoder(script), torch.device("cpu")
    forms = quick.quicker_forms(encode, players=4, seed=3, size=(45, 80), device=cpu, say=said.append, backend=backend)
    names = [line.split(":")[0] for line in said]
    assert names == ["pictures, compiled", "latents, rewritten", "latents, compiled", "steps, at once"]
    assert all(line.endswith(", used") for line in said)
    assert isinstance(forms.advance, quick.Steps)
    assert len(graphs) == 2
    for seed in (70, 90):
        settings = {"players": 4, "frames": 3, "first_seed": seed, "device": cpu, "size": (45, 80)}
        wanted = script.record(encode=encode, **settings)
        made = script.record(encode=forms.encode, draw=forms.draw, advance=forms.advance, **settings)
        torch.testing.assert_close(made.latents, wanted.latents, atol=2e-3, rtol=2e-3)
        assert torch.equal(made.mouse, wanted.mouse)
    assert len(graphs) == 2, "compiled again"
    assert len(said) == 4


def test_a_form_that_is_wrong_slow_or_broken_is_not_used(quick: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    later = monotonic() + 60

    def plain(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    def broken(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no compiler")

    def far(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a - b).abs().max())

    forms = {"nan": lambda: lambda x: x * torch.nan, "off": lambda: lambda x: x + 3, "broken": lambda: broken}
    assert quick.quicker("values", plain, forms, (torch.zeros(2),), far, said.append, later) is plain
    assert [line.split(", ")[1].split(":")[0] for line in said] == ["nan", "off", "broken"]
    assert said[2] == "values, broken: not used, RuntimeError: no compiler"
    monkeypatch.setattr(quick, "seconds_of", lambda function, inputs: 1.0)
    encode = quick.Coder(torch.nn.Conv2d(4, 1, 1), torch.float32)
    settings = {"players": 1, "seed": 3, "size": (9, 16), "device": torch.device("cpu")}
    assert quick.quicker_forms(encode, **settings, say=said.append, backend="none") == quick.Forms(encode=encode)
    assert said[3].startswith("all forms as before, as InvalidBackend: ")
    assert quick.quicker("values", plain, {"equal": lambda: plain}, (torch.zeros(2),), far, said.append, later) is plain


def test_a_form_that_fails_later_gives_way_to_the_plain_one(quick: ModuleType) -> None:
    said: list[str] = []
    calls: list[int] = []

    def form(x: torch.Tensor) -> torch.Tensor:
        calls.append(len(x))
        if len(calls) > 1:
            raise RuntimeError("out of memory")
        return x + 1

    settings = ((torch.zeros(2),), lambda a, b: 0, said.append, monotonic() + 60)
    one = quick.quicker("values", lambda x: x + 1, {"form": lambda: form}, *settings)
    for size in (3, 2, 2):
        assert torch.equal(one(torch.zeros(size)), torch.ones(size))
    assert calls == [2, 2], "never with another size, and no more once it failed"
    assert said[1:] == ["values: as before from here on, as RuntimeError: out of memory"]


def test_a_renderer_that_shares_a_gpu_leaves_the_held_out_worlds_to_the_measures(script: ModuleType) -> None:
    module, told = importlib.import_module("by_clock"), {"small": False, "worlds": 12, "round_players": None}
    for where, share, worlds in (("cuda:0", module.SHARED, 0), ("cuda:1", 1.0, 12), ("cpu", 1.0, 12)):
        args = Namespace(data_device=where, config=WORLD / "game_rft.yml", init=None, run=None, **told)
        order = module.order_of(args, torch.device("cuda:0"))
        assert (order.share, order.truth_worlds) == (share, worlds)


def test_first_rounds_end_with_the_places_or_the_time(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def record(first_seed: int, **_: object) -> object:
        asked.append(first_seed)
        return episodes(script, count=2)

    monkeypatch.setattr(script, "record", record)
    rest = (script.Forms(encode=torch.zeros_like), torch.device("cpu"), (9, 16))
    assert len(script.collect(600.0, 2, 24, 70, *rest, places=5)) == 4
    assert asked == [70, 72]
    assert len(script.collect(-1.0, 2, 24, 70, *rest)) == 2, "one round at least"


def test_halving_and_ungrouped_are_what_they_stand_for(quick: ModuleType) -> None:
    torch.manual_seed(0)
    down = Downsample(6, 10)
    x = torch.randn(2, 6, 12, 8)
    torch.testing.assert_close(quick.Halving(fold_weight_norm(down))(x), down(x), atol=1e-5, rtol=1e-5)
    conv = torch.nn.Conv2d(32, 64, 3, padding=1, groups=4)
    x = torch.randn(2, 32, 5, 7)
    wide = quick.ungrouped(conv)
    assert (wide.groups, conv.groups, tuple(wide.weight.shape)) == (1, 4, (64, 32, 3, 3))
    torch.testing.assert_close(wide(x), conv(x), atol=1e-5, rtol=1e-5)


def test_steps_taken_at_once_are_those_taken_one_by_one(script: ModuleType, quick: ModuleType) -> None:
    """Also for worlds that begin; the graph itself is compared with them when it is captured."""
    world, other = (sys.modules["episodes"].enter(3, 5, "cpu") for _ in range(2))
    player = sys.modules["episodes"].RestlessPlayer(world)
    steps = quick.Steps(False)
    for _ in range(3):
        mouse, buttons = player.controls()
        sys.modules["episodes"].advance(world, mouse, buttons)
        steps(other, mouse, buttons)
        for name in ("position", "yaw", "held", "creatures", "gone", "frame", "pulse"):
            assert torch.equal(getattr(world.state, name), getattr(other.state, name))
