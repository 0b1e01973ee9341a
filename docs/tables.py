"""README's tables, made from the code they tell of: `python docs/tables.py` writes them, `--check` only compares.

A table stands between the lines `<!-- NAME:start -->` and `<!-- NAME:end -->`. Not here: any other word of README.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from merger.errors import MergerError
from merger.methods.registry import Method, methods

README = Path(__file__).resolve().parents[1] / "README.md"


def main(arguments: Sequence[str]) -> int:
    """Write or check the tables; 1 if the check finds a difference."""
    found = README.read_text("utf-8")
    wanted = filled(found, {"methods": methods_table(methods().values()), "exit-codes": exit_codes_table()})
    if found == wanted:
        return 0
    if "--check" in arguments:
        print("README.md: its tables are not those of the code; run make tables", file=sys.stderr)
        return 1
    README.write_text(wanted, "utf-8")
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
