"""Computing a key must not disturb a decode that is under way in another thread.

Why: `torch.export` swaps a module's parameters for fakes while it traces, so exporting the caller's own module would
break every other thread that runs it; the key is computed on a copy on the meta device instead. Recording the forward
patches nothing; a decoder that cannot be recorded is still exported, so both ways are held to it.

Run: python -m pytest tests/trt/test_key_threads.py
"""

from __future__ import annotations

import threading

import pytest
import torch

from owl_wms import trt
from owl_wms.request import Request
from owl_wms.trt.graph import recording
from owl_wms.trt.graph.recording import Recording
from owl_wms.vae import build_decoder, fold_weight_norm
from tests.vae.helpers import small_dcae


@pytest.mark.parametrize("way", ["recorded", "exported"])
def test_decoding_goes_on_while_a_key_is_computed(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if way == "exported":
        monkeypatch.setattr(recording, "record", lambda *_: (_ for _ in ()).throw(NotImplementedError("no meta form")))
    decoder = fold_weight_norm(build_decoder(small_dcae())).eval()
    z = torch.randn(2, 8, 8, 8)
    with torch.no_grad():
        reference = decoder(z)
    answers: list[torch.Tensor | Exception] = []
    stop = threading.Event()

    def decode() -> None:
        while not stop.is_set():
            try:
                with torch.no_grad():
                    answers.append(decoder(z))
            except Exception as error:
                answers.append(error)

    threads = [threading.Thread(target=decode) for _ in range(3)]
    for thread in threads:
        thread.start()
    keys = set()
    # A recorded key takes milliseconds, so it takes many of them for decodes to run beside.
    for batch in (2, 3) if way == "exported" else range(2, 66):
        spec = Request(input_shape=(batch, 8, 8, 8), precision="fp32")
        keys.add(trt.key_material(decoder, spec)["graph"])
        assert Recording.of(decoder, spec.input_shape).text.startswith(way)
    stop.set()
    for thread in threads:
        thread.join()

    assert len(keys) == (2 if way == "exported" else 64)
    assert len(answers) > 10, "too few decodes ran beside the key to mean anything"
    assert not [answer for answer in answers if isinstance(answer, Exception)][:1]
    # Export changes process-wide arithmetic settings for a moment: float noise is allowed, nothing more.
    for answer in answers:
        torch.testing.assert_close(answer, reference, rtol=1e-4, atol=1e-5)
