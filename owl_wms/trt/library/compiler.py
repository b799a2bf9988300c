"""`torch_tensorrt.compile` with the dynamo frontend, nodes of chosen modules left in PyTorch, and an account of the
partition.

Why it exists: Torch-TensorRT can exclude an operator everywhere (`torch_executed_ops`) but not one node
(`torch_executed_modules` is accepted and ignored by its dynamo frontend), while it is a node that fails. Every
converter carries a validator that may refuse a node, and every node remembers the module it came from, through export,
decomposition and lowering; so refusing by module path keeps exactly those nodes in PyTorch, as ordinary ATen operators
that load without any registration.

Usage:
    program, partition = compile_exported(exported, z, spec.compile_settings("bf16"), kept=("blocks.0.conv",))
    save_program(program, path, z, {})
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from owl_wms.errors import FastPathError
from owl_wms.temporary import temporary_folder
from owl_wms.trt.library import importer, versions

Progress = Callable[[str, int, int], None]
"""`(phase, step, steps)` as TensorRT's builder reports them."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Partition:
    """The split of a program between TensorRT and PyTorch.

    Attributes:
        engines: TensorRT engines in it.
        engine_operators: operators inside engines.
        pytorch_operators: `(operator, module path)` of every node left in PyTorch.
    """

    engines: int
    engine_operators: int
    pytorch_operators: tuple[tuple[str, str], ...]


OUTSIDE = "(decoder)"
"""Path of the nodes that belong to no submodule: the decoder's own forward, and constants without a history."""


def module_path(node: torch.fx.Node) -> str:
    """Dotted path of the innermost module a node came from; `OUTSIDE` for the decoder itself or when unknown."""
    stack = node.meta.get("nn_module_stack")
    return (str(list(stack.values())[-1][0]) if stack else "") or OUTSIDE


def operators_by_module(exported: ExportedProgram) -> dict[str, list[str]]:
    """Module path -> operators called directly in it, in graph order: the modules that can be left in PyTorch."""
    found: dict[str, list[str]] = {}
    for node in exported.graph.nodes:
        if node.op == "call_function":
            found.setdefault(module_path(node), []).append(str(node.target))
    return found


@contextlib.contextmanager
def leave_in_pytorch(kept: Collection[str]) -> Iterator[None]:
    """Inside the block every converter refuses nodes whose innermost module is in `kept`; restored afterwards."""
    if not kept:
        yield
        return
    registry = importer.submodule("dynamo.conversion._ConverterRegistry").DYNAMO_ATEN_CONVERTERS
    saved = dict(registry)

    def refusing(support: Any) -> Any:
        allowed = support.capability_validator
        return dataclasses.replace(
            support,
            capability_validator=lambda node, settings: module_path(node) not in kept and allowed(node, settings),
        )

    try:
        for target, converters in saved.items():
            registry[target] = [refusing(support) for support in converters]
        yield
    finally:
        registry.update(saved)


@contextlib.contextmanager
def without_shared_kernels() -> Iterator[None]:
    """Inside the block, engines take no kernels from the file that all processes of a user share and write to.

    Its path in the temporary folder is known beforehand, so somebody else could have put it there; and a build would
    check kernels that the program does not carry.
    """
    release = versions.of_torch()
    if release is None or not release.runtime_cache:
        yield
        return
    settings = importer.submodule("runtime._runtime_config")
    before, settings.RUNTIME_CACHE_PATH = settings.RUNTIME_CACHE_PATH, ""
    try:
        yield
    finally:
        settings.RUNTIME_CACHE_PATH = before


def compile_exported(
    exported: ExportedProgram,
    z: Tensor,
    settings: dict[str, Any],
    *,
    state: Sequence[Tensor] = (),
    kept: Collection[str] = (),
    progress: Progress | None = None,
) -> tuple[torch.fx.GraphModule, Partition]:
    """Compile `exported` for inputs like `z`.

    Args:
        settings: keyword arguments of `torch_tensorrt.compile`, from `spec.compile_settings` (plus `dryrun` in
            tests).
        state: what a step takes after its latents `z`; inputs like these.
        kept: module paths (as `module_path` gives them) whose own nodes stay in PyTorch.
        progress: called with TensorRT's own build phases, where this TensorRT reports them.

    Raises:
        Whatever the compiler raises: a failed conversion, an engine that cannot be built, a context that cannot be
            created.
    """
    torch_tensorrt = importer.require()
    counted = _Counter()
    with (
        temporary_folder("timing") as private,
        leave_in_pytorch(kept),
        without_shared_kernels(),
        _builder_progress(progress),
        counted.watch(),
        torch.no_grad(),
    ):
        program = torch_tensorrt.compile(
            exported,
            ir="dynamo",
            inputs=[z, *state],
            # The default file is shared by all users of the machine and written without a lock.
            timing_cache_path=str(private / "timing.bin"),
            **settings,
        )
    return program, counted.partition(program)


