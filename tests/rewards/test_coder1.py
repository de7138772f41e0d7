"""The program verifier on responses judged by hand, in both modes, and on ones that want the reward for nothing."""

import json
import os
import time

import pytest

from rljax.config import ConfigError
from rljax.rewards import coder1, sandbox
from rljax.rewards.coder1 import paper_score, score
from rljax.rewards.pool import RewardItem, RewardPool

TESTS = """

def check(candidate):
    assert candidate(1, 2) == 3
    assert candidate(5, 7) == 12


check(add)"""
TRUTH = json.dumps({"functional": TESTS})
RIGHT = "def add(a, b):\n    return a + b"
WRONG = "def add(a, b):\n    return a - b"


@pytest.fixture(autouse=True)
def bwrap():
    sandbox._probe.cache_clear()
    if sandbox.problem():
        pytest.skip(f"needs a sandbox: {sandbox.problem()}")


def fenced(code, language="python"):
    return f"```{language}\n{code}\n```"


ANSWERS = {  # name -> response, score, paper_score
    "right": (fenced(RIGHT), 1, 1),
    "wrong": (fenced(WRONG), 0, 0),
    "no language": (fenced(RIGHT, ""), 1, 1),
    "another language": (fenced(RIGHT, "text"), 0, 1),
    "text around": (f"So:\n{fenced(RIGHT)}\nDone.", 1, 1),
    "text before the fence": (f"So: {fenced(RIGHT)}", 1, 1),
    "text behind the fence": (f"{fenced(RIGHT)}Done.", 1, 1),
    "no fence": (RIGHT, 0, 0),
    "empty": ("", 0, 0),
    "empty block": ("```python\n\n```", 0, 0),
    "unclosed": (f"```python\n{RIGHT}", 1, 0),
    "inline": (f"```{RIGHT}```", 0, 0),
    "trailing space": (f"```python \n{RIGHT}\n```", 1, 0),
    "attributes": (f"```python title=x\n{RIGHT}\n```", 1, 0),
    "CRLF": (fenced(RIGHT).replace("\n", "\r\n"), 1, 0),
    "indented": ("1. so\n" + "\n".join(f"   {line}" for line in fenced(RIGHT).split("\n")), 1, 0),
    "indented closing": (f"```python\n{RIGHT}\n  ```", 1, 0),
    "four ticks": (f"````python\n{RIGHT}\n````", 1, 1),
    "capital": (fenced(RIGHT, "Python"), 1, 1),
    "no closing before the next": (f"```python\nimport math\n```python\n{RIGHT}\n```", 1, 0),
    "fence in a docstring": (
        fenced('def add(a, b):\n    """\n    ```\n    x\n    ```\n    """\n    return a + b'),
        1,
        1,
    ),
    "behind thought": (f"{fenced(WRONG)}</think>{fenced(RIGHT)}", 1, 1),
    "only in thought": (f"{fenced(RIGHT)}</think>none", 0, 0),
    "last thought": (f"</think>{fenced(RIGHT)}</think>{fenced(WRONG)}", 0, 0),
    "two blocks": (f"{fenced('def one(): return 1')}\n{fenced('def add(a, b): return a + b * one()')}", 1, 1),
    "corrected": (f"{fenced(WRONG)} no: {fenced(RIGHT)}", 1, 1),
    "failing example": (f"{fenced(RIGHT)}\n{fenced('assert add(1, 1) == 3')}", 1, 0),
    "failing example in the block": (fenced(f"{RIGHT}\nassert add(1, 1) == 3"), 1, 0),
    "shell example": (f"{fenced(RIGHT)}\n{fenced('python add.py', 'bash')}", 1, 0),
    "prompt example": (f"{fenced(RIGHT)}\n{fenced('>>> add(1, 2)', '')}", 1, 0),
    "main": (fenced(f"{RIGHT}\nif __name__ == '__main__':\n    print(add(int(input()), 1))"), 1, 0),
    "prints": (fenced(f"{RIGHT}\nprint('x' * 1000)"), 1, 1),
    "not UTF-8": (fenced(f"{RIGHT}\nimport os; os.write(1, bytes([255]))"), 1, 0),
    "syntax error": (fenced("def add(a, b:"), 0, 0),
    "missing import": (fenced("def add(a, b): return math.floor(a + b)"), 0, 0),
    "missing import of ours": (fenced("def add(a, b): return json.loads(str(a + b))"), 0, 0),
    "dataclass": (fenced(f"from dataclasses import dataclass\n@dataclass\nclass P:\n    x: 'int'\n{RIGHT}"), 1, 1),
    "raises": (fenced("def add(a, b): raise ValueError"), 0, 0),
    "another name": (fenced("def plus(a, b): return a + b"), 0, 0),
    "no function": (fenced("add = 3"), 0, 0),
    "a lambda": (fenced("add = lambda a, b: a + b"), 1, 1),
    "NUL": (fenced(f"{RIGHT}\0"), 0, 0),
    "surrogate": (fenced(f"{RIGHT}\n'\ud800'"), 0, 0),
    "large": (fenced(f"{RIGHT}\n#{'x' * 1_000_000}"), 1, 1),
    "megabyte of prose": ("x" * 1_000_000, 0, 0),
    "fences": ("x```\n" * 100_000, 0, 0),
    "ticks": ("`" * 1_000_000, 0, 0),
    "long language": ("```" + "a" * 500_000 + "`", 0, 0),
}


