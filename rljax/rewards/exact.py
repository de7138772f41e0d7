"""The completion is the answer."""

from typing import Any


def score(response: str, ground_truth: str, extra_info: dict[str, Any]) -> float:
    """1 if the response equals the ground truth, surrounding whitespace aside; else 0."""
    return float(response.strip() == ground_truth.strip())
