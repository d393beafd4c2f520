"""Frames, without any process or pipe."""

from __future__ import annotations

import contextlib
import datetime
import io
import json
import os
import random
import uuid
from pathlib import Path

import pytest

import bodies
import frames


def test_large_body_must_be_for_this_pipe(tmp_path: Path) -> None:
    receiver = tmp_path / "rpc_me"
    for name in ("../secret", "/etc/passwd", f"body_other.{'0' * 32}", f"body_rpc_me.{'0' * 31}/", 17, None):
        text = json.dumps({"body_file": name}, separators=(",", ":"))
        with pytest.raises(frames.Garbage):
            bodies.unpack(frames.frame(text) or b"", receiver)
    body = tmp_path / f"body_rpc_me.{'0' * 32}"
    body.symlink_to("/etc/passwd")
    with pytest.raises(frames.Garbage):
        bodies.unpack(frames.frame(f'{{"body_file":"{body.name}"}}') or b"", receiver)


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
                        bodies.unpack(frame, Path("/nowhere/rpc_x"))
                    wrong += 1
    assert found == 1_000_000
    assert wrong > 0 and stream_of.skipped > 1_000_000


ODD = [
    uuid.UUID(int=7),
    datetime.datetime(2026, 2, 28, 12, 30, 1, 5),
    datetime.datetime(2026, 2, 28, tzinfo=datetime.timezone(datetime.timedelta(hours=-3))),
    datetime.date(2026, 2, 28),
    b"\x00\xff",
    b"",
    3 - 4j,
    {1, "a", (1, (2, b"x"))},
    frozenset({frozenset({1}), uuid.UUID(int=8)}),
    {"!": "uuid", "value": "not one"},
    {"!": {"!": {1}}},
    {"!": "object", "value": {"!": "object", "value": 1}},
]


def there_and_back(value: object, codec: frames.Codec | None = None) -> object:
    codec = codec or frames.Codec()
    return codec.decode(frames.parse(codec.encode({"body": value}).encode()), "body")


@pytest.mark.parametrize("value", ODD, ids=str)
def test_what_goes_beyond_json_arrives_as_what_it_was(value: object) -> None:
    for form in (value, [value], {"key": [{"deeper": value}]}):
        arrived = there_and_back(form)
        assert arrived == form and type(arrived) is type(form)


def test_tuples_arrive_as_lists() -> None:
    assert there_and_back((1, (2,), {"a": (3,)})) == [1, [2], {"a": [3]}]
    assert there_and_back((1, {2})) == [1, {2}]


def test_plain_message_is_plain_json() -> None:
    body = {"!": "uuid", "value": "x", "dressed": True}
    message = {"body": body, "sender": None}
    assert json.loads(frames.Codec().encode(message)) == message
    assert there_and_back(body) == body


def test_random_values_arrive_as_what_they_were() -> None:
    chance = random.Random(7)

    def value(depth: int) -> object:
        kind = chance.randrange(6 if depth else 3)
        if kind < 2:
            return chance.choice([None, True, 1, 1.5, "text", "!"])
        if kind == 2:
            return chance.choice(ODD)
        if kind == 3:
            return {chance.choice(["!", "value", "dressed", "a"]): value(depth - 1) for _ in range(3)}
        return [value(depth - 1) for _ in range(chance.randrange(4))]

    for _ in range(5000):
        sent = value(4)
        assert there_and_back(sent) == sent


@pytest.mark.parametrize(
    "value",
    [
        {"!": "uuid", "value": "x"},
        {"!": "datetime", "value": 1},
        {"!": "os.system", "value": "ls"},
        {"!": ["uuid"], "value": 1},
        {"!": "set", "value": [[1]]},
        {"!": "complex"},
        {"!": "object", "value": 1},
    ],
)
def test_value_that_is_not_what_its_mark_says_is_refused(value: object) -> None:
    with pytest.raises(ValueError):
        frames.Codec().decode({"body": value, "dressed": True}, "body")


@pytest.mark.parametrize("value", [object(), {1: object()}, [1, {object()}], float, {(1, 2): 3}])
def test_what_nobody_can_express_is_refused(value: object) -> None:
    with pytest.raises(TypeError):
        frames.Codec().encode({"body": value})


def test_encoder_and_decoder_replace_what_the_codec_knows() -> None:
    codec = frames.Codec(lambda value: {"as": str(value)}, lambda mapping: mapping.get("as", mapping))
    assert there_and_back([uuid.UUID(int=7), {"b": {1}}], codec) == [str(uuid.UUID(int=7)), {"b": "{1}"}]