@pytest.mark.parametrize("response, fixed, paper", ANSWERS.values(), ids=ANSWERS)
def test_both_modes(response, fixed, paper):
    start = time.monotonic()
    assert score(response, TRUTH, {"prefix": ""}) == fixed
    assert paper_score(response, TRUTH, {"prefix": ""}) == paper
    assert time.monotonic() - start < 20


EQUAL = "class Same:\n    def __eq__(self, other): return True\n    def __ne__(self, other): return False\n"

ZERO = "def add(a, b): return 0\n"
FOREVER = "def add(a, b):\n    while True: pass\n"

TOKEN_IN_FRAMES = """
import os, sys
def add(a, b):
    frame = sys._getframe()
    while frame:
        for value in [*frame.f_locals.values(), *frame.f_globals.values()]:
            if isinstance(value, dict) and 'token' in value:
                [os.write(n, value['token'].encode()) for n in range(9)]
        frame = frame.f_back
    return 0
"""

FORGED_REPLIES = """
import os
def add(a, b):
    for n in range(3, 64):
        try: os.write(n, b'{"value": 4}\\n{"value": true}\\n{"value": ["list", []]}\\n')
        except OSError: pass
    return 0
"""

OTHER_PROCESSES = """
import os
def add(a, b):
    for process in os.listdir('/proc'):
        for n in range(9):
            try: open(f'/proc/{process}/fd/{n}', 'wb').write(b'0' * 32)
            except Exception: pass
    return 0
"""

