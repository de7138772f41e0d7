"""Are two plain expressions, such as 2*sqrt(3) and 2sqrt3, equal to sympy's simplifier?

The paper's scorer hands their difference to sympy's `parse_expr`, which is `eval` with a friendlier syntax. Here sympy
turns the text into Python source, the same as there, and a short interpreter of its syntax tree computes the value: it
knows numbers, symbols, arithmetic and a handful of functions, so no text reaches `eval`, and what would take all day is
refused before it is computed.
"""

import ast
import builtins
import operator
import re
import types
import warnings
from collections.abc import Callable
from typing import Any

import sympy
from sympy.core.function import UndefinedFunction
from sympy.parsing.sympy_parser import (
    implicit_multiplication_application,
    standard_transformations,
    stringify_expr,
)

from rljax.rewards.answers import Undecidable

_MAX_CHARS = 2000
_MAX_LETTERS = 2
_MAX_BITS = 100_000
_MAX_SYMBOLIC_EXPONENT = 100
_MAX_FACTORIAL = 2000

# What the paper's scorer does not try: nested powers, and exponents of two digits or in brackets.
_NOT_TRIED = re.compile(r"\^[{(]|\^[0-9]+\^|\^[0-9][0-9]+")

_TRANSFORMATIONS = (*standard_transformations, implicit_multiplication_application)

# The names that sympy's parser knows, which decide whether x is a symbol and whether f(x) is a call.
_KNOWN: dict[str, Any] = {name: getattr(sympy, name) for name in sympy.__all__}
_KNOWN |= {name: value for name, value in vars(builtins).items() if isinstance(value, types.BuiltinFunctionType)}
_KNOWN |= {"max": sympy.Max, "min": sympy.Min}


def equal(left: str, right: str) -> bool:
    """True if sympy simplifies the difference to 0; False if not, if either is no expression, or if it is not tried.

    Raises:
      Undecidable: it would take longer than the paper's scorer waits, or run code other than arithmetic.
    """
    text = f"({left})-({right})"
    letters = {character for character in text.replace("sqrt", "").replace("frac", "") if character.isalpha()}
    if len(letters) > _MAX_LETTERS or _NOT_TRIED.search(text):
        return False
    if len(text) > _MAX_CHARS:
        raise Undecidable(f"an expression of {len(text)} characters; at most {_MAX_CHARS} are read")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            source = stringify_expr(text.replace("^", "**"), {}, _KNOWN, _TRANSFORMATIONS)
            difference = _value(ast.parse(source.lstrip(" \t"), mode="eval").body)
            return bool(sympy.simplify(difference) == 0)
    except (Undecidable, MemoryError):
        raise
    except Exception:  # sympy raises whatever it likes on what it cannot read or compare
        return False


def _value(node: ast.AST) -> Any:
    """The value of one node. Raises what Python would raise, and Undecidable for what is not arithmetic."""
    match node:
        case ast.Constant(value=value):
            return value
        case ast.Name(id=name):
            return _KNOWN[name]
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
            return _UNARY[type(op)](_value(operand))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _BINARY[type(op)](_value(left), _value(right))
        case ast.Call(func=function, args=arguments, keywords=[]):
            return _call(_value(function), [_value(argument) for argument in arguments])
        case ast.Tuple(elts=elements):
            return tuple(_value(element) for element in elements)
        case ast.List(elts=elements):
            return [_value(element) for element in elements]
        case ast.Set(elts=elements):
            return {_value(element) for element in elements}
        case ast.Compare():
            raise TypeError("a comparison has no difference")
        case ast.Attribute(value=owner, attr=name) if not hasattr(type(_value(owner)), name):
            raise AttributeError(name)  # a.b, meant as a product; a name that is there would be looked up and run
    raise Undecidable(f"{type(node).__name__} in an expression, which the paper's scorer would execute")


def _call(function: Any, arguments: list[Any]) -> Any:
    if not callable(function):
        raise TypeError(f"{function} is not callable")
    if function in (sympy.factorial, sympy.factorial2) and any(argument.is_number for argument in arguments):
        if not all(argument <= _MAX_FACTORIAL for argument in arguments):
            raise Undecidable(f"the factorial of a number above {_MAX_FACTORIAL}")
    elif function not in _FUNCTIONS and not isinstance(function, UndefinedFunction):
        raise Undecidable(f"a call of {function}, which the paper's scorer would execute")
    return function(*arguments)


def _product(left: Any, right: Any) -> Any:
    if any(isinstance(factor, str | bytes | tuple | list) for factor in (left, right)):
        raise Undecidable("text or a list, repeated")  # 'a'*10**12 ends in a MemoryError, or in a worker's end
    return left * right


def _power(base: Any, exponent: Any) -> Any:
    if isinstance(exponent, sympy.Rational):
        size = abs(exponent)
        if not isinstance(base, sympy.Number):
            too_large = size > _MAX_SYMBOLIC_EXPONENT
        elif isinstance(base, sympy.Rational):
            too_large = size * max(abs(int(base.p)), int(base.q)).bit_length() > _MAX_BITS
        else:
            too_large = False  # a float is as long as before
        if too_large and base not in (0, 1, -1):
            raise Undecidable(f"a power with the exponent {exponent}")
    return base**exponent


_FUNCTIONS = frozenset((
    sympy.Integer, sympy.Float, sympy.Rational, sympy.Number, sympy.Symbol, sympy.Function, sympy.sqrt,
    sympy.frac, sympy.ln, sympy.factorial, sympy.factorial2,
))  # fmt: skip
_UNARY: dict[type, Callable[[Any], Any]] = {ast.UAdd: operator.pos, ast.USub: operator.neg, ast.Invert: operator.invert}
_BINARY: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: _product,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: _power,
    ast.BitOr: operator.or_,
    ast.BitAnd: operator.and_,
}
