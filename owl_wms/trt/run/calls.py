"""The call list of a program: its operators, in order, as JSON inside the program's file.

Why it exists: `torch.export.load` imports torch's compiler and sympy, which takes most of a start that finds its
program in the cache. To run a program, only its operators, their arguments and its weights are needed. So a build
writes them down once more, as a list that this module reads with what `import torch` has loaded anyway. Weights and
engines are those of the exported program, read where they lie in the same file.

The exported program stays the one that counts. `save.py` keeps a list only if, read back from the file, it gives the
same frames bit for bit. A file without a list, or with one that is refused here, is read by `torch.export.load`.

The JSON object has the fields `format`, `graph` (SHA-256 of the exported graph that it stands for), `inputs`,
`constants`, `calls` and `outputs`. An argument is a plain JSON value or an object with one field: `value` (number of an
input or of an earlier call), `constant` (its number), `dtype`, `layout`, `memory_format`, or `device` (null: the
program's).

Usage:
    data = with_calls(data, exported, device)       # after torch.export.save
    program = read(data, device)                    # None if there is no list; raises if it refuses the list
"""

from __future__ import annotations

import hashlib
import io
import json
import operator
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

FILE = "owl_wms_calls.json"
FORMAT = 1
NAMESPACES = ("aten", "owl_wms", "tensorrt")
GETITEM = "getitem"
_NAMED = {"dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format}


@dataclass(frozen=True, kw_only=True)
class Program:
    """A program that was read.

    Attributes:
        module: takes latents and state, returns what the exported program returns.
        inputs: shape and dtype of latents and state.
        engines: TensorRT's, in no order that matters.
        extra: the other texts in the file by name, such as the machine code of our kernels.
    """

    module: nn.Module
    inputs: list[tuple[tuple[int, ...], torch.dtype]]
    engines: list[Any]
    extra: dict[str, str]


# ---- writing


def with_calls(data: bytes, exported: ExportedProgram, device: torch.device) -> bytes:
    """Returns the file `data` with the call list of `exported` in it.

    Args:
        data: what `torch.export.save` wrote.
        exported: read from those bytes.
        device: where it runs.

    Raises:
        ValueError: the graph has something in it that a call list cannot hold.
        Exception: this torch lays out its files in another way.
    """
    buffer = io.BytesIO(data)
    with zipfile.ZipFile(buffer, "a") as archive:
        root = archive.namelist()[0].split("/")[0]
        stored: dict[str, dict[str, Any]] = {}
        for folder, file in (("weights", "model_weights_config"), ("constants", "model_constants_config")):
            config = json.loads(archive.read(f"{root}/data/{folder}/{file}.json"))["config"]
            for name, row in config.items():
                record = f"data/{folder}/{row['path_name']}"
                stored[name] = {"record": record, "bytes": archive.getinfo(f"{root}/{record}").file_size}
        graph = hashlib.sha256(archive.read(f"{root}/models/model.json")).hexdigest()
        written = {"format": FORMAT, "graph": graph, **_written(exported, stored, device)}
        archive.writestr(f"{root}/extra/{FILE}", json.dumps(written, separators=(",", ":")))
    return buffer.getvalue()


def _written(
    exported: ExportedProgram, stored: Mapping[str, dict[str, Any]], device: torch.device
) -> dict[str, list[Any]]:
    signature = exported.graph_signature
    if signature.buffers_to_mutate or signature.user_inputs_to_mutate:
        raise ValueError("the program writes to its weights or its inputs")
    names = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
        **signature.inputs_to_lifted_custom_objs,
    }
    made: dict[str, list[Any]] = {"inputs": [], "constants": [], "calls": [], "outputs": []}
    numbers: dict[fx.Node, dict[str, int]] = {}

    def text(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return numbers[value]
        if isinstance(value, (list, tuple)):
            return [text(item) for item in value]
        if isinstance(value, torch.device) and value.type == device.type:
            return {"device": None}
        field = next((field for field, kind in _NAMED.items() if isinstance(value, kind)), "")
        if field:
            return {field: _short(value)}
        if value is None or type(value) in (bool, int, float, str):
            return value
        raise ValueError(f"an argument is a {type(value).__name__}")

    for node in exported.graph.nodes:
        if node.op == "placeholder" and node.name in names:
            name = names[node.name]
            value = exported.state_dict[name] if name in exported.state_dict else exported.constants[name]
            numbers[node] = {"constant": len(made["constants"])}
            made["constants"].append(_constant(stored[name], value))
        elif node.op == "placeholder":
            numbers[node] = {"value": len(made["inputs"])}
            made["inputs"].append({"shape": list(node.meta["val"].shape), "dtype": _short(node.meta["val"].dtype)})
        elif node.op == "output":
            frames, *state = node.args[0]
            made["outputs"] = text([frames, *state] if state else frames)
        elif node.op == "call_function":
            name = GETITEM if node.target is operator.getitem else str(node.target)
            if name.startswith("aten._assert_tensor_metadata."):
                continue  # export checked it, and returns nothing
            _operator(name)
            numbers[node] = {"value": len(made["inputs"]) + len(made["calls"])}
            made["calls"].append([name, text(node.args), {key: text(item) for key, item in node.kwargs.items()}])
        else:
            raise ValueError(f"the graph has a node of kind {node.op}")
    return made


def _constant(stored: dict[str, Any], value: Any) -> dict[str, Any]:
    if not isinstance(value, Tensor):
        return {"object": stored["record"]}
    if type(value.data) is not Tensor or value.layout is not torch.strided:
        raise ValueError(f"{stored['record']} is no plain tensor")
    shape, stride = list(value.shape), list(value.stride())
    return {**stored, "dtype": _short(value.dtype), "shape": shape, "stride": stride, "offset": value.storage_offset()}


def _short(value: Any) -> str:
    return str(value).removeprefix("torch.")


# ---- reading


def read(data: bytes, device: torch.device) -> Program | None:
    """Returns the program behind the call list in the file `data`, with its weights on `device`.

    Args:
        data: the whole file, verified by the caller. It is not held afterwards.
        device: where the program runs.

    Returns:
        None if the file has no call list.

    Raises:
        Exception: the list is of another format or graph, or names what is not there or not allowed.
    """
    reader: Any = torch._C.PyTorchFileReader(io.BytesIO(data))
    texts = [name for name in reader.get_all_records() if name.startswith("extra/")]
    extra = {name.removeprefix("extra/"): reader.get_record(name).decode() for name in texts}
    if FILE not in extra:
        return None
    made = json.loads(extra.pop(FILE))
    if made["format"] != FORMAT:
        raise ValueError(f"its call list has format {made['format']}, this version reads {FORMAT}")
    if made["graph"] != hashlib.sha256(reader.get_record("models/model.json")).hexdigest():
        raise ValueError("its call list belongs to another graph")
    flat: dict[tuple[str, torch.dtype], Tensor] = {}

    def constant(row: dict[str, Any]) -> Any:
        if "object" in row:
            return torch._C._pickle_load_obj(reader.get_record(row["object"]))
        dtype = _named("dtype", row["dtype"])
        key = row["record"], dtype
        if key not in flat:  # tensors that share memory go on sharing it
            begin, count = reader.get_record_offset(row["record"]), row["bytes"] // dtype.itemsize
            flat[key] = torch.frombuffer(data, dtype=dtype, count=count, offset=begin).to(device, copy=True)
        return flat[key].as_strided(row["shape"], row["stride"], row["offset"])

    engines: list[Any] = []
    root, graph = nn.Module(), fx.Graph()
    nodes: dict[tuple[str, int], fx.Node] = {}
    for number in range(len(made["inputs"])):
        nodes["value", number] = graph.placeholder(f"input_{number}")
    for number, row in enumerate(made["constants"]):
        held = constant(row)
        if "object" in row:
            engines.append(held)
        setattr(root, f"constant_{number}", held)
        nodes["constant", number] = graph.get_attr(f"constant_{number}")

    def argument(value: Any) -> Any:
        if isinstance(value, list):
            return [argument(item) for item in value]
        if not isinstance(value, dict):
            return value
        ((field, held),) = value.items()
        if field == "device":
            return device
        return _named(field, held) if field in _NAMED else nodes[field, held]

    for number, (name, args, kwargs) in enumerate(made["calls"], len(made["inputs"])):
        given = {key: argument(item) for key, item in kwargs.items()}
        nodes["value", number] = graph.call_function(_operator(name), tuple(argument(args)), given)
    graph.output(argument(made["outputs"]))
    inputs = [(tuple(row["shape"]), _named("dtype", row["dtype"])) for row in made["inputs"]]
    return Program(module=fx.GraphModule(root, graph), inputs=inputs, engines=engines, extra=extra)


def _named(field: str, name: str) -> Any:
    found = getattr(torch, name)
    if not isinstance(found, _NAMED[field]):
        raise ValueError(f"torch.{name} is no {field}")
    return found


def _operator(name: str) -> Any:
    """Returns the operator `namespace.name.overload`.

    Raises:
        ValueError: a call list may not name it: it is in another namespace, or it takes no tensor or returns nothing,
            and so does something else than compute, such as `aten.save`.
    """
    if name == GETITEM:
        return operator.getitem
    namespace, packet, overload = name.split(".")
    found = getattr(getattr(getattr(torch.ops, namespace), packet), overload) if namespace in NAMESPACES else None
    if not isinstance(found, torch._ops.OpOverload):
        raise ValueError(f"a call list may not name {name}")
    takes = any("Tensor" in str(argument.type) for argument in found._schema.arguments)
    if not takes or not found._schema.returns:
        raise ValueError(f"{name} does not compute from tensors")
    return found
