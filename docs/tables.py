"""README's tables and docs/methods.md, made from the code: `python docs/tables.py` writes them, `--check` compares.

A table stands between the lines `<!-- NAME:start -->` and `<!-- NAME:end -->`. Not here: any other word of README.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from merger.console import needs
from merger.errors import MergerError
from merger.methods.registry import Method, Param, methods

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
METHODS = ROOT / "docs" / "methods.md"


def main(arguments: Sequence[str]) -> int:
    """Write or check what is generated; 1 if the check finds a difference."""
    built = methods().values()
    tables = {"methods": methods_table(built), "exit-codes": exit_codes_table()}
    wanted = {README: filled(README.read_text("utf-8"), tables), METHODS: methods_page(built)}
    stale = [page for page, text in wanted.items() if not page.exists() or page.read_text("utf-8") != text]
    if "--check" in arguments:
        for page in stale:
            print(f"{page.name}: not what the code says; run make tables", file=sys.stderr)
        return int(bool(stale))
    for page in stale:
        page.write_text(wanted[page], "utf-8")
    return 0


def filled(text: str, tables: dict[str, str]) -> str:
    """The text with each table in its place."""
    for name, table in tables.items():
        place = re.compile(rf"(<!-- {name}:start -->\n).*?(<!-- {name}:end -->)", re.DOTALL)
        if len(place.findall(text)) != 1:
            raise SystemExit(f"README.md: there must be one place for the table {name!r}")
        text = place.sub(lambda match, table=table: f"{match[1]}{table}\n{match[2]}", text)  # type: ignore[misc]
    return text


def methods_table(built: Iterable[Method]) -> str:
    """A row for each merge method."""
    rows = [(f"`{method.name}`", method.summary, parameters(method), source(method)) for method in built]
    return table(("method", "what comes out", "parameters", "from"), rows)


def methods_page(built: Iterable[Method]) -> str:
    """All about each method: what it computes, where it departs from mergekit, its parameters."""
    head = "# Methods\n\nGenerated from the code by `make tables`; `merger methods NAME` says the same.\n"
    return "\n".join([head, *(method_section(method) for method in built)])


def method_section(method: Method) -> str:
    """A method's part of the page."""
    lines = [f"## `{method.name}`: {method.title}", "", method.description, "", f"Models: {needs(method)}.", ""]
    if method.params:
        head = ("parameter", "kind", "default", "what it is")
        lines += [table(head, [parameter(param) for param in method.params]), ""]
    if method.paper:
        lines += [f"From {source(method)}, *{method.paper.title}*.", ""]
    return "\n".join(lines)


def parameter(param: Param) -> tuple[str, str, str, str]:
    """A row of a method's table."""
    kind = "a number for each model" if param.per_model else param.kind
    bounds = f", {param.bounds}" if param.bounds else ""
    default = "required" if param.required else str(param.default).lower()
    return f"`{param.name}`", kind + bounds, default, param.description


def parameters(method: Method) -> str:
    """The method's parameters, those without a default first said to be required."""
    words = [f"`{param.name}`" + (" (required)" if param.required else "") for param in method.params]
    return ", ".join(words)


def source(method: Method) -> str:
    """The paper, as a link."""
    return f"[{method.paper.authors} {method.paper.year}]({method.paper.url})" if method.paper else ""


def exit_codes_table() -> str:
    """A row for each kind of error."""
    kinds = sorted(MergerError.__subclasses__(), key=lambda kind: kind.exit_code)
    return table(("exit code", "what it says"), [(str(kind.exit_code), first_line(kind)) for kind in kinds])


def first_line(kind: type) -> str:
    """What a class's docstring opens with."""
    return (kind.__doc__ or "").splitlines()[0]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |" for line in lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
