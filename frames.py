"""Messages to bytes and back, and the next frame after garbage. No I/O.

Strategy: one write of at most ``PIPE_BUF`` bytes to a pipe is atomic, and all or nothing with ``O_NONBLOCK`` (pipe(7),
write(2)). So a frame never exceeds that, writers in any number of processes need no lock between them, and no reader
ever waits for the other half of a frame. What does not fit lies in a file, and the frame names it (the claim check
pattern).

    frame = 4 bytes: length of the text, big-endian | the text: a JSON object in UTF-8

Rules:
- JSON text holds no zero byte, and the length of a frame starts with two; so a reader that meets garbage finds the next
  frame again. It counts what it skips.
- What is ours stands last in a message, ``reply_to`` and ``correlation_id``: whoever cannot parse what a user has
  nested too deep still knows whom to tell.
- What is a user's is JSON and, beyond JSON, what plumpy and others send over RabbitMQ's default codec: `uuid.UUID`,
  `datetime`, `date`, `bytes`, `set`, `frozenset` and `complex` arrive as what they were. A message that holds none of
  them is plain JSON and costs nothing extra. One that does says so with ``"dressed": true``; in it such a value is
  ``{"!": type, "value": ...}``, and so is a dictionary of the user's that has a key "!", which is how neither can be
  mistaken for the other.
"""

from __future__ import annotations

import binascii
import datetime
import json
import re
import select
import struct
import uuid
from collections.abc import Callable
from typing import Any

_HEADER = struct.Struct(">I")
HEADER_SIZE = _HEADER.size
LARGEST_TEXT = select.PIPE_BUF - _HEADER.size
_CLAIM_CHECK = b'{"body_file":'
_MARK = "!"
_ENVELOPE = re.compile(
    rb'[,{]((?:\s*"(?:no_reply|reply_to|correlation_id|dressed)"\s*:\s*(?:true|false|null|"[^"\\]*")\s*,?)+)}\s*$'
)
_LONGEST_ENVELOPE = 400

Message = dict[str, Any]
_decode = json.JSONDecoder().raw_decode


class Garbage(ValueError):
    """A frame's text, or the file it names, is not a message."""

    def __init__(self, why: str, text: bytes = b"") -> None:
        super().__init__(why)
        self.envelope = _envelope(text)
        """Whom to tell, and of what, as far as it can be known: ``reply_to`` and ``correlation_id``."""


def _envelope(text: bytes) -> Message:
    match = _ENVELOPE.search(text[-_LONGEST_ENVELOPE:])
    try:
        return dict(json.loads(b"{" + match[1] + b"}")) if match else {}
    except ValueError:
        return {}


def frame(text: str) -> bytes | None:
    """Put a message's text into a frame; `None` if it does not fit."""
    data = text.encode()
    return _HEADER.pack(len(data)) + data if len(data) <= LARGEST_TEXT else None


def text(data: bytes) -> str:
    """Return a frame's text."""
    return data[_HEADER.size :].decode()


def parse(text: bytes) -> Message:
    """Return the message that a frame's text, or a body, holds.

    :raises Garbage: it is no JSON object.
    """
    try:
        said = str(text, "utf-8").strip()
        message, end = _decode(said)
    except ValueError as error:
        raise Garbage(f"{type(error).__name__}: {error}", text) from error
    except RecursionError as error:
        raise Garbage("it is nested too deep for this process", text) from error
    if not isinstance(message, dict) or end < len(said):
        raise Garbage("it is not a JSON object")
    return message


def claim_check(body: str) -> bytes:
    """Return the frame that stands for a message in a file.

    :param body: the file's name.
    """
    text = _CLAIM_CHECK + f'"{body}"}}'.encode()
    return _HEADER.pack(len(text)) + text


def claimed(data: bytes) -> str | None:
    """Return what a frame names as the file that holds its message, unchecked; `None` if the frame itself holds it."""
    if not data.startswith(_CLAIM_CHECK, _HEADER.size):
        return None
    try:
        return str(parse(data[_HEADER.size :])["body_file"])
    except (Garbage, KeyError):
        return None


class Frames:
    """Finds the frames in a stream of bytes, and after garbage the next frame again."""

    def __init__(self) -> None:
        self.skipped = 0
        """Bytes that belonged to no frame."""
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """Take what was read; return the frames that are whole, headers included."""
        data = self._rest + data if self._rest else data
        frames, at, end = [], 0, len(data)
        while end - at >= _HEADER.size:
            (length,) = _HEADER.unpack_from(data, at)
            stop = at + _HEADER.size + length
            text = data[at + _HEADER.size : stop]
            if not 2 <= length <= LARGEST_TEXT or b"\0" in text or (text and text[0] != 0x7B):
                at = self._skip(data, at, at + 1)
            elif stop > end:
                break
            else:
                frames.append(data[at:stop])
                at = stop
        if end - at < _HEADER.size and data[at : at + 2].strip(b"\0"):
            # Too short to be judged by its length, but no header starts like this.
            at = self._skip(data, at, at)
        self._rest = data[at:]
        return frames

    def _skip(self, data: bytes, at: int, start: int) -> int:
        following = data.find(b"\0", start)
        following = len(data) if following < 0 else following
        self.skipped += following - at
        return following


