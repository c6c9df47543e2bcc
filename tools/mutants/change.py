"""The mutants of a module: its source with one operator, number or condition changed, by Cosmic Ray's operators.

Left out is what no test can notice: changes of annotations, which never run (``from __future__ import annotations``);
sources that do not compile, or that another operator made already; and ``@dataclass(frozen=True)`` made changeable,
which guards against mistakes in code that does not exist.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import cache

from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names


@dataclass(frozen=True)
class Mutant:
    """A changed module: Cosmic Ray's name of the change, its line (from 1 on) before and after, all of the source."""

    operator: str
    line: int
    was: str
    now: str
    source: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.was}  ->  {self.now}"


def mutants_of(source: str) -> list[Mutant]:
    """All mutants of a module's source that a test could notice, in the order of their lines."""
    seen, result = {_what_runs(source)}, []
    for name in operator_names():
        kind = get_operator(name)
        if kind.arguments():
            continue  # those that replace one named variable by another have to be told which
        occurrence = 0
        while (changed := mutate_code(source, kind(), occurrence)) is not None:
            occurrence += 1
            try:
                runs = _what_runs(changed)
            except SyntaxError:
                continue
            if runs not in seen:
                seen.add(runs)
                result.append(Mutant(name.removeprefix("core/"), *_difference(source, changed), changed))
    return sorted(result, key=lambda mutant: mutant.line)


@cache
def _what_runs(source: str) -> str:
    """The code without annotations, and without ``frozen=`` of decorators."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            node.annotation = None
        elif isinstance(node, ast.FunctionDef):
            node.returns = None
        elif isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant(None)
        elif isinstance(node, ast.ClassDef):
            for call in (decorator for decorator in node.decorator_list if isinstance(decorator, ast.Call)):
                call.keywords = [word for word in call.keywords if word.arg != "frozen"]
    return ast.dump(tree)


def _difference(source: str, changed: str) -> tuple[int, str, str]:
    """Number of the first line that differs, and what differs before and after; blank lines do not count."""
    numbers = [k for k, line in enumerate(source.splitlines(), start=1) if line.strip()]
    was, now = ([line.strip() for line in text.splitlines() if line.strip()] for text in (source, changed))
    first = next(k for k, line in enumerate(was) if now[k:k + 1] != [line])
    while len(was) > first and len(now) > first and was[-1] == now[-1]:
        was.pop(), now.pop()
    return numbers[first], " ".join(was[first:]), " ".join(now[first:])
