"""Every knob of a run, and the shapes of the models: frozen dataclasses that import no JAX.

The defaults are the recipe of arXiv 2509.25300 as its code ran it (`scripts/train/*.sh` of the paper's repository).
Checks never change a value: a contradiction is a `ConfigError` that says what was given, what is required, what to do.
"""

import dataclasses
import difflib
import math
from typing import Any, Literal


class ConfigError(ValueError):
    """Something the user gave cannot be used. The command line prints it as one paragraph and exits non-zero."""


# --------------------------------------------------------------------------------------------------- architectures


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Shape of a decoder of the Qwen2.5 / Qwen3 / Llama family (pre-norm, RoPE, grouped-query attention, SwiGLU)."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_size: int
    vocab_size: int
    """Rows of the embedding table, padding rows beyond the tokenizer included."""
    tied_embeddings: bool
    qkv_bias: bool = True
    """Bias on q, k, v (Qwen2.5); Qwen3 and Llama have none."""
    qk_norm: bool = False
    """RMS norm over head_dim on q and k (Qwen3)."""
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    num_tokens: int = 0
    """Vocabulary rows that are tokens: rows beyond it are padding and are never sampled. 0: all of them."""

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_heads = {self.num_heads} is not a multiple of num_kv_heads = {self.num_kv_heads}; "
                "grouped-query attention needs whole groups of query heads"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim = {self.head_dim} is odd; rotary embeddings rotate pairs, use an even number")


def _qwen25(hidden: int, layers: int, heads: int, kv_heads: int, head_dim: int, mlp: int, vocab: int, tied: bool):
    return Architecture(hidden, layers, heads, kv_heads, head_dim, mlp, vocab, tied)


def _qwen3(hidden: int, layers: int, heads: int, kv_heads: int, mlp: int, tied: bool):
    return Architecture(hidden, layers, heads, kv_heads, 128, mlp, 151936, tied, qkv_bias=False, qk_norm=True)


ARCHITECTURES: dict[str, Architecture] = {
    "tiny": _qwen25(128, 4, 4, 2, 32, 256, 64, True),
    "ladder-18k": _qwen25(32, 2, 2, 1, 16, 64, 64, True),
    "ladder-60k": _qwen25(48, 3, 3, 1, 16, 96, 64, True),
    "ladder-200k": _qwen25(64, 4, 4, 2, 16, 192, 64, True),
    "ladder-1.3m": _qwen25(192, 4, 6, 2, 32, 384, 64, True),
    "ladder-2.8m": _qwen25(256, 4, 8, 2, 32, 704, 64, True),
    "qwen2.5-0.5b": _qwen25(896, 24, 14, 2, 64, 4864, 151936, True),
    "qwen2.5-1.5b": _qwen25(1536, 28, 12, 2, 128, 8960, 151936, True),
    "qwen2.5-3b": _qwen25(2048, 36, 16, 2, 128, 11008, 151936, True),
    "qwen2.5-7b": _qwen25(3584, 28, 28, 4, 128, 18944, 152064, False),
    "qwen2.5-14b": _qwen25(5120, 48, 40, 8, 128, 13824, 152064, False),
    "qwen2.5-32b": _qwen25(5120, 64, 40, 8, 128, 27648, 152064, False),
    "qwen2.5-72b": _qwen25(8192, 80, 64, 8, 128, 29568, 152064, False),
    "qwen3-0.6b": _qwen3(1024, 28, 16, 8, 3072, True),
    "qwen3-1.7b": _qwen3(2048, 28, 16, 8, 6144, True),
    "qwen3-4b": _qwen3(2560, 36, 32, 8, 9728, True),
    "qwen3-8b": _qwen3(4096, 36, 32, 8, 12288, False),
    "qwen3-14b": _qwen3(5120, 40, 40, 8, 17408, False),
    "qwen3-32b": _qwen3(5120, 64, 64, 8, 25600, False),
    "smollm2-135m": Architecture(
        576, 30, 9, 3, 64, 1536, 49152, True, qkv_bias=False, rope_theta=1e5, rms_norm_eps=1e-5
    ),
}
"""Known shapes by name. The seven Qwen2.5 sizes are the paper's; base and instruct share a shape. The sizes of the
ladder, to which `tiny` belongs, are for the procedural tasks; their names are their non-embedding parameters."""

