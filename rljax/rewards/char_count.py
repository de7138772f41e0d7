"""Answers of the procedural tasks: an integer after the last "=" of the completion."""

import re
from typing import Any

_INTEGER = re.compile(r"-?[0-9]{1,100}")


def score(response: str, ground_truth: str, extra_info: dict[str, Any]) -> float:
    """1 if what follows the last "=" is the ground truth's integer and, whitespace aside, nothing else; else 0.

    Example: "a0b1c1b2=2" answers 2. A completion without "=" has not answered.
    """
    _, equals, answer = response.rpartition("=")
    answer = answer.strip()
    return float(bool(equals) and bool(_INTEGER.fullmatch(answer)) and int(answer) == int(ground_truth))