def save_program(
    program: torch.fx.GraphModule, path: Path, z: Tensor, extra: dict[str, str], state: Sequence[Tensor] = ()
) -> None:
    """Write `program` as an exported program to `path` (a name ending in `.pt2`), retraced at the shapes of `z` and
    `state`, with `extra` texts by name beside it in the same file.
    """
    torch_tensorrt = importer.require()
    form: dict[str, Any] = {"output_format": "exported_program", "retrace": True}
    with torch.no_grad():
        torch_tensorrt.save(program, str(path), extra_files=extra, arg_inputs=[z, *state], **form)


class _Counter:
    """Reads the partition off Torch-TensorRT's own tracker, which it fills for dry runs and real ones alike."""

    def __init__(self) -> None:
        self.tracker: Any = None

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        compiler = importer.submodule("dynamo._compiler")
        original = compiler.dryrun_stats_display

        def display(tracker: Any, dryrun: Any) -> None:
            self.tracker = tracker  # the original prints pages; the numbers are all that is wanted

        compiler.dryrun_stats_display = display
        try:
            yield
        finally:
            compiler.dryrun_stats_display = original

    def partition(self, program: torch.fx.GraphModule) -> Partition:
        if self.tracker is None:  # too few supported operators: the graph came back as it was
            return left_in_pytorch(program.graph)
        left = tuple((operator_name(entry), _location(entry)) for entry in self.tracker.to_run_in_torch)
        return Partition(
            engines=int(self.tracker.tensorrt_graph_count),
            engine_operators=sum(int(data.subgraph_op_count) for data in self.tracker.per_subgraph_data),
            pytorch_operators=left,
        )


def left_in_pytorch(graph: torch.fx.Graph) -> Partition:
    """The partition of a graph without engines."""
    nodes = [node for node in graph.nodes if node.op == "call_function"]
    left = tuple((str(node.target), module_path(node)) for node in nodes)
    return Partition(engines=0, engine_operators=0, pytorch_operators=left)


def operator_name(entry: str) -> str:
    """`torch.ops.aten.convolution.default` out of a tracker line `Node: torch.ops.aten.convolution.default, with layer
    location: ...`.
    """
    return entry.split(",")[0].removeprefix("Node: ").strip()


def _location(entry: str) -> str:
    return entry.split("location:")[-1].strip() if "location:" in entry else ""


@contextlib.contextmanager
def _builder_progress(progress: Progress | None) -> Iterator[None]:
    """Attach a progress monitor to every builder configuration that Torch-TensorRT makes inside the block.

    By replacing one of its methods: no setting of 2.11 takes a monitor, its own ones draw on the terminal.
    """
    if progress is None:
        yield
        return
    tell = progress
    try:
        interpreter = importer.submodule("dynamo.conversion._TRTInterpreter")
        monitor_base = interpreter.trt.IProgressMonitor
        original = interpreter.TRTInterpreter._populate_trt_builder_config
    except (AttributeError, FastPathError):  # an older or newer release without it: build without progress
        yield
        return

    class Monitor(monitor_base):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            monitor_base.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self.steps[phase] = steps
            tell(phase, 0, steps)

        def step_complete(self, phase: str, step: int) -> bool:
            tell(phase, step + 1, self.steps.get(phase, 0))
            return True

        def phase_finish(self, phase: str) -> None:
            self.steps.pop(phase, None)

    def populate(self: Any, *args: Any, **kwargs: Any) -> Any:
        config = original(self, *args, **kwargs)
        monitor = Monitor()
        config.progress_monitor = monitor
        self.owl_progress_monitor = monitor  # the configuration holds no Python reference of its own
        return config

    interpreter.TRTInterpreter._populate_trt_builder_config = populate
    try:
        yield
    finally:
        interpreter.TRTInterpreter._populate_trt_builder_config = original