NOMINAL_PARAMS: dict[str, float] = {
    "qwen2.5-0.5b": 0.5e9,
    "qwen2.5-1.5b": 1.5e9,
    "qwen2.5-3b": 3e9,
    "qwen2.5-7b": 7e9,
    "qwen2.5-14b": 14e9,
    "qwen2.5-32b": 32e9,
    "qwen2.5-72b": 72e9,
}
"""The N that the paper's fits use (`analysis/src/extract_csv.py`): the size label, not a count."""

# ------------------------------------------------------------------------------------------------ sections of a run


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Which policy, and how it is held."""

    path: str = ""
    """Folder or hub name with Hugging Face safetensors; empty: random weights of `architecture`."""
    architecture: str = "qwen2.5-0.5b"
    """Name in `ARCHITECTURES`, used when `path` is empty. With a procedural task the vocabulary is the task's."""
    tokenizer: str = ""
    """Folder or hub name of the tokenizer; empty: the one in `path`, or the procedural task's own."""
    revision: str = ""
    """Hub revision (commit) of `path`; empty: the newest."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of forward and backward; masters are float32. auto: bfloat16 on TPU and GPU, float32 on CPU."""
    head_dtype: Literal["auto", "float32"] = "auto"
    """Operands of the logits, whose sums are float32 either way. auto: the compute dtype; float32 brings sampler and
    learner nearer to each other (MiniMax-M1, arXiv:2506.13585; ScaleRL, arXiv:2510.13786) for a slower head."""
    remat: Literal["auto", "none", "dots", "full"] = "auto"
    """What the backward pass recomputes: nothing, everything but matmuls, or each whole layer. auto: the first of these
    whose activations fit the memory; a run notes its choice in config.yaml and continues with it."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices as a grid. The product must be the number of devices; one axis may be -1, "what is left"."""

    data: int = 1
    """Replicas of the parameters, each with its own rows."""
    fsdp: int = -1
    """Devices over which parameters, optimizer state and rows are split."""
    tensor: int = 1
    """Devices over which heads, MLP columns and the vocabulary are split."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Training prompts and how often each is used. prompts = unique x repeats = steps x prompts_per_step."""

    train: str = ""
    """.parquet or .jsonl in the verl schema, a saved HF dataset folder, `hub:OWNER/NAME`, or a task:
    `task:char_count`, `task:arithmetic`, `task:sorting`."""
    prompts_per_step: int = 512
    unique: int = 0
    """Unique prompts taken from the file by `subset`; 0: all of them."""
    repeats: int = 1
    """tau: times each unique prompt is used in the run."""
    order: Literal["file", "curriculum", "reverse", "shuffle", "shuffle_once"] = "file"
    """file: as read, every epoch alike (the paper). curriculum: easy to hard by `difficulty_field`; reverse: hard to
    easy. shuffle: a new permutation every epoch, from `seed`; shuffle_once: one, every epoch alike."""
    subset: Literal["first", "paper", "independent", "difficulty_matched"] = "first"
    """How `unique` records are chosen. first: the first rows. paper: stratified easy/hard from seeds 42 and 43, nested.
    independent: uniform without replacement from `seed`. difficulty_matched: the same from each value of
    `difficulty_field`, in its share of all records."""
    difficulty_field: str = "qwen2.5_7b_pass_rate"
    """Field of `extra_info` with a pass rate in [0, 1]: 1 is easiest."""
    seed: int = 0
    max_prompt_tokens: int = 2048
    """Longer prompts, chat template included, are an error or dropped (`overlong`)."""
    overlong: Literal["error", "drop"] = "drop"
    """drop: leave out and count (the paper, train and evaluation alike)."""
    task_records: int = 4096
    """Training records a procedural task generates."""
    system_prompt: str = ""
    """System message; empty: the chat template's own default."""


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How completions are drawn in training."""

    max_completion_tokens: int = 4096
    temperature: float = 1.0
    """0 is greedy; training needs > 0."""
    chunk_tokens: int = 16
    """Tokens decoded per call of the jitted loop; the host looks at the rows between calls."""
    cache_growth: float = 1.5
    """Factor between the sizes of the growing cache of completions; 1: full length from the start."""
    compact: bool = True
    """Halve the batch when half of its completions have ended."""
    refill: bool = True
    """Completions that do not fit at once take the places of ended ones; False: they wait for the next wave."""
    max_rows: int = 0
    """Completions decoded at once; 0: as many as the free memory holds."""
    stop_token_ids: tuple[int, ...] = ()
    """Empty: those of the model's `generation_config` (base and instruct models differ)."""


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """How completions are scored."""

    name: Literal["auto", "naive_dapo", "math_dapo", "gsm8k", "supergpqa", "zebra", "coder1", "char_count", "exact"] = (
        "auto"
    )
    """auto: by each record's `data_source`."""
    mode: Literal["paper", "fixed"] = "fixed"
    """paper: the verifiers as the paper's code has them, defects included. fixed: the same, repaired."""
    hack_meter: bool = True
    """In training, score every completion in the other mode too and log how often they differ."""
    file: str = ""
    """FILE.py:FUNCTION of a reward of your own, fn(response, ground_truth, extra_info) -> [0, 1]. It is code, so it is
    taken from the command line only, never from a YAML file or a checkpoint."""
    unsandboxed_code: bool = False
    """Run programs in completions (HumanEval) where the sandbox, bubblewrap, does not work. They can then do whatever
    this user can."""
    timeout_seconds: float = 10.0
    """Wall-clock limit per completion; an overrun scores 0 and is counted."""
    workers: int = 2
    """Worker processes."""
    overlong_buffer_tokens: int = 0
    """Completions longer than the cap minus this lose up to `overlong_penalty` of their reward (DAPO); 0: off."""
    overlong_penalty: float = 1.0
    """Taken off at the cap."""


