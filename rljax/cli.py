"""The `rljax` command: each subcommand is a call of a function elsewhere. Imports nothing heavy until it must."""

import argparse
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from rljax.config import CHECKPOINT_FAILED, NON_FINITE, PREEMPTED, CheckpointError, ConfigError, NonFiniteError

if TYPE_CHECKING:
    from rich.table import Table

    from rljax.config import RewardConfig
    from rljax.evaluate.predictions import SetResult
    from rljax.scaling.sweep import Status

USAGE_ERROR = 64
"""Exit code of input that cannot be used; a launcher must not try it again."""


class _Parser(argparse.ArgumentParser):
    """Raises ConfigError where argparse prints and exits."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.prog}: {message}; `{self.prog} --help` says what it takes")


def _train(argv: list[str]) -> None:
    """GRPO: trains, or resumes the run folder if it holds a checkpoint   CONFIG.yaml ... [--a.b value]"""
    from rljax.config_file import parse_config

    config = parse_config(argv, prog="rljax train")
    _log_to_stdout()
    from rljax import hosts

    hosts.start()
    import jax

    from rljax.scaling.forecast import forecast_metrics
    from rljax.scaling.report import write_report
    from rljax.train import train

    summary = train(config, forecast=forecast_metrics)
    if jax.process_index() == 0:
        _print_table(config.run_dir, summary, str(write_report(config.run_dir)))


def _sft(argv: list[str]) -> None:
    """Supervised warm start: writes a Hugging Face folder   CONFIG.yaml ... [--a.b value]"""
    from rljax.config_file import parse_config

    config = parse_config(argv, prog="rljax sft")
    output = Path(config.sft.output or Path(config.run_dir) / "sft")
    if output.exists():  # said now, not when the training is done
        raise ConfigError(f"sft.output = {output} exists and is not overwritten; give another folder, or remove it")
    _log_to_stdout()
    from rljax import hosts

    hosts.start()
    from rljax.sft import sft

    sft(config)


def _eval(argv: list[str]) -> None:
    """Measures a policy on named sets   CONFIG.yaml ... --eval.data FILE ... | --rescore FOLDER [--mode paper|fixed]"""
    if any(argument.partition("=")[0] == "--rescore" for argument in argv):
        _rescore(argv)
        return
    from rljax.config_file import parse_config

    config = parse_config(argv, prog="rljax eval")
    _log_to_stdout()
    from rljax.evaluate.sets import evaluate

    _print_sets(evaluate(config))


def _rescore(argv: list[str]) -> None:
    parser = _Parser(prog="rljax eval", description="Scores saved predictions anew, without a model.")
    parser.add_argument("--rescore", required=True, metavar="FOLDER", help="what `rljax eval` wrote")
    parser.add_argument("--output", default="", help="folder to write; without it, one inside FOLDER")
    _add_reward_arguments(parser)
    given = parser.parse_args(argv)
    config = _reward_config(given)
    from rljax.evaluate.predictions import rescore

    _print_sets(rescore(given.rescore, config, given.output))


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


def _reward(argv: list[str]) -> None:
    """Scores saved completions, JSON lines in and out   FILE.jsonl [--mode paper|fixed] [--output FILE]"""
    given = reward_parser().parse_args(argv)
    config = _reward_config(given)
    from rljax.rewards.offline import score_file

    score_file(given.jsonl, config, given.output)


def reward_parser() -> argparse.ArgumentParser:
    """Arguments of `rljax reward`; raises ConfigError where others print and exit."""
    parser = _Parser(
        prog="rljax reward",
        description="Scores completions offline: every line of FILE holds data_source, response, ground_truth and "
        "perhaps extra_info; the same lines come out with score, error and seconds.",
    )
    parser.add_argument("jsonl", metavar="FILE.jsonl")
    parser.add_argument("--output", default="", help="JSONL file to write; without it, the terminal")
    _add_reward_arguments(parser)
    return parser


def _add_reward_arguments(parser: argparse.ArgumentParser) -> None:
    """What scores saved completions; `_reward_config` reads it."""
    from rljax.config import RewardConfig

    default = RewardConfig()
    parser.add_argument("--mode", choices=("paper", "fixed"), default=default.mode)
    parser.add_argument("--name", default=default.name, help="verifier; auto: by data_source")
    parser.add_argument("--file", default="", metavar="FILE.py:FUNCTION", help="a reward of your own")
    parser.add_argument("--workers", type=int, default=default.workers)
    parser.add_argument("--timeout-seconds", type=float, default=default.timeout_seconds, help="limit of an item")
    parser.add_argument("--unsandboxed-code", action="store_true", help="run programs where there is no sandbox")


def _reward_config(given: argparse.Namespace) -> "RewardConfig":
    from rljax.config import RewardConfig

    if given.workers < 1 or not 0 < given.timeout_seconds < float("inf"):
        raise ConfigError(
            f"--workers {given.workers} must be at least 1 and --timeout-seconds {given.timeout_seconds} positive and "
            "finite"
        )
    return RewardConfig(
        name=given.name,
        mode=given.mode,
        workers=given.workers,
        timeout_seconds=given.timeout_seconds,
        file=given.file,
        unsandboxed_code=given.unsandboxed_code,
    )


def _sweep(argv: list[str]) -> None:
    """Many runs and one table of their curves; finished ones are skipped   SWEEP.yaml [--print]"""
    from rljax.scaling import grid

    parser = _Parser(
        prog="rljax sweep",
        description="Does the runs of a sweep file that are not finished, one after the other;\na run that was stopped "
        "resumes from its checkpoint, one that fails stops no other.",
        epilog=grid.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", metavar="SWEEP.yaml")
    parser.add_argument("--print", action="store_true", help="do nothing but list the commands, for other machines")
    given = parser.parse_args(argv)
    from rljax.scaling.sweep import commands, run_sweep

    sweep = grid.read_sweep(given.file)
    if given.print:
        print("\n".join(commands(sweep)))
        return
    from rich.console import Console
    from rich.live import Live

    console = Console(file=sys.stdout)
    if not console.is_terminal:  # there the table is live, and lines would tear it
        _log_to_stdout()
    # Elsewhere than on a terminal, rich shows nothing but the last state.
    with Live(console=console, auto_refresh=False, vertical_overflow="visible") as live:
        failures = run_sweep(sweep, lambda statuses: live.update(_sweep_table(statuses), refresh=True))
    for failure in failures:
        print(f"\n{failure.name}: exit code {failure.exit_code}; the end of {failure.log}:\n{failure.tail}")
    if (curves := sweep.folder / "curves.csv").is_file():
        console.print(f"curves: {curves}", soft_wrap=True, highlight=False)
    if failures:
        raise SystemExit(1)


def _sweep_table(statuses: "Sequence[Status]") -> "Table":
    from rich.table import Table

    finished = sum(status.outcome == "finished" for status in statuses)
    table = Table(caption=f"{finished} of {len(statuses)} runs finished")
    table.add_column("run")
    for title in ("state", "step", "pass@1", "accelerator-s"):
        table.add_column(title, justify="right")
    for status in statuses:
        done, steps = status.progress, status.run.config.steps
        table.add_row(
            status.run.name,
            status.outcome,
            (f"{done.step}/{steps}" if steps else f"{done.step}") if done.step >= 0 else "",
            f"{done.first:.3f} -> {done.last:.3f}" if done.first is not None else "",
            f"{done.accelerator_seconds:,.0f}" if done.accelerator_seconds else "",
        )
    return table


def _report(argv: list[str]) -> None:
    """One self-contained HTML page of a run folder, or figures and one of a sweep   RUN_DIR | SWEEP_DIR | CURVES.csv"""
    given = report_parser().parse_args(argv)
    is_run = (Path(given.source) / "metrics.jsonl").is_file()
    if Path(given.source).suffix == ".csv" or (not is_run and (Path(given.source) / "curves.csv").is_file()):
        from rljax.scaling.sweep_page import write_sweep_report

        print(write_sweep_report(given.source, given.output, beside=given.beside, models=given.models))
        return
    if given.output or given.beside or given.models:
        raise ConfigError(
            f"--output, --beside and --models are of a sweep or a table, and {given.source} is not one; leave them out"
        )
    from rljax.scaling.report import write_report

    print(write_report(given.source))


def report_parser() -> argparse.ArgumentParser:
    """Arguments of `rljax report`."""
    parser = _Parser(prog="rljax report", allow_abbrev=False, description=(
        "Writes RUN_DIR/report.html; of a sweep or a table of curves, figures (PNG, SVG) and one page with them."
    ))  # fmt: skip
    parser.add_argument("source", metavar="RUN_DIR | SWEEP_DIR | CURVES.csv")
    parser.add_argument("--output", metavar="FOLDER", help="of a sweep or table; default: its own, or CURVES-report")
    parser.add_argument("--beside", metavar="CURVES.csv", help="another table, such as the paper's, beside each figure")
    parser.add_argument("--models", metavar="MODELS.csv", help="other models' losses, beside those of the sizes")
    return parser


def _fit(argv: list[str]) -> None:
    """Scaling laws of curves, with intervals, as fit.json   CURVES.csv ... [--form F] [--x X] [--protocol P]"""
    from rljax.scaling.command import fit_arguments, run_fit

    run_fit(fit_arguments(_Parser(prog="rljax fit", allow_abbrev=False)).parse_args(argv))


def _advise(argv: list[str]) -> None:
    """Which size, how many steps, how many repeats   [FIT.json] --budget FLOPS|Nprompts --unique N"""
    from rljax.scaling.command import advise_arguments, run_advise

    run_advise(advise_arguments(_Parser(prog="rljax advise", allow_abbrev=False)).parse_args(argv))


def _plan(argv: list[str]) -> None:
    """Does a run fit on a slice, how fast, at what cost   CONFIG.yaml ... --plan.slice v5p-128 [--search|--compile]"""
    if argv[:1] == ["--costs"]:
        if len(argv) != 2:
            raise ConfigError(f"rljax plan --costs takes one folder of YAML files and was given {len(argv) - 1}")
        from rljax.plan_page import page

        print(page(argv[1]), end="")
        return
    from rljax.config_file import parse_config

    switches = {"--search": "--plan.search=true", "--compile": "--plan.compile=true"}
    config = parse_config([switches.get(argument, argument) for argument in argv], prog="rljax plan")
    from rljax.plan import plan_command, planned

    print("\n".join(plan_command(config)), flush=True)
    if config.plan.compile:
        from rljax.compiled_plan import compiled_lines

        for line in compiled_lines(planned(config)):
            print(line, flush=True)


def _data(argv: list[str]) -> None:
    """Makes the paper's data files, or says what a file holds   prepare KIND SOURCE OUTPUT_DIR | inspect FILE ..."""
    options = data_parser().parse_args(argv)
    if options.action == "prepare":
        _prepare(options)
        return
    from rljax.data.inspect import as_json, as_text, inspect

    found = inspect(
        options.files,
        tokenizer=options.tokenizer,
        against=options.against,
        max_prompt_tokens=options.max_prompt_tokens,
        difficulty_field=options.difficulty_field,
        system_prompt=options.system_prompt,
    )
    said = as_json(found) if options.json else as_text(found)
    print(said.encode("utf-8", "backslashreplace").decode("utf-8"))  # half a surrogate pair, which JSON may hold


