"""Small faults put into a module, one at a time, by changing its syntax tree."""

from __future__ import annotations

import ast
import copy
import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

_COMPARED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}
_COMPUTED: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.MatMult: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
#: Fields left as they are: types, and what a class or function is wrapped in.
_IGNORED = {"annotation", "returns", "bases", "decorator_list", "type_params"}


@dataclass(frozen=True)
class Mutant:
    """A module with one fault, at a place that stays the same between runs."""

    file: str
    line: int
    index: int
    kind: str
    was: str
    now: str
    #: The function or method, or the class or module outside of its functions; the fault's number in it; its digest.
    scope: str
    number: int
    source: str

    @property
    def key(self) -> str:
        """What tells it from all others, as long as its function stays the same."""
        return f"{self.file}:{self.scope} {self.number}"


def mutants(root: Path, file: Path) -> list[Mutant]:
    """All mutants of a file below ``root``, in the order of its nodes."""
    tree = ast.parse(file.read_text())
    name = file.relative_to(root).as_posix()
    scopes = {id(node): scope for node, scope in _scopes(tree, Scope("", _digest(tree)))}
    numbers: Counter[str] = Counter()
    found = []
    for index, (node, kind, changed) in enumerate(_changes(tree)):
        scope = scopes[id(node)]
        now = _short(changed) if changed else "(removed)"
        number = numbers[scope.name]
        found.append(Mutant(name, node.lineno, index, kind, _short(node), now, scope.name, number, scope.digest))
        numbers[scope.name] += 1
    return found


def mutated(source: str, index: int) -> ast.Module:
    """The syntax tree of a module with the fault of that index."""
    tree = ast.parse(source)
    for i, (node, _, changed) in enumerate(_changes(tree)):
        if i == index:
            by = ast.copy_location(changed or ast.Pass(), node)
            return ast.fix_missing_locations(_Replacer(node, by).visit(tree))
    raise IndexError(index)


class _Replacer(ast.NodeTransformer):
    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        return self.new if node is self.old else self.generic_visit(node)


class Scope(NamedTuple):
    """A function, or what a class or module has beside functions and classes."""

    name: str
    digest: str


_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def _scopes(node: ast.AST, scope: Scope) -> Iterator[tuple[ast.AST, Scope]]:
    """All nodes below, each with its scope; functions in functions belong to the outer one."""
    if isinstance(node, _FUNCTIONS):
        yield from ((below, scope) for below in ast.walk(node))
        return
    for child in ast.iter_child_nodes(node):
        named = isinstance(child, (*_FUNCTIONS, ast.ClassDef))
        inner = Scope(f"{scope.name}.{child.name}".removeprefix("."), _digest(child)) if named else scope
        yield child, inner
        yield from _scopes(child, inner)


def _digest(node: ast.AST) -> str:
    """The same for the same code, whatever its comments, docstring and place."""
    body = [child for child in node.body if not _is_docstring(child)]
    if not isinstance(node, _FUNCTIONS):
        body = [
            child for child in body if not isinstance(child, (*_FUNCTIONS, ast.ClassDef, ast.Import, ast.ImportFrom))
        ]
    return hashlib.sha256(ast.unparse(_with(node, body=body)).encode()).hexdigest()[:16]


def _is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _changes(node: ast.AST) -> Iterator[tuple[ast.AST, str, ast.AST | None]]:
    """For each fault the node, the kind of fault, and what the node becomes; None if it is left out."""
    for field, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or field in _IGNORED or isinstance(child, ast.JoinedStr):
                continue
            if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                continue
            yield from _changes_of(child)
            yield from _changes(child)


def _changes_of(node: ast.AST) -> Iterator[tuple[ast.AST, str, ast.AST | None]]:
    match node:
        case ast.Compare(ops=[op]):
            yield node, "comparison", _with(node, ops=[_COMPARED[type(op)]()])
        case ast.BinOp(op=op) if type(op) in _COMPUTED and not _is_text(node):
            yield node, "arithmetic", _with(node, op=_COMPUTED[type(op)]())
        case ast.AugAssign(op=op) if type(op) in _COMPUTED:
            yield node, "arithmetic", _with(node, op=_COMPUTED[type(op)]())
        case ast.BoolOp(op=op):
            yield node, "boolean", _with(node, op=ast.Or() if isinstance(op, ast.And) else ast.And())
        case ast.UnaryOp(op=ast.Not() | ast.USub() | ast.Invert(), operand=operand):
            yield node, "operator left out", operand
        case ast.Constant(value=bool() as value):
            yield node, "constant", ast.Constant(not value)
        case ast.Constant(value=int() | float() as value):
            yield node, "constant", ast.Constant(value + 1)
        case ast.IfExp(body=body, orelse=orelse):
            yield node, "branches exchanged", _with(node, body=orelse, orelse=body)
        case ast.Return(value=value) if value is not None and ast.unparse(value) != "None":
            yield node, "return", ast.Return(ast.Constant(None))
        case ast.Expr(value=ast.Call()) | ast.Raise() | ast.Continue() | ast.Break():
            yield node, "statement left out", None
        case ast.Assign(targets=[ast.Subscript() | ast.Attribute()]):
            yield node, "statement left out", None


def _with(node: ast.AST, **fields: object) -> ast.AST:
    changed = copy.copy(node)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed


def _is_text(node: ast.BinOp) -> bool:
    sides = [side.value if isinstance(side, ast.Constant) else side for side in (node.left, node.right)]
    return any(isinstance(side, ast.JoinedStr | str) for side in sides)


def _short(node: ast.AST) -> str:
    text = " ".join(ast.unparse(node).split())
    return text if len(text) <= 90 else f"{text[:87]}..."
