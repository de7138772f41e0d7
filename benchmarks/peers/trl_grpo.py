"""TRL's `GRPOTrainer` as a worker (operations of a trainer: protocol.py), in the environment of `make bench-peers`.

Its own loop runs in a thread and waits before each step. Variants are `CACHE/ROWS`: the cache of the rollouts, which
draw the whole batch to its longest row, and the rows of a forward and backward pass. Rows are then cut to their
lengths, so that the trainer sees the batch it would have, had they stopped there. Gradient checkpointing, which it has
on by itself, is off: that is faster.
"""

import os
import tempfile
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import transformers
import trl
from datasets import Dataset
from protocol import Turns, serve
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, PreTrainedTokenizerFast, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

state: dict[str, Any] = {}
SETTINGS = {"kl_coefficient": 0.001, "learning_rate": 0.0, "weight_decay": 0.0, "max_grad_norm": 0.0}
"""Of a trainer that makes no step."""


def load(folder: str, dtype: str) -> dict[str, Any]:
    _end()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    state.update(folder=folder, dtype=dtype)
    versions = {"trl": trl.__version__, "transformers": transformers.__version__, "torch": torch.__version__}
    return {"versions": versions, "variants": ["dynamic", "static"]}


def _end() -> None:
    if turns := state.pop("turns", None):
        turns.stop()
    state.pop("trainer", None)


def _id_text(vocab: int) -> PreTrainedTokenizerFast:
    """Tokenizer of texts that are ids with blanks between; the end of a sequence is an id that no model draws."""
    words = {str(token): token for token in range(vocab)} | {"end": vocab}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="0", eos_token="end")


def _even_share(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [sum(token % 2 == 0 for token in row) / len(row) for row in completion_ids]


def _trainer(
    prompts: list[list[int]], lengths: list[int], variant: str, settings: dict[str, float], callbacks: list[Any]
) -> GRPOTrainer:
    cache, _, rows = variant.partition("/")
    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        use_cpu=True,
        bf16=False,
        model_init_kwargs={"dtype": state["dtype"]},
        per_device_train_batch_size=int(rows),
        gradient_accumulation_steps=len(lengths) // int(rows),
        num_generations=len(lengths) // len(prompts),
        max_completion_length=max(lengths),
        beta=settings["kl_coefficient"],
        learning_rate=settings["learning_rate"],
        weight_decay=settings["weight_decay"],
        max_grad_norm=settings["max_grad_norm"],
        num_iterations=1,
        lr_scheduler_type="constant",
        gradient_checkpointing=False,
        temperature=1.0,
        cache_implementation=None if cache == "dynamic" else cache,
        shuffle_dataset=False,
        max_steps=1_000_000,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    texts = [" ".join(map(str, prompt)) for prompt in prompts]
    vocab = AutoConfig.from_pretrained(state["folder"]).vocab_size
    trainer = GRPOTrainer(
        model=state["folder"],
        reward_funcs=_even_share,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": texts * 100}),
        processing_class=_id_text(vocab),
        callbacks=callbacks,
    )
    trainer.eos_token_ids = [vocab]
    trainer.generation_config.eos_token_id = vocab
    trainer.generation_kwargs["eos_token_id"] = vocab
    return trainer


def logprobs(prompts: list[list[int]], completions: list[list[int]]) -> dict[str, Any]:
    lengths = [len(row) for row in completions]
    trainer = _trainer(prompts, lengths, f"dynamic/{len(lengths)}", SETTINGS, [])
    longest, group = max(lengths), len(completions) // len(prompts)
    rows = [prompts[i // group] + row + [0] * (longest - len(row)) for i, row in enumerate(completions)]
    mask = [[1] * (len(rows[0]) - longest + n) + [0] * (longest - n) for n in lengths]
    with torch.no_grad():
        scored, _, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, torch.tensor(rows), torch.tensor(mask), longest
        )
    return {"logprobs": [row[:n].tolist() for row, n in zip(scored, lengths, strict=True)]}


class _Turn(TrainerCallback):
    """Waits before a step and says when it is done."""

    turns: Turns

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.turns.begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.turns.end()


def start(prompts: list[list[int]], lengths: list[int], variant: str, settings: dict[str, float]) -> dict[str, Any]:
    _end()
    turn = _Turn()
    trainer = _trainer(prompts, lengths, variant, settings, [turn])
    draw, score = trainer._generate_single_turn, trainer._get_per_token_logps_and_entropies

    def cut(*arguments: Any, **named: Any) -> tuple[list[list[int]], None]:
        drawn, _ = draw(*arguments, **named)
        assert [len(row) for row in drawn] == [max(lengths)] * len(lengths), "a row ended early"
        return [row[:length] for row, length in zip(drawn, lengths, strict=True)], None

    def loop(turns: Turns) -> None:
        turn.turns = turns
        reference = turns.timed("reference", score)
        trainer._generate_single_turn = turns.timed("rollout", cut)
        trainer._get_per_token_logps_and_entropies = lambda *a, **k: (
            score(*a, **k) if torch.is_grad_enabled() else reference(*a, **k)
        )
        trainer.train()

    state.update(trainer=trainer, turns=Turns(loop))
    return {}


def step() -> dict[str, Any]:
    return state["turns"].step()


if __name__ == "__main__":
    serve({"load": load, "logprobs": logprobs, "start": start, "step": step})
