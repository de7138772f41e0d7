"""Weights from one form to another: GGUF files and run folders to Hugging Face folders, and adapters to PEFT's."""

import dataclasses
import json
import logging
from pathlib import Path

from rljax.checkpoint import CheckpointStore
from rljax.config import ConfigError, MeshConfig, ModelConfig, RunConfig
from rljax.config_file import parse_config, read_yaml
from rljax.models.gguf import convert_gguf, demo_gguf
from rljax.models.hf import describe_architecture
from rljax.models.lora import attach
from rljax.models.peft import save_adapter
from rljax.policy import Policy, open_policy

logger = logging.getLogger(__name__)

DEMO = "demo:smollm2"


def convert(source: str, destination: str, *, adapter: bool = False) -> None:
    """Writes a Hugging Face folder at `destination` from a .gguf file, `demo:smollm2`, or a run folder.

    Args:
      adapter: only the LoRA adapter of a run, as a PEFT folder.

    Raises:
      ConfigError: the source is none of these, or has no adapter; the destination exists.
    """
    if Path(destination).exists():
        raise ConfigError(f"destination {destination} exists; give a folder that does not, nothing is overwritten")
    is_run = (Path(source) / "config.yaml").is_file()
    if adapter and not is_run:
        raise ConfigError(
            f"--adapter with source {source!r}: only the folder of a run with LoRA holds an adapter; give one"
        )
    if source == DEMO:
        convert_gguf(demo_gguf(), destination)
    elif source.endswith(".gguf"):
        if not Path(source).is_file():
            raise ConfigError(f"GGUF file {source} does not exist; give the path of one, or {DEMO}")
        convert_gguf(Path(source), destination)
    elif is_run:
        export_run(Path(source), destination, adapter=adapter)
    elif (Path(source) / "config.json").is_file():
        raise ConfigError(
            f"source {source} is a Hugging Face folder already; give it as model.path, a run starts there"
        )
    else:
        raise ConfigError(
            f"source {source!r} is not a .gguf file, not {DEMO!r}, and holds no config.yaml as a run folder does; "
            "give one of these"
        )
    logger.info("wrote %s", destination)


def save_description(policy: Policy, folder: Path) -> None:
    """Writes what a Hugging Face folder holds beside the weights: with it in a run folder, `export_run` needs no other.

    Files: config.json, generation_config.json (stop and pad ids), tokenizer.json, tokenizer_config.json.
    """
    tokenizer = policy.tokenizer
    tokenizer.save(folder)
    for name, content in (
        ("config.json", describe_architecture(policy.arch)),
        ("generation_config.json", {"eos_token_id": list(tokenizer.stop_ids), "pad_token_id": tokenizer.pad_id}),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def export_run(run_dir: Path, destination: str, *, adapter: bool = False) -> None:
    """The newest checkpoint of a run as a Hugging Face folder, or its LoRA `adapter` as one of PEFT.

    Model and tokenizer are those described in `run_dir`/model, so a run can be moved; a run without that folder needs
    the folders named in its config.yaml, as seen from the working directory. So does a run with LoRA, whose checkpoints
    hold the adapter and not the model it belongs to.

    Raises:
      ConfigError: `adapter` of a run without one; a folder that is needed is not there.
    """
    with_lora = bool(read_yaml(run_dir / "config.yaml").get("lora", {}).get("rank"))
    if adapter and not with_lora:
        raise ConfigError(
            f"{run_dir} is a run without LoRA (lora.rank = 0), so there is no adapter; leave --adapter out to write "
            "the model"
        )
    if (run_dir / "model").is_dir() and not with_lora:
        config = RunConfig(model=ModelConfig(path=str(run_dir / "model")))
    else:
        config = parse_config([str(run_dir / "config.yaml")])
    # The devices here need not be those of the run; the checkpoint is read onto whatever mesh this machine makes.
    policy = open_policy(dataclasses.replace(config, mesh=MeshConfig()))
    store = CheckpointStore(run_dir / "checkpoints", None)
    try:
        state, _, step = store.restore({"params": policy.trained_shapes}, partial=True)
    finally:
        store.close()
    logger.info("step %d of %s", step, run_dir)
    if adapter:
        save_adapter(state["params"], config.lora, config.model, destination)
    else:
        base = policy.load_params(config.seed) if with_lora else None
        policy.export(attach(base, state["params"], config.lora.scale), destination)