CHEATS = {  # what a program may try; paper_score for it
    "sys.exit": ("import sys; sys.exit(0)", 1),
    "os._exit": ("import os; os._exit(0)", 1),
    "SystemExit": ("raise SystemExit", 1),
    "atexit": ("import atexit, os; atexit.register(os._exit, 0)", 1),
    "excepthook": ("import sys, os; sys.excepthook = lambda *_: os._exit(0)", 1),
    "exit in finally": ("def add(a, b):\n    try: return 0\n    finally: raise SystemExit", 1),
    "_exit in the call": ("import os\ndef add(a, b): os._exit(0)", 1),
    "equal to all": (f"{EQUAL}\ndef add(a, b): return Same()", 1),
    "equal string": (f"{EQUAL}\nclass S(Same, str): pass\ndef add(a, b): return S('x')", 1),
    "equal integer": (f"{EQUAL}\nclass I(Same, int): pass\ndef add(a, b): return I(0)", 1),
    "builtins": (f"import builtins\nbuiltins.AssertionError = SystemExit\n{ZERO}", 0),
    "exec": (f"import builtins\nbuiltins.exec = builtins.compile = lambda *_: None\n{ZERO}", 0),
    "check": (f"import builtins\nbuiltins.check = lambda f: None\ndef check(f): pass\n{ZERO}", 0),
    "trace": (f"import sys, os\nsys.settrace(lambda f, *_: f.f_code.co_name == 'check' and os._exit(0))\n{ZERO}", 1),
    "signal": (
        f"import os, signal\nsignal.signal(14, lambda *_: os._exit(0)); signal.setitimer(0, 0.1)\n{FOREVER}",
        1,
    ),
    "thread": (f"import os, threading\nthreading.Timer(0.2, os._exit, [0]).start()\n{FOREVER}", 1),
    "fork": (f"import os\nif os.fork(): os._exit(0)\n{ZERO}", 1),
    "payload": (f"import __main__, sys\nprint(getattr(__main__, 'PAYLOAD', 0), file=sys.stderr)\n{ZERO}", 0),
    "frames": (TOKEN_IN_FRAMES, 0),
    "forged replies": (FORGED_REPLIES, 0),
    "other processes": (OTHER_PROCESSES, 0),
    "kill": (f"import os\nfor n in range(2, 99):\n    try: os.kill(n, 9)\n    except OSError: pass\n{ZERO}", 0),
}


@pytest.mark.parametrize("program, paper", CHEATS.values(), ids=CHEATS)
def test_cheats(program, paper):
    assert score(fenced(program), TRUTH, {}) == 0.0
    assert paper_score(fenced(program), TRUTH, {}) == paper
    assert score(fenced(RIGHT), TRUTH, {}) == 1.0


HARM = {
    "fork bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "sleep": "import time; time.sleep(600)",
    "sleep in the call": "import time\ndef add(a, b): time.sleep(600)",
    "memory": "x = bytearray(4 << 30)\ndef add(a, b): return 0",
    "write": "open('{outside}', 'w').write('x')\ndef add(a, b): return 0",
    "network": "import socket; socket.create_connection(('1.1.1.1', 80))\ndef add(a, b): return 0",
    "project": "import os\nassert not os.path.exists('{project}')\nimport rljax\ndef add(a, b): return 0",
    "flood": "while True: print('x' * 10000)",
    "flood in the call": "def add(a, b): return 'x' * (20 << 20)",
    "flood of replies": "import os\ndef add(a, b):\n    while True: [os.write(n, b'x' * 9999) for n in (3, 4, 5)]",
    "daemon": "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(63.125)\ndef add(a, b): return 0",
    "kill all": "import os; os.kill(-1, 9)\ndef add(a, b): return 0",
    "deep": "def add(a, b):\n    x = []\n    for _ in range(100000): x = [x]\n    return x",
    "endless": "def add(a, b):\n    while True: yield 1",
}


@pytest.mark.parametrize("program", HARM.values(), ids=HARM)
def test_harm(program, tmp_path, monkeypatch):
    monkeypatch.setattr(coder1, "SECONDS", 3.0)
    outside = tmp_path / "written"
    program = program.replace("{outside}", str(outside)).replace("{project}", os.path.dirname(coder1.__file__))
    for mode in (score, paper_score):
        start = time.monotonic()
        assert mode(fenced(program), TRUTH, {}) == 0.0
        assert time.monotonic() - start < 6
    assert not outside.exists()
    monkeypatch.setattr(coder1, "SECONDS", 30.0)
    assert score(fenced(RIGHT), TRUTH, {}) == paper_score(fenced(RIGHT), TRUTH, {}) == 1.0


def test_prefix():
    base = fenced("def add(a, b): return floor(a + b)")
    for mode in (score, paper_score):
        assert mode(base, TRUTH, {"prefix": "from math import floor"}) == 1.0
        assert mode(base, TRUTH, {"prefix": None}) == 0.0
    counted = "import sys\nsys.times = getattr(sys, 'times', 0) + 1"
    answer = fenced("import sys\ndef add(a, b): return a + b if sys.times == 2 else 0")
    assert paper_score(answer, TRUTH, {"prefix": counted}) == 1.0
    assert score(answer, TRUTH, {"prefix": counted}) == 0.0


