"""A worker's side of the line between a benchmark and a peer: JSON objects, one a line, in on stdin and out on stdout.

Standard library only, for every peer runs in an environment of its own. A request is `{"do": name, ...arguments}`, a
reply `{...}` or `{"error": text}`. Whatever a library prints goes to stderr.

The operations of a sampler:

  load    folder, dtype                          -> versions, device, variants
  greedy  prompts, new_tokens                    -> tokens: a list of ids per prompt
  sample  prompts, lengths, variant, seed        -> seconds, drawn, peak_mib
"""

import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

STATUS = "/proc/self/status"


def reset_peak_memory() -> None:
    """Lets `peak_mib` count from what is resident now."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def peak_mib() -> float:
    """Largest resident memory of this process since `reset_peak_memory`, MiB."""
    with open(STATUS) as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def split_by_rows(lengths: list[int], rows: int) -> list[tuple[slice, int]]:
    """Batches of at most `rows` neighbouring rows, each with its longest length: what a static batch has to draw."""
    cuts = range(0, len(lengths), rows or len(lengths))
    parts = [slice(start, start + (rows or len(lengths))) for start in cuts]
    return [(part, max(lengths[part])) for part in parts]


def serve(operations: dict[str, Callable[..., dict[str, Any]]]) -> None:
    """Answers requests until stdin closes."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # a library's print may not end up among the replies
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply = operations[request.pop("do")](**request)
        except Exception:
            reply = {"error": traceback.format_exc()}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()
