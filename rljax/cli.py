"""The `rljax` command: each subcommand is a call of a function elsewhere. Imports nothing heavy until it must."""

import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from rljax.config import ConfigError

USAGE_ERROR = 64
"""Exit code of input that cannot be used; a launcher must not try it again."""


def _train(argv: list[str]) -> None:
    """GRPO: trains, or resumes the run folder if it holds a checkpoint   CONFIG.yaml ... [--a.b value]"""
    from rljax.config_file import parse_config

    config = parse_config(argv, prog="rljax train")
    _log_to_stdout()
    from rljax.scaling.report import write_report
    from rljax.train import train

    summary = train(config)
    _print_table(config.run_dir, summary, str(write_report(config.run_dir)))


def _sft(argv: list[str]) -> None:
    """Supervised warm start: writes a Hugging Face folder   CONFIG.yaml ... [--a.b value]"""
    from rljax.config_file import parse_config

    config = parse_config(argv, prog="rljax sft")
    output = Path(config.sft.output or Path(config.run_dir) / "sft")
    if output.exists():  # said now, not when the training is done
        raise ConfigError(f"sft.output = {output} exists and is not overwritten; give another folder, or remove it")
    _log_to_stdout()
    from rljax.sft import sft

    sft(config)


def _sample(argv: list[str]) -> None:
    """Completions of prompts given or in a file, as JSON lines   CONFIG.yaml ... [--sample.prompts TEXT ...]"""
    from rljax.config_file import parse_config

    config = parse_config(argv, prog="rljax sample")
    from rljax.sample import sample

    sample(config)


def _convert(argv: list[str]) -> None:
    """GGUF file, `demo:smollm2` or run folder to a Hugging Face folder   SOURCE DESTINATION [--adapter]"""
    adapter = "--adapter" in argv
    places = [argument for argument in argv if argument != "--adapter"]
    if len(places) != 2 or places[0].startswith("-"):
        print("usage: rljax convert SOURCE DESTINATION [--adapter]\n\n" + (_convert.__doc__ or ""))
        print(
            "\nSOURCE       a .gguf file; demo:smollm2 (SmolLM2-135M-Instruct, extra `demo`); or a run folder with "
            "checkpoints\nDESTINATION  a folder that does not exist yet\n--adapter    of a run with LoRA: only its "
            "adapter, as a PEFT folder; without it, the model with the adapter merged"
        )
        if argv not in (["--help"], ["-h"]):
            raise ConfigError(
                f"rljax convert was given {len(places)} argument(s) and takes 2; give SOURCE and DESTINATION"
            )
        return
    _log_to_stdout()
    from rljax.export import convert

    convert(*places, adapter=adapter)


def _report(argv: list[str]) -> None:
    """One self-contained HTML page of a run folder   RUN_DIR"""
    if len(argv) != 1 or argv[0].startswith("-"):
        print("usage: rljax report RUN_DIR\n\n" + (_report.__doc__ or ""))
        if argv not in (["--help"], ["-h"]):
            raise ConfigError(f"rljax report was given {len(argv)} argument(s) and takes 1; give RUN_DIR")
        return
    from rljax.scaling.report import write_report

    print(write_report(argv[0]))


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "train": _train,
    "sft": _sft,
    "sample": _sample,
    "convert": _convert,
    "report": _report,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand; returns the exit code: 0, 64 for unusable input, 1 for anything else that failed."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0 if arguments else USAGE_ERROR
    name, *rest = arguments
    if name not in COMMANDS:
        import difflib

        nearest = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; perhaps you meant {nearest[0]}" if nearest else ""
        print(f"error: rljax has no command {name!r}{hint}. Commands: {', '.join(COMMANDS)}", file=sys.stderr)
        return USAGE_ERROR
    try:
        COMMANDS[name](rest)
    except ConfigError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)  # what it quotes may hold line ends
        return USAGE_ERROR
    except SystemExit as stop:  # --help, when it has been printed
        return 0 if stop.code in (None, 0) else 1
    except KeyboardInterrupt:
        resumes = "; the same command resumes from the last checkpoint" if name == "train" else ""
        print(f"interrupted{resumes}", file=sys.stderr)
        return 130
    except Exception as error:
        if isinstance(error, BrokenPipeError) and rest in (["--help"], ["-h"]):  # `--help | head` has read enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes at its end
            return 0
        traceback.print_exc()
        return 1
    return 0


def _usage() -> str:
    lines = ["usage: rljax COMMAND ...", "", "Reinforcement-learning post-training of language models in JAX.", ""]
    for name, command in COMMANDS.items():
        what, _, arguments = (command.__doc__ or "").partition("   ")
        lines += [f"  rljax {name} {arguments}", f"      {what}"]
    return "\n".join([*lines, "", "`rljax COMMAND --help` lists every option."])


def _log_to_stdout() -> None:
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    for chatty in ("absl", "jax", "orbax", "httpx", "grain"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


def _print_table(run_dir: str, summary: dict[str, float], report: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=run_dir)
    table.add_column("steps", justify="right")
    row = [f"{summary['steps']:.0f}"]
    if "first" in summary:
        for title, value in (("pass@1 before", summary["first"]), ("pass@1 after", summary["last"])):
            table.add_column(title, justify="right")
            row.append(f"{value:.3f}")
        table.add_column("change", justify="right")
        row.append(f"{summary['last'] - summary['first']:+.3f}")
    table.add_row(*row)
    console = Console()
    console.print(table)
    console.print(f"report: {report}", soft_wrap=True, highlight=False)


if __name__ == "__main__":
    sys.exit(main())
