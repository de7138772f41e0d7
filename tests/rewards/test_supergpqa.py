"""The option verifier on answers judged by hand, in both modes."""

import time

import pytest

from rljax.rewards.supergpqa import paper_score, score

LETTERS = "ABCDEFGHIJ"


def read(mode, response):
    """The letter that a mode reads: "" for none."""
    return "".join(letter for letter in LETTERS if mode(response, letter, {}) == 1.0)


@pytest.mark.parametrize(
    "response, letter",
    [
        ("\\boxed{A}", "A"),
        ("so \\boxed{B}, or rather \\boxed{C}", "C"),
        ("\\boxed {A}", "A"),
        ("\\boxed{ J }", "J"),
        ("\\boxed{(D)}", "D"),
        ("\\boxed{[D]}", "D"),
        ("\\boxed{D.}", "D"),
        ("\\boxed{\\text{E}}", "E"),
        ("\\boxed{\\textbf{(F)}}", "F"),
        ("\\boxed{$\\mathrm{G}$}", "G"),
        ("\\boxed{**H**}", "H"),
        ("\\boxed{\\boxed{H}}", "H"),
        ("\\boxed{A: 0.36g}", "A"),
        ("\\boxed{(A) 0.36 g, and so on}", "A"),
        ("\\boxed{I. \\text{Bernoulli}}", "I"),
        ("\\boxed{Option B}", "B"),
        ("\\boxed{The answer is B}", "B"),
        ("\\boxed{C} ends it.</s>\\boxed{D}", "C"),
        ("\\boxed{C}<|im_end|>\\boxed{D}", "C"),
        ("The answer is A.", "A"),
        ("The answer is: A", "A"),
        ("The answer is (A) 0.36g", "A"),
        ("The answer is A.\nThe answer is B.", "B"),
        ("The correct answer is **C**.", "C"),
        ("Final Answer: D", "D"),
        ("Final Answer: D\n", "D"),
        ("**Final Answer:** E\n\nDone.", "E"),
        ("## Final Answer\n\nF", "F"),
        ("Answer: G", "G"),
        ("put it in \\boxed{}. The answer is A.", "A"),
        ("Only put the letter in the box, e.g. \\boxed{A}. The answer is B.", "B"),
        ("\\boxed{A", ""),
        ("", ""),
        ("nothing", ""),
        ("\\boxed{ABC}", ""),
        ("\\boxed{Bernoulli}", ""),
        ("\\boxed{ABCDEFGHIJ}", ""),
        ("\\boxed{A, B}", ""),
        ("\\boxed{A or B}", ""),
        ("\\boxed{A. or B.}", ""),
        ("\\boxed{A) B) C)}", ""),
        ("\\boxed{A: B}", ""),
        ("\\boxed{\\text{A}\\text{B}}", ""),
        ("\\boxed{K}", ""),
        ("\\boxed{b}", ""),
        ("\\boxed{0.36g}", ""),
        ("\\boxed{}", ""),
        ("e.g. \\boxed{A}", ""),
        ("The answer is A good one", ""),
        ("The answer is unknown", ""),
        ("The answer is", ""),
        ("Boxed: \\boxed{Bernoulli}. The answer is B.", ""),  # the box goes first
        ("\ud800\\boxed{A}\0", "A"),
    ],
)
def test_option(response, letter):
    assert read(score, response) == letter


