r"""LaTeX as plain text: `\frac{1}{2}` is 1/2, `2\sqrt{3}` is 2√(3), `\left(` is a bracket and unknown macros vanish.

The paper's scorer compares answers after pylatexenc's `latex_to_text`; this gives what version 2.11 of that library
gives for what answers contain, oddities included (`\mbox{cm}` vanishes with its content, a `\frac` without
arguments becomes "%s/%s"). One pass, without the library's repeated copies of the text. `$` and `%` must be gone.
"""

import re
import unicodedata
from dataclasses import dataclass
from typing import NamedTuple

_MAX_DEPTH = 100
"""Of groups and arguments. There the library runs out of Python's stack, a little deeper or less deep by what nests."""

# What a macro takes: "{" a group or one token, "[" an optional argument in brackets, "*" an optional star.
_SIGNATURES = {
    "{": r"""mbox textrm textit textbf textmd textsc textsf textsl texttt textup text emph mathrm mathbb mathbf mathit
        mathsf mathtt mathcal mathscr mathfrak label ref autoref cref Cref eqref url ensuremath overline underline
        widehat widetilde wideparen overleftarrow overrightarrow overleftrightarrow underleftarrow underrightarrow
        underleftrightarrow overbrace underbrace overgroup undergroup overbracket underbracket overlinesegment
        underlinesegment overleftharpoon overrightharpoon ket bra ' ` " c ^ ~ H k = b . d r u v vec dot hat check breve
        acute grave tilde bar ddot not""",
    "{{": "frac nicefrac braket ketbra",
    "[{": "sqrt footnote hphantom vphantom xleftarrow xrightarrow color",
    "*{": "hspace vspace",
    "*[": "\\",
    "[{{": "textcolor colorbox",
}
_ARGUMENTS = {name: signature for signature, names in _SIGNATURES.items() for name in names.split()}
_ENVIRONMENT_ARGUMENTS = {"array": "[{", "tabular": "{", "alignat": "{", "alignat*": "{"}

