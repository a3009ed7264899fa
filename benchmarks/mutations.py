"""Bytes made wrong: bit by bit, piece by piece, and in the values of the JSON that they hold."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

NUMBERS = (0, 1, -1, 2, 7, 64, 65, 255, 2**16, 2**31, 2**32 - 1, 2**53, 2**62, 2**63, 2**64, 10**30, 1.5, 1e308)
WORDS = ("", "F32", "F4", "BOOL", "C64", "../x", "/etc/passwd", "a\0b", "\ud800", "é", "__metadata__", "a/b", "none")
PIECES = (
    *(
        b'"',
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b":",
        b"\\u0061",
        b"\\ud800",
        b"NaN",
        b"-",
        b"\x00",
        b"\xff",
        b"\xef\xbb\xbf",
    ),
    *(
        b"[" * 2000,
        b'{"a":' * 2000,
        b"9" * 5000,
        b"PK\x03\x04",
        b"\x80\x02}",
        b"GGUF",
        b"<html>",
        b"1e999",
        b"Infinity",
    ),
)
LENGTHS = (0, 1, 7, 8, 10**8, 10**8 + 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1)


def mutate(text: bytes, others: list[bytes], draw: random.Random, *, framed: bool) -> bytes:
    """Return the bytes with one to four things wrong; `framed` bytes are a length, so much JSON, and data."""
    for _ in range(draw.choice((1, 1, 1, 2, 3, 4))):
        change = draw.choice(BYTES + (FRAMED if framed else JSON))
        text = change(text, others, draw)
    return text


def _flip(text: bytes, others: list[bytes], draw: random.Random) -> bytes:
    at = _place(text, draw)
    return text[:at] + bytes([text[at] ^ 1 << draw.randrange(8)]) + text[at + 1 :] if text else text


def _cut(text: bytes, others: list[bytes], draw: random.Random) -> bytes:
    return text[: _place(text, draw)]


def _drop(text: bytes, others: list[bytes], draw: random.Random) -> bytes:
    at = _place(text, draw)
    return text[:at] + text[at + draw.choice((1, 1, 2, 8, 40)) :]


def _double(text: bytes, others: list[bytes], draw: random.Random) -> bytes:
    at, count = _place(text, draw), draw.choice((1, 2, 8, 40, 200))
    return text[: at + count] + text[at:]


def _insert(text: bytes, others: list[bytes], draw: random.Random) -> bytes:
    at = _place(text, draw)
    return text[:at] + draw.choice(PIECES) + text[at + draw.choice((0, 0, 1, 4)) :]


def _splice(text: bytes, others: list[bytes], draw: random.Random) -> bytes:
    other = draw.choice(others)
    return text[: _place(text, draw)] + other[_place(other, draw) :]


def _number(text: bytes, others: list[bytes], draw: random.Random) -> bytes:
    digits = [i for i, byte in enumerate(text) if 0x30 <= byte <= 0x39]
    at = draw.choice(digits) if digits else 0
    return text[:at] + str(draw.choice(NUMBERS)).encode() + text[at + 1 :]


def _length(text: bytes, others: list[bytes], draw: random.Random) -> bytes:
    near = int.from_bytes(text[:8], "little") + draw.randrange(-9, 10)
    return (draw.choice((near, *LENGTHS)) % 2**64).to_bytes(8, "little") + text[8:]


def _place(text: bytes, draw: random.Random) -> int:
    # half of them near the beginning, where what decides stands
    return draw.randrange(min(len(text), 400 if draw.random() < 0.5 else len(text)) or 1)


def _value(text: bytes, others: list[bytes], draw: random.Random) -> bytes:
    """Change one value or key of the JSON, which stays JSON."""
    try:
        table = json.loads(text)
    except (ValueError, RecursionError):
        return _flip(text, others, draw)
    places: list[tuple[Any, Any]] = []
    _collect(table, places)
    if not places:
        return text
    node, key = draw.choice(places)
    old = node[key]
    new = draw.choice((draw.choice(NUMBERS), draw.choice(WORDS), None, True, [], {}, [old], {"a": old}, old))
    if type(old) is int and draw.random() < 0.5:
        new = old + draw.choice((-8, -1, 1, 8, 2**40))
    if isinstance(node, dict) and draw.random() < 0.4:
        node[draw.choice((draw.choice(WORDS), f"{key}x", str(key).upper()))] = node.pop(key)
    elif isinstance(node, list) and draw.random() < 0.3:
        node.insert(draw.randrange(len(node) + 1), old)
    elif draw.random() < 0.2:
        del node[key]
    else:
        node[key] = new
    return json.dumps(table, ensure_ascii=draw.random() < 0.5).encode("utf-8", "surrogatepass")


def _collect(node: Any, places: list[tuple[Any, Any]]) -> None:
    keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else []
    for key in keys:
        places.append((node, key))
        _collect(node[key], places)


def _header(text: bytes, others: list[bytes], draw: random.Random) -> bytes:
    """Change the JSON of a header and give it its new length, so that only its meaning is wrong."""
    length = int.from_bytes(text[:8], "little")
    change = draw.choice((_value, _value, _number, _insert, _flip))
    head = change(text[8 : 8 + length], [other[8:] for other in others], draw)
    return len(head).to_bytes(8, "little") + head + text[8 + length :]


Change = Callable[[bytes, list[bytes], random.Random], bytes]
BYTES: tuple[Change, ...] = (_flip, _cut, _drop, _double, _insert, _splice, _number)
JSON: tuple[Change, ...] = (_value,) * 7
FRAMED: tuple[Change, ...] = (_length, *(_header,) * 8)
