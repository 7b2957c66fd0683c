"""Short mathematical expressions read into sympy, without `eval`: digits, letters, `+ - * / ^ sqrt pi ( )`.

`sympy.parse_expr` runs its text as Python. A model's answer must not be run.
"""

import re
from types import ModuleType
from typing import Any

# Longer text than this is not worth the time; a power above this many bits is a bomb.
_MAX_LENGTH, _MAX_DEPTH, _MAX_BITS = 300, 40, 10_000
_TOKEN = re.compile(r"[0-9]+(?:\.[0-9]*)?|\.[0-9]+|sqrt|pi|[a-z]|[-+*/^()]")


def are_equal(left: str, right: str) -> bool:
    """Is `left - right` zero, as far as sympy can simplify it? False for what cannot be read.

    As in the published grader, no more than two different letters are admitted (`pi` counts as two), and exponents are
    of one digit.
    """
    if len({letter for letter in (left + right).replace("sqrt", "") if letter.isalpha()}) > 2:
        return False
    try:
        difference = _Reader(left).read() - _Reader(right).read()
    except ValueError:
        return False
    return bool(difference == 0 or sympy().simplify(difference) == 0)


def sympy() -> ModuleType:
    """Sympy, imported late: a worker that has no use for it starts in a tenth of a second."""
    import sympy

    return sympy


class _Reader:
    """Recursive descent; every fault is a ValueError."""

    def __init__(self, text: str) -> None:
        text = text.replace("**", "^")
        self._tokens = _TOKEN.findall(text)
        if len(text) > _MAX_LENGTH or text.count("(") > _MAX_DEPTH or "".join(self._tokens) != text:
            raise ValueError("not an expression of the supported kind")
        self._next = 0

    def read(self) -> Any:
        value = self._sum()
        if self._peek():
            raise ValueError(f"{self._peek()!r} is out of place")
        return value

    def _peek(self) -> str:
        return self._tokens[self._next] if self._next < len(self._tokens) else ""

    def _take(self) -> str:
        self._next += 1
        return self._tokens[self._next - 1] if self._next <= len(self._tokens) else ""

    def _sum(self) -> Any:
        value = self._product()
        while self._peek() in ("+", "-"):
            value = value + self._product() if self._take() == "+" else value - self._product()
        return value

    def _product(self) -> Any:
        value = self._signed(self._power)
        while self._peek() not in ("", "+", "-", ")", "^"):
            if self._peek() == "/":
                self._take()
                value = value / self._signed(self._power)
            else:  # "2x" is a product, too
                if self._peek() == "*":
                    self._take()
                value = value * self._signed(self._power)
        return value

    def _signed(self, rest: Any) -> Any:
        sign = 1
        while self._peek() in ("+", "-"):
            sign = -sign if self._take() == "-" else sign
        return sign * rest()

    def _power(self) -> Any:
        base = self._atom()
        if self._peek() != "^":
            return base
        self._take()
        if self._peek() == "(" or (len(self._peek()) > 1 and self._peek().isdigit()):
            raise ValueError("only exponents of one digit or letter are read")
        exponent = self._signed(self._atom)
        if base.is_Rational and exponent.is_Rational:
            bits = max(int(base.p).bit_length(), int(base.q).bit_length())
            if bits * abs(exponent) > _MAX_BITS:
                raise ValueError("the power is too large")
        return base**exponent

    def _atom(self) -> Any:
        token = self._take()
        if token == "(":
            value = self._sum()
            if self._take() != ")":
                raise ValueError("an open parenthesis")
            return value
        if token == "sqrt":
            return sympy().sqrt(self._atom())
        if token == "pi":
            return sympy().pi
        if token.isalpha():
            return sympy().Symbol(token)
        if not token or token in "+-*/^)":
            raise ValueError(f"{token!r} is no operand")
        return sympy().Rational(token)