@dataclasses.dataclass(frozen=True)
class AlgorithmConfig:
    """The objective. Defaults are the paper's code: verl's token-mean GRPO with dual clip and a k3 KL loss."""

    group_size: int = 8
    """G: completions per prompt."""
    updates_per_step: int = 4
    """Optimizer updates per step, each on prompts_per_step / updates_per_step prompts."""
    advantage: Literal["grpo", "dr_grpo", "batch_std", "rloo", "reinforce_pp", "max_rl", "opo"] = "grpo"
    """grpo: (r - mean) / (std + eps), std with ddof 1. dr_grpo: r - mean. The others: `rljax/rl/advantages.py`."""
    advantage_eps: float = 1e-6
    advantage_clip_low: float = 0.0
    """Advantages below minus this are set to it; 0: off."""
    advantage_clip_high: float = 0.0
    """Advantages above this are set to it; 0: off."""
    zero_variance_groups: Literal["keep", "drop"] = "keep"
    """Groups whose advantages are all 0. keep: they count in the loss's divisor, as in the paper's code. drop: not."""
    dynamic_sampling_rounds: int = 0
    """Further rounds of prompts_per_step prompts that a step may sample while fewer groups than that have rewards that
    differ (DAPO); the first such groups are trained on. Prompts run out sooner, and the run ends with them. 0: off."""
    overlong: Literal["keep", "mask"] = "keep"
    """Completions cut at the cap. mask: they have no part in the loss nor its divisor (DAPO's overlong filtering)."""
    loss: Literal["clip", "cispo", "gspo", "dppo_mask"] = "clip"
    """Policy loss per token; formulas and sources in `rljax/rl/losses.py`."""
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float = 3.0
    """Upper bound of -ratio * A for A < 0; 0: off."""
    dppo_mask: float = 0.2
    """`dppo_mask` drops a token whose probability has moved further than this towards its advantage."""
    dppo_penalty: float = 1e-3
    """`dppo_mask`'s weight of log(ratio)^2."""
    off_policy_mask: float = 0.0
    """Drops the policy loss of completions with A < 0 whose mean of log(sampler / policy) over their tokens is above
    this (DeepSeek-V3.2, arXiv:2512.02556); they stay in the loss's divisor. 0: off."""
    aggregation: Literal[
        "token_mean",
        "seq_mean_token_mean",
        "seq_mean_token_sum",
        "constant",
        "prompt_mean",
        "micro_batch_token_mean",
    ] = "token_mean"
    """token_mean: one mean over the update's completion tokens. seq_mean_token_mean: the paper's printed formula.
    micro_batch_token_mean: what the paper's code computed. All: `rljax/rl/aggregation.py`."""
    kl_coefficient: float = 0.001
    """Weight of the KL to the reference model; 0: no reference model is kept."""
    kl_in: Literal["loss", "reward"] = "loss"
    """reward: kl_coefficient times a completion's summed KL is taken off its reward before advantages are computed."""
    kl_estimator: Literal["k1", "abs", "k2", "k3", "k1+", "k3+"] = "k3"
    """+: the value of the one named, the gradient of k2."""
    kl_importance_weight: bool = False
    """In the loss: the estimate times policy / old policy, so that in expectation its gradient is the reverse KL's
    (DeepSeek-V3.2, arXiv:2512.02556; TRL's default). `policy/reference_kl` is then the weighted one."""
    reference_update: Literal["fixed", "ema", "periodic"] = "fixed"
    """fixed: the starting model. ema: a running mean of the policy. periodic: a copy of it, renewed now and then."""
    reference_ema_decay: float = 0.0
    """ema: after each step, reference = decay x reference + (1 - decay) x policy, kept in float32."""
    reference_every_steps: int = 0
    """periodic: steps after which the policy becomes the reference."""
    entropy_coefficient: float = 0.0
    """Weight of the entropy of the tempered distribution, which is rewarded."""
    old_logprobs: Literal["recompute", "behaviour", "current"] = "recompute"
    """recompute: the learner rescores before the first update (the paper). behaviour: the sampler's own log-probs.
    current: the policy's at the update itself, so the ratio is 1; for one update per step."""
    correction: Literal[
        "off", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask", "geometric_mask", "error_mask"
    ] = "off"
    """Importance weight between sampler and learner: `rljax/rl/correction.py`."""
    correction_low: float = 0.5
    """Smallest ratio that the masks trust; 0: no bound."""
    correction_high: float = 2.0
    """Largest ratio: truncated to, or masked above. `error_mask`: largest mean error of a completion, a factor."""
    correction_normalise: bool = False
    """Divide the weights by their mean over the update, of completions where a completion has one weight (verl's
    `rollout_is_batch_normalize`). Needs `old_logprobs: recompute`."""
    microbatch_tokens: int = 16384
    """Tokens, padding included, per forward and backward on each (data x fsdp) shard."""


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """One rule on float32 masters, decay on every parameter (as torch)."""

    name: Literal["adamw", "muon"] = "adamw"
    """muon: the layers' matrices by orthogonalised momentum, sized as AdamW's updates; all else by AdamW."""
    learning_rate: float = 1e-6
    """The highest of the run."""
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    """Global-norm clip; 0: off. A non-finite norm skips the update and is counted."""
    max_nonfinite_steps: int = 10
    """A run ends (exit code 71) when all updates of so many steps in a row were skipped for it; 0: never."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """What follows the warm-up: constant is the paper's; linear and cosine fall until `decay_updates`."""
    warmup_updates: int = 0
    """Updates of linear warm-up; the first has learning_rate / warmup_updates."""
    decay_updates: int = 0
    """Updates, the warm-up's included, after which linear and cosine are at their final rate, and stay there."""
    final_learning_rate_fraction: float = 0.0
    """Share of `learning_rate` at which linear and cosine end."""
    moments_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the moments between updates. bfloat16: 4 bytes less per parameter (Muon's matrices 2), rounded at random."""


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (arXiv:2106.09685): W stays as it is, and scale (x A) B is learnt beside x W."""

    rank: int = 0
    """r, of A [in, r] and B [r, out]; 0: all parameters are trained."""
    alpha: float = 0.0
    """scale = alpha / rank; 0: twice the rank."""
    targets: tuple[str, ...] = ("q", "k", "v", "o", "gate", "up", "down")
    """Matrices of every layer that get an adapter."""

    @property
    def scale(self) -> float:
        """Factor of A B."""
        return (self.alpha or 2 * self.rank) / max(self.rank, 1)


LORA_TARGETS = LoraConfig().targets


@dataclasses.dataclass(frozen=True)
class SftConfig:
    """Supervised warm start (`rljax sft`): completion-only cross-entropy on the records' `solution`."""

    steps: int = 100
    batch_size: int = 64
    learning_rate: float = 1e-5
    weight_decay: float = 0.1
    max_tokens: int = 2048
    """Prompt plus solution; longer records are dropped and counted."""
    output: str = ""
    """Hugging Face folder to write; empty: `run_dir`/sft."""


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Held-out measurement: test_loss = 1 - pass@1."""

    data: str = ""
    """As `data.train`; empty: no evaluation. `task:NAME` is the task's held-out split, disjoint from training."""
    every: int = 1
    """Steps between evaluations; step 0, before training, is always evaluated. 0: only step 0 and the last."""
    samples_per_prompt: int = 1
    temperature: float = 0.7
    """0 is greedy. The paper draws one sample at 0.7."""
    max_completion_tokens: int = 0
    """0: as `sampling`."""
    max_prompts: int = 0
    """First so many records; 0: all (for a task: 256)."""


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """`rljax eval`: a policy on named sets. The defaults are the paper's: one completion at 0.7."""

    data: tuple[str, ...] = ()
    """Files in the verl schema, folders of them, or as `data.train`; a set goes by the name of its file."""
    run: str = ""
    """Folder of a run whose checkpoint is measured, with its tokenizer and stop tokens; empty: the weights in
    `model.path`."""
    step: int = 0
    """Step of the run; 0: the newest that is kept."""
    samples_per_prompt: int = 1
    """n: of the mean@n, pass@k and maj@n."""
    temperature: float = 0.7
    """0 is greedy."""
    top_p: float = 1.0
    """Draw from the fewest likeliest tokens that hold this share; 1: off."""
    max_completion_tokens: int = 0
    """0: as `sampling`."""
    max_prompts: int = 0
    """First so many records of each set; 0: all (for a task: 256)."""
    output: str = ""
    """Folder for predictions.jsonl, results.json and results.md; empty: `eval` in the folder of the run."""


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """`rljax sample`: completions of prompts given here or in a file, as lines of JSON."""

    prompts: tuple[str, ...] = ()
    """User messages. Empty: the prompts of `data`."""
    data: str = ""
    """As `data.train`."""
    samples_per_prompt: int = 1
    temperature: float = 1.0
    """0 is greedy."""
    top_k: int = 0
    """Draw from so many of the likeliest tokens; 0: off."""
    top_p: float = 1.0
    """Draw from the fewest likeliest tokens that hold this share; 1: off."""
    min_p: float = 0.0
    """Draw from the tokens at least this part as likely as the likeliest; 0: off."""
    min_completion_tokens: int = 0
    """No stop token before."""
    max_completion_tokens: int = 512
    stop_strings: tuple[str, ...] = ()
    """Texts that end a completion, beside the stop tokens."""
    logprobs: bool = False
    """Write token ids and their log-probs too."""
    output: str = ""
    """JSONL file to write; empty: the terminal."""


@dataclasses.dataclass(frozen=True)
class PlanConfig:
    """`rljax plan`: whether a run fits on a slice, how long a step takes there, and what the run costs."""

    slice: str = ""
    """`v5p-128`, `v6e-8`, `h200-8`: in v4-N, v5p-N and tpu7x-N, N counts TensorCores, two to a chip; elsewhere chips.
    With `search` also a generation alone, `v5e`."""
    search: bool = False
    """Find the fewest chips of that generation on which the run fits, and their fastest mesh."""
    compile: bool = False
    """Ask the TPU compiler, too (extra `tpu`; no TPU): compile the run's programs for the slice, minutes each."""
    meshes: tuple[str, ...] = ()
    """Slices the run is meant for, each with its mesh, data x fsdp x tensor: `v5p-128 1x8x8`. The one of `slice` goes
    before `mesh`."""
    steps: int = 0
    """Steps of the run that is paid for; 0: as `steps`."""
    prompt_tokens: float = 150.0
    """Mean length of a prompt, for times; memory is planned for the longest. The paper's is 150."""
    completion_tokens: float = 800.0
    """Mean length of a completion; lengths are log-normal around it and cut at the cap."""
    evaluation_prompts: int = 500
    """Prompts of `evaluation.data`, where `evaluation.max_prompts` does not say: the paper's holdout has 500."""
    sampler_share: float = 0.3
    """Speed of sampling as a share of the roofline of the data sheet. 0.3: 0.47, measured on an H200 with lengths all
    alike (1.5B, 59 % of a measured read rate that is 79 % of the sheet's), times 0.65 for lengths that differ, counted
    by benchmarks/simulate.py."""
    learner_share: float = 0.28
    """The same of updates and rescoring. 0.28: 40 % of a large product's measured rate, 69 % of the sheet's, of the
    0.5B model on an H200. No TPU was measured."""


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Learner state, data iterator, config and counters, saved as one unit."""

    every: int = 10
    """Steps between saves; the last step is always saved. 0: never."""
    keep: int = 2
    """Newest steps kept. The paper kept 1; a second is what a damaged newest one falls back to."""


@dataclasses.dataclass(frozen=True)
class LoggingConfig:
    """metrics.jsonl and curves.csv are always written."""

    rollouts: int = 4
    """Completions per step kept in rollouts/ for reading."""
    tensorboard: bool = False
    wandb: str = ""
    """Project name; empty: off. Needs the `wandb` extra."""
    aliases: Literal["none", "verl", "trl"] = "none"
    """Write metrics under the names of that library as well (`ALIASES` in `rljax/run_log.py`)."""


FINISHED = "finished.json"
"""In a run folder: the run of its config.yaml came to its end."""

PREEMPTED = 75
"""Exit code of a run that was told to stop (SIGTERM) and saved its step first: a launcher starts it again."""
NON_FINITE = 71
"""Exit code of a run that ended for `NonFiniteError`: it would come to the same again."""
CHECKPOINT_FAILED = 72
"""Exit code of a run that ended for `CheckpointError`: what it learnt from then on would be lost."""


class NonFiniteError(ArithmeticError):
    """No update of `optimizer.max_nonfinite_steps` steps in a row had a finite gradient."""


class CheckpointError(OSError):
    """A step could not be saved; those saved before are whole."""


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """A run: everything that decides what is computed."""

    run_dir: str = "runs/default"
    """Folder of the run; an existing one is resumed."""
    seed: int = 0
    """Seed of initial weights and of every draw."""
    steps: int = 0
    """0: as many whole steps as unique x repeats prompts give."""
    watchdog_seconds: float = 300.0
    """Of several processes one whose phase takes longer, and ten times longer than that phase ever took, ends with exit
    code 70, for another may be gone (`rljax/watchdog.py`). 0: off."""
    model: ModelConfig = ModelConfig()
    mesh: MeshConfig = MeshConfig()
    data: DataConfig = DataConfig()
    sampling: SamplingConfig = SamplingConfig()
    reward: RewardConfig = RewardConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    lora: LoraConfig = LoraConfig()
    sft: SftConfig = SftConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    eval: EvalConfig = EvalConfig()
    sample: SampleConfig = SampleConfig()
    plan: PlanConfig = PlanConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()

    def __post_init__(self) -> None:
        _check_ranges(self)
        _check_algorithm(self)
        _check_reference(self)
        _check_optimizer(self)
        _check_lora(self)


# ------------------------------------------------------------------------------------------------------------ checks

_AT_LEAST_ONE = (
    "data.prompts_per_step",
    "data.repeats",
    "data.max_prompt_tokens",
    "data.task_records",
    "sampling.max_completion_tokens",
    "sampling.chunk_tokens",
    "sampling.cache_growth",
    "reward.workers",
    "algorithm.group_size",
    "algorithm.updates_per_step",
    "algorithm.microbatch_tokens",
    "sft.batch_size",
    "sft.max_tokens",
    "evaluation.samples_per_prompt",
    "eval.samples_per_prompt",
    "sample.samples_per_prompt",
    "sample.max_completion_tokens",
    "plan.prompt_tokens",
    "plan.completion_tokens",
    "checkpoint.keep",
)
_AT_LEAST_ZERO = (
    "seed",
    "steps",
    "watchdog_seconds",
    "optimizer.max_nonfinite_steps",
    "data.unique",
    "data.seed",
    "sampling.temperature",
    "reward.overlong_buffer_tokens",
    "reward.overlong_penalty",
    "algorithm.dynamic_sampling_rounds",
    "algorithm.advantage_eps",
    "algorithm.clip_low",
    "algorithm.clip_high",
    "algorithm.advantage_clip_low",
    "algorithm.advantage_clip_high",
    "algorithm.dual_clip",
    "algorithm.dppo_mask",
    "algorithm.dppo_penalty",
    "algorithm.off_policy_mask",
    "algorithm.kl_coefficient",
    "algorithm.reference_ema_decay",
    "algorithm.reference_every_steps",
    "algorithm.entropy_coefficient",
    "algorithm.correction_low",
    "algorithm.correction_high",
    "optimizer.learning_rate",
    "optimizer.eps",
    "optimizer.weight_decay",
    "optimizer.max_grad_norm",
    "optimizer.warmup_updates",
    "optimizer.decay_updates",
    "lora.rank",
    "lora.alpha",
    "sft.steps",
    "sft.learning_rate",
    "sft.weight_decay",
    "evaluation.every",
    "evaluation.temperature",
    "evaluation.max_completion_tokens",
    "evaluation.max_prompts",
    "eval.step",
    "eval.temperature",
    "eval.max_completion_tokens",
    "eval.max_prompts",
    "sample.temperature",
    "sample.top_k",
    "sample.min_completion_tokens",
    "sampling.max_rows",
    "plan.steps",
    "plan.evaluation_prompts",
    "checkpoint.every",
    "logging.rollouts",
)


def field_value(config: Any, dotted: str) -> Any:
    """The value at `dotted`, `"algorithm.group_size"`, of a `RunConfig`."""
    for name in dotted.split("."):
        config = getattr(config, name)
    return config


def _check_ranges(config: RunConfig) -> None:
    for bound, names in ((1, _AT_LEAST_ONE), (0, _AT_LEAST_ZERO)):
        for name in names:
            value = field_value(config, name)
            if not bound <= value < math.inf:  # also refuses NaN
                raise ConfigError(
                    f"{name} = {value} must be at least {bound} and finite; change it in the YAML or with --{name}"
                )
    for name in ("optimizer.b1", "optimizer.b2"):
        if not 0 <= field_value(config, name) < 1:
            raise ConfigError(
                f"{name} = {field_value(config, name)} must be at least 0 and below 1, the share of the past that a "
                f"running mean keeps; change it in the YAML or with --{name}"
            )
    if not 0 < config.eval.top_p <= 1:
        raise ConfigError(f"eval.top_p = {config.eval.top_p} must be above 0 and at most 1; 1 switches it off")
    if not 0 < config.sample.top_p <= 1 or not 0 <= config.sample.min_p <= 1:
        raise ConfigError(
            f"sample.top_p = {config.sample.top_p} must be above 0 and at most 1, and sample.min_p = "
            f"{config.sample.min_p} from 0 to 1; 1 and 0 switch them off"
        )
    for name in ("plan.sampler_share", "plan.learner_share"):
        if not 0 < field_value(config, name) <= 1:
            raise ConfigError(
                f"{name} = {field_value(config, name)} must be above 0 and at most 1, a share of the roofline; change "
                f"it in the YAML or with --{name}"
            )
    if not 0 < config.reward.timeout_seconds < math.inf:
        raise ConfigError(
            f"reward.timeout_seconds = {config.reward.timeout_seconds} must be positive and finite; change it in the "
            "YAML or with --reward.timeout_seconds"
        )
    if config.model.path == "" and config.model.architecture not in ARCHITECTURES:
        raise ConfigError(
            f"model.architecture = {config.model.architecture!r} is not known; choose one of "
            f"{', '.join(ARCHITECTURES)}, or give model.path"
        )


def _check_algorithm(config: RunConfig) -> None:
    algorithm, prompts = config.algorithm, config.data.prompts_per_step
    if algorithm.group_size == 1 and algorithm.advantage != "reinforce_pp":
        raise ConfigError(
            f"algorithm.group_size = 1: algorithm.advantage = {algorithm.advantage!r} compares a completion with "
            "others of its prompt ('grpo' by a standard deviation, which a single reward has not); use a group of at "
            "least 2"
        )
    if algorithm.group_size == 1 and algorithm.dynamic_sampling_rounds:
        raise ConfigError(
            f"algorithm.dynamic_sampling_rounds = {algorithm.dynamic_sampling_rounds} looks for groups whose rewards "
            "differ, and algorithm.group_size = 1 has none; set the rounds to 0, or use a group of at least 2"
        )
    if algorithm.old_logprobs == "current" and algorithm.updates_per_step > 1:
        raise ConfigError(
            f"algorithm.old_logprobs = 'current' makes every ratio 1, which is right for the first update only, and "
            f"algorithm.updates_per_step is {algorithm.updates_per_step}; set it to 1, or old_logprobs to 'behaviour'"
        )
    if algorithm.loss == "dppo_mask" and algorithm.old_logprobs != "behaviour":
        raise ConfigError(
            f"algorithm.loss = 'dppo_mask' is a loss against the sampler's log-probs, and algorithm.old_logprobs is "
            f"{algorithm.old_logprobs!r}; set it to 'behaviour'"
        )
    if algorithm.correction != "off" and algorithm.old_logprobs == "behaviour":
        raise ConfigError(
            f"algorithm.correction = {algorithm.correction!r} weighs old against behaviour log-probs, which "
            "algorithm.old_logprobs = 'behaviour' makes the same; use 'recompute' or 'current', or correction 'off'"
        )
    if algorithm.correction_normalise and (algorithm.correction == "off" or algorithm.old_logprobs != "recompute"):
        raise ConfigError(
            f"algorithm.correction_normalise = true with algorithm.correction = {algorithm.correction!r} and "
            f"algorithm.old_logprobs = {algorithm.old_logprobs!r}: the mean is of the weights of a whole update, known "
            "before it only where there are some and old log-probs are recomputed; set a correction and "
            "old_logprobs = 'recompute', or correction_normalise to false"
        )
    if algorithm.correction_low > algorithm.correction_high:
        raise ConfigError(
            f"algorithm.correction_low = {algorithm.correction_low} is above algorithm.correction_high = "
            f"{algorithm.correction_high}: no ratio is trusted; exchange them"
        )
    if algorithm.kl_in == "reward" and algorithm.kl_importance_weight:
        raise ConfigError(
            "algorithm.kl_importance_weight = true with algorithm.kl_in = 'reward': a reward has no gradient to be "
            "corrected; set kl_in to 'loss' or kl_importance_weight to false"
        )
    if algorithm.kl_in == "reward" and algorithm.advantage == "reinforce_pp":
        raise ConfigError(
            "algorithm.kl_in = 'reward' with algorithm.advantage = 'reinforce_pp' needs a return per token, which is "
            "not offered; set kl_in to 'loss', or take another advantage"
        )
    if prompts % algorithm.updates_per_step:
        raise ConfigError(
            f"data.prompts_per_step = {prompts} cannot be split into algorithm.updates_per_step = "
            f"{algorithm.updates_per_step} equal updates; make it a multiple"
        )
    if config.sampling.temperature == 0:
        raise ConfigError(
            "sampling.temperature = 0 samples greedily: all completions of a group are the same and no advantage is "
            "left; use a positive temperature (evaluation.temperature may be 0)"
        )


def _check_reference(config: RunConfig) -> None:
    algorithm = config.algorithm
    update, decay, every = algorithm.reference_update, algorithm.reference_ema_decay, algorithm.reference_every_steps
    if update != "fixed" and algorithm.kl_coefficient == 0:
        raise ConfigError(
            f"algorithm.reference_update = {update!r} moves a reference model, and algorithm.kl_coefficient = 0 keeps "
            "none; set a coefficient above 0, or the update to 'fixed'"
        )
    if (update == "ema") != (decay > 0) or decay >= 1:
        raise ConfigError(
            f"algorithm.reference_ema_decay = {decay} with algorithm.reference_update = {update!r}: it must be above 0 "
            "and below 1 with 'ema', the share of the reference that stays after a step, and 0 without"
        )
    if (update == "periodic") != (every > 0):
        raise ConfigError(
            f"algorithm.reference_every_steps = {every} with algorithm.reference_update = {update!r}: it must be at "
            "least 1 with 'periodic' and 0 without"
        )


def _check_optimizer(config: RunConfig) -> None:
    optimizer = config.optimizer
    final, end, warmup = optimizer.final_learning_rate_fraction, optimizer.decay_updates, optimizer.warmup_updates
    if not 0 <= final <= 1:
        raise ConfigError(
            f"optimizer.final_learning_rate_fraction = {final} must be from 0 to 1, a share of the learning rate; "
            "change it in the YAML or with --optimizer.final_learning_rate_fraction"
        )
    if optimizer.schedule == "constant" and (end or final):
        raise ConfigError(
            f"optimizer.decay_updates = {end} and optimizer.final_learning_rate_fraction = {final} do nothing with "
            "optimizer.schedule = 'constant'; set the schedule to 'linear' or 'cosine', or leave both at 0"
        )
    if optimizer.schedule != "constant" and end <= warmup:
        raise ConfigError(
            f"optimizer.decay_updates = {end} with optimizer.schedule = {optimizer.schedule!r} must be above "
            f"optimizer.warmup_updates = {warmup}, for the decay starts there; the updates of a whole run are its "
            "steps x algorithm.updates_per_step"
        )


def _check_lora(config: RunConfig) -> None:
    lora, known = config.lora, ", ".join(LORA_TARGETS)
    for name in lora.targets:
        if name not in LORA_TARGETS:
            plain = name.removesuffix("_proj")
            nearest = [plain] if plain in LORA_TARGETS else difflib.get_close_matches(plain, LORA_TARGETS, n=1)
            hint = f"perhaps you meant {nearest[0]}; " if nearest else ""
            raise ConfigError(
                f"lora.targets holds {name!r}, which is no matrix of a layer; {hint}choose from {known} (the default: "
                "all of them)"
            )
    if lora.rank == 0:
        return
    if not lora.targets or len(set(lora.targets)) < len(lora.targets):
        raise ConfigError(
            f"lora.targets = {list(lora.targets)} with lora.rank = {lora.rank} must name at least one matrix, and none "
            f"twice; choose from {known}, or set lora.rank to 0 to train all parameters"
        )
    if config.optimizer.name == "muon":
        raise ConfigError(
            f"optimizer.name = 'muon' orthogonalises the updates of whole matrices, and lora.rank = {lora.rank} trains "
            "factors of them; set optimizer.name to 'adamw', or lora.rank to 0"
        )
    if config.algorithm.reference_update != "fixed":
        raise ConfigError(
            f"algorithm.reference_update = {config.algorithm.reference_update!r} moves the reference, and with "
            f"lora.rank = {lora.rank} that is the frozen model itself; set it to 'fixed', or lora.rank to 0"
        )