_KEEPS_CONTENT = frozenset(("emph", "mathrm", "text", "textrm", "textit", "textbf", "textsc", "textsl"))
_STYLES = {
    "mathbf": "BOLD", "mathit": "ITALIC", "mathsf": "SANS-SERIF", "mathbb": "DOUBLE-STRUCK", "mathtt": "MONOSPACE",
    "mathcal": "SCRIPT", "mathscr": "SCRIPT", "mathfrak": "FRAKTUR",
}  # fmt: skip
_ACCENTS = {
    "'": "\u0301", "`": "\u0300", '"': "\u0308", "c": "\u0327", "^": "\u0302", "~": "\u0303", "H": "\u030b",
    "k": "\u0328", "=": "\u0304", "b": "\u0331", ".": "\u0307", "d": "\u0323", "r": "\u030a", "u": "\u0306",
    "v": "\u030c", "vec": "\u20d7", "dot": "\u0307", "hat": "\u0302", "check": "\u030c", "breve": "\u0306",
    "acute": "\u0301", "grave": "\u0300", "tilde": "\u0303", "bar": "\u0305", "ddot": "\u0308", "not": "\u0338",
}  # fmt: skip
_TEMPLATES = {
    "frac": "%s/%s", "nicefrac": "%s/%s", "sqrt": "√(%(2)s)", "ensuremath": "%s", "url": "<%s>", "footnote": "[%(2)s]",
    "textcolor": "%(3)s", "colorbox": "%(3)s", "ket": "|%s⟩", "bra": "⟨%s|", "braket": "⟨%s|%s⟩", "ketbra": "|%s⟩⟨%s|",
} | {name: "%s" for name in _ARGUMENTS if name.startswith(("over", "under", "wide"))}  # fmt: skip
_USES_ARGUMENTS = _KEEPS_CONTENT | set(_STYLES) | set(_ACCENTS) | set(_TEMPLATES)
_SYMBOL_TABLE = r"""
    ~=~ &=& $=$ {={ }=} #=# _=_ -=­ prime=' backslash=\ textbackslash=\ ref=<ref> autoref=<ref> cref=<ref> Cref=<Ref>
    eqref=(<ref>) oe=œ OE=Œ ae=æ AE=Æ aa=å AA=Å o=ø O=Ø ss=ß L=Ł l=ł i=ı j=ȷ hbar=ħ ell=ℓ textendash=– textemdash=—
    textquoteleft=‘ textquoteright=’ textquotedblright=” textquotedblleft=“ textpm=± textmp=∓ texteuro=€
    forall=∀ complement=∁ partial=∂ exists=∃ nexists=∄ varnothing=∅ emptyset=∅ aleph=ℵ nabla=∇ in=∈ notin=∉ ni=∋
    prod=∏ coprod=∐ sum=∑ setminus=∖ smallsetminus=∖ ast=∗ circ=∘ bullet=∙ propto=∝ infty=∞ parallel=∥ nparallel=∦
    wedge=∧ vee=∨ cap=∩ cup=∪ int=∫ iint=∬ iiint=∭ oint=∮ sim=∼ backsim=∽ simeq=≃ approx=≈ neq=≠ equiv=≡ le=≤ ge=≥
    leq=≤ geq=≥ leqslant=⩽ geqslant=⩾ leqq=≦ geqq=≧ lneqq=≨ gneqq=≩ ll=≪ gg=≫ nless=≮ ngtr=≯ nleq=≰ ngeq=≱ lesssim=≲
    gtrsim=≳ lessgtr=≶ gtrless=≷ prec=≺ succ=≻ preceq=≼ succeq=≽ precsim=≾ succsim=≿ nprec=⊀ nsucc=⊁ subset=⊂ supset=⊃
    subseteq=⊆ supseteq=⊇ nsubseteq=⊈ nsupseteq=⊉ subsetneq=⊊ supsetneq=⊋ cdot=· times=× otimes=⊗ oplus=⊕ bigotimes=⊗
    bigoplus=⊕ cos=cos sin=sin tan=tan arccos=arccos arcsin=arcsin arctan=arctan cosh=cosh sinh=sinh tanh=tanh
    arccosh=arccosh arcsinh=arcsinh arctanh=arctanh ln=ln log=log exp=exp max=max min=min sup=sup inf=inf lim=lim
    dag=† dagger=† pm=± mp=∓ ldots=… cdots=⋯ ddots=⋱ iddots=⋰ vdots=⋮ dots=… dotsc=… dotsb=… dotsm=… dotsi=… dotso=…
    langle=⟨ rangle=⟩ lvert=| rvert=| vert=| lVert=‖ rVert=‖ Vert=‖ mid=| nmid=∤ uparrow=↑ downarrow=↓ rightarrow=→ to=→
    leftarrow=← longrightarrow=⟶ longleftarrow=⟵ leftrightarrow=↔ updownarrow=↕ nearrow=↗ mapsto=↦ Leftarrow=⇐
    Rightarrow=⇒ Leftrightarrow=⇔ Longrightarrow=⟹ Longleftrightarrow=⟺ hookrightarrow=↪ rightleftharpoons=⇌ angle=∠
    rightangle=∟ measuredangle=∡ therefore=∴ because=∵ cong=≅ asymp=≍ doteq=≐ uplus=⊎ sqcap=⊓ sqcup=⊔ ominus=⊖ oslash=⊘
    odot=⊙ boxplus=⊞ boxtimes=⊠ perp=⊥ top=⊤ vdash=⊢ dashv=⊣ bigwedge=⋀ bigvee=⋁ bigcap=⋂ bigcup=⋃ star=⋆ diamond=♢
    bowtie=⋈ ltimes=⋉ rtimes=⋊ lceil=⌈ rceil=⌉ lfloor=⌊ rfloor=⌋ div=÷ texttimes=× textdiv=÷ lnot=¬ textdegree=°
    lbrace={ rbrace=} surd=√ square=□ bigcirc=◯ lozenge=◊ sharp=♯ flat=♭ natural=♮ wp=℘ hslash=ℏ beth=ℶ gimel=ℷ
    textdollar=$ textcelsius=℃ textonehalf=½ textonequarter=¼ textthreequarters=¾ textasciitilde=~ id=𝕀 Ident=𝕀
    epsilon=ϵ phi=ϕ varepsilon=ε vartheta=ϑ varpi=ϖ varrho=ϱ varsigma=ς varphi=φ varkappa=ϰ
"""
_SYMBOLS: dict[str, str] = {name: text for name, _, text in (pair.partition("=") for pair in _SYMBOL_TABLE.split())} | {
    "\\": "\n", ",": " ", ";": " ", ":": " ", " ": " ", "!": "", "quad": "  ", "qquad": "    ", "hspace": "",
    "vspace": "\n", "limsup": "lim sup", "liminf": "lim inf",
}  # fmt: skip
_GREEK = """alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigma tau upsilon
    phi chi psi omega"""
