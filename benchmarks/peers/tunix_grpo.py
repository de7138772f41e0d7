"""Tunix's `GRPOLearner` as a worker (operations of a trainer: protocol.py), in the environment of `make bench-peers`.

Its own loop runs in a thread and waits before each step. Variants are `static/ROWS`: rows of a forward and backward
pass; rollouts draw the whole batch to its longest row. Rows are then cut to their lengths, so that the learner sees the
batch it would have, had they stopped there.
"""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from protocol import Stop, Turns, serve
from tunix.rl import rl_cluster
from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
from tunix.rl.rollout.base_rollout import RolloutConfig
from tunix_sampler import NO_TOKEN, IdText, mesh, read_model, versions

state: dict[str, Any] = {}


def load(folder: str, dtype: str) -> dict[str, Any]:
    _end()
    state.update(folder=folder, dtype=dtype)
    return {"versions": versions(), "variants": ["static"]}


def _end() -> None:
    if turns := state.pop("turns", None):
        turns.stop()


def _cluster(
    prompts: list[list[int]], lengths: list[int], variant: str, settings: dict[str, float]
) -> rl_cluster.RLCluster:
    group = len(lengths) // len(prompts)
    micro = int(variant.partition("/")[2]) // group
    actor, reference = (read_model(state["folder"], state["dtype"])[0] for _ in range(2))
    optimizer = optax.chain(
        optax.clip_by_global_norm(settings["max_grad_norm"]),
        optax.adamw(settings["learning_rate"], weight_decay=settings["weight_decay"]),
    )
    training = rl_cluster.RLTrainingConfig(
        actor_optimizer=optimizer,
        eval_every_n_steps=1_000_000,
        max_steps=1_000_000,
        mini_batch_size=len(prompts),
        train_micro_batch_size=micro,
        rollout_micro_batch_size=len(prompts),
        compute_logps_micro_batch_size=micro,
    )
    rollout = RolloutConfig(
        max_tokens_to_generate=max(lengths),
        max_prompt_length=len(prompts[0]),
        kv_cache_size=len(prompts[0]) + max(lengths),
        temperature=1.0,
        top_p=1.0,
        eos_tokens=[NO_TOKEN],
    )
    roles = (rl_cluster.Role.ACTOR, rl_cluster.Role.REFERENCE, rl_cluster.Role.ROLLOUT)
    config = rl_cluster.ClusterConfig(
        role_to_mesh={role: mesh for role in roles},
        rollout_engine="vanilla",
        training_config=training,
        rollout_config=rollout,
    )
    return rl_cluster.RLCluster(actor=actor, reference=reference, tokenizer=IdText(), cluster_config=config)


def logprobs(prompts: list[list[int]], completions: list[list[int]]) -> dict[str, Any]:
    lengths = [len(row) for row in completions]
    settings = {"learning_rate": 0.0, "weight_decay": 0.0, "max_grad_norm": 1.0}
    cluster = _cluster(prompts, lengths, f"static/{len(lengths)}", settings)
    padded = np.full((len(lengths), max(lengths)), NO_TOKEN, np.int32)
    for row, completion in zip(padded, completions, strict=True):
        row[: len(completion)] = completion
    scored = cluster.get_ref_per_token_logps(
        prompt_tokens=jnp.asarray(np.repeat(prompts, len(lengths) // len(prompts), axis=0)),
        completion_tokens=jnp.asarray(padded),
        pad_id=NO_TOKEN,
        eos_id=NO_TOKEN,
    )
    return {"logprobs": [row[:n].tolist() for row, n in zip(np.asarray(scored), lengths, strict=True)]}


def start(prompts: list[list[int]], lengths: list[int], variant: str, settings: dict[str, float]) -> dict[str, Any]:
    _end()
    cluster = _cluster(prompts, lengths, variant, settings)
    drawn: list[np.ndarray] = []
    draw, score, update = cluster.generate, cluster.get_ref_per_token_logps, cluster.update_actor
    updates = 0

    def cut(*arguments: Any, **named: Any) -> Any:
        out = draw(*arguments, **named)
        assert [len(row) for row in out.tokens] == [max(lengths)] * len(lengths), "a row ended early"
        out.tokens[:] = [np.asarray(row)[:length] for row, length in zip(out.tokens, lengths, strict=True)]
        drawn[:] = out.tokens
        return out

    def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        """The share of even ids; from the ids, which saves decoding them."""
        assert len(completions) == len(drawn), (len(completions), len(drawn))
        return [float(np.mean(row % 2 == 0)) for row in drawn]

    def waited_for(*arguments: Any, **named: Any) -> Any:
        return jax.block_until_ready(score(*arguments, **named))

    def updated(*arguments: Any, **named: Any) -> None:
        nonlocal updates
        update(*arguments, **named)
        jax.block_until_ready(nnx.state(cluster.actor_trainer.model))
        updates += 1

    def loop(turns: Turns) -> None:
        cluster.generate = turns.timed("rollout", cut)
        cluster.get_ref_per_token_logps = turns.timed("reference", waited_for)
        cluster.update_actor = updated
        texts = np.array([" ".join(map(str, prompt)) for prompt in prompts])

        def batches() -> Iterator[dict[str, np.ndarray]]:
            """The next batch is asked for when everything of the last step is done."""
            nonlocal updates
            try:
                while True:
                    turns.begin()
                    updates = 0
                    yield {"prompts": texts}
                    assert updates, "the next batch was asked for before the update"
                    turns.end()
            except Stop:
                return

        config = GRPOConfig(
            num_generations=len(lengths) // len(prompts), num_iterations=1, beta=settings["kl_coefficient"], epsilon=0.2
        )
        learner = GRPOLearner(rl_cluster=cluster, algo_config=config, reward_fns=reward)
        with contextlib.suppress(StopIteration):  # there was no batch at all
            learner.train(batches())
        raise Stop

    state["turns"] = Turns(loop)
    return {}


def step() -> dict[str, Any]:
    return state["turns"].step()


if __name__ == "__main__":
    serve({"load": load, "logprobs": logprobs, "start": start, "step": step})
