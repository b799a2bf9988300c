"""Runs the code cells of a notebook in this process, and stores in it what they print and show.

Why not nbclient: with ipykernel it would add packages to every installation for one notebook, and a second process that
imports torch. A cell here is plain Python; a last line that is an expression is shown, as in Jupyter.

Run: python -m tests.notebook examples/latents_to_frames.ipynb     # runs it, and writes its outputs into it
"""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

from PIL import Image


def run(path: Path) -> dict[str, Any]:
    """Returns the notebook with new outputs; its cells share their names, and run in the notebook's folder.

    Raises:
        Exception: that of a cell.
    """
    notebook: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    names: dict[str, Any] = {"__name__": "__main__"}
    before = Path.cwd()
    os.chdir(path.parent)
    try:
        cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
        for number, cell in enumerate(cells, 1):
            cell["execution_count"] = number
            cell["outputs"] = _outputs("".join(cell["source"]), f"{path.name}, code cell {number}", number, names)
    finally:
        os.chdir(before)
    return notebook


def _outputs(source: str, where: str, number: int, names: dict[str, Any]) -> list[dict[str, Any]]:
    tree = ast.parse(source, where)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(tree, where, "exec"), names)
        value = None if last is None else eval(compile(ast.Expression(last.value), where, "eval"), names)
    outputs: list[dict[str, Any]] = []
    if printed.getvalue():
        text = printed.getvalue().splitlines(keepends=True)
        outputs.append({"name": "stdout", "output_type": "stream", "text": text})
    if isinstance(value, Image.Image):
        data = {**_picture(value), "text/plain": ["<PIL.Image.Image>"]}
    elif value is not None:
        data = {"text/plain": [repr(value)]}
    if value is not None:
        outputs.append({"data": data, "execution_count": number, "metadata": {}, "output_type": "execute_result"})
    return outputs


def _picture(picture: Image.Image) -> dict[str, str]:
    """A picture in the smaller of two forms, by its type."""
    made = {}
    for form in ("png", "jpeg"):
        file = io.BytesIO()
        picture.save(file, form, quality=70, optimize=True)
        made[f"image/{form}"] = base64.b64encode(file.getvalue()).decode()
    return dict([min(made.items(), key=lambda item: len(item[1]))])


if __name__ == "__main__":
    for name in sys.argv[1:]:
        made = run(Path(name))
        Path(name).write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
