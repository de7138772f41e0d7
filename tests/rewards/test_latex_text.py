r"""LaTeX as text, against what pylatexenc 2.11 makes of the same input."""

import pytest

from rljax.rewards.latex_text import Unconvertible, latex_to_text


@pytest.mark.parametrize(
    "latex, text",
    [
        ("", ""),
        ("x + 1", "x + 1"),
        ("x  \n y ", "x  \n y "),
        ("a \n\n b", "a \n\n b"),
        ("\\alpha \n\n b", "α\n\n b"),
        ("\\frac{1}{2}", "1/2"),
        ("\\frac12", "1/2"),
        ("\\frac 1 2", "1/2"),
        ("\\frac{x+1}{2}", "x+1/2"),
        ("\\frac\\pi2", "π/2"),
        ("\\frac1", "%s/%s1"),
        ("\\frac{1}", "%s/%s1"),
        ("\\frac\\frac123", "%s/%s/123"),
        ("{\\frac1}2", "1/2"),
        ("\\sqrt{3}", "√(3)"),
        ("\\sqrt[3]{2}", "√(2)"),
        ("\\sqrt [3] {2}", "√(2)"),
        ("\\sqrt[3", None),
        ("2\\sqrt 3", "2√(3)"),
        ("2 \\pi r", "2 πr"),
        ("\\Omega\\Lambda\\varphi\\phi", "ΩΛφϕ"),
        ("\\left( x \\right)", "( x )"),
        ("\\unknown{a}{b}", "ab"),
        ("\\mbox{cm}", ""),
        ("\\text{a b}", "a b"),
        ("\\mathrm{cm}^2", "cm^2"),
        ("\\mathbb{R}", "ℝ"),
        ("\\mathbb{A1}", "𝔸1"),
        ("\\mathfrak{C}\\mathfrak{g}", "ℭ𝔤"),
        ("\\mathit{hx}", "ℎ𝑥"),
        ("\\mathbf{x}", "𝐱"),
        ("\\mathbb", ""),
        ("\\hat{x}", "x̂"),
        ("\\hat{ı}", "î"),
        ("\\bar", " ̅"),
        ("\\vec ab", "a⃗b"),
        ("\\overline{AB}", "AB"),
        ("\\textcolor{red}{5}", "5"),
        ("\\color{red}5", "5"),
        ("\\hspace*{1cm}5", "5"),
        ("\\hspace{1cm}5", "5"),
        ("a \\\\ b", "a \n b"),
        ("a \\\\[1cm] b", "a \n b"),
        ("a \\\\ [1] b", "a \n [1] b"),
        ("a \\\\* b", "a \n b"),
        ("a\\\\", "a\n"),
        ("\\{1\\}", "{1}"),
        ("1\\,2\\;3\\ 4\\!5", "1 2 3 45"),
        ("a & b ~ c", "a     b \u00a0 c"),
        ("a--b---c", "a–b—c"),
        ("``a''", "“a”"),
        ("\\frac--2", "–/2"),
        ("x_1^2", "x_1^2"),
        ("a}b", "ab"),
        ("{a", "a"),
        ("\\frac{1}}2", "1/2"),
        ("{\\hat}x", "x"),
        ("[1]", "[1]"),
        ("\\sqrt[[a]]{b}", "√(b)"),
        ("\\( \\pi r \\)", "π r"),
        ("\\( {a} {b} \\)", "ab"),
        ("{a} {b}", "a b"),
        ("\\[ x \\]", "\n    x\n"),
        ("\\( x", "x"),
        ("\\) x \\]", " x "),
        ("\\frac\\(2", "/2"),
        ("\\begin{align} a &= b \\\\ c \\end{align}", "\n    a    = b \n     c\n"),
        ("\\begin{center}a\\end{center}", "\na\n"),
        ("\\begin{cases} a & b \\end{cases}", " a     b "),
        ("\\begin{cases} a", " a"),
        ("\\end{cases} a", " a"),
        ("\\begin a", "\\begin a"),
        ("\\frac\\end2", "/\\end2"),
        ("\\begin{pmatrix} 1 & 20 \\\\ 3 & 4 \\end{pmatrix}", "[  1 20;  3  4 ]"),
        ("\\begin{pmatrix} 1 & \\\\ 3 \\\\ \\end{pmatrix}", "[ 1  ; 3;   ]"),
        ("\\begin{array}{cc} 1 & 2 \\end{array}", "[ 1 2 ]"),
        ("\\begin{array}", None),
        ("x \\", "x"),
        ("\\infty \\cup \\cdot \\times", "∞∪·×"),
    ],
)
def test_conversion(latex, text):
    if text is None:
        with pytest.raises(Unconvertible):
            latex_to_text(latex)
    else:
        assert latex_to_text(latex) == text


@pytest.mark.parametrize(
    "latex", ["\\sqrt", "x\\sqrt ", "\\begin{pmatrix}\\end{pmatrix}", "{" * 2000, "\\frac{" * 2000]
)
def test_what_the_library_cannot_convert(latex):
    with pytest.raises(Unconvertible):
        latex_to_text(latex)


def test_a_long_answer_is_one_pass():
    assert latex_to_text("{a} " * 25_000) == "a " * 25_000
