"""What the README says is so: its Python runs, its commands run in its order, and the files it names are there."""

import argparse
import contextlib
import dataclasses
import io
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from rljax.cli import COMMANDS, data_parser, main, report_parser, reward_parser
from rljax.config import ModelConfig, RunConfig
from rljax.config_file import parse_config
from rljax.data.records import read_records
from rljax.export import DEMO
from rljax.models import qwen2
from rljax.rewards.dispatch import verifier_for
from rljax.scaling.command import advise_arguments, fit_arguments
from rljax.types import Rollouts

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()

TINY = {
    "steps": 1,
    "data.prompts_per_step": 2,
    "data.task_records": 64,
    "algorithm.updates_per_step": 1,
    "algorithm.group_size": 2,
    "sampling.max_completion_tokens": 8,
    "sampling.chunk_tokens": 7,
    "evaluation.max_prompts": 2,
    "evaluation.samples_per_prompt": 2,  # the shape of training: no second sampler is compiled
    "reward.workers": 1,
    "sft.steps": 1,
    "sft.batch_size": 2,
}
"""Added to a command of the README, so that it takes seconds. One that sets its own number of steps gets 2."""


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def commands(program: str) -> list[list[str]]:
    """Arguments of each call of `program` in the README's shell blocks, in order; `\\` at a line's end joins two."""
    lines = "".join(blocks("sh")).replace("\\\n", " ").splitlines()
    assert all(line.split()[0] in ("make", "rljax") for line in lines), "a program this test does not know"
    return [shlex.split(line)[1:] for line in lines if line.split()[0] == program]


def tree() -> dict[str, str]:
    """Path -> clause of each line of the file tree; folders end with a slash."""
    (block,) = blocks("text")
    found: dict[str, str] = {}
    folders: list[str] = []
    for line in block.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        name, _, clause = line.strip().partition(" ")
        folders[depth:] = [name]
        found["".join(folders)] = clause.strip()
    return found


def is_out_of_reach(arguments: list[str]) -> bool:
    """The command wants real weights, or files that are only an example."""
    absent = r"smollm2|Qwen/|^hub:|\.parquet|\.jsonl|paper_curves|fit\.json"
    return any(re.search(absent, argument) for argument in arguments)


RLJAX = commands("rljax")
IDS = [f"{place}-{arguments[0]}" for place, arguments in enumerate(RLJAX)]


# ----------------------------------------------------------------------------------------------------------- commands


@contextlib.contextmanager
def quick_compiles() -> Iterator[None]:
    """Programs run once here: a third of the time went into optimising them. None is left for other tests."""
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", False)
        jax.clear_caches()


@dataclasses.dataclass(frozen=True)
class Walk:
    """What came of the README's `rljax` commands, run one after the other in a folder with nothing but configs/."""

    folder: Path
    results: list[tuple[int, str]]
    """Exit code and what was said; (-1, "") for one that is out of reach."""


@pytest.fixture(scope="module")
def walk(tmp_path_factory: pytest.TempPathFactory) -> Walk:
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(ROOT / "configs", folder / "configs")
    results = []
    with contextlib.chdir(folder), quick_compiles():
        for arguments in RLJAX:
            if is_out_of_reach(arguments):
                results.append((-1, ""))
                continue
            if arguments[0] in ("train", "sft"):
                settings = TINY | ({"steps": 2} if "--steps" in arguments else {})
                arguments = [*arguments, *(f"--{name}={value}" for name, value in settings.items())]
            said = io.StringIO()
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                code = main(arguments)
            results.append((code, said.getvalue()))
    return Walk(folder, results)


@pytest.mark.parametrize("place", range(len(RLJAX)), ids=IDS)
def test_rljax_commands(place: int, walk: Walk) -> None:
    arguments = RLJAX[place]
    assert arguments[0] in COMMANDS
    code, said = walk.results[place]
    if not is_out_of_reach(arguments):
        assert code == 0, said
    elif arguments[0] == "data":  # parsed only
        assert data_parser().parse_args(arguments[1:]).action == arguments[1]
    elif arguments[0] == "reward":
        assert reward_parser().parse_args(arguments[1:]).mode == "paper"
    elif arguments[0] == "report":
        assert report_parser().parse_args(arguments[1:]).source.endswith(".csv")
    elif arguments[0] in ("fit", "advise"):
        takes = {"fit": fit_arguments, "advise": advise_arguments}[arguments[0]]
        assert takes(argparse.ArgumentParser()).parse_args(arguments[1:])
    elif arguments[0] == "convert":
        assert arguments[1] == DEMO and len(arguments) == 3
    else:  # parsed only
        files = [str(ROOT / argument) for argument in arguments[1:] if argument.endswith(".yaml")]
        config = parse_config([*files, *(a for a in arguments[1:] if not a.endswith(".yaml"))])
        assert config.data.train and config.evaluation.data and config.model.path