def _prepare(options: argparse.Namespace) -> None:
    guru = {name: getattr(options, name) for name in ("holdout", "holdout_file", "reuse_sets")}
    guru = {name: value for name, value in guru.items() if value is not None}
    if guru and options.kind != "guru-math":
        raise ConfigError(
            f"rljax data prepare {options.kind} was given --{next(iter(guru)).replace('_', '-')}, which is of "
            "guru-math only; leave it out"
        )
    if "holdout" in guru and "holdout_file" in guru:
        raise ConfigError("--holdout draws problems and --holdout-file names them; give one of the two")
    from rljax.data.prepare import prepare

    print(prepare(options.kind, options.source, options.output_dir, **guru))


def data_parser() -> argparse.ArgumentParser:
    """Arguments of `rljax data`; raises ConfigError where others print and exit."""
    parser = _Parser(prog="rljax data", description="Data in the verl schema, and what it holds.", allow_abbrev=False)
    actions = parser.add_subparsers(dest="action", required=True, metavar="{prepare,inspect}")

    make = actions.add_parser("prepare", help="the paper's files from the raw sets", allow_abbrev=False)
    make.add_argument("kind", choices=("guru-math", "gsm8k", "math"))
    make.add_argument("source", metavar="SOURCE", help="file, folder, hub:OWNER/NAME or hub:OWNER/NAME:CONFIG")
    make.add_argument("output_dir", metavar="OUTPUT_DIR", help="where the .parquet files go; none is overwritten")
    make.add_argument("--holdout", type=int, metavar="N", help="guru-math: problems held out, half easy (default 500)")
    make.add_argument("--holdout-file", metavar="FILE", help="guru-math: hold out the problems of this file instead")
    make.add_argument(
        "--reuse-sets", action="store_true", default=None, help="guru-math: also the paper's subsets, 1/2 to 1/100"
    )

    look = actions.add_parser("inspect", help="counts, difficulties, lengths, texts, duplicates", allow_abbrev=False)
    look.add_argument("files", nargs="+", metavar="FILE", help="as data.train")
    look.add_argument("--tokenizer", default="", metavar="FOLDER", help="folder or hub name; without it, no lengths")
    look.add_argument(
        "--against", nargs="+", default=[], metavar="FILE", help="evaluation sets that must share nothing"
    )
    look.add_argument("--max-prompt-tokens", type=int, default=0, metavar="N", help="count prompts longer than this")
    look.add_argument(
        "--difficulty-field", default="qwen2.5_7b_pass_rate", metavar="NAME", help="as data.difficulty_field"
    )
    look.add_argument("--system-prompt", default="", metavar="TEXT", help="as data.system_prompt")
    look.add_argument("--json", action="store_true", help="one JSON array instead of tables")
    return parser


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "train": _train,
    "sft": _sft,
    "eval": _eval,
    "sample": _sample,
    "reward": _reward,
    "convert": _convert,
    "sweep": _sweep,
    "fit": _fit,
    "advise": _advise,
    "report": _report,
    "plan": _plan,
    "data": _data,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand; returns the exit code: 0, 64 for unusable input, 75 for a run that was told to stop and has
    saved its step (this process ignores SIGTERM from then on), 71 for one that learns nothing any more, 72 for one that
    cannot save, 1 for anything else that failed."""
    code = _run(list(sys.argv[1:] if argv is None else argv))
    if code == PREEMPTED and threading.current_thread() is threading.main_thread():
        # All is saved. Python lets go of its handlers while it ends: a SIGTERM that comes late, as from a launcher that
        # tells each process of a run, would make the exit code that of a killed program.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    hosts = sys.modules.get("rljax.hosts")
    if code not in (0, PREEMPTED) and hosts is not None:
        hosts.leave(code)
    return code


def _run(arguments: list[str]) -> int:
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
    except NonFiniteError as error:
        print(f"error: {error}", file=sys.stderr)
        return NON_FINITE
    except CheckpointError as error:
        traceback.print_exc()  # what failed below says where
        print(f"error: {error}", file=sys.stderr)
        return CHECKPOINT_FAILED
    except SystemExit as stop:  # --help, when it has been printed; a preempted run
        return {None: 0, 0: 0, PREEMPTED: PREEMPTED}.get(stop.code, 1)
    except KeyboardInterrupt:
        resumes = "; the same command resumes from the last checkpoint" if name in ("train", "sweep") else ""
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


def _print_sets(results: "Sequence[SetResult]") -> None:
    from rich.console import Console
    from rich.table import Table

    from rljax.evaluate.predictions import overall, table_rows

    (first, *titles), *rows = table_rows(results)
    table = Table(caption=f"mean over data sources: {overall(results):.3f}; ± standard error, clustered by prompt")
    table.add_column(first)
    for title in titles:
        table.add_column(title, justify="right")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


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
