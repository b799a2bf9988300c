"""Counts what a decode call does on its way to a program, here and in the build process.

Everything is real but the GPU: the key, the build process with its plans and checks, the store, the loading. Engines
are executed by PyTorch, and `torch.cuda`'s queries are answered by a stand-in, so this runs in a process of its own.

Usage:
    python -m tests.runtime.counting CACHE_DIRECTORY     # prints one JSON object per decode function
"""

from __future__ import annotations

import atexit
import functools
import importlib
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

COUNTED = {
    "folds": "owl_wms.vae.fold.fold_weight_norm",
    "recordings": "owl_wms.trt.graph.record.record",
    "forwards for shapes": "owl_wms.trt.graph.shapes.record_shapes",
    "selections": "owl_wms.trt.plans.select",
    "digests of the weights": "owl_wms.trt.graph.digest.weights_digest",
    "directory checks": "owl_wms.cache.guard.open_trusted",
    "keys hashed": "owl_wms.cache.key._digits",
    "exported programs loaded": "owl_wms.trt.run.load._exported",
    "call lists read": "owl_wms.trt.run.calls.read",
    "outputs compared": "owl_wms.trt.run.load.confirm",
    "exports": "owl_wms.trt.graph.export.export_decoder",
}
counts: Counter[str] = Counter()


def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        counts[name] += 1
        return function(*args, **kwargs)

    return call


def watch() -> None:
    """Count every call from now on, by whatever name a loaded module knows the function."""
    for name, path in COUNTED.items():
        module, _, attribute = path.rpartition(".")
        if module not in sys.modules:
            continue
        function = getattr(sys.modules[module], attribute)
        replacement = counted(name, function)
        for other in list(sys.modules.values()):
            if getattr(other, "__name__", "").startswith("owl_wms"):
                for key, value in list(vars(other).items()):
                    if value is function:
                        setattr(other, key, replacement)


def child(arguments: list[str]) -> None:
    """The build process: as `tests.trt.build_child`; counts and loaded modules are written to the file named first."""
    from tests.trt.build_child import main

    importlib.import_module("owl_wms.trt.build.worker")
    watch()

    def tell() -> None:
        modules = sorted(name for name in sys.modules if name.split(".")[0] == "owl_wms")
        Path(arguments[0]).write_text(json.dumps({"counts": counts, "modules": modules}))

    atexit.register(tell)
    main(arguments[1:])


def report(source: str, file: Path) -> None:
    """Print the counts of this process and of a build process since the last report, and begin anew."""
    built = json.loads(file.read_text()) if file.exists() else {"counts": {}, "modules": []}
    file.unlink(missing_ok=True)
    both = {name: [counts[name], built["counts"].get(name, 0)] for name in COUNTED}
    print(json.dumps({"source": source, "counts": both, "modules": built["modules"]}), flush=True)
    counts.clear()


def main(cache: str) -> None:
    """Decode with two decode functions one after the other."""
    import torch

    from tests.trt import cuda_stand_in, decoders

    cuda_stand_in.install()
    from owl_wms.runtime import TensorRT, VideoDecode
    from owl_wms.settings import TensorRTConfig
    from owl_wms.trt.build import parent

    watch()

    file = Path(tempfile.mkdtemp()) / "counts.json"
    bootstrap = parent.BOOTSTRAP.replace("owl_wms.trt.build.child import main", "tests.runtime.counting import child")
    bootstrap = bootstrap.replace("main(sys.argv[2:])", f"child([{str(file)!r}, *sys.argv[2:]])")
    parent.Build = functools.partial(parent.Build, bootstrap=bootstrap)  # type: ignore[misc, assignment]
    TensorRT.ready = lambda self, request: None  # type: ignore[method-assign]
    decoder, shape = decoders.make("tiled")
    settings = TensorRTConfig(cache_dir=Path(cache))
    for _ in range(2):
        decode = VideoDecode(decoder, batch_size=shape[0], settings=settings, strict=True)
        decode(torch.zeros(1, *shape))
        report(decode.stats().reason.split()[0], file)


if __name__ == "__main__":
    main(sys.argv[1])
