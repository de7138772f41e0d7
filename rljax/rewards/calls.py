"""A program and its tests in two processes: the tests call the program's functions through a pipe.

This file, with a call of `main` behind it, is what runs in both, in a sandbox each: it imports the standard library
only. One JSON line per call goes from the tests to the program, one comes back. Values cross as plain data, rebuilt on
the other side, so that no object of the program's, with its own idea of equality, is ever in the tests' process.

  tests -> program   {"name": "add", "arguments": [...], "keywords": {...}}
  program -> tests   {"value": ...} or {"raised": "ValueError", "message": "..."}
"""

import ast
import builtins
import collections.abc
import decimal
import fractions
import itertools
import json
import os
import sys
import types
from collections.abc import Callable, Iterable
from typing import IO, Any

MAX_MESSAGE_BYTES = 16 << 20
_MAX_ITEMS = 1_000_000
_PLAIN_INT = 1 << 62


def encode(value: Any) -> Any:
    """JSON for a value: plain ones as they are, all else as [kind, content].

    What is a subclass becomes its base, an iterator the list of what it yields. Raises TypeError for other objects.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        value = int(value)
        return value if abs(value) < _PLAIN_INT else ["int", hex(value)]
    if isinstance(value, float):
        return float(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, dict):
        return ["dict", [[encode(k), encode(v)] for k, v in dict.items(value)]]
    if isinstance(value, collections.abc.Iterator):
        items = list(itertools.islice(value, _MAX_ITEMS + 1))
        if len(items) > _MAX_ITEMS:
            raise TypeError(f"an iterator of more than {_MAX_ITEMS} items")
        return ["iterator", [encode(item) for item in items]]
    for kind, base in _SEQUENCES.items():
        if isinstance(value, base):
            return [kind, [encode(item) for item in value]]
    for kind, (base, take_apart, _) in _OTHERS.items():
        if isinstance(value, base):
            return [kind, take_apart(value)]
    raise TypeError(f"a value of type {type(value).__name__} is not plain data")


def decode(data: Any) -> Any:
    """The value that `encode` wrote. Raises ValueError or TypeError for what it cannot have written."""
    if not isinstance(data, list):
        return data
    kind, content = data
    if kind == "int":
        return int(content, 16)
    if kind == "dict":
        return {decode(k): decode(v) for k, v in content}
    if kind == "iterator":
        return iter([decode(item) for item in content])
    if kind in _SEQUENCES:
        return _SEQUENCES[kind](decode(item) for item in content)
    if kind in _OTHERS:
        return _OTHERS[kind][2](content)
    raise ValueError(f"{kind!r} is no kind of value")


_SEQUENCES: dict[str, type[Any]] = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}

_OTHERS: dict[str, tuple[type, Callable[[Any], Any], Callable[[Any], Any]]] = {
    "bytes": (bytes, bytes.hex, bytes.fromhex),
    "bytearray": (bytearray, bytearray.hex, bytearray.fromhex),
    "complex": (complex, lambda z: [z.real, z.imag], lambda parts: complex(*parts)),
    "range": (range, lambda r: [r.start, r.stop, r.step], lambda parts: range(*parts)),
    "fraction": (fractions.Fraction, lambda q: [q.numerator, q.denominator], lambda parts: fractions.Fraction(*parts)),
    "decimal": (decimal.Decimal, str, decimal.Decimal),
}


def serve(blocks: list[str], requests: Iterable[bytes], replies: IO[bytes]) -> None:
    """Runs the program's blocks in one namespace, then answers calls. A block that fails keeps what it has defined."""
    module = types.ModuleType("program")  # not "__main__": what a block does only as a script, it need not do here
    sys.modules["program"] = module
    for block in blocks:
        try:
            exec(compile(block, "<program>", "exec"), module.__dict__)
        except BaseException:  # an example that fails, or leaves; the functions are what is tested
            continue
    for line in requests:
        request = json.loads(line)
        try:
            arguments = [decode(argument) for argument in request["arguments"]]
            keywords = {name: decode(value) for name, value in request["keywords"].items()}
            if request["name"] not in module.__dict__:
                raise NameError(f"the program defines no {request['name']}")
            reply = {"value": encode(module.__dict__[request["name"]](*arguments, **keywords))}
        except BaseException as error:  # SystemExit too: the tests see it as an error
            reply = {"raised": type(error).__name__, "message": str(error)[:500]}
        replies.write(json.dumps(reply).encode("ascii") + b"\n")
        replies.flush()


def run_tests(tests: str, given: str, replies: IO[bytes], requests: IO[bytes]) -> None:
    """Runs the tests; returns if they passed and called the program at least once.

    A name that neither the tests nor `given` (functions that the problem gives) defines is the program's function of
    that name. Raises what the tests raise.
    """
    calls = itertools.count()
    namespace: dict[str, Any] = {"__name__": "tests"}
    exec(compile(given, "<given>", "exec"), namespace)
    for node in ast.walk(ast.parse(tests)):
        if isinstance(node, ast.Name) and node.id not in namespace and not hasattr(builtins, node.id):
            namespace[node.id] = _remote(node.id, replies, requests, calls)
    exec(compile(tests, "<tests>", "exec"), namespace)
    assert next(calls) > 0, "the tests did not call the program"


def _remote(name: str, replies: IO[bytes], requests: IO[bytes], calls: "itertools.count[int]") -> Callable[..., Any]:
    def call(*arguments: Any, **keywords: Any) -> Any:
        next(calls)
        request = {
            "name": name,
            "arguments": [encode(argument) for argument in arguments],
            "keywords": {key: encode(value) for key, value in keywords.items()},
        }
        requests.write(json.dumps(request).encode("ascii") + b"\n")
        requests.flush()
        line = replies.readline(MAX_MESSAGE_BYTES)
        if not line.endswith(b"\n"):
            raise RuntimeError("the program ended, or its reply is too long")
        reply = json.loads(line)
        if "raised" in reply:
            kind = getattr(builtins, str(reply["raised"]), None)
            if isinstance(kind, type) and issubclass(kind, Exception):
                raise kind(reply["message"])
            raise RuntimeError(reply["message"])
        return decode(reply["value"])

    call.__name__ = name
    return call


def main(payload: dict[str, Any]) -> None:
    """The program's part or the tests', on standard input and output; the tests then write the token to standard error.

    What either prints goes nowhere: the well-known streams are /dev/null before its first line runs.
    """
    with (
        os.fdopen(os.dup(0), "rb") as received,
        os.fdopen(os.dup(1), "wb") as sent,
        os.fdopen(os.dup(2), "wb") as verdict,
    ):
        null = os.open(os.devnull, os.O_RDWR)
        for standard in (0, 1, 2):
            os.dup2(null, standard)
        os.close(null)
        if "blocks" in payload:
            verdict.close()
            serve(payload["blocks"], received, sent)
        else:
            run_tests(payload["tests"], payload["given"], received, sent)
            verdict.write(payload["token"].encode("ascii"))