@pytest.mark.parametrize(
    "response, letter",
    [
        ("\\boxed{A}", "A"),
        ("\\boxed{B}, or rather \\boxed{C}", "C"),
        ("\\boxed{\\text{B}}", "B"),
        ("\\boxed{\\text{\\textbf{B}}}", "B"),
        ("\\boxed{\\text{\\textbf{\\emph{B}}}} Final Answer: C\n", "C"),  # three levels inside are too many
        ("\\boxed{x{\\boxed{{{D}}}}}", "D"),  # of nested boxes the outermost that is shallow enough
        ("\\boxed{E \\boxed{A}}", "A"),  # the first of A, B, ..., J in it
        ("\\boxed{ABC}", "A"),
        ("\\boxed{Bernoulli}", "B"),
        ("\\boxed{}} Final Answer: D\n", "D"),
        ("\\boxed{ Final Answer: D\n", "D"),
        ("\\boxed{A} {Final Answer: D\n", "A"),
        ("Final Answer: D\nThe answer is: C\n", "D"),
        ("The answer is: C\n", "C"),
        ("The answer is: C\nThe answer is: D\n", "D"),
        ("Final Answer: x<\nC\n", "C"),  # a line end behind "<" is passed over
        ("Final Answer: <b>C</b>\n", "C"),
        ("Final Answer: << Final Answer: D\n", "D"),
        ("Final Answer: C Final Answer: D\n", "A"),  # all of it, so the A of "Answer"
        ("\\boxed{A}</s>\\boxed{B}", "A"),
        ("\\boxed{A}<|endoftext|>\\boxed{B}", "A"),
        ("<|im_start|>user \\boxed{A}<|im_start|>assistant \\boxed{B}", "B"),
        ("<|im_start|>user \\boxed{A}", "A"),
        ("Assistant: \\boxed{A} Assistant: \\boxed{B}", "B"),
    ],
)
def test_paper_letter(response, letter):
    assert read(paper_score, response) == letter


@pytest.mark.parametrize(
    "response",
    [
        "",
        "nothing",
        "\\boxed {A}",
        "The answer is A.",
        "Final Answer: A",
        "Final Answer: A<",
        "Final Answer: <<A\n",
        "\\boxed{0.36}",
        "\\boxed{K} Final Answer: A\n",
        "Final Answer:\n",
        "\\boxed{A}Assistant: none",
        "\ud800\0",
    ],
)
def test_paper_draws_a_letter(response):
    drawn = read(paper_score, response)
    assert len(drawn) == 1
    assert read(paper_score, response) == drawn


def test_drawn_letters_are_uniform():
    drawn = "".join(read(paper_score, f"no letter at all, {i}") for i in range(2000))
    assert all(150 < drawn.count(letter) < 250 for letter in LETTERS)


def test_paper_compares_exactly():
    assert paper_score("\\boxed{A}", "A ", {}) == 0.0
    assert score("\\boxed{A}", "A ", {}) == 1.0


@pytest.mark.parametrize("mode", [score, paper_score])
@pytest.mark.parametrize(
    "response",
    [
        "Final Answer:" * 20_000,
        "The answer is:" * 20_000,
        "Final Answer: <<" * 20_000,
        "\\boxed{" * 20_000,
        "\\boxed{" + "(" * 200_000 + "}",
        "\\boxed{A" + " " * 200_000 + "B}",
        "\n" * 200_000 + "answer",
        "e.g. " * 40_000,
        "x" * 1_000_000,
    ],
    ids=lambda response: response[:14] if isinstance(response, str) else None,
)
def test_time_is_linear(mode, response):
    start = time.monotonic()
    mode(response, "A", {})
    assert time.monotonic() - start < 5


def test_data(shared_data):
    parquet = pytest.importorskip("pyarrow.parquet")
    file = shared_data / "guru_math" / "online_eval" / "stem__supergpqa_200.parquet"
    if not file.exists():
        pytest.skip(f"needs {file}")
    rows = parquet.read_table(file).to_pylist()
    for row in rows:
        truth = row["reward_model"]["ground_truth"]
        other = "B" if truth == "A" else "A"
        for mode in (score, paper_score):
            assert mode(f"so \\boxed{{{truth}}}", truth, row["extra_info"]) == 1.0
            assert mode(f"so \\boxed{{{other}}}", truth, row["extra_info"]) == 0.0
    echoed = sum(score(row["prompt"][0]["content"], row["reward_model"]["ground_truth"], {}) for row in rows)
    assert echoed == 0
