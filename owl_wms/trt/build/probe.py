"""Finds the kinds of modules that cannot be built alone: the suspects that isolation begins with.

Why it exists: a decoder has hundreds of modules, some thirty kinds and a dozen classes of them (all depthwise 3x3
convolutions are one class, those of one width are a kind). One small build per kind costs seconds and usually names the
culprit; trying subsets of the whole costs a whole build each.

Usage:
    prober = Prober(request, journal, device)
    failing = prober.probe(module, like_modules(module, exported), "bf16", settings)      # {module path: reason}
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from owl_wms.request import Request
from owl_wms.trt.build import attempts
from owl_wms.trt.build.journal import BuildJournal
from owl_wms.trt.check.parity import latents
from owl_wms.trt.graph.export import export_decoder
from owl_wms.trt.graph.shapes import record_shapes
from owl_wms.trt.library import compiler
from owl_wms.trt.spec import dtype_of

PROBE_SECONDS = 25.0


class Prober:
    """Builds leaf modules alone and remembers the answers by what was probed."""

    def __init__(self, request: Request, journal: BuildJournal, device: torch.device) -> None:
        self.request = request
        self.journal = journal
        self.device = device
        self.probed: dict[str, str] = {}

    def probe(
        self, module: nn.Module, classes: list[list[list[str]]], precision: str, settings: dict[str, Any]
    ) -> dict[str, str]:
        """Build one leaf module of each kind alone; `{module path: reason}` for all modules of failing kinds.

        One kind of each class comes first, for `PROBE_SECONDS`; then, for as long again, the other kinds of the classes
        in which it failed; and the rest if there is time left of the first.

        Args:
            classes: of `like_modules`.
        """
        shapes = record_shapes(module, self.request.input_shape)
        children = dict(module.named_modules())
        failing: dict[str, str] = {}
        deadline = time.monotonic() + PROBE_SECONDS

        def buildable(path: str) -> bool:
            return path in shapes and next(children[path].children(), None) is None

        def fails(group: list[str], until: float) -> bool:
            path = next(filter(buildable, group))
            leaf, shape = children[path], shapes[path]
            # Keyed by what is probed: another plan's module of the same kind and shape has the same answer.
            key = f"probe|{precision}|{shape}|{_kind(leaf, [])}"
            if key not in self.probed and time.monotonic() > until:
                return False
            reason = self.probed.get(key)
            if reason is None:
                reason = self.journal.attempt(key)
            if reason is None:
                reason = self._probe_one(leaf, shape, precision, settings)
                self.journal.outcome(key, reason)
            self.probed[key] = reason
            if reason:
                failing.update(dict.fromkeys(group, reason))
            return bool(reason)

        known = [kinds for groups in classes if (kinds := [group for group in groups if any(map(buildable, group))])]
        failed = [fails(kinds[0], deadline) for kinds in known]
        for suspicious, until in ((True, deadline + PROBE_SECONDS), (False, deadline)):
            for kinds, first in zip(known, failed, strict=True):
                if first is suspicious:
                    for group in kinds[1:]:
                        fails(group, until)
        return failing

    def _probe_one(self, leaf: nn.Module, shape: tuple[int, ...], precision: str, settings: dict[str, Any]) -> str:
        try:
            x = latents(shape, 1.0, dtype_of(precision), self.device, self.request.seed)
            exported = export_decoder(nn.Sequential(leaf), x)
            program, _ = compiler.compile_exported(exported, x, {**settings, "min_block_size": 1})
            attempts.run(program, x)
        except Exception as error:
            attempts.check_context(self.device)
            return attempts.reason_of(error)
        return ""


def like_modules(module: nn.Module, exported: ExportedProgram) -> list[list[list[str]]]:
    """Module paths that call operators, grouped by kind, and the kinds by class.

    A kind is a leaf's type, configuration and tensor shapes, else the operators. A class is the type, with a
    convolution's kernel size and the grouping of its channels. Grouped convolutions come first: they are what
    libraries have the fewest kernels for.
    """
    kinds: dict[str, list[str]] = {}
    children = dict(module.named_modules())
    for path, operators in compiler.operators_by_module(exported).items():
        kinds.setdefault(_kind(children.get(path), operators), []).append(path)
    classes: dict[str, list[list[str]]] = {}
    for kind in kinds.values():
        classes.setdefault(_class(children.get(kind[0])), []).append(kind)
    return [classes[name] for name in sorted(classes, key=lambda name: not name.endswith(_GROUPED))]


_GROUPED = ("depthwise", "grouped")


def _class(child: nn.Module | None) -> str:
    groups = getattr(child, "groups", 1)
    grouped = "" if groups == 1 else _GROUPED[groups != getattr(child, "in_channels", groups)]
    return f"{type(child).__name__} {getattr(child, 'kernel_size', '')} {grouped}"


def _kind(child: nn.Module | None, operators: list[str]) -> str:
    if child is None or next(child.children(), None) is not None:
        return f"{type(child).__name__} {sorted(set(operators))}"
    tensors = [*child.named_parameters(recurse=False), *child.named_buffers(recurse=False)]
    return f"{type(child).__name__} {child.extra_repr()} {[(key, tuple(t.shape)) for key, t in tensors]}"
