"""What the rollout benchmark runs: models, prompts, lengths, and the named rows made of them."""

import dataclasses
import math
from typing import Any

import numpy as np

from rljax.config import ARCHITECTURES, Architecture
from rljax.types import PromptRecord, Prompts

TINY = Architecture(
    hidden_size=256, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=64, mlp_size=1024, vocab_size=512,
    tied_embeddings=True,
)  # fmt: skip
"""4.07 million parameters: the shape of a quickstart on two CPU cores."""

ARCHS: dict[str, Architecture] = {
    "tiny": TINY,
    "135m": ARCHITECTURES["smollm2-135m"],
    "0.5b": ARCHITECTURES["qwen2.5-0.5b"],
    "1.5b": ARCHITECTURES["qwen2.5-1.5b"],
    "7b": ARCHITECTURES["qwen2.5-7b"],
}


@dataclasses.dataclass(frozen=True)
class Workload:
    """One row: `prompts` prompts of `prompt` tokens, `group` completions each."""

    model: str
    prompts: int
    group: int = 8
    prompt: int = 64
    """Tokens of each prompt."""
    cap: int = 128
    """Most tokens of a completion; with fixed lengths every completion has as many."""
    sigma: float = 0.0
    """Spread of log-normal lengths; 0: all of the same length."""
    share: float = 0.25
    """With spread: mean length, as a share of the cap."""
    seed: int = 0

    @property
    def batch(self) -> int:
        """Completions in all."""
        return self.prompts * self.group

    def lengths(self) -> np.ndarray:
        """Tokens of each completion, [prompts * group] int32."""
        if not self.sigma:
            return np.full(self.batch, self.cap, np.int32)
        return realistic_lengths(self.batch, self.cap, self.share * self.cap, self.sigma, self.seed)

    def make_prompts(self, vocab: int = 0) -> Prompts:
        """Random tokens below `vocab` (0: that of the model), never 0: peers take that for padding."""
        vocab = vocab or ARCHS[self.model].vocab_size
        tokens = np.random.default_rng([self.seed, 1]).integers(1, vocab, (self.prompts, self.prompt), dtype=np.int32)
        record = PromptRecord(({"role": "user", "content": ""},), "exact", "")
        lengths = np.full(self.prompts, self.prompt, np.int32)
        return Prompts(tokens, lengths, np.arange(self.prompts, dtype=np.int64), (record,) * self.prompts)

    def case(self) -> dict[str, Any]:
        """The `case` of a line of results."""
        case: dict[str, Any] = {
            "model": self.model,
            "batch": self.batch,
            "lengths": "realistic" if self.sigma else "fixed",
            "group": self.group,
            "prompt": self.prompt,
            "cap": self.cap,
        }
        return case | ({"sigma": self.sigma} if self.sigma else {})


def realistic_lengths(count: int, cap: int, mean: float, sigma: float, seed: int) -> np.ndarray:
    """Lengths 1..cap, [count] int32, log-normal of spread `sigma`, cut at the cap, with the given mean of the sample.

    The scale is searched until cutting at the cap no longer lowers the mean. Completions of a model before it has
    learnt to stop pile up at the cap just so.
    """
    if not 1 <= mean < cap:
        raise ValueError(f"mean = {mean} tokens with cap = {cap}; it must be at least 1 and below the cap")
    normal = np.random.default_rng([seed, 2]).normal(size=count)

    def lengths(log_scale: float) -> np.ndarray:
        return np.clip(np.rint(np.exp(np.minimum(log_scale + sigma * normal, 50.0))), 1, cap).astype(np.int32)

    low, high = -10.0 * (1 + sigma), math.log(cap) + 10.0 * (1 + sigma)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if lengths(middle).mean() < mean else (low, middle)
    return lengths(high)


REALISTIC = Workload("tiny", prompts=32, cap=512, sigma=0.8)

ROWS: dict[str, Workload] = {
    **{f"tiny-b{batch}": Workload("tiny", batch // 8) for batch in (8, 32, 64, 256, 1024)},
    "tiny-b64-alone": Workload("tiny", 64, group=1),
    "tiny-b64-prompt512": Workload("tiny", 8, prompt=512),
    "tiny-b64-long": Workload("tiny", 8, cap=1024),
    "tiny-realistic": REALISTIC,
    **{f"tiny-realistic-spread{sigma}": dataclasses.replace(REALISTIC, sigma=sigma) for sigma in (0.4, 1.2)},
    **{f"135m-b{batch}": Workload("135m", batch // 8) for batch in (8, 32, 64, 256)},
    "135m-b32-alone": Workload("135m", 32, group=1),
    "135m-realistic": Workload("135m", prompts=8, cap=512, sigma=0.8),
    "rehearsal": Workload("tiny", prompts=2, group=4, prompt=32, cap=48),
    "rehearsal-realistic": Workload("tiny", prompts=8, group=4, prompt=32, cap=96, sigma=0.8),
    # On an accelerator: gpu.sh.
    "0.5b-b512": Workload("0.5b", 64, prompt=256, cap=256),
    "1.5b-b512": Workload("1.5b", 64, prompt=256, cap=256),
    "7b-b256": Workload("7b", 32, prompt=256, cap=256),
    "1.5b-realistic": Workload("1.5b", 64, prompt=256, cap=1024, sigma=0.8),
}

DEFAULT_ROWS = (
    "tiny-b8", "tiny-b32", "tiny-b64", "tiny-b256", "tiny-realistic",
    "135m-b8", "135m-b32", "135m-b64", "135m-realistic",
)  # fmt: skip

TRAINING_ROWS: dict[str, Workload] = {
    "tiny-fixed": Workload("tiny", prompts=8),
    "tiny-realistic": REALISTIC,
    "135m": Workload("135m", prompts=4, group=4, cap=64),
    "rehearsal": Workload("tiny", prompts=2, group=4, prompt=32, cap=48),
    "rehearsal-realistic": Workload("tiny", prompts=8, group=4, prompt=32, cap=96, sigma=0.8),
    # On an accelerator: gpu.sh.
    "0.5b-update": Workload("0.5b", prompts=8, prompt=256, cap=768),
    "1.5b-update": Workload("1.5b", prompts=8, prompt=256, cap=768),
}
"""Of step.py and update.py."""

DEFAULT_TRAINING_ROWS = ("tiny-fixed", "tiny-realistic", "135m")