for _name in _GREEK.split():
    _letter = "LAMDA" if _name == "lambda" else _name.upper()
    _SYMBOLS.setdefault(_name, unicodedata.lookup(f"GREEK SMALL LETTER {_letter}"))
    _SYMBOLS[_name.capitalize()] = unicodedata.lookup(f"GREEK CAPITAL LETTER {_letter}")

_SPECIALS = {"---": "—", "--": "–", "``": "“", "''": "”", "!`": "¡", "?`": "¿", "~": "\u00a0", "&": "   "}
_SPECIAL = re.compile("|".join(map(re.escape, _SPECIALS)))  # longest first
_MATRICES = frozenset(("array", "pmatrix", "bmatrix", "smallmatrix", "psmallmatrix", "bsmallmatrix"))
_DISPLAYS = frozenset(
    name + star for name in ("equation", "eqnarray", "align", "multline", "gather", "dmath") for star in ("", "*")
)
_SPACE = re.compile(r"\s*")
_ENVIRONMENT_NAME = re.compile(r"\s*\{([\w* ._-]+)\}")


class Unconvertible(ValueError):
    """The library raises: a root without radicand, an empty matrix, or nesting deeper than Python's stack."""


def latex_to_text(latex: str) -> str:
    """The text of `latex`, which has no `$` and no `%`. Raises Unconvertible where the library raises."""
    return _render(_Reader(latex).sequence(), loose=False)


@dataclass(frozen=True, slots=True)
class _Node:
    kind: str  # text, special, group, macro, environment, inline, display
    text: str = ""  # the characters, or the name
    children: tuple["_Node", ...] = ()
    arguments: tuple["_Node | None", ...] | None = ()  # None when they are missing
    space: str = ""  # that follows a macro's name


class _Token(NamedTuple):
    kind: str  # char, special, macro, begin, end, open, close, math
    text: str
    start: int
    end: int
    before: str  # white space skipped on the way to it
    after: str = ""


class _End(Exception):
    """Nothing but `space` is left."""

    def __init__(self, space: str):
        super().__init__()
        self.space = space


