r"""Programs (HumanEval): the response's fenced Python, run against the tests that are the ground truth.

`paper_score` is the rule that arXiv 2509.25300 scored with, defects included; `score` is the repaired one. Both run
the program in `sandbox`, and refuse where there is none. The interpreter is the one that runs this, without its virtual
environment: only the standard library can be imported. A process gets 1 GiB; the paper's had 10.

What `score` does not stop: a program that knows the public tests and answers just them, wrong programs that the tests
do not tell from right ones, and, where there is no sandbox, a program that reads or changes the memory of the
tests' process, since nothing separates them there.

The ground truth is a JSON object whose "functional" is test code that ends in a call `check(name)`.
"""

import json
import os
import re
import secrets
import subprocess
import textwrap
import time
from pathlib import Path
from typing import Any

from rljax.rewards import calls, sandbox

SECONDS = 30.0
"""Wall-clock limit of one program with its tests, which an item may take beside its own."""

_PAPER_FENCE = re.compile(r"```\w*\n")
_OPEN_FENCE = re.compile(r"(?P<before>[^`]*+)(?P<ticks>`{3,}+)[ \t]*+(?P<language>[\w+.-]*+)[^`]*+")
_PYTHON = ("", "py", "python", "python3", "py3")
_CALLS = Path(calls.__file__).read_text(encoding="utf-8") + "\nmain(PAYLOAD)\n"

# Three problems give a function beside the one to write, and test the one by the other. A program could bring its own
# (`poly = lambda *_: 0`), so the tests use these.
_GIVEN = {
    "find_zero": "def poly(xs, x):\n    return sum(x_i * x**i for i, x_i in enumerate(xs))\n",
    "decode_cyclic": "def encode_cyclic(s):\n"
    "    threes = [s[i : i + 3] for i in range(0, len(s), 3)]\n"
    "    return ''.join(t[1:] + t[0] if len(t) == 3 else t for t in threes)\n",
    "decode_shift": "def encode_shift(s):\n"
    "    return ''.join(chr((ord(c) - ord('a') + 5) % 26 + ord('a')) for c in s)\n",
}


def score(response: str, ground_truth: str, extra_info: dict[str, Any]) -> float:
    """1 if the tests pass with the response's program; else 0.

    The program is every Python block behind the last `</think>`, in order, in one namespace, after the item's prefix.
    Blocks may be indented or have CRLF line ends; one that fails (an example of use) does not undo what others, or it,
    have defined. The tests run in a process of their own and call the program's functions through a pipe, as plain
    data (`calls`). After the last test, that process reports a random token on a pipe that the program's process does
    not have: leaving early, with whatever status, or changing `check`, the builtins or what equality means, leaves no
    token. No call of the program, no token either.

    Raises:
      ConfigError: there is no sandbox; see `sandbox.check`.
    """
    sandbox.check()
    tests = _functional(ground_truth)
    blocks = _blocks(response)
    if not blocks:
        return 0.0
    return float(_tests_pass([*_prefix(extra_info), *blocks], tests))


def paper_score(response: str, ground_truth: str, extra_info: dict[str, Any]) -> float:
    """1 if the program with the tests behind it ends with exit status 0 within 30 s, as in the paper's code; else 0.

    The program is every fenced block behind the first `</think>`: "```", a word or none, a line end, the content, and
    a line that begins with "```". The item's prefix stands in front, twice. Whatever ends with status 0 passes.

    Raises:
      ConfigError: there is no sandbox; see `sandbox.check`.
    """
    sandbox.check()
    tests = _functional(ground_truth)
    _, thought, answer = response.partition("</think>")
    code = "\n".join(_paper_blocks(answer.strip() if thought else response)).strip()
    if not code:
        return 0.0
    program = "\n".join([*_prefix(extra_info), *_prefix(extra_info), code, tests])
    result = sandbox.run(program, seconds=SECONDS)
    return float(result.exit_status == 0 and _is_text(result.output))


def _functional(ground_truth: str) -> str:
    """The tests. Raises ValueError when the ground truth has none, which no response can help."""
    truth = json.loads(ground_truth)
    if not isinstance(truth, dict) or not isinstance(truth.get("functional"), str):
        raise ValueError(
            f'the ground truth {ground_truth[:80]!r} must be a JSON object with test code under "functional"; '
            "the other kinds (pytest, inputs and outputs) cannot be scored"
        )
    return truth["functional"]


def _prefix(extra_info: dict[str, Any]) -> list[str]:
    prefix = extra_info.get("prefix")
    return [] if prefix is None else [str(prefix)]


def _is_text(output: bytes) -> bool:
    """The paper's code raised on output that is not UTF-8."""
    try:
        output.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _paper_blocks(text: str) -> list[str]:
    blocks, fence = [], _PAPER_FENCE.search(text)
    while fence:
        end = text.find("\n```", fence.end())
        if end < 0:
            break  # nor is there one for a later fence
        blocks.append(text[fence.end() : end])
        fence = _PAPER_FENCE.search(text, end + 4)
    return blocks


def _blocks(response: str) -> list[str]:
    """Contents of the Python blocks behind the last `</think>`; the last may lack its closing fence."""
    text = response.rpartition("</think>")[2].replace("\r\n", "\n").replace("\r", "\n")
    blocks: list[list[str]] = []
    closing, indent, wanted = "", 0, False
    for line in text.split("\n"):
        content = line.lstrip(" \t")
        if closing and content.startswith(closing) and len(line) - len(content) <= indent + 3:
            closing, line = "", content.lstrip("`")  # deeper down it is part of a docstring
            if line.strip().lower() in _PYTHON[1:]:
                line = f"```{line}"  # a fence that opens, where none closed this block
        if closing:
            if wanted:
                blocks[-1].append(line)
            continue
        fence = _OPEN_FENCE.fullmatch(line)
        if fence:
            closing = fence["ticks"]
            indent = len(fence["before"]) if not fence["before"].strip() else 0
            wanted = fence["language"].lower() in _PYTHON
            if wanted:
                blocks.append([])
    programs = [textwrap.dedent("\n".join(lines)) for lines in blocks]
    return [program for program in programs if program.strip()]


def _tests_pass(blocks: list[str], tests: str) -> bool:
    deadline = time.monotonic() + SECONDS
    checked = re.search(r"check\((\w+)\)\s*$", tests)
    token = secrets.token_hex(16)
    given = _GIVEN.get(checked[1], "") if checked else ""
    calls_read, calls_write = os.pipe()
    replies_read, replies_write = os.pipe()
    ends = [calls_read, calls_write, replies_read, replies_write]
    try:
        with (
            sandbox.process(_CALLS, {"blocks": blocks}, stdin=calls_read, stdout=replies_write),
            sandbox.process(
                _CALLS,
                {"tests": tests, "given": given, "token": token},
                stdin=replies_read,
                stdout=calls_write,
                stderr=subprocess.PIPE,
            ) as judge,
        ):
            while ends:
                os.close(ends.pop())  # ours, so that each side sees the other's end
            said = sandbox.read(judge, judge.stderr, deadline=deadline, at_most=len(token))
    finally:
        for end in ends:
            os.close(end)
    return secrets.compare_digest(said, token.encode("ascii"))