encode: Callable[[Message], str] = json.JSONEncoder(separators=(",", ":")).encode
"""Turns a message of our own, which holds nothing of a user's, into JSON."""


class _Beyond(Exception):
    """A message holds what JSON cannot express, but `_dress` may."""


def _refuse(value: object) -> Any:
    if isinstance(value, tuple(_BEYOND)):
        raise _Beyond
    raise TypeError(f"JSON cannot express {value!r} ({type(value).__name__})")


class Codec:
    """How what is a user's becomes JSON, and what it was again. It has no state, and is safe in any thread."""

    def __init__(
        self,
        encoder: Callable[[Any], Any] | None = None,
        decoder: Callable[[dict[str, Any]], Any] | None = None,
    ) -> None:
        """
        :param encoder: called for what JSON cannot express, as the ``default`` of `json.dumps`, in place of our own.
        :param decoder: called for each JSON object in what is a user's, as the ``object_hook`` of `json.loads`.
        """
        self._encode = json.JSONEncoder(default=encoder or _refuse, separators=(",", ":")).encode
        self._decoder = decoder

    @property
    def runs_user_code(self) -> bool:
        """Whether decoding may take any time, wait for something, or raise anything."""
        return self._decoder is not None

    def concerns_user(self, message: Message, key: str) -> bool:
        """Say whether decoding a field of this very message runs a user's code."""
        return self.runs_user_code and isinstance(message.get(key), dict | list)

    def encode(self, message: Message) -> str:
        """Turn a message into JSON.

        :raises TypeError: JSON cannot express it.
        :raises Exception: whatever else the user's encoder raises.
        """
        try:
            try:
                return self._encode(message)
            except _Beyond:
                return self._encode({**{key: _dress(value) for key, value in message.items()}, "dressed": True})
        except (ValueError, RecursionError) as error:
            raise TypeError(f"JSON cannot express the message: {error}") from error

    def decode(self, message: Message, key: str) -> Any:
        """Return a field of a message as its user knows it; `None` if it is not there.

        :raises ValueError: it does not hold what it says.
        :raises Exception: whatever the user's decoder raises.
        """
        value = message.get(key)
        if message.get("dressed") is True:
            value = _undress(value)
        return value if self._decoder is None else self._revive(value)

    def _revive(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._revive(item) for item in value]
        if isinstance(value, dict) and self._decoder is not None:
            return self._decoder({key: self._revive(item) for key, item in value.items()})
        return value


# A datetime is a date too, so it comes first. A set may hold tuples, but no lists.
_BEYOND: dict[type, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    uuid.UUID: (str, uuid.UUID),
    datetime.datetime: (datetime.datetime.isoformat, datetime.datetime.fromisoformat),
    datetime.date: (datetime.date.isoformat, datetime.date.fromisoformat),
    bytes: (lambda value: binascii.b2a_base64(value, newline=False).decode(), binascii.a2b_base64),
    complex: (lambda value: [value.real, value.imag], lambda value: complex(*value)),
    set: (lambda value: [_dress_member(item) for item in value], lambda value: set(map(_undress, value))),
    frozenset: (lambda value: [_dress_member(item) for item in value], lambda value: frozenset(map(_undress, value))),
}
"""How JSON says a value of these types, and how it becomes again what it was."""
_REVIVALS: dict[str, Callable[[Any], Any]] = {
    **{kind.__name__.lower(): revive for kind, (_, revive) in _BEYOND.items()},
    "tuple": lambda value: tuple(map(_undress, value)),
    "object": lambda value: {key: _undress(item) for key, item in value.items()},
}


def _dress(value: Any) -> Any:
    if isinstance(value, dict):
        dressed = {key: _dress(item) for key, item in value.items()}
        return {_MARK: "object", "value": dressed} if _MARK in dressed else dressed
    if isinstance(value, list | tuple):
        return [_dress(item) for item in value]
    for kind, (express, _) in _BEYOND.items():
        if isinstance(value, kind):
            return {_MARK: kind.__name__.lower(), "value": express(value)}
    return value


def _dress_member(value: Any) -> Any:
    if isinstance(value, tuple):
        return {_MARK: "tuple", "value": [_dress_member(item) for item in value]}
    return _dress(value)


def _undress(value: Any) -> Any:
    if isinstance(value, list):
        return [_undress(item) for item in value]
    if not isinstance(value, dict):
        return value
    if _MARK not in value:
        return {key: _undress(item) for key, item in value.items()}
    try:
        return _REVIVALS[value[_MARK]](value["value"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"this is not what its mark says: {value!r:.200}") from error
