"""The objective once more, from the formulas: float64 NumPy, one sequence and one token at a time, no masks.

`frozen` stands for every stop_gradient, so that a difference quotient in `logprobs` is the gradient.
"""

import numpy as np


def advantages(name: str, rewards: np.ndarray, lengths: np.ndarray, eps: float) -> np.ndarray:
    """[P, G], a completion at a time."""
    rewards, lengths = rewards.astype(np.float64), lengths.astype(np.float64)
    everyone = rewards.reshape(-1).tolist()
    tokens = [r for r, n in zip(everyone, lengths.reshape(-1), strict=True) for _ in range(int(n))]
    result = np.zeros_like(rewards)
    for p, group in enumerate(rewards.tolist()):
        mean = sum(group) / len(group)
        std = (sum((r - mean) ** 2 for r in group) / (len(group) - 1)) ** 0.5
        for g, r in enumerate(group):
            others = group[:g] + group[g + 1 :]
            result[p, g] = {
                "grpo": (r - mean) / (std + eps),
                "dr_grpo": r - mean,
                "batch_std": (r - mean) / (np.std(everyone, ddof=1) + eps),
                "rloo": r - sum(others) / len(others),
                "reinforce_pp": (r - np.mean(tokens)) / (np.std(tokens, ddof=1) + eps),
                "max_rl": (r - mean) / mean if mean else 0.0,
                "opo": r - float(np.dot(group, lengths[p])) / lengths[p].sum(),
            }[name]
    return result


def surrogate(ratio: float, advantage: float, o) -> float:
    """PPO's, with dual clip."""
    clipped = min(max(ratio, 1 - o.clip_low), 1 + o.clip_high)
    loss = -min(ratio * advantage, clipped * advantage)
    return min(loss, -o.dual_clip * advantage) if advantage < 0 and o.dual_clip else loss


def policy_loss(lp, frozen, old, mu, advantage: float, o) -> list[float]:
    """Token losses of one completion; log-probs [l] of the policy, old policy and sampler."""
    losses = []
    for t in range(len(lp)):
        ratio = np.exp(lp[t] - old[t])
        if o.loss == "clip":
            losses.append(surrogate(ratio, advantage, o))
        elif o.loss == "cispo":
            held = min(max(np.exp(frozen[t] - old[t]), 1 - o.clip_low), 1 + o.clip_high)
            losses.append(-held * advantage * lp[t])
        elif o.loss == "gspo":
            whole = np.exp(np.mean(frozen - old))
            losses.append(surrogate(whole * np.exp(lp[t] - frozen[t]), advantage, o))
        elif o.loss == "dppo_mask":
            moved = np.exp(frozen[t]) - np.exp(mu[t])
            gone = (advantage > 0 and moved > o.dppo_mask) or (advantage < 0 and -moved > o.dppo_mask)
            losses.append((0.0 if gone else -advantage * ratio) + o.dppo_penalty * (lp[t] - old[t]) ** 2)
    return losses


def correction(old, mu, o) -> list[float]:
    """Weights of one completion's tokens."""
    ratios = np.exp(old - mu)
    product, mean = np.prod(ratios), np.exp(np.mean(old - mu))
    low, high = o.correction_low, o.correction_high
    return [
        {
            "off": 1.0,
            "token_truncate": min(r, high),
            "token_mask": r if low <= r <= high else 0.0,
            "sequence_truncate": min(product, high),
            "sequence_mask": product if low <= product <= high else 0.0,
            "geometric_mask": float(low <= mean <= high),
            "error_mask": float(np.mean(np.exp(abs(old - mu))) <= high),
        }[o.correction]
        for r in ratios
    ]


def is_off_policy(frozen, mu, advantage: float, o) -> bool:
    """Of one completion: whether it has no policy loss."""
    return o.off_policy_mask > 0 and advantage < 0 and np.mean(mu - frozen) > o.off_policy_mask


def kl(lp: float, frozen: float, reference: float, estimator: str) -> float:
    """Of one token; + has the value of the first and the slope of k2."""
    x = lp - reference
    value = {"k1": x, "abs": abs(x), "k2": x * x / 2, "k3": np.exp(-x) + x - 1}
    if not estimator.endswith("+"):
        return value[estimator]
    y = frozen - reference
    return {"k1": y, "k3": np.exp(-y) + y - 1}[estimator[:-1]] + value["k2"] - y * y / 2


def weights(aggregation: str, lengths: list[list[int]], cap: int) -> list[list[float]]:
    """Per completion, of each of its tokens."""
    flat = [n for group in lengths for n in group if n]
    groups = [sum(group) for group in lengths if sum(group)]
    return [
        [
            {
                "token_mean": 1 / sum(flat),
                "seq_mean_token_mean": 1 / n / len(flat),
                "seq_mean_token_sum": 1 / len(flat),
                "constant": 1 / len(flat) / cap,
                "prompt_mean": 1 / sum(group) / len(groups),
            }[aggregation]
            if n
            else 0.0
            for n in group
        ]
        for group in lengths
    ]