class _Reader:
    """Recursive descent over one text. Tolerant: what closes nothing is dropped, what is not closed ends at the end."""

    def __init__(self, text: str):
        self.text = text
        self.place = 0
        self.depth = 0

    def sequence(self, close: str = "", environment: str = "", math: str = "") -> tuple[_Node, ...]:
        """Nodes up to and past the closing bracket, the end of the environment, or the closing math delimiter."""
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise Unconvertible(f"nested more than {_MAX_DEPTH} deep")
        nodes: list[_Node] = []
        characters = ""
        while True:
            try:
                token = self.token(self.place, brackets=close == "]")
            except _End as end:
                characters += end.space
                self.place += len(end.space)
                break
            self.place = token.end
            if token.kind == "char":
                characters += token.before + token.text
                continue
            characters += token.before
            if characters:
                nodes.append(_Node("text", characters))
            characters = ""
            closes = {"close": close, "end": environment, "math": math}.get(token.kind)
            if closes and token.text == closes:
                break
            node = self.node(token)
            if node is not None:
                nodes.append(node)
        self.depth -= 1
        if characters:
            nodes.append(_Node("text", characters))
        return tuple(nodes)

    def node(self, token: _Token) -> _Node | None:
        """What begins with `token`; None for what closes nothing."""
        match token.kind:
            case "special":
                return _Node("special", token.text)
            case "open":
                return self.group(token)
            case "macro":
                arguments = self.arguments(_ARGUMENTS.get(token.text, ""), tight=token.text == "\\")
                return _Node("macro", token.text, arguments=arguments, space=token.after)
            case "begin":
                self.arguments(_ENVIRONMENT_ARGUMENTS.get(token.text, ""))
                return _Node("environment", token.text, self.sequence(environment=token.text))
            case "math" if token.text == "\\(":
                return _Node("inline", children=self.sequence(math="\\)"))
            case "math" if token.text == "\\[":
                return _Node("display", children=self.sequence(math="\\]"))
        return None

    def group(self, opening: _Token) -> _Node:
        self.place = opening.end
        return _Node("group", children=self.sequence(close="]" if opening.text == "[" else "}"))

    def arguments(self, signature: str, *, tight: bool = False) -> tuple[_Node | None, ...] | None:
        """The arguments, or None, with nothing consumed, when the text ends before the last of them."""
        start, found = self.place, []
        try:
            for kind in signature:
                if kind == "{":
                    found.append(self.expression())
                elif kind == "[":
                    found.append(
                        None if tight and self.text[self.place : self.place + 1].isspace() else self.optional()
                    )
                else:
                    found.append(self.star())
        except _End:
            self.place = start
            return None
        return tuple(found)

    def expression(self) -> _Node:
        """One mandatory argument: a group, or a single token; nothing before a closing bracket."""
        token = self.token(self.place, environments=False)
        if token.kind == "open":
            return self.group(token)
        if token.kind == "close" or (token.kind == "macro" and token.text == "end"):
            self.place = token.start
            return _Node("text")
        self.place = token.end
        if token.kind in ("macro", "math"):
            return _Node("macro", token.text, arguments=None, space=token.after)
        return _Node("special" if token.kind == "special" else "text", token.text)

    def optional(self) -> _Node | None:
        try:
            token = self.token(self.place, brackets=True, environments=False)
        except _End:
            return None
        return self.group(token) if token.kind == "open" and token.text == "[" else None

    def star(self) -> _Node | None:
        token = self.token(self.place)
        if token.kind != "char" or token.text != "*":
            return None
        self.place = token.end
        return _Node("text", "*")

    def token(self, place: int, *, brackets: bool = False, environments: bool = True) -> _Token:
        text = self.text
        space = _SPACE.match(text, place)[0]  # pyright: ignore[reportOptionalSubscript]
        paragraph = space.find("\n\n")
        if paragraph >= 0:
            return _Token("char", "\n\n", place + paragraph, place + paragraph + 2, space[:paragraph])
        place += len(space)
        if place >= len(text):
            raise _End(space)
        if text[place] == "\\":
            return self.command(place, space, environments)
        for opening, closing in ("{}", "[]") if brackets else ("{}",):
            if text[place] in (opening, closing):
                return _Token("open" if text[place] == opening else "close", text[place], place, place + 1, space)
        special = _SPECIAL.match(text, place)
        if special:
            return _Token("special", special[0], place, special.end(), space)
        return _Token("char", text[place], place, place + 1, space)

    def command(self, place: int, space: str, environments: bool) -> _Token:
        text, end = self.text, place + 2
        if end > len(text):
            raise _End("")  # a lone backslash, which is dropped with the space before it
        if text[place + 1].isalpha():
            while end < len(text) and text[end].isalpha():
                end += 1
        name = text[place + 1 : end]
        if name in ("(", ")", "[", "]"):
            return _Token("math", "\\" + name, place, end, space)
        if environments and name in ("begin", "end"):
            match = _ENVIRONMENT_NAME.match(text, end)
            if match is None:
                return _Token("char", "\\" + name, place, end, space)
            return _Token(name, match[1], place, match.end(), space)
        after = ""
        if name[0].isalpha():
            after = _SPACE.match(text, end)[0].partition("\n\n")[0]  # pyright: ignore[reportOptionalSubscript]
        return _Token("macro", name, place, end + len(after), space, after)


