"""Values and calls between a program and its tests, without the processes."""

import collections
import decimal
import fractions
import io
import json
import os
import threading

import pytest

from rljax.rewards import calls


@pytest.mark.parametrize(
    "value",
    [
        *(None, True, False, 0, -7, 2**62, -(10**5000), 0.5, float("inf"), 1 + 2j),
        *("", "a\ud800\0", b"\0a", bytearray(b"b"), range(1, 9, 2)),
        *([], [1, [2]], (1, (2,)), {1, 2}, set(), frozenset({1}), {}, {"a": {1: 2}, (1, 2): None}),
        *(fractions.Fraction(1, 3), decimal.Decimal("1.50")),
    ],
    ids=lambda value: type(value).__name__,
)
def test_round_trip(value):
    back = calls.decode(json.loads(json.dumps(calls.encode(value))))
    assert back == value
    assert type(back) is type(value)


class Text(str):
    def __eq__(self, other):
        return True

    __hash__ = str.__hash__


class Whole(int):
    def __eq__(self, other):
        return True

    __hash__ = int.__hash__


class Part(float):
    def __eq__(self, other):
        return True

    __hash__ = float.__hash__


class Mapping(dict):
    def __eq__(self, other):
        return True


Pair = collections.namedtuple("Pair", "a b")


@pytest.mark.parametrize(
    "value, plain",
    [
        (Text("a"), "a"),
        (Whole(1), 1),
        (Part(1.5), 1.5),
        (Mapping(a=1), {"a": 1}),
        (Pair(1, 2), (1, 2)),
        (collections.Counter("aa"), {"a": 2}),
    ],
)
def test_subclasses_become_their_base(value, plain):
    back = calls.decode(json.loads(json.dumps(calls.encode(value))))
    assert back == plain
    assert type(back) is type(plain)


def test_iterators():
    assert list(calls.decode(calls.encode(x for x in (1, 2)))) == [1, 2]
    endless = iter(int, 1)
    with pytest.raises(TypeError, match="1000000 items"):
        calls.encode(endless)


@pytest.mark.parametrize("value", [object(), lambda: 1, type, [object()], collections.deque()])
def test_objects_do_not_cross(value):
    with pytest.raises(TypeError, match="not plain data"):
        calls.encode(value)


@pytest.mark.parametrize("data", [["what", 1], ["dict", [[["list", []], 1]]], ["int", "x"], ["list"], []])
def test_forged_data(data):
    with pytest.raises((ValueError, TypeError)):
        calls.decode(data)


def served(blocks, *requests):
    replies = io.BytesIO()
    lines = [json.dumps({"name": name, "arguments": a, "keywords": k}).encode() for name, a, k in requests]
    calls.serve(blocks, lines, replies)
    return [json.loads(line) for line in replies.getvalue().splitlines()]


def test_serve():
    blocks = ["def f(x, y=1): return x + y\n1 / 0", "syntax error", "def g(): raise SystemExit(0)", "raise SystemExit"]
    assert served(blocks, ("f", [1], {}), ("f", [1], {"y": 5}), ("f", ["a"], {}), ("g", [], {}), ("h", [], {})) == [
        {"value": 2},
        {"value": 6},
        {"raised": "TypeError", "message": 'can only concatenate str (not "int") to str'},
        {"raised": "SystemExit", "message": "0"},
        {"raised": "NameError", "message": "the program defines no h"},
    ]


def judged(tests, *replies, given=""):
    lines = b"".join(reply if isinstance(reply, bytes) else json.dumps(reply).encode() + b"\n" for reply in replies)
    requests = io.BytesIO()
    calls.run_tests(tests, given, io.BytesIO(lines), requests)
    return [json.loads(line) for line in requests.getvalue().splitlines()]


def test_run_tests():
    tests = "def check(f):\n    assert f([1], b=2) == 3\n    assert other() == helper(1)\ncheck(add)"
    assert judged(tests, {"value": 3}, {"value": 2}, given="def helper(x): return x + 1") == [
        {"name": "add", "arguments": [["list", [1]]], "keywords": {"b": 2}},
        {"name": "other", "arguments": [], "keywords": {}},
    ]


@pytest.mark.parametrize(
    "tests, reply, error",
    [
        ("assert add(1) == 3", {"value": 4}, AssertionError),
        ("add(1)", {"raised": "KeyError", "message": "x"}, KeyError),
        ("add(1)", {"raised": "SystemExit", "message": "0"}, RuntimeError),
        ("add(1)", {"raised": "print", "message": "0"}, RuntimeError),
        ("add(1)", {"raised": "nothing", "message": "0"}, RuntimeError),
        ("add(1)", b"", RuntimeError),
        ("add(1)", b'{"value": 1}', RuntimeError),
        ("add(1)", b"x\n", ValueError),
        ("add(1)", b"{}\n", KeyError),
        ("add(1)", b"[]\n", TypeError),
        ("pass", {"value": 4}, AssertionError),
        ("add", {"value": 4}, AssertionError),
    ],
)
def test_failing_tests(tests, reply, error):
    with pytest.raises(error):
        judged(tests, reply)


def test_main(monkeypatch):
    """Both parts in one process: each is given the streams that it would find."""
    requests, replies, verdict = os.pipe(), os.pipe(), os.pipe()
    unused = os.open(os.devnull, os.O_RDWR)
    streams, real_dup = {}, os.dup
    monkeypatch.setattr(calls.os, "dup", lambda number: real_dup(streams[threading.get_ident()][number]))
    monkeypatch.setattr(calls.os, "dup2", lambda *_: None)

    def part(payload, *its_streams):
        streams[threading.get_ident()] = its_streams
        calls.main(payload)

    tests = {"tests": "assert add(1, 2) == 3", "given": "", "token": "t0"}
    program = {"blocks": ["def add(a, b): return a + b"]}
    serving = threading.Thread(target=part, args=(program, requests[0], replies[1], unused))
    testing = threading.Thread(target=part, args=(tests, replies[0], requests[1], verdict[1]))
    serving.start()
    testing.start()
    testing.join(20)
    assert os.read(verdict[0], 10) == b"t0"
    os.close(requests[1])
    serving.join(20)
    assert not serving.is_alive()
    for number in (requests[0], *replies, *verdict, unused):
        os.close(number)
