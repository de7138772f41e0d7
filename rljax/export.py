"""Weights from one form to another: GGUF files and run folders to Hugging Face folders, and adapters to PEFT's."""

import json
import logging
from pathlib import Path

from rljax.config import ConfigError
from rljax.config_file import read_yaml
from rljax.models.gguf import convert_gguf, demo_gguf
from rljax.models.hf import describe_architecture
from rljax.models.lora import attach
from rljax.models.peft import save_adapter
from rljax.policy import Policy, load_run

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
    """The newest checkpoint of a run as a Hugging Face folder, or its LoRA `adapter` as one of PEFT (`load_run`).

    Raises:
      ConfigError: `adapter` of a run without one; a folder that is needed is not there.
    """
    with_lora = bool(read_yaml(run_dir / "config.yaml").get("lora", {}).get("rank"))
    if adapter and not with_lora:
        raise ConfigError(
            f"{run_dir} is a run without LoRA (lora.rank = 0), so there is no adapter; leave --adapter out to write "
            "the model"
        )
    run = load_run(run_dir, with_base=not adapter)
    logger.info("step %d of %s", run.step, run_dir)
    if adapter:
        save_adapter(run.trained, run.config.lora, run.config.model, destination)
    else:
        run.policy.export(attach(run.base, run.trained, run.lora_scale), destination)
