r"""The AIME and AMC reward of arXiv 2509.25300: the box near the end as a string, else Math-Verify on the end.

From `verl/utils/reward_score/math_dapo.py` of the paper's repository. Nothing but the last 300 characters counts, so an
answer that is followed by a longer remark, or a longer box, is lost; the repaired rule is `math.score`.
"""

import re
from typing import Any

from rljax.rewards.whole_text import agrees

_TAIL_CHARS = 300
_BOX_CHARS = 100


def paper_score(response: str, ground_truth: str, extra_info: dict[str, Any]) -> float:
    """1 if the box in the last 100 characters holds the ground truth's very text, or Math-Verify agrees; else 0.

    Raises:
      Undecidable: Math-Verify would take longer than the original waits.
    """
    tail = response[-_TAIL_CHARS:]
    return float(last_box(tail[-_BOX_CHARS:]) == ground_truth or agrees(tail, ground_truth))


def last_box(text: str) -> str | None:
    r"""What the last `\boxed{` holds, unstripped; None if its braces, escaped ones included, do not balance.

    Unlike `answers.last_boxed` it does not go back to an earlier box.
    """
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth = 0
    for brace in re.compile("[{}]").finditer(text, start):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return text[start + len("\\boxed{") : brace.start()]
    return None
