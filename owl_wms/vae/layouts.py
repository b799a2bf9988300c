"""The layouts in which training programs leave weights, brought to one: a flat mapping of the network's own names.

A checkpoint wraps names in three ways. Containers are mappings one level down (`state_dict`, `ema`); wrappers are names
that torch.compile, DDP, FSDP and activation checkpointing put between a network's own; roots are the attributes under
which a training program keeps a network (`model.decoder`). Every name ends in one of three places: in the result, in
a log line that says that it was not used, or in the error of loading, which reports whatever a network does not have.

Usage:
    state = flat_weights(content, path)          # containers, wrappers and averages resolved
    decoder = select_part(state, "decoder")      # the half under whatever root it has
"""

from __future__ import annotations

import functools
import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from owl_wms.errors import CheckpointError, printable

_log = logging.getLogger(__name__)

# Put between names by torch.compile, DDP, Lightning, FSDP and activation checkpointing, around parts or whole models.
WRAPPERS = ("_orig_mod", "module", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# Where training programs keep averaged weights (ema-pytorch, timm, BasicSR, ...), in order of preference.
AVERAGES = ("ema", "ema_model", "ema_state_dict", "state_dict_ema", "model_ema", "params_ema", "g_ema", "averaged")
# Words of other names for them, alone or with a part's name: `ema_weights`, `net_g_ema`, `swa_model`, `decoder_ema`.
_AVERAGE_WORDS = {"ema", "swa", "avg", "average", "averaged", "shadow"}
# ema-pytorch's copy of the trained weights, beside the averaged ones.
ONLINE = "online_model"
# Scalars that ema-pytorch, torch's AveragedModel and latent-diffusion's LitEma keep beside the weights.
AVERAGE_STATE = ("initted", "step", "n_averaged", "decay", "num_updates")
# Where training programs keep the trained weights.
TRAINED = ("model", "state_dict", "model_state_dict", "module", "generator", "params", "weights", "net", "network")
# Names of parts (a world model's core, the halves of an autoencoder), which stay until somebody asks for the part.
CORE = "core"
PARTS = ("decoder", "encoder")
# The first layer of every half of an autoencoder, and of every world model: what stands before it is the root.
HALF_ANCHOR = "conv_in"
CORE_ANCHOR = "proj_in"
_ANCHORS = (HALF_ANCHOR, CORE_ANCHOR)
# Networks that only a training program uses.
SIDE_NETWORKS = ("loss", "loss_fn", "criterion", "discriminator", "disc", "lpips", "perceptual", "perceptual_loss")
# Words in names of averages of something else: `d_ema` stands beside `g_ema`, and optimisers keep `exp_avg`.
_SIDE_WORDS = {*SIDE_NETWORKS, "d", "critic", "exp", "sq", "grad", "grads", "gradient", "gradients", "momentum"}
_SIDE_WORDS |= {"norm", "norms", "meter", "meters", "metric", "metrics"}
_TRAINING_STATE = ("opt", "optim", "optimizer", "scheduler", "lr_scheduler", "scaler", "grad_scaler", "rng", "callback")
_LEADING = {ONLINE, *TRAINED, CORE, *PARTS}
# Of mappings in mappings, and of tensors in all.
MAX_DEPTH = 16
MAX_NAMES = 100_000
MAX_NAMED = 4

Pairs = list[tuple[str, Any]]


def is_training_state(key: str) -> bool:
    """Returns whether a name stands for optimisers, schedulers and the like (`opt`, `d_opt_state`)."""
    words = key.split(".")[0].lower().removesuffix("s")
    for ending in ("_state_dict", "_state"):
        words = words.removesuffix(ending)
    return any(words == name or words.endswith(f"_{name}") for name in _TRAINING_STATE)


@functools.lru_cache(1024)
def _is_average(name: str) -> bool:
    """Returns whether a name stands for averaged weights, and of no network that only training uses."""
    words = set(re.split("[_-]", name.lower()))
    return name in AVERAGES or (bool(words & _AVERAGE_WORDS) and not words & _SIDE_WORDS)


def _named_part(name: str) -> str | None:
    """Returns which of `CORE` and `PARTS` a piece of a key stands for: `decoder_ema` is an average of the decoder."""
    words = re.split("[_-]", name) if _is_average(name) else [name]
    return next((part for part in (CORE, *PARTS) if part in words), None)


def flat_weights(content: Any, path: Path | str, *, prefer_ema: bool = True) -> dict[str, Tensor]:
    """Returns the weights inside `content` by dotted names, without containers, wrappers and prefixes of averages.

    Names of parts (`core`, `decoder`, `encoder`) and unknown roots stay: see `select_part` and `select_core`. A key
    that is unlike most others keeps its name too, so that loading can report it.

    Args:
        content: of a checkpoint: a mapping, nested or not.
        path: where it came from, for messages.
        prefer_ema: take the averaged weights where there are both.

    Raises:
        CheckpointError: no mapping, no weights in it, several sets between which nothing decides, nested in itself or
            more than 16 deep, or two keys that become one.
    """
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not a mapping of weights", path=path)
    pairs = _without_side_networks(_Opener(path, prefer_ema).open(content), path)
    if not pairs:
        keys = ", ".join(sorted(map(str, content))[:5]) or "none"
        raise CheckpointError(f"{path}: holds no weights; its keys are: {keys}", path=path)
    pairs = _one_set(_with_dots([(without_wrappers(key), value) for key, value in pairs]), path, prefer_ema)
    flat: dict[str, Tensor] = {}
    for key, value in pairs:
        if key in flat:
            gone = ", ".join((*WRAPPERS, *AVERAGES))
            raise CheckpointError(f"{path}: two keys become one, {key}, once the prefixes {gone} are gone", path=path)
        flat[key] = value
    return flat


def without_wrappers(key: str) -> str:
    """Returns a key without the names that `WRAPPERS` put between its own."""
    return ".".join(piece for piece in key.split(".") if piece not in WRAPPERS)


# ---- containers


class _Opener:
    """Finds the container that holds the network, and names the tensors below it. Visits every mapping once.

    A pickle may hold mappings that contain themselves or one another; naive recursion over those does not end.
    """

    def __init__(self, path: Path | str, prefer_ema: bool) -> None:
        self._path, self._prefer_ema = path, prefer_ema
        self._order = (*AVERAGES, *TRAINED) if prefer_ema else (*TRAINED, *AVERAGES)
        self._seen: dict[int, Pairs | None] = {}

    def open(self, content: Mapping[Any, Any], depth: int = 0) -> Pairs:
        """Returns the tensors of `content` by dotted names."""
        if id(content) not in self._seen:
            self._seen[id(content)] = None
            self._seen[id(content)] = self._open(content, depth)
        pairs = self._seen[id(content)]
        if pairs is None or depth > MAX_DEPTH or len(pairs) > MAX_NAMES:
            text = f"mappings nested in themselves or more than {MAX_DEPTH} deep, or over {MAX_NAMES} names"
            raise CheckpointError(f"{self._path}: {text}, which no checkpoint has", path=self._path)
        return pairs

    def _open(self, content: Mapping[Any, Any], depth: int) -> Pairs:
        if depth > MAX_DEPTH:
            return []
        own = [(str(key), tensor_of(value)) for key, value in content.items()]
        direct = [(key, value) for key, value in own if value is not None]
        nested = {str(key): value for key, value in content.items() if isinstance(value, Mapping) and value}
        nested = {
            key: value for key, value in nested.items() if not is_training_state(key) and not _is_optimiser(value)
        }
        for name in self._likely(nested, depth):
            pairs = self.open(nested[name], depth + 1)
            if pairs:
                beside = [*(key for key, value in direct if not _is_scalar(value)), *nested]
                remark = f"stand beside {name} and are not used"
                _tell(self._path, [key for key in beside if key not in (name, *self._order)], remark)
                return pairs
            _tell(self._path, [name], "holds no weights by name and is not used")
        below: Pairs = []
        for name, value in nested.items():
            below += [(f"{name}.{key}", tensor) for key, tensor in self.open(value, depth + 1)]
            if len(below) > MAX_NAMES:
                break
        if _has_anchor(direct) or not _has_anchor(below):
            return direct + below
        # The first layer of a network is one level down, so what stands here is a record of the run.
        remark = f"stand beside {', '.join(nested)} and are not used"
        _tell(self._path, [key for key, value in direct if not _is_scalar(value)], remark)
        return below

    def _likely(self, nested: Mapping[str, Mapping[Any, Any]], depth: int) -> list[str]:
        """Returns the containers of the whole network by name, the likeliest first."""
        known = [name for name in self._order if name in nested]
        other = [name for name in nested if _is_average(name) and name not in AVERAGES]
        networks = (*_ANCHORS, *PARTS)  # averages of metrics have no such names
        other = [name for name in other if _has_anchor(self.open(nested[name], depth + 1), networks)]
        if not self._prefer_ema or not other:
            return known
        if any(_named_part(name) for name in other):  # the other parts are elsewhere: see `_one_set`
            return []
        first = sum(name in AVERAGES for name in known)
        return [*known[:first], *(other if len(other) == 1 else ()), *known[first:]]


def _has_anchor(pairs: Pairs, anchors: tuple[str, ...] = _ANCHORS) -> bool:
    return any(anchor in key.split(".") for key, _ in pairs for anchor in anchors)


def tensor_of(value: Any) -> Tensor | None:
    """Returns a tensor or a numpy array of numbers as a tensor, else None: numbers and texts are records of a run."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, np.ndarray) and value.ndim and value.dtype.kind in "fiub":
        native = value.astype(value.dtype.newbyteorder("="))
        try:
            return torch.from_numpy(native)
        except TypeError:  # float128
            return None
    return None


def _is_optimiser(value: Mapping[Any, Any]) -> bool:
    return {"state", "param_groups"} <= set(value)


def _without_side_networks(pairs: Pairs, path: Path | str) -> Pairs:
    kept: Pairs = []
    aside: Pairs = []
    for key, value in pairs:
        pieces = without_wrappers(key).split(".")
        side = is_training_state(key) or (len(pieces) > 1 and pieces[0] in SIDE_NETWORKS)
        (aside if side else kept).append((key, value))
    _tell(path, [key for key, _ in aside], "belong to training and are not used", logging.INFO)
    return kept


# ---- averages


def _with_dots(pairs: Pairs) -> Pairs:
    """Returns averages under the names of what was averaged: LitEma of latent-diffusion takes the dots out of them."""
    bare = {key for key, _ in pairs if key.count(".") == 1 and _is_average(key.partition(".")[0])}
    dotted: dict[str, str] = {}
    for pieces in [key.split(".") for key, _ in pairs if key not in bare] if bare else ():
        for at in range(len(pieces) - 1):  # it may be of a part of the whole
            dotted.setdefault("".join(pieces[at:]), ".".join(pieces[at:]))
    named = ((key, *key.partition(".")[::2], value) for key, value in pairs)
    return [(f"{name}.{dotted.get(rest, rest)}" if key in bare else key, value) for key, name, rest, value in named]


def _one_set(pairs: Pairs, path: Path | str, prefer_ema: bool) -> Pairs:
    """Returns one set of weights of every part, averaged or trained, without the prefix that tells which it is.

    A decoder may have been averaged while its encoder was frozen, so every part decides for itself.
    """
    leads = [_lead(key)[0] for key, _ in pairs]
    origins = [tuple(name for name in lead if name not in (CORE, *PARTS)) for lead in leads]
    counts: dict[str | None, Counter[tuple[str, ...]]] = {}
    for lead, origin, (_, value) in zip(leads, origins, pairs, strict=True):
        if not _is_scalar(value):
            counts.setdefault(_part(lead), Counter())[origin] += 1
    chosen = {part: _chosen(of_part, path, prefer_ema) for part, of_part in counts.items()}
    sets = {part: _sets(of_part) for part, of_part in counts.items()}
    averaged = any(origin for origins_of_part in sets.values() for origin in origins_of_part)
    kept: Pairs = []
    for (key, value), lead, origin in zip(pairs, leads, origins, strict=True):
        part = _part(lead)
        rest = _lead(key)[1]
        counter = rest.split(".")[-1] == "n_averaged" or (averaged and rest in AVERAGE_STATE)
        if counter and not value.is_nested and value.numel() == 1:
            continue
        if origin == chosen.get(part):
            kept.append((".".join((*filter(None, map(_named_part, lead)), rest)), value))
        elif origin not in sets.get(part, ()):
            kept.append((key, value))
    return kept


def _chosen(counts: Counter[tuple[str, ...]], path: Path | str, prefer_ema: bool) -> tuple[str, ...]:
    """Returns which of the sets of one part is taken."""

    def rank(origin: tuple[str, ...]) -> tuple[bool, int]:
        average = any(map(_is_average, origin)) and ONLINE not in origin
        places = [AVERAGES.index(name) if name in AVERAGES else len(AVERAGES) for name in filter(_is_average, origin)]
        nearest = min(places, default=-1)
        return average != prefer_ema, nearest

    sets = sorted(_sets(counts), key=rank)
    if len(sets) > 1 and rank(sets[0]) == rank(sets[1]):
        names = " and ".join(".".join(origin) or "no prefix" for origin in sets[:2])
        raise CheckpointError(f"{path}: holds weights twice, under {names}; save the set that is meant", path=path)
    return sets[0]


def _sets(counts: Counter[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Returns the prefixes that have keys enough to be a network; one with fewer than half the most keys is a stray."""
    most = max(counts.values())
    return [origin for origin, count in counts.items() if 2 * count >= most]


def _is_scalar(value: Any) -> bool:
    return not value.is_nested and value.numel() == 1 and not value.is_floating_point()


def _lead(key: str) -> tuple[tuple[str, ...], str]:
    """Returns the known prefixes that a key begins with, in whatever order, and the rest of it, never empty."""
    pieces = key.split(".")
    known = (piece in _LEADING or _is_average(piece) for piece in pieces)
    count = next((i for i, leads in enumerate(known) if not leads), len(pieces) - 1)
    return tuple(pieces[:count]), ".".join(pieces[count:])


def _part(pieces: Iterable[str]) -> str | None:
    return next((part for part in map(_named_part, pieces) if part in PARTS), None)


# ---- roots


def select_part(state: Mapping[str, Tensor], part: str, path: Path | str = "the weights") -> dict[str, Tensor]:
    """Returns the weights of one half of an autoencoder: of a full model by its root, of a bare half as they are.

    Args:
        state: from `flat_weights`.
        part: "decoder" or "encoder".
        path: where they came from, for messages.

    Raises:
        CheckpointError: several networks could be meant.
    """
    return _below_root(state, HALF_ANCHOR, part, path)


def select_core(state: Mapping[str, Tensor], path: Path | str = "the weights") -> dict[str, Tensor]:
    """Returns the weights of a world model's core, from those of the core, of its wrapper or of a training program.

    Raises:
        CheckpointError: several networks could be meant.
    """
    return _below_root(state, CORE_ANCHOR, CORE, path)


def _below_root(state: Mapping[str, Tensor], anchor: str, part: str, path: Path | str) -> dict[str, Tensor]:
    roots = _roots(state, (anchor,), 0) or _roots(state, PARTS, 1)
    if not roots:
        return dict(state)
    own = {key: max((root for root in roots if _below(key, root)), key=len, default=None) for key in state}
    found = _sets(Counter(root for root in own.values() if root is not None))
    whole = any(_part(root) for root in found)
    found = [root for root in found if part in root or not whole]
    if not found:
        return {}
    if len(found) > 1:
        names = " and ".join(".".join(root) or "no prefix" for root in found[:2])
        raise CheckpointError(f"{path}: holds several networks, under {names}; save the one that is meant", path=path)
    (root,) = found
    prefix = "".join(f"{name}." for name in root)
    picked = {key.removeprefix(prefix): value for key, value in state.items() if own[key] == root}
    left = {key: value for key, value in state.items() if own[key] != root}
    if whole:
        half = tuple("encoder" if name == "decoder" else "decoder" if name == "encoder" else name for name in root)
        _tell(path, [key for key in left if not _below(key, half)], "are in neither half and are not used")
        return picked
    # Beside it: a key further up, without its prefix, may be one of its weights given twice.
    others = [key for key in left if (at := own[key]) is not None and not _below(key, root) and at != root[: len(at)]]
    _tell(path, others, "belong to another network and are not used")
    left = {key: value for key, value in left.items() if key not in others}
    # Loading reports what is left over. Where a short name is taken twice, the long one is left over.
    return {**left, **picked, **{prefix + key: state[prefix + key] for key in left.keys() & picked.keys()}}


def _roots(state: Mapping[str, Tensor], anchors: tuple[str, ...], kept: int) -> set[tuple[str, ...]]:
    """Returns the pieces that stand before the first of `anchors` in each key that has one, and `kept` of those."""
    roots = set()
    for key in state:
        pieces = key.split(".")[:-1]
        at = next((i for i, piece in enumerate(pieces) if piece in anchors), None)
        if at is not None:
            roots.add(tuple(pieces[: at + kept]))
    return roots


def _below(key: str, root: tuple[str, ...]) -> bool:
    return not root or key.startswith(".".join(root) + ".")


def _tell(path: Path | str, keys: list[str], remark: str, level: int = logging.WARNING) -> None:
    if keys:
        more = f" and {len(keys) - MAX_NAMED} more" if len(keys) > MAX_NAMED else ""
        shown = ", ".join(printable(key, 100) for key in keys[:MAX_NAMED])
        _log.log(level, "%s: %s%s %s", printable(str(path)), shown, more, remark)
