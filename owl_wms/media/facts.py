"""Facts that travel with latents and clips: frame rate, scale, autoencoder and layout, in the file's own metadata.

Why: a file of latents alone does not say by what it has to be multiplied, which decoder belongs to it, or how fast its
frames follow each other, and a wrong guess still gives a picture.

| file | where the facts are |
|---|---|
| `.safetensors` | the header's `__metadata__`, key `owl_wms` |
| `.pt` | a member `owl_wms.json` of the zip archive, which `torch.load` passes over |
| `.mp4` | the comment |
| a table | `source.json` |
| `.npy` | nowhere: the format has no place for them |

Usage:
    facts = read_facts("clip.safetensors")          # owl_wms.media.read_facts
    scale = facts.vae_scale or 1.0
    save_array("copy.safetensors", latents, facts=facts)
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from owl_wms.errors import DataError
from owl_wms.files import one_line

METADATA_KEY = "owl_wms"
MEMBER = "owl_wms.json"
_NUMBER = (int, float)
_FORM: dict[str, type | tuple[type, ...]] = {
    **{"fps": _NUMBER, "vae_scale": _NUMBER},
    **{"vae": str, "vae_sha256": str, "layout": str},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts:
    """Holds what is known about a file; None where nothing is.

    Attributes:
        fps: frames per second; of latents, how many of them per second.
        vae_scale: the decoder's input is the stored latents times this number.
        vae: name of the autoencoder, for messages.
        vae_sha256: of the autoencoder's file of weights, 64 hex digits.
        layout: names of the axes, for example `n c h w`.
    """

    fps: float | None = None
    vae_scale: float | None = None
    vae: str | None = None
    vae_sha256: str | None = None
    layout: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the facts that are known, ready for JSON."""
        known = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        return {name: value.item() if hasattr(value, "item") else value for name, value in known.items()}

    def to_text(self) -> str:
        """Return the same as JSON text."""
        return json.dumps(self.to_dict(), sort_keys=True)

    def otherwise(self, **told: Any) -> list[str]:
        """Return one sentence for each value that differs from a known fact; None counts as not told."""
        own = self.to_dict()
        return [
            f"{name} is {value!r}, and the file says {own[name]!r}"
            for name, value in told.items()
            if value is not None and name in own and own[name] != value
        ]


def facts_of(value: Any, path: Path) -> Facts:
    """Check facts that came from a file; names that this version does not know are left out.

    Raises:
        DataError: no mapping, or a value of another type or range.
    """
    if not isinstance(value, dict):
        raise DataError(f"{path}: its facts must be a JSON object, found {type(value).__name__}", path=path)
    known = {name: value[name] for name in _FORM if value.get(name) is not None}
    for name, item in known.items():
        good = isinstance(item, _FORM[name]) and not isinstance(item, bool)
        if not good or (isinstance(item, (int, float)) and not 0 < item < 1e9) or len(str(item)) > 1000:
            raise DataError(f"{path}: its fact {name} cannot be {one_line(repr(item), 80)}", path=path)
    return Facts(**known)


def facts_of_text(text: str | bytes | None, path: Path) -> Facts:
    """Read facts from JSON text; none from None.

    Raises:
        DataError: as `facts_of`, or no JSON.
    """
    if text is None:
        return Facts()
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: its facts are no JSON: {one_line(error, 80)}", path=path) from error
    return facts_of(value, path)
