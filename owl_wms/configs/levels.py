"""Says which noise levels a world model is trained at: the `levels` of the `train` section.

Usage:
    levels = LevelsConfig(prefix=0.8, context=(0.0, 0.35))
"""

from __future__ import annotations

from pydantic import model_validator

from owl_wms.configs.strict import FloatPair, PositiveInt, StrictModel


class LevelsConfig(StrictModel):
    """The `levels` of `train`: noise levels that `rft`, `av` and `mixed_av` draw, from 0 (data) to 1 (noise).

    A model knows the levels that it was trained on and no others, so training has to draw those that sampling uses.
    A share `prefix` of the clips looks as in sampling: a history of at least `prefix_min` frames at one level, and the
    frames behind it at levels of their own, which alone count in the loss. The other clips have a level of its own for
    each frame, and all frames count.

    Attributes:
        mean, std: independent levels are sigmoid(mean + std * normal).
        uniform: share of independent levels that are uniform in 0 to 1 instead.
        ones: share of independent levels that are exactly 1, where sampling begins.
        prefix: share of clips with a history.
        prefix_min: frames of the shortest history.
        context: lowest and highest level of a history, which is uniform between them; `noise_prev` of the sampler must
            lie there.
        context_low, context_low_share: level of a history that is nearly clean, and the share of clips with it.
        shift: levels behind a history are shift * u / (1 + (shift - 1) u) with u uniform, as samplers step.
        prefix_ones: share of those levels that are exactly 1.
    """

    mean: float = 0.0
    std: float = 1.0
    uniform: float = 0.1
    ones: float = 0.04
    prefix: float = 0.5
    prefix_min: PositiveInt = 1
    context: FloatPair = (0.0, 0.35)
    context_low: float = 0.02
    context_low_share: float = 0.2
    shift: float = 3.0
    prefix_ones: float = 0.1

    @model_validator(mode="after")
    def _fits(self) -> LevelsConfig:
        for name in ("uniform", "ones", "prefix", "context_low", "context_low_share", "prefix_ones"):
            self._require(0.0 <= getattr(self, name) <= 1.0, name, "must be within 0..1")
        self._require(self.uniform + self.ones <= 1.0, "ones", "uniform + ones must be at most 1")
        self._require(self.std > 0, "std", "must be above 0")
        self._require(self.shift > 0, "shift", "must be above 0")
        low, high = self.context
        self._require(0.0 <= low <= high <= 1.0, "context", "must rise within 0..1")
        return self
