"""The shipped sweeps are the experiments they say they are."""

import itertools
import math
from pathlib import Path

import pytest

from rljax.config import ARCHITECTURES
from rljax.costs import num_non_embedding_params
from rljax.data.reuse import make_plan, steps_for
from rljax.scaling.grid import Sweep, read_sweep

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "scaling"
FILES = sorted(FOLDER.glob("*.yaml"))


@pytest.fixture(scope="module")
def ladder() -> Sweep:
    return read_sweep(FOLDER / "ladder.yaml")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_shipped_sweep_is_one_and_has_its_line(file: Path) -> None:
    sweep = read_sweep(file)
    names = [run.name for run in sweep.runs]
    assert len(set(names)) == len(names) > 1
    assert f"`scaling/{file.name}`" in (FOLDER.parent / "README.md").read_text()


def test_the_sizes_span_two_decades_and_are_what_their_names_say(ladder: Sweep) -> None:
    sizes = {run.labels["size"]: run.config.model.architecture for run in ladder.runs}
    params = [num_non_embedding_params(ARCHITECTURES[name]) for name in sizes.values()]
    assert len(params) >= 6 and params == sorted(params)
    assert max(params) / min(params) >= 100
    assert max(b / a for a, b in itertools.pairwise(params)) < 4
    for label, count in zip(sizes, params, strict=True):
        named = float(label[:-1]) * {"k": 1e3, "m": 1e6}[label[-1]]
        assert math.isclose(named, count, rel_tol=0.06), (label, count)
    for arch in map(ARCHITECTURES.get, sizes.values()):
        assert arch is not None and arch.qkv_bias and arch.tied_embeddings and not arch.qk_norm  # Qwen2.5


def test_the_axes_are_those_of_the_paper(ladder: Sweep) -> None:
    assert len(ladder.runs) == 6 * 3 + 6 + 3 + 1
    middle = [run for run in ladder.runs if run.labels["size"] == "590k" and run.config.seed == 0]
    assert {int(run.labels["tau"]) for run in middle} == {1, 2, 5, 20, 25, 50, 100}
    assert {run.config.algorithm.group_size for run in middle} == {4, 8, 16, 32}
    assert {run.config.data.order for run in middle} == {"shuffle", "curriculum"}
    for run in ladder.runs:
        data = run.config.data
        plan = make_plan(data.task_records, unique=data.unique, repeats=data.repeats)
        assert (steps_for(plan, data.prompts_per_step, run.config.steps), data.unique * data.repeats) == (150, 4800)


def test_warm_starts_differ_in_size_alone(ladder: Sweep) -> None:
    assert len(ladder.starts) == 6
    recipes = {(s.config.seed, s.config.sft.steps, s.config.sft.learning_rate, s.config.data) for s in ladder.starts}
    assert len(recipes) == 1
    assert all(run.start is not None and run.start.name == run.labels["size"] for run in ladder.runs)