def test_the_commands_do_what_the_readme_says(walk: Walk) -> None:
    """Warm start, run, resume with more steps, report and export are all among them."""
    run = walk.folder / "runs" / "quickstart"
    for name in (
        "config.yaml",
        "metrics.jsonl",
        "curves.csv",
        "rollouts",
        "checkpoints",
        "exposures.csv",
        "report.html",
    ):
        assert (run / name).exists() and f"| `{name}{'/' * (run / name).is_dir()}` |" in README
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 3  # steps 0, 1, and 2 after the resume
    for folder in (run / "sft", run / "hf"):
        assert (folder / "model.safetensors").is_file() and (folder / "tokenizer.json").is_file()


def test_make_targets_exist() -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = [target for arguments in commands("make") for target in arguments]
    assert {"quickstart", "demo", "test"} <= set(named) <= set(targets)
    assert set(re.findall(r"`make ([a-z]+)`", README)) <= set(targets)


# ------------------------------------------------------------------------------------------------------ code and data


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    first, second = blocks("python")
    names: dict = {}
    exec(compile(first, "README.md", "exec"), names)
    exec(compile(second, "README.md", "exec"), names)
    rollouts = names["rollouts"]
    assert isinstance(rollouts, Rollouts) and rollouts.tokens.shape == (8, 16)
    assert names["metrics"]["policy/behaviour_gap_max"].value() < 1e-5
    assert "policy/behaviour_gap_max" in capsys.readouterr().out
    assert names["advantages"].any()  # or the gradient below would be 0 whatever the code did
    assert np.abs(names["gradient"]["embed"]).max() > 0
    assert qwen2.param_shapes(names["arch"]).keys() == names["gradient"].keys()


def test_the_data_line_is_a_record(tmp_path: Path) -> None:
    (line,) = blocks("json")
    (tmp_path / "mine.jsonl").write_text(line)
    (record,) = read_records(str(tmp_path / "mine.jsonl"))
    assert record.ground_truth == "144" and "\\boxed{}" in record.prompt[0]["content"]
    assert verifier_for(record.data_source) == "naive_dapo/fixed"


def test_the_ten_lines_are_the_defaults(tmp_path: Path) -> None:
    (block,) = blocks("yaml")
    assert len(block.splitlines()) == 10
    (tmp_path / "run.yaml").write_text(block)
    config, default = parse_config([str(tmp_path / "run.yaml")]), RunConfig()
    assert config == dataclasses.replace(
        default,
        run_dir="runs/mine",
        model=ModelConfig(path="Qwen/Qwen2.5-0.5B"),
        data=dataclasses.replace(default.data, train="train.parquet"),
        evaluation=dataclasses.replace(default.evaluation, data="holdout.parquet"),
    )


# -------------------------------------------------------------------------------------------------------------- files


def test_every_file_of_the_tree_exists() -> None:
    for path, clause in tree().items():
        assert (ROOT / path).is_dir() if path.endswith("/") else (ROOT / path).is_file(), path
        assert clause or path.startswith("rljax/"), path


def test_every_module_is_in_the_tree() -> None:
    modules = {str(file.relative_to(ROOT)) for file in (ROOT / "rljax").rglob("*.py") if file.stem != "__init__"}
    named = {path for path in tree() if path.endswith(".py")}
    assert modules == named


def test_what_the_readme_points_at_exists() -> None:
    for link in re.findall(r"\]\((?!https?://|#)([^)]+)\)", README):
        assert (ROOT / link).exists(), link
    for path in re.findall(r"`((?:tests|configs|rljax|benchmarks)/[\w./-]+)`", README):
        assert (ROOT / path).exists(), path
    modules = "|".join(path.name for path in (ROOT / "rljax").iterdir() if (path / "__init__.py").is_file())
    for path in re.findall(rf"`((?:{modules})/\w+\.py)`", README):
        assert (ROOT / "rljax" / path).is_file(), path
    functions = "\n".join(file.read_text() for file in (ROOT / "tests").rglob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", README):
        assert f"def {name}(" in functions, name


def test_every_config_has_its_line() -> None:
    text = (ROOT / "configs" / "README.md").read_text()
    names = {file.name for file in (ROOT / "configs").glob("*.yaml")}
    assert names and names == set(re.findall(r"^\| `([\w.-]+\.yaml)` \|", text, re.MULTILINE))
