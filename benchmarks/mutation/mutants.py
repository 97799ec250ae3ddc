"""Small faults put into a module, one at a time, by changing its syntax tree."""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

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

    @property
    def key(self) -> str:
        """What tells it from all others, as long as its module stays the same."""
        return f"{self.file}:{self.line} {self.index} {self.kind}"


def mutants(root: Path, file: Path) -> list[Mutant]:
    """All mutants of a file below ``root``, in the order of its nodes."""
    tree = ast.parse(file.read_text())
    name = file.relative_to(root).as_posix()
    return [
        Mutant(name, node.lineno, index, kind, _short(node), _short(changed) if changed else "(removed)")
        for index, (node, kind, changed) in enumerate(_changes(tree))
    ]


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