def test_given_functions():
    """The tests use the problem's own helper, not the one that the response brings."""
    tests = "def check(candidate):\n    assert abs(poly([6, -5, 1], candidate([6, -5, 1]))) < 1e-4\n\ncheck(find_zero)"
    truth = json.dumps({"functional": tests})
    forged = fenced("def poly(xs, x): return 0\ndef find_zero(xs): return 0")
    assert (score(forged, truth, {}), paper_score(forged, truth, {})) == (0.0, 1.0)
    assert score(fenced("def find_zero(xs): return 2.0"), truth, {}) == 1.0
    for entry, own in (("decode_cyclic", "encode_cyclic"), ("decode_shift", "encode_shift")):
        tests = f"def check(candidate):\n    assert candidate({own}('abcdz')) == 'abcdz'\ncheck({entry})"
        truth = json.dumps({"functional": tests})
        assert score(fenced(f"def {own}(s): return s\ndef {entry}(s): return s"), truth, {}) == 0.0
    right = "def decode_shift(s): return ''.join(chr((ord(c) - 5 - 97) % 26 + 97) for c in s)"
    assert score(fenced(right), truth, {}) == 1.0


def test_tests_must_call():
    for tests in ("x = 1", "check = print\ncheck(add)"):
        assert score(fenced(RIGHT), json.dumps({"functional": tests}), {}) == 0.0


@pytest.mark.parametrize("mode", [score, paper_score])
@pytest.mark.parametrize("truth", ["[]", "x", '{"functional": 1}', '{"inputs": [], "outputs": []}'])
def test_bad_ground_truth(mode, truth):
    with pytest.raises(ValueError):
        mode(fenced(RIGHT), truth, {})


@pytest.mark.parametrize("mode", [score, paper_score])
@pytest.mark.parametrize("response", [fenced(RIGHT), ""])
def test_refuses_without_a_sandbox(mode, response, monkeypatch):
    monkeypatch.setattr(sandbox, "problem", lambda: "none")
    with pytest.raises(ConfigError, match="no sandbox for them: none"):
        mode(response, TRUTH, {})


def test_a_side_that_does_not_start(monkeypatch):
    def process(*_, **__):
        raise OSError("no more processes")

    monkeypatch.setattr(sandbox, "process", process)
    with pytest.raises(OSError, match="no more processes"):
        score(fenced(RIGHT), TRUTH, {})


def test_an_item_has_the_seconds_of_a_program_beside_its_own(monkeypatch):
    monkeypatch.setattr(coder1, "SECONDS", 2.0)  # here, where the limit is kept; the worker has its thirty
    hang = RewardItem("coder1/fixed", fenced("while True: pass"), TRUTH)
    with RewardPool(1, 0.5) as pool:
        (verdict,) = pool.score([hang])
    assert (verdict.status, verdict.message) == ("timeout", "stopped after 2.5 s")


def test_data(shared_data):
    """Every item's tests run; an answer by the wrong name fails them, and a right one to the first passes."""
    parquet = pytest.importorskip("pyarrow.parquet")
    file = shared_data / "guru_math" / "online_eval" / "codegen__humaneval_164.parquet"
    if not file.exists():
        pytest.skip(f"needs {file}")
    rows = parquet.read_table(file).to_pylist()
    program = "def has_close_elements(n, t): return any(abs(a - b) < t for i, a in enumerate(n) for b in n[:i])"
    first = rows[0]["reward_model"]["ground_truth"]
    for mode in (score, paper_score):
        assert mode(fenced(program), first, rows[0]["extra_info"]) == 1.0
        for row in rows[1::20]:
            assert mode(fenced(program), row["reward_model"]["ground_truth"], row["extra_info"]) == 0.0
