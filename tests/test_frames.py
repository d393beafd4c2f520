"""Frames, without any process or pipe."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
from pathlib import Path

import pytest

import fifo
import frames


def test_large_body_must_be_for_this_pipe(tmp_path: Path) -> None:
    receiver = tmp_path / "rpc_me"
    for name in ("../secret", "/etc/passwd", f"body_other.{'0' * 32}", f"body_rpc_me.{'0' * 31}/", 17, None):
        text = json.dumps({"body_file": name}, separators=(",", ":"))
        with pytest.raises(frames.Garbage):
            fifo.unpack(frames.frame(text) or b"", receiver)
    body = tmp_path / f"body_rpc_me.{'0' * 32}"
    body.symlink_to("/etc/passwd")
    with pytest.raises(OSError):
        fifo.unpack(frames.frame(f'{{"body_file":"{body.name}"}}') or b"", receiver)


def test_frames_are_found_again_after_garbage() -> None:
    for seed in range(300):
        chance = random.Random(seed)
        proper, stream = [], b""
        for number in range(20):
            frame = frames.frame(json.dumps({"number": number, "text": "x" * chance.randrange(300)})) or b""
            garbage = chance.choice(
                [
                    b"",
                    os.urandom(chance.randrange(50)),
                    frame[: chance.randrange(len(frame))],
                    b"\0" * chance.randrange(9),
                ]
            )
            stream += garbage + frame
            proper.append(frame)
        stream_of, found = frames.Frames(), []
        while stream:
            size = chance.randrange(1, 400)
            found += stream_of.feed(stream[:size])
            stream = stream[size:]
        assert [frame for frame in found if frame in proper] == proper, seed


def test_a_million_frames_between_garbage() -> None:
    chance = random.Random(7)
    proper = frames.frame('{"number":1}') or b""
    kinds = [
        lambda: chance.randbytes(chance.randrange(1, 40)),
        lambda: b"\0" * chance.randrange(1, 9),
        lambda: proper[: chance.randrange(1, len(proper))],
        lambda: b"\0\0" + chance.randbytes(2) + b"{" + bytes(chance.choices(range(1, 256), k=5)),
        lambda: b'{"a":1}',
        lambda: b"",
    ]
    pool = [chance.choice(kinds)() for _ in range(50_000)]
    stream_of, found, wrong, rest = frames.Frames(), 0, 0, io.BytesIO()
    for _ in range(100):
        pieces = [piece + proper for piece in chance.choices(pool, k=10_000)]
        rest = io.BytesIO(b"".join(pieces))
        while data := rest.read(chance.randrange(1, 1 << 16)):
            for frame in stream_of.feed(data):
                found += frame == proper
                if frame != proper:
                    with contextlib.suppress(frames.Garbage):
                        fifo.unpack(frame, Path("/nowhere/rpc_x"))
                    wrong += 1
    assert found == 1_000_000
    assert wrong > 0 and stream_of.skipped > 1_000_000
