"""The house: a name stands for one thing, a wing has nine rooms at most, and no imports lead in a circle.

Types count too. Not here: that imports only go down (the contracts in pyproject.toml).
"""

from __future__ import annotations

import ast
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter

from elsewhere import TAKEN
from places import ROOT

MOST_ROOMS = 9
OFFERED = ("check", "diff", "merge", "parse", "plan", "search", "verify")
API = dict.fromkeys(OFFERED, "the Python API offers what a room does")
SAME_ELSEWHERE = {"main": "a process begins with it", **API}
"""Names that stand for the same thing in several rooms, and why."""


@cache
def rooms() -> dict[str, ast.Module]:
    """Each module's tree by its name."""
    paths = [path for top in ("merger", "space") for path in sorted((ROOT / top).rglob("*.py"))]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths]
    return {name: ast.parse(path.read_text("utf-8")) for name, path in zip(names, paths, strict=True)}


def imported(tree: ast.Module) -> Iterator[str]:
    """The modules of ours that one imports, wherever in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in rooms())
        elif isinstance(node, ast.ImportFrom) and node.module:
            parts = {f"{node.module}.{alias.name}" for alias in node.names}
            yield from (parts & rooms().keys()) or ({node.module} & rooms().keys())


def test_a_public_name_stands_for_one_thing() -> None:
    """No function or class of one room is called as another's, but for those with a reason."""
    found: dict[str, list[str]] = defaultdict(list)
    for room, tree in rooms().items():
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                found[node.name].append(room)
    assert {name: places for name, places in found.items() if len(places) > 1 and name not in SAME_ELSEWHERE} == {}


def test_no_imports_lead_in_a_circle() -> None:
    """Not even for types: who reads a room has read what it stands on."""
    graph = {room: set(imported(tree)) - {room} for room, tree in rooms().items()}
    order = list(TopologicalSorter(graph).static_order())
    assert set(order) >= set(rooms())


def test_a_wing_has_nine_rooms_at_most() -> None:
    """Those of wings inside of it are counted by themselves."""
    paths = [path for top in ("merger", "space") for path in (ROOT / top).rglob("*.py") if path.name != "__init__.py"]
    counted = Counter(path.parent for path in paths)
    assert {str(wing): count for wing, count in counted.items() if count > MOST_ROOMS} == {}


def test_what_only_posix_has_stands_in_one_room() -> None:
    """By name; `make lint` has mypy read the package as on Windows, which finds the rest. The Space runs on Linux."""
    modules = {"fcntl", "grp", "msvcrt", "pty", "pwd", "resource", "termios", "tty", "winreg"}
    names = {*TAKEN, "fork", "forkpty", "killpg", "mkfifo", "setsid", "SIGCHLD", "SIGHUP", "SIGKILL", "SIGXCPU"}
    found = defaultdict(set)
    for room, tree in rooms().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                named = {alias.name for alias in node.names} | {getattr(node, "module", None) or ""}
                found[room] |= named & (modules | names)
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                found[room] |= {node.attr} & names if node.value.id in ("os", "signal") else set()
    assert found["merger.system"] >= {"fcntl", "resource", "msvcrt", "preadv"}
    told = {room: some for room, some in found.items() if some and not room.startswith("space.")}
    assert told.keys() == {"merger.system"}, told
