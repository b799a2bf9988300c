"""Messages between the page and the server: strict, small, and checked before they are used.

Client to server: JSON text, one `ClientMessage`. Server to client: JSON text (`status`, `refused`, `error`)
and binary frames, a fixed header before the compressed picture:

    uint32 index | uint32 dropped | float64 sent | float32 model_ms | float32 decode_ms | float32 encode_ms
    little-endian

`sent` is the client's own clock, echoed from the last input that the frame has seen: when the first picture with it is
drawn, the page subtracts it from its clock and has the time from hand to eye without comparing two clocks. It is 0
before the first input.
"""

from __future__ import annotations

import struct
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from owl_wms.errors import OwlError

MAX_MESSAGE_BYTES = 2048
_HEADER = struct.Struct("<IIdfff")
HEADER_BYTES = _HEADER.size

MAX_BUTTONS = 64
MAX_SEED = 2**31 - 1
ButtonName = Annotated[str, Field(max_length=32)]
Clock = Annotated[float, Field(ge=0, le=1e15, allow_inf_nan=False)]
Movement = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]


class MessageError(OwlError, ValueError):
    """A message that does not follow the rules above; the connection ends with this text as its reason."""


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class InputMessage(_Message):
    """Buttons that are down now, and how far the mouse went since the last input, in units of a full frame's turn.

    The session refuses names that are none of its source's.
    """

    type: Literal["input"]
    buttons: Annotated[list[ButtonName], Field(max_length=MAX_BUTTONS)]
    mouse: Annotated[list[Movement], Field(min_length=2, max_length=2)]
    sent: Clock


class AckMessage(_Message):
    """A frame has been drawn; the server keeps few frames under way, and drops what is stale instead of queueing it."""

    type: Literal["ack"]
    index: Annotated[int, Field(ge=0, lt=2**32)]


class CommandMessage(_Message):
    """Something asked of the source or of its session; `seed` goes with `new_world`, and None draws one."""

    type: Literal["command"]
    name: Literal["play", "pause", "restart", "new_world", "more_steps", "fewer_steps"]
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None


ClientMessage = Annotated[InputMessage | AckMessage | CommandMessage, Field(discriminator="type")]
_CLIENT: TypeAdapter[InputMessage | AckMessage | CommandMessage] = TypeAdapter(ClientMessage)


def parse_message(text: str) -> InputMessage | AckMessage | CommandMessage:
    """Check a client's message.

    Raises:
        MessageError: says what is wrong in at most 100 ASCII characters, which is what a close frame has room for. What
            the client wrote is escaped: it may hold control characters, and the text goes to a terminal.
    """
    try:
        return _CLIENT.validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise MessageError(ascii(f"bad message: {where}: {first['msg']}")[1:-1][:100]) from error


def pack_frame(
    picture: bytes, *, index: int, dropped: int, sent: float, model_ms: float, decode_ms: float, encode_ms: float
) -> bytes:
    """Header and picture as one binary message."""
    return _HEADER.pack(index, dropped, sent, model_ms, decode_ms, encode_ms) + picture


def unpack_header(message: bytes) -> dict[str, float]:
    """The header of a binary message, for clients written in Python and for tests."""
    names = ("index", "dropped", "sent", "model_ms", "decode_ms", "encode_ms")
    return dict(zip(names, _HEADER.unpack_from(message), strict=True))