def _render(nodes: tuple[_Node, ...], *, loose: bool) -> str:
    """The text of `nodes`. `loose`: inside a formula, where blanks count after a macro, and only there."""
    parts: list[str] = []
    previous: _Node | None = None
    for node in nodes:
        if loose and node.kind == "text":
            if previous is not None and previous.kind == "macro" and not any(previous.arguments or ()):
                parts.append(previous.space)
            parts.append(node.text if node.text.strip() else "")
        else:
            parts.append(_node_text(node, loose))
        previous = node
    return "".join(parts)


def _node_text(node: _Node, loose: bool) -> str:
    match node.kind:
        case "text":
            return node.text
        case "special":
            return _SPECIALS[node.text]
        case "macro":
            return _macro_text(node, loose)
        case "inline":
            return _render(node.children, loose=True).strip()
        case "environment" if node.text in _MATRICES:
            return _matrix_text(node, loose)
        case "environment" | "display" if node.kind == "display" or node.text in _DISPLAYS:
            content = _render(node.children, loose=True).strip()
            return "\n    " + content.replace("\n", "\n    ") + "\n"
        case "environment" if node.text in ("center", "flushleft", "flushright"):
            return f"\n{_render(node.children, loose=loose)}\n"
    return _render(node.children, loose=loose)


def _macro_text(node: _Node, loose: bool) -> str:
    name = node.text
    if name not in _USES_ARGUMENTS:
        return _SYMBOLS.get(name, "")
    arguments = [_render((item,), loose=loose) if item else "" for item in node.arguments or ()]
    if name in _KEEPS_CONTENT:
        return "".join(arguments)
    if name in _STYLES:
        return "".join(_styled(letter, _STYLES[name]) for letter in "".join(arguments))
    if name in _ACCENTS:
        base = arguments[0].strip() if arguments else " "
        plain = base.replace("ı", "i").replace("ȷ", "j")
        return "".join(unicodedata.normalize("NFC", letter + _ACCENTS[name]) for letter in plain)
    template = _TEMPLATES[name]
    if "%s" in template:
        return template % tuple(arguments) if arguments else template
    if not arguments:
        raise Unconvertible(f"\\{name} without its argument")
    return template % {str(place): text for place, text in enumerate(arguments, start=1)}


def _styled(letter: str, style: str) -> str:
    """The mathematical letter; some, such as the double-struck R, were in Unicode before the mathematical ones."""
    if not ("A" <= letter <= "Z" or "a" <= letter <= "z"):
        return letter
    if (style, letter) == ("ITALIC", "h"):
        return "ℎ"
    name = f"{style} {'CAPITAL' if letter.isupper() else 'SMALL'} {letter.upper()}"
    try:
        return unicodedata.lookup(f"MATHEMATICAL {name}")
    except KeyError:
        return unicodedata.lookup(name.replace("FRAKTUR", "BLACK-LETTER"))


def _matrix_text(node: _Node, loose: bool) -> str:
    """Rows between semicolons, cells right-aligned: [ 1 2; 3 4 ]."""
    rows: list[list[str]] = [[]]
    cell: list[_Node] = []
    for child in (*node.children, _Node("macro", "\\")):
        ends_row = child.kind == "macro" and child.text == "\\"
        if ends_row or (child.kind == "special" and child.text == "&"):
            if cell:
                rows[-1].append(_render(tuple(cell), loose=loose).strip())
            cell = []
            if ends_row:
                rows.append([])
        else:
            cell.append(child)
    rows.pop()
    if not any(rows):
        raise Unconvertible("a matrix without cells")
    width = max(len(text) for row in rows for text in row)
    return "[ " + "; ".join(" ".join(text.rjust(width) for text in row) for row in rows) + " ]"
