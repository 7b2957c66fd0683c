"""Tests as assert statements, judged outside of the program's interpreter.

A program can subvert whatever runs beside it: patch `math.isclose`, return an object that equals everything, leave
before the tests. So a test is taken apart here. Of `assert f(2) == 4` the sandbox gets `f(2)`, and returns a value as
plain data; the comparison, and the 4, stay in this process.
"""

import ast
import builtins
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

_OPERATORS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda item, container: item in container,
    ast.NotIn: lambda item, container: item not in container,
    ast.Is: lambda value, other: value is other,
    ast.IsNot: lambda value, other: value is not other,
}
_SETUP = (ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, ast.FunctionDef, ast.ClassDef)
_CONTAINERS: dict[str, type] = {"set": set, "frozenset": frozenset, "tuple": tuple, "list": list, "dict": dict}
_CALLS = (ast.Call, ast.Attribute, ast.Subscript, ast.Name, ast.Starred, ast.keyword, ast.Slice, ast.Load)
_LITERALS = (ast.Constant, ast.List, ast.Tuple, ast.Set, ast.Dict, ast.UnaryOp, ast.USub, ast.UAdd)


@dataclass(frozen=True, slots=True)
class Test:
    """A test: its step in the sandbox, its text, and what the step's value must satisfy (None: that it ran)."""

    step: int
    text: str
    holds: Callable[[Any], bool] | None
    expected: str = ""


@dataclass(slots=True)
class Plan:
    """The steps that the sandbox takes after the program (numbered from 1), and the tests among them."""

    steps: list[tuple[str, str]] = field(default_factory=list)
    tests: list[Test] = field(default_factory=list)


@dataclass(frozen=True, slots=True, eq=False)
class Other:
    """A value that is no plain data. It equals nothing."""

    text: str
    truth: bool

    def __bool__(self) -> bool:
        return self.truth

    def __repr__(self) -> str:
        return self.text


def plan(source: str, *, forgeable: bool) -> Plan:
    """The tests of a script. One that cannot be judged from outside is refused, unless `forgeable`."""
    made = Plan()
    for statement in ast.parse(source).body:
        text = ast.unparse(statement)
        if isinstance(statement, _SETUP):
            made.steps.append(("do", text))
        elif isinstance(statement, ast.Assert) and (split := _split(statement.test)) is not None:
            value, holds, expected = split
            made.steps.append(("value", ast.unparse(value)))
            made.tests.append(Test(len(made.steps), text, holds, expected))
        elif forgeable:
            made.steps.append(("do", text))
            made.tests.append(Test(len(made.steps), text, None))
        else:
            raise ValueError(
                f"the test {text[:200]!r} would run beside the program, which could forge its result: write it as "
                "`assert call(...) == literal`, give pairs of input and output instead, or set "
                "reward.options.forgeable=true"
            )
    return made


def plain(data: Any) -> Any:
    """The value that the sandbox reported (`jail._plain`); ValueError, TypeError or RecursionError if it is none."""
    if data is None or isinstance(data, bool | str | float):
        return data
    kind, content, *rest = data
    if kind == "int":
        return int(content, 16)
    if kind == "float":
        return float(content)
    if kind == "complex":
        return complex(*content)
    if kind == "bytes":
        return bytes.fromhex(content)
    if kind == "dict":
        return {plain(key): plain(value) for key, value in content}
    if kind in ("list", "tuple", "set", "frozenset"):
        return _CONTAINERS[kind](plain(item) for item in content)
    return Other(str(content), bool(rest and rest[0]))


def _split(test: ast.expr) -> tuple[ast.expr, Callable[[Any], bool], str] | None:
    """(what the program computes, whether a value of it passes, what was expected); None where that does not tell all.

    What is sent must not hold what is expected, so it is made of calls and literals, and where just a truth is
    expected, of one call of literals: `isclose(f(2), 0.5)` is true of every program that patches `isclose`.
    """
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return (test.operand, operator.not_, "a false value") if _is_judged_by_truth(test.operand) else None
    if (near := _approximate(test)) is not None:
        return near
    if not isinstance(test, ast.Compare):
        return (test, operator.truth, "a true value") if _is_judged_by_truth(test) else None
    if len(test.ops) != 1:
        return None
    compare, left, right = _OPERATORS[type(test.ops[0])], test.left, test.comparators[0]
    swapped = _constant(right) is None
    value, side = (right, left) if swapped else (left, right)
    if (literal := _constant(side)) is None:
        return None
    (other,) = literal
    judged = _is_judged_by_truth if other is None or isinstance(other, bool) else _is_calls
    if not judged(value):
        return None
    shown = ast.unparse(side) if isinstance(test.ops[0], ast.Eq) else ast.unparse(test)
    return value, lambda got: compare(other, got) if swapped else compare(got, other), shown


def _approximate(test: ast.expr) -> tuple[ast.expr, Callable[[Any], bool], str] | None:
    """`abs(call - number) < tolerance` and `math.isclose(call, number, ...)`."""
    match test:
        case ast.Compare(
            ast.Call(ast.Name("abs"), [ast.BinOp(value, ast.Sub(), wanted)], []), [ast.Lt() | ast.LtE() as sign], [most]
        ):
            compare, limit = _OPERATORS[type(sign)], _constant(most)
            number = _constant(wanted)
            if number is None or limit is None or not _is_calls(value):
                return None
            return value, lambda got: compare(abs(got - number[0]), limit[0]), ast.unparse(wanted)
        case ast.Call(function, [value, wanted], keywords) if ast.unparse(function) in ("isclose", "math.isclose"):
            number = _constant(wanted)
            options = {keyword.arg: _constant(keyword.value) for keyword in keywords}
            if number is None or not _is_calls(value) or not options.keys() <= {"rel_tol", "abs_tol"}:
                return None
            values = {str(name): option[0] for name, option in options.items() if option is not None}
            if len(values) < len(options):
                return None
            return value, lambda got: math.isclose(got, number[0], **values), ast.unparse(wanted)
    return None


def _is_judged_by_truth(value: ast.expr) -> bool:
    """A call of the program's own function, on literals."""
    if not isinstance(value, ast.Call) or not _is_calls(value):
        return False
    root: ast.expr = value.func
    while isinstance(root, ast.Attribute | ast.Call):
        root = root.value if isinstance(root, ast.Attribute) else root.func
    arguments: Sequence[ast.expr] = [*value.args, *(keyword.value for keyword in value.keywords)]
    own = isinstance(root, ast.Name) and not hasattr(builtins, root.id)
    return own and all(_constant(argument) is not None for argument in arguments)


def _is_calls(value: ast.expr) -> bool:
    """Made of calls, attributes, items and literals; something is called or named in it."""
    nodes = list(ast.walk(value))
    return all(isinstance(node, _CALLS + _LITERALS) for node in nodes) and any(
        isinstance(node, ast.Name) for node in nodes
    )


def _constant(node: ast.expr) -> tuple[Any] | None:
    """The value of a literal, or of `set([...])` and the like, in a tuple; None if it is neither."""
    wrap: Callable[..., Any] | None = None
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _CONTAINERS:
        if len(node.args) > 1 or node.keywords:
            return None
        wrap = _CONTAINERS[node.func.id]
        if not node.args:
            return (wrap(),)
        node = node.args[0]
    try:
        value = ast.literal_eval(node)
        return (value if wrap is None else wrap(value),)
    except (ValueError, TypeError):
        return None
