"""Writes trl_grpo.npz: what TRL's `GRPOTrainer` makes of frozen rollouts. Run by `make golden-trl`.

Everything is TRL's own: rollouts go in where it would generate them, it scores and normalises them, its loss is
differentiated and its optimizer makes the step. Between scoring and the loss the policy moves, so that ratios are not
1.
"""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer
from weights import formula_weights

OUT = Path(__file__).with_name("trl_grpo.npz")
END, GROUP, CAP = 1, 4, 12
SHAPE = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 24, "tie_word_embeddings": True, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}  # fmt: skip
MOVED = 0.03
"""The policy's weights are those it drew with plus this much of others."""
CASES: dict[str, dict[str, Any]] = {
    "grpo": {"loss_type": "grpo", "beta": 0.04},
    "grpo, on policy": {"loss_type": "grpo", "beta": 0.0, "num_iterations": 1},
    "bnpo": {"loss_type": "bnpo", "beta": 0.0, "epsilon": 0.1},
    "dr_grpo": {"loss_type": "dr_grpo", "beta": 0.0, "scale_rewards": "none"},
    "dapo": {"loss_type": "dapo", "beta": 0.04, "epsilon_high": 0.28, "use_bias_correction_kl": False},
    "dapo, cut ones masked": {"loss_type": "dapo", "beta": 0.0, "mask_truncated_completions": True},
    "cispo": {"loss_type": "cispo", "beta": 0.0, "epsilon_high": 1.5, "scale_rewards": "batch"},
}
"""Settings of `GRPOConfig` that differ from ALIKE."""
ALIKE = {
    "num_iterations": 2, "learning_rate": 1e-3, "weight_decay": 0.0, "max_grad_norm": 0.5, "adam_beta2": 0.999,
    "epsilon": 0.2, "epsilon_high": None, "scale_rewards": "group", "mask_truncated_completions": False,
    "use_bias_correction_kl": True,
}  # fmt: skip


def rollouts() -> tuple[list[list[int]], list[list[int]], list[float]]:
    """Three prompts, GROUP completions of each, some cut at CAP, and rewards; those of the last group are equal."""
    rng = np.random.RandomState(0)
    prompts = [rng.randint(2, 24, n).tolist() for n in (3, 7, 5)]
    completions = []
    for length in (1, 12, 4, 7, 12, 2, 9, 5, 3, 8, 12, 6):
        completions.append(rng.randint(2, 24, length).tolist())
        if length < CAP:
            completions[-1][-1] = END
    return prompts, completions, [1, 0, 0, 0, 0.5, 1, 0, 1, 1, 1, 1, 1]


def id_text() -> PreTrainedTokenizerFast:
    """Tokenizer of texts that are ids with blanks between."""
    tokenizer = Tokenizer(
        models.WordLevel({"pad": 0, "end": END} | {str(i): i for i in range(2, SHAPE["vocab_size"])}, unk_token="pad")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="pad", eos_token="end")


def weights(model: Any, moved: float) -> dict[str, torch.Tensor]:
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    start, other = formula_weights(shapes), formula_weights({f"other.{name}": s for name, s in shapes.items()})
    return {name: torch.from_numpy(start[name] + np.float32(moved) * other[f"other.{name}"]) for name in shapes}


def run(case: dict[str, Any]) -> dict[str, np.ndarray]:
    prompts, completions, rewards = rollouts()
    model = Qwen2ForCausalLM(Qwen2Config(**SHAPE))
    model.load_state_dict(weights(model, 0.0), strict=False)
    folder = tempfile.mkdtemp()  # the reference is read from where the policy was
    model.save_pretrained(folder)
    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        use_cpu=True,
        bf16=False,
        model_init_kwargs={"dtype": "float32", "attn_implementation": "eager"},
        per_device_train_batch_size=len(completions),
        num_generations=GROUP,
        max_completion_length=CAP,
        lr_scheduler_type="constant",
        gradient_checkpointing=False,
        report_to="none",
        **(ALIKE | case),
    )
    trainer = GRPOTrainer(
        model=folder,
        reward_funcs=lambda completions, **_: rewards,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": [" ".join(map(str, prompt)) for prompt in prompts]}),
        processing_class=id_text(),
    )
    trainer._generate_single_turn = lambda *_, **__: (completions, None)
    trainer.current_gradient_accumulation_steps = 1
    trainer.create_optimizer()
    model = trainer.model.train()
    inputs = trainer._generate_and_score_completions([row for row in trainer.train_dataset for _ in range(GROUP)])
    model.load_state_dict(weights(model, MOVED if config.num_iterations > 1 else 0.0), strict=False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    loss = trainer.compute_loss(model, inputs)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
    trainer.optimizer.step()
    out = {"advantages": inputs["advantages"], "loss": loss, "grad_norm": norm}
    if inputs.get("old_per_token_logps") is not None:
        out["old_logprobs"] = inputs["old_per_token_logps"]
    for name, p in model.named_parameters():
        out[f"gradient/{name}"], out[f"change/{name}"] = p.grad, p - before[name]
    return {key: value.detach().numpy() for key, value in out.items()}


def main() -> None:
    torch.set_num_threads(1)
    versions = {"trl": trl.__version__, "transformers": transformers.__version__, "torch": torch.__version__}
    prompts, completions, rewards = rollouts()
    about = {"versions": versions, "config": SHAPE, "group": GROUP, "cap": CAP, "moved": MOVED, "end": END}
    about |= {"prompts": prompts, "completions": completions, "rewards": rewards}
    about["cases"] = {name: ALIKE | case for name, case in CASES.items()}
    arrays = {f"{name}/{key}": value for name, case in CASES.items() for key, value in run(case).items()}
    np.savez_compressed(OUT, about=json.dumps(about), **arrays)
    print(f"{OUT}: {OUT.stat().st_size // 1024} KiB", {name: float(arrays[f"{name}/loss"]) for name in CASES})


if __name__ == "__main__":
    main()
