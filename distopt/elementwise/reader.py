"""Read an elementwise formula: from the source of a Python function to a list of simple operations.

The list is what all three code generators start from, so a formula means the same on every path:

- every operation is rounded to the compute type by itself, in the order in which Python would
  evaluate the expression; nothing is reassociated, so two paths that keep to IEEE 754 give the same
  bits;
- equal subexpressions are one operation, and what does not reach a returned array is dropped;
- what depends on scalars only (`1 - beta_1`) is marked, and computed once per call;
- array names stand for the values before the call until they are assigned; nothing is stored before
  all of an element's results are known.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import linecache
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distopt.elementwise.formula import Formula, Node, Signature

__all__ = ["FUNCTIONS", "read_formulas"]

MOST_OPTIONS = 6  # every combination is generated when the rule is defined

FUNCTIONS: dict[str, tuple[str, int]] = {
    "sqrt": ("sqrt", 1),
    "abs": ("absolute", 1),
    "sign": ("sign", 1),
    "square": ("square", 1),
    "exp": ("exp", 1),
    "log": ("log", 1),
    "isfinite": ("isfinite", 1),
    "isnan": ("isnan", 1),
    "maximum": ("maximum", 2),
    "minimum": ("minimum", 2),
    "where": ("where", 3),
}
"""Functions that a formula may call: the operation each becomes, and its number of arguments."""

_ARITHMETIC: dict[type[ast.operator], str] = {
    ast.Add: "add",
    ast.Sub: "subtract",
    ast.Mult: "multiply",
    ast.Div: "divide",
}
_LOGIC: dict[type[ast.operator], str] = {ast.BitAnd: "logical_and", ast.BitOr: "logical_or"}
_COMPARISONS: dict[type[ast.cmpop], str] = {
    ast.Lt: "less",
    ast.LtE: "less_equal",
    ast.Gt: "greater",
    ast.GtE: "greater_equal",
    ast.Eq: "equal",
    ast.NotEq: "not_equal",
}
_GIVES_TRUTH = {*_LOGIC.values(), *_COMPARISONS.values(), "logical_not", "isfinite", "isnan"}
_TAKES_TRUTH = {*_LOGIC.values(), "logical_not"}

_FOLDED: dict[str, Callable[..., float]] = {
    "add": lambda a, b: a + b,
    "subtract": lambda a, b: a - b,
    "multiply": lambda a, b: a * b,
    "divide": lambda a, b: a / b,
    "negative": lambda a: -a,
}


def read_formulas(
    function: Callable[..., Any],
) -> tuple[Signature, dict[tuple[bool, ...], Formula]]:
    """Read a formula's source and settle its static options in every possible way.

    Returns:
        The signature, and a formula for every combination of the options' values, in their order.

    Raises:
        SyntaxError: the formula uses what can't be generated; it names the line and the construct.
        ValueError: the source of `function` can't be found.
    """
    try:
        lines, first_line = inspect.getsourcelines(function)
        definition = ast.parse(textwrap.dedent("".join(lines))).body[0]
    except (OSError, TypeError, SyntaxError, IndexError) as error:
        raise ValueError(
            f"the source of {getattr(function, '__name__', function)!r} can't be read ({error}). "
            "@elementwise works on functions defined with `def` in a file."
        ) from error
    if not isinstance(definition, ast.FunctionDef):
        raise ValueError(
            f"@elementwise works on plain functions, got {ast.unparse(definition)[:60]!r}. "
            "Define the formula with `def`."
        )
    source = _Source(definition.name, inspect.getsourcefile(function) or "<unknown>", first_line)
    signature = _signature(source, definition.args)
    formulas = {
        setting: _Reader(source, signature, dict(zip(signature.options, setting, strict=True))).read(
            definition
        )
        for setting in itertools.product((False, True), repeat=len(signature.options))
    }
    returned = {formula.returned for formula in formulas.values()}
    if len(returned) > 1:
        raise source.error(definition, f"the options change which arrays are returned: {sorted(returned)}")
    return signature, formulas


@dataclass(frozen=True)
class _Source:
    name: str
    file: str
    first_line: int

    def error(self, where: ast.AST, problem: str) -> SyntaxError:
        line = self.first_line + getattr(where, "lineno", 1) - 1
        text = linecache.getline(self.file, line).rstrip("\n")
        message = f"in the elementwise formula {self.name!r}: {problem}"
        return SyntaxError(message, (self.file, line, 1 + len(text) - len(text.lstrip()), text))


def _signature(source: _Source, arguments: ast.arguments) -> Signature:
    for extra in (arguments.vararg, arguments.kwarg):
        if extra is not None:
            raise source.error(extra, f"'*{extra.arg}' isn't allowed; name every array and scalar")
    positional = [*arguments.posonlyargs, *arguments.args]
    if not positional:
        raise source.error(arguments, "it has no arrays; the parameters before the '*' are arrays")
    if arguments.defaults:
        raise source.error(arguments.defaults[0], "an array can't have a default value")
    scalars: list[str] = []
    options: list[str] = []
    defaults: dict[str, float | bool] = {}
    for parameter, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        annotation = ast.unparse(parameter.annotation).strip("'\"") if parameter.annotation else ""
        (options if annotation == "bool" else scalars).append(parameter.arg)
        if default is not None:
            defaults[parameter.arg] = _default(source, default, annotation == "bool")
    for parameter in [*positional, *arguments.kwonlyargs]:
        if parameter.arg in FUNCTIONS or parameter.arg in ("control", "path"):
            raise source.error(parameter, f"a parameter can't be named {parameter.arg!r}: that is taken")
    if len(options) > MOST_OPTIONS:
        raise source.error(arguments.kwonlyargs[0], f"{len(options)} options; at most {MOST_OPTIONS}")
    names = tuple(parameter.arg for parameter in positional)
    return Signature(names, tuple(scalars), tuple(options), defaults)


def _default(source: _Source, default: ast.expr, option: bool) -> float | bool:
    try:
        value = ast.literal_eval(default)
    except ValueError:
        value = None
    if option and isinstance(value, bool):
        return value
    if not option and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    wanted = "True or False" if option else "a number"
    raise source.error(default, f"the default {ast.unparse(default)!r} must be {wanted}")


class _Reader:
    """Walks the statements of one formula with settled options and numbers the values."""

    def __init__(self, source: _Source, signature: Signature, options: dict[str, bool]) -> None:
        self._source = source
        self._signature = signature
        self._options = options
        self._nodes: list[Node] = []
        self._numbers: dict[Node, int] = {}
        self._names: dict[str, int] = {}

    def read(self, definition: ast.FunctionDef) -> Formula:
        for name in self._signature.arrays:
            self._names[name] = self._add(Node("array", label=name, varies=True))
        for name in self._signature.scalars:
            self._names[name] = self._add(Node("scalar", label=name))
        returned = self._run(definition.body)
        if returned is None:
            raise self._error(definition, "it has no return statement; return the arrays that are updated")
        results = {
            name: self._names[name]
            for name in returned
            if self._nodes[self._names[name]] != Node("array", label=name, varies=True)
        }
        if not results:
            raise self._error(definition, f"with {self._options} it changes no array")
        nodes, results = _reachable(self._nodes, results)
        used = {node.label for node in nodes if node.operation == "array"} | set(results)
        return Formula(
            self._source.name,
            self._options,
            tuple(name for name in self._signature.arrays if name in used),
            self._signature.scalars,
            nodes,
            results,
            returned,
        )

    def _error(self, where: ast.AST, problem: str) -> SyntaxError:
        return self._source.error(where, problem)

    def _run(self, statements: Sequence[ast.stmt]) -> tuple[str, ...] | None:
        for statement in statements:
            returned = None
            match statement:
                case ast.Expr(value=ast.Constant(value=str())) | ast.Pass():
                    pass
                case ast.Assign(targets=[ast.Name(id=name)], value=value):
                    self._assign(statement, name, self._value(value))
                case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
                    self._assign(statement, name, self._value(value))
                case ast.AugAssign(target=ast.Name() as target, op=op, value=value):
                    left = ast.copy_location(ast.Name(target.id, ast.Load()), statement)
                    both = ast.copy_location(ast.BinOp(left, op, value), statement)
                    self._assign(statement, target.id, self._value(both))
                case ast.If(test=test, body=body, orelse=otherwise):
                    returned = self._run(body if self._static(test) else otherwise)
                case ast.Return():
                    returned = self._returned(statement)
                case _:
                    raise self._error(
                        statement,
                        f"{ast.unparse(statement).splitlines()[0]!r} ({type(statement).__name__}) "
                        "isn't allowed; a formula consists of assignments to names, `if` on "
                        "static options, and a return",
                    )
            if returned is not None:
                return returned
        return None

    def _assign(self, where: ast.stmt, name: str, value: int) -> None:
        if name in self._options or name in FUNCTIONS:
            kind = "a static option" if name in self._options else "a function"
            raise self._error(where, f"{name!r} is {kind} and can't be assigned")
        self._names[name] = value

    def _returned(self, statement: ast.Return) -> tuple[str, ...]:
        value = statement.value
        items = value.elts if isinstance(value, ast.Tuple) else [value]
        names = [item.id if isinstance(item, ast.Name) else "" for item in items]
        for name in names:
            if name not in self._signature.arrays or names.count(name) > 1:
                raise self._error(
                    statement,
                    f"{ast.unparse(statement)!r} must give back, once each and by their names, the "
                    f"arrays that are updated; the arrays are {', '.join(self._signature.arrays)}",
                )
            if self._nodes[self._names[name]].truth:
                raise self._error(statement, f"{name!r} was set to a comparison; use where(...)")
        return tuple(names)

    def _static(self, test: ast.expr) -> bool:
        match test:
            case ast.Name(id=name) if name in self._options:
                return self._options[name]
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return not self._static(operand)
            case ast.BoolOp(op=op, values=values):
                settled = [self._static(value) for value in values]
                return all(settled) if isinstance(op, ast.And) else any(settled)
            case _:
                options = ", ".join(self._options) or "(this formula has none)"
                raise self._error(
                    test,
                    f"the condition {ast.unparse(test)!r} isn't made of static options {options}; "
                    "to choose element by element, use where(condition, a, b)",
                )

    def _value(self, expression: ast.expr) -> int:
        match expression:
            case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
                return self._constant(expression, float(number))
            case ast.Name(id=name):
                return self._name(expression, name)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return self._operate(expression, "negative", operand)
            case ast.UnaryOp(op=ast.UAdd(), operand=operand):
                return self._value(operand)
            case ast.UnaryOp(op=ast.Invert(), operand=operand):
                return self._operate(expression, "logical_not", operand)
            case ast.BinOp(left=base, op=ast.Pow(), right=exponent):
                return self._power(expression, self._value(base), self._value(exponent))
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
                return self._operate(expression, _ARITHMETIC[type(op)], left, right)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _LOGIC:
                return self._operate(expression, _LOGIC[type(op)], left, right)
            case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _COMPARISONS:
                return self._operate(expression, _COMPARISONS[type(op)], left, right)
            case ast.IfExp(test=test, body=body, orelse=otherwise):
                return self._value(body if self._static(test) else otherwise)
            case ast.Call(func=ast.Name(id=name), args=operands, keywords=[]) if name in FUNCTIONS:
                operation, count = FUNCTIONS[name]
                if len(operands) != count:
                    raise self._error(expression, f"{name} takes {count} arguments, got {len(operands)}")
                return self._operate(expression, operation, *operands)
            case _:
                raise self._error(
                    expression,
                    f"{ast.unparse(expression)!r} ({type(expression).__name__}) isn't allowed; "
                    "allowed are numbers, names, + - * / **, single comparisons, & | ~ of "
                    "comparisons, `a if option else b`, and calls of " + ", ".join(sorted(FUNCTIONS)),
                )

    def _name(self, where: ast.expr, name: str) -> int:
        if name in self._names:
            return self._names[name]
        if name in self._options:
            raise self._error(where, f"the static option {name!r} can't be used as a number")
        raise self._error(
            where,
            f"the name {name!r} has no value here; known are {', '.join(self._names)}. "
            "Numbers from outside must be passed as scalars",
        )

    def _operate(self, where: ast.expr, operation: str, *operands: ast.expr) -> int:
        return self._combine(where, operation, *[self._value(operand) for operand in operands])

    def _combine(self, where: ast.expr, operation: str, *arguments: int) -> int:
        if operation == "square":
            operation, arguments = "multiply", (arguments[0], arguments[0])
        nodes = [self._nodes[argument] for argument in arguments]
        for place, node in enumerate(nodes):
            wanted = operation in _TAKES_TRUTH or (operation == "where" and place == 0)
            if node.truth != wanted:
                raise self._error(
                    where,
                    f"{ast.unparse(where)!r} needs {'a comparison' if wanted else 'a number'} "
                    f"where it has {'a number' if wanted else 'a comparison'}"
                    + ("" if wanted else "; use where(condition, a, b) to turn it into numbers"),
                )
        if operation in _FOLDED and all(node.operation == "constant" for node in nodes):
            try:
                number = _FOLDED[operation](*[node.number for node in nodes])
            except ZeroDivisionError as error:
                raise self._error(where, f"{ast.unparse(where)!r} divides by zero") from error
            return self._constant(where, number)
        varies = any(node.varies for node in nodes)
        return self._add(Node(operation, arguments, "", 0.0, varies, operation in _GIVES_TRUTH))

    def _power(self, where: ast.expr, base: int, exponent: int) -> int:
        node = self._nodes[exponent]
        if node.varies:
            raise self._error(
                where,
                f"the exponent in {ast.unparse(where)!r} differs from element to element; it must "
                "be a number or made of scalars",
            )
        if node.operation != "constant":
            return self._combine(where, "power", base, exponent)
        # Products and roots are exact to rounding and far cheaper than a general power.
        match node.number:
            case 0.5:
                return self._combine(where, "sqrt", base)
            case 1.0:
                return base
            case 2.0:
                return self._combine(where, "multiply", base, base)
            case 3.0:
                squared = self._combine(where, "multiply", base, base)
                return self._combine(where, "multiply", squared, base)
            case -0.5 | -1.0 | -2.0 | -3.0:
                positive = self._constant(where, -node.number)
                one = self._constant(where, 1.0)
                return self._combine(where, "divide", one, self._power(where, base, positive))
            case _:
                return self._combine(where, "power", base, exponent)

    def _constant(self, where: ast.expr, number: float) -> int:
        if not math.isfinite(number):
            raise self._error(where, f"{ast.unparse(where)!r} is {number}; a constant must be finite")
        return self._add(Node("constant", label=repr(number), number=number))  # 0.0 is not -0.0

    def _add(self, node: Node) -> int:
        if node not in self._numbers:
            self._numbers[node] = len(self._nodes)
            self._nodes.append(node)
        return self._numbers[node]


def _reachable(nodes: Sequence[Node], results: Mapping[str, int]) -> tuple[tuple[Node, ...], dict[str, int]]:
    """Drop the nodes that no result needs, and number the others anew."""
    needed = set(results.values())
    for position in range(len(nodes) - 1, -1, -1):
        if position in needed:
            needed.update(nodes[position].arguments)
    places = {old: new for new, old in enumerate(sorted(needed))}
    kept = tuple(
        Node(n.operation, tuple(places[a] for a in n.arguments), n.label, n.number, n.varies, n.truth)
        for n in (nodes[old] for old in sorted(needed))
    )
    return kept, {name: places[node] for name, node in results.items()}
