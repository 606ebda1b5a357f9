"""Arithmetic that a model asks for: parsed and walked, never handed to `eval`."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable

MAX_LENGTH = 200  # characters of an expression
LIMIT = 1e15  # of every intermediate value: whole numbers stay exact as floats, and powers stay cheap

_BINARY: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_UNARY: dict[type[ast.unaryop], Callable[[float], float]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}


def evaluate(expression: str) -> float:
    """The value of an expression of numbers, + - * / // % ** and brackets.

    Raises ValueError, with a text fit for the model, for anything else, division by 0, or a value beyond 1e15.
    """
    if len(expression) > MAX_LENGTH:
        raise ValueError(f"the expression is longer than {MAX_LENGTH} characters")
    try:
        tree = ast.parse(expression.strip(), mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise ValueError("that is not an arithmetic expression") from None
    return _walk(tree.body)


def show(value: float) -> str:
    """Whole numbers without a point, others to ten digits."""
    return str(int(value)) if value == int(value) else f"{value:.10g}"


def _walk(node: ast.expr) -> float:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return _limited(node.value)  # type: ignore[arg-type]
    if isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
        return _UNARY[type(node.op)](_walk(node.operand))
    if isinstance(node, ast.BinOp):
        left, right = _walk(node.left), _walk(node.right)
        if isinstance(node.op, ast.Pow):
            return _power(left, right)
        if type(node.op) in _BINARY:
            try:
                return _limited(_BINARY[type(node.op)](left, right))
            except ZeroDivisionError:
                raise ValueError("division by zero") from None
    raise ValueError("only numbers, + - * / // % ** and brackets are understood")


def _power(base: float, exponent: float) -> float:
    if base < 0 and exponent != int(exponent):
        raise ValueError("a root of a negative number")
    if base == 0 and exponent < 0:
        raise ValueError("division by zero")
    if base != 0 and exponent * math.log10(abs(base)) > math.log10(LIMIT):
        raise ValueError("the result is too large")
    return _limited(float(base) ** float(exponent) if exponent < 0 else base**exponent)


def _limited(value: float) -> float:
    if not abs(value) <= LIMIT:
        raise ValueError("the result is too large")
    return value
