"""What README and pages of docs/ say of the code in tables, docs/methods.md, the recipes' schema, and whose repository
it is: `python docs/tables.py` writes them, `--check` compares.

A table stands between the lines `<!-- NAME:start -->` and `<!-- NAME:end -->`. Not here: any other word of those pages.
"""

from __future__ import annotations

import ast
import json
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import formats
import yaml
from console import MERGE, MISTAKES, console

from merger.card.terms import KINDS, TERMS
from merger.cli.text import models_text
from merger.errors import MergerError
from merger.methods.registry import Method, Param, methods
from merger.models.formats.packed import PackedFormat
from merger.models.formats.quantised import FORMATS
from merger.recipe.checks import FIELD_METHODS
from merger.recipe.mergekit import POINTS
from merger.recipe.schema import schema
from merger.safety.limits import TABLE
from merger.safety.numbers import ANY

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
METHODS = ROOT / "docs" / "methods.md"
MERGEKIT = ROOT / "docs" / "mergekit.md"
COMMAND = ROOT / "docs" / "command.md"
ACTION = ROOT / "docs" / "action.md"
CARDS = ROOT / "docs" / "cards.md"
SECURITY = ROOT / "docs" / "security.md"
FORMATS_PAGE = ROOT / "docs" / "formats.md"
ARCHITECTURE = ROOT / "docs" / "architecture.md"
FAMILIES = (
    "averaging", "spherical", "task_vectors", "sparsify", "consensus", "importance", "spectral", "subspace",
)  # fmt: skip
"""The files of methods, as README has them: what to try first comes first."""
SCHEMA = ROOT / "docs" / "recipe.schema.json"
NAMING = (
    "README.md", "docs/*.md", "examples/*.yml", "examples/recipes/*", "templates/recipes/*", ".github/workflows/*.yml",
    "integrations/*.py", "integrations/*/*",
)  # fmt: skip
"""The files that say whose repository it is."""
UNNAMED = "OWNER/merger"
WORKFLOWS = ("workflow", "workflow-parts", "workflow-search")
DEPARTS = "Departs from mergekit: "


def main(arguments: Sequence[str]) -> int:
    """Write or check what is generated; 1 if the check finds a difference."""
    built = methods().values()
    action = yaml.safe_load((ROOT / "action.yml").read_text("utf-8"))
    in_command = {"mistakes": console(MISTAKES), "exit-codes": exit_codes_table()}
    in_action = {"inputs": inputs_table(action["inputs"]), "outputs": outputs_table(action["outputs"])}
    in_cards = {"kinds": kinds_table(), "licences": licences_table()}
    in_formats = {
        "forms": table(("stored as", "read", "merged", "written", "held by"), formats.forms()),
        "refused": table(("what", "the sentence", "the next step", "held by"), formats.refusals()),
        "packed": packed_table(),
        "points": table(("what", "rebuilt in small, by its own library", "held by"), formats.points()),
        "families": table(("family", "class", "in llama.cpp", "positions scaled"), formats.families()),
    }
    wanted = {
        README: filled(README, {"merge": console(MERGE), "families": families_table(built)}),
        COMMAND: filled(COMMAND, in_command),
        ACTION: filled(ACTION, in_action | {name: example(name) for name in WORKFLOWS}),
        CARDS: filled(CARDS, in_cards),
        METHODS: methods_page(built),
        ARCHITECTURE: filled(ARCHITECTURE, {"wings": wings_picture()}),
        FORMATS_PAGE: filled(FORMATS_PAGE, in_formats),
        SECURITY: filled(SECURITY, {"limits": limits_table()}),
        MERGEKIT: filled(MERGEKIT, {"departures": departures(built), "warned": warned_table()}),
    }
    wanted[SCHEMA] = json.dumps(schema(methods()), indent=1, ensure_ascii=False) + "\n"
    for page in (page for pattern in NAMING for page in ROOT.glob(pattern)):
        wanted[page] = with_repository(wanted.get(page) or page.read_text("utf-8"))
    stale = [page for page, text in wanted.items() if not page.exists() or page.read_text("utf-8") != text]
    if "--check" in arguments:
        for page in stale:
            print(f"{page.name}: not what the code says; run make tables", file=sys.stderr)
        return int(bool(stale))
    for page in stale:
        page.write_text(wanted[page], "utf-8")
    return 0


def with_repository(text: str) -> str:
    """The text with the repository that [project.urls] names, in place of none and of the one that README named."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    own = "/".join(project["urls"]["Repository"].split("/")[-2:])
    named = re.search(r"uses: ([\w.-]+/[\w.-]+)@v1\b", README.read_text("utf-8"))
    return text.replace(UNNAMED, own).replace(named[1] if named else UNNAMED, own)


def filled(page: Path, tables: dict[str, str]) -> str:
    """The page's text with each table in its place."""
    text = page.read_text("utf-8")
    for name, table in tables.items():
        place = re.compile(rf"(<!-- {name}:start -->\n).*?(<!-- {name}:end -->)", re.DOTALL)
        if len(place.findall(text)) != 1:
            raise SystemExit(f"{page.name}: there must be one place for the table {name!r}")
        text = place.sub(lambda match, table=table: f"{match[1]}{table}\n{match[2]}", text)  # type: ignore[misc]
    return text


def wings_picture() -> str:
    """The wings by floor as the import contract has them, each with what it says of itself and its number of rooms."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]["contracts"]
    floors = next(contract["layers"] for contract in contracts if contract["name"] == "imports only go down")
    rows = []
    for floor in floors:
        for wing in floor.split(" | "):
            folder = ROOT / "merger" / wing
            if folder.is_dir():
                says = (ast.get_docstring(ast.parse((folder / "__init__.py").read_text("utf-8"))) or "").splitlines()[0]
                inner = sorted(each.name for each in folder.iterdir() if (each / "__init__.py").exists())
                rooms = sum(path.name != "__init__.py" for path in folder.rglob("*.py"))
                rows.append((f"`{wing}`", says, str(rooms), ", ".join(f"`{name}`" for name in inner)))
    picture = "\n".join(f"{floor.replace(' | ', '  ')}" for floor in ["space", *floors] if floor != "__main__")
    return f"```\n{picture}\n```\n\n{table(('wing', 'what it is for', 'rooms', 'of these in wings of its own'), rows)}"


def families_table(built: Iterable[Method]) -> str:
    """A row for each family of methods: a file, what it says of itself, and its methods."""
    files: dict[str, list[str]] = {f"merger.methods.{name}": [] for name in FAMILIES}
    for method in built:
        files[method.function.__module__].append(f"[`{method.name}`](docs/methods.md#{_anchor(method)})")
    says = {name: (sys.modules[name].__doc__ or "").splitlines()[0].split(":")[0] for name in files}
    rows = [(re.sub("^Methods ", "… ", says[name]), ", ".join(of)) for name, of in files.items()]
    return table(("family", "methods"), rows)


def _anchor(method: Method) -> str:
    return re.sub(r"[^a-z0-9_ -]", "", f"{method.name} {method.title}".lower()).replace(" ", "-")


def methods_table(built: Iterable[Method]) -> str:
    """A row for each merge method."""
    rows = [(f"`{method.name}`", method.summary, parameters(method), source(method)) for method in built]
    return table(("method", "what comes out", "parameters", "from"), rows)


def departures(built: Iterable[Method]) -> str:
    """What each of mergekit's methods does otherwise here, from its own words; and which methods it does not have."""
    shared = [method for method in built if method.name in FIELD_METHODS]
    rows = [(f"`{method.name}`", departure(method) or "nothing") for method in shared]
    newer = ", ".join(f"`{method.name}`" for method in built if method not in shared)
    return f"{table(('method', 'what it does otherwise here'), rows)}\n\nMethods that mergekit does not have: {newer}."


def warned_table() -> str:
    """A row for each point at which `check` says that a recipe means something else than in mergekit."""
    head = ("in the recipe", "here", "mergekit", "why")
    return table(head, [(point.recipe, point.here, point.there, point.why) for point in POINTS])


def departure(method: Method) -> str:
    """Where a method departs from mergekit, as a sentence or more."""
    said = [part for part in method.description.split("\n\n") if part.startswith(DEPARTS)]
    text = " ".join(" ".join(said).removeprefix(DEPARTS).split())
    return text[:1].upper() + text[1:]


def methods_page(built: Iterable[Method]) -> str:
    """All about each method: what it computes, where it departs from mergekit, its parameters."""
    head = "# Methods\n\nGenerated from the code by `make tables`; `merger methods NAME` says the same.\n"
    head += f"A parameter without a range may be any number from {ANY}.\n\n"
    head += (
        "To methods on singular values a tensor of two dimensions is a matrix. Of a stack `[experts, rows, columns]`,\n"
        "which its name tells (`….experts.gate_up_proj` and others), each expert is one, merged as if it were a\n"
        "tensor of its own. Any other tensor of more than two dimensions, such as a convolution's `[out, in, k…]`, is\n"
        "one matrix, `[out, in · k…]`.\n"
    )
    return "\n".join([head, methods_table(built), "", *(method_section(method) for method in built)])


def method_section(method: Method) -> str:
    """A method's part of the page."""
    formula = [f"$$ {method.formula} $$", ""] if method.formula else []
    lines = [f"## `{method.name}`: {method.title}", "", *formula, method.description, ""]
    lines += [f"Models: {models_text(method)}.", ""]
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
    return f"[{method.paper.by} {method.paper.year}]({method.paper.url})" if method.paper else ""


def exit_codes_table() -> str:
    """A row for each kind of error."""
    kinds = sorted(MergerError.__subclasses__(), key=lambda kind: kind.exit_code)
    return table(("exit code", "what it says"), [(str(kind.exit_code), first_line(kind)) for kind in kinds])


def first_line(kind: type) -> str:
    """What a class's docstring opens with."""
    return (kind.__doc__ or "").splitlines()[0]


def kinds_table() -> str:
    """A row for each thing that a licence asks."""
    return table(("word", "what it asks"), [(kind.value, asks) for kind, asks in KINDS.items()])


def licences_table() -> str:
    """A row for each licence that is known, the ones that ask least first."""
    rows = [
        (f"`{terms.name}`", f"[{terms.title}]({terms.url})", ", ".join(kind.value for kind in terms.asks) or "nothing")
        for terms in TERMS.values()
    ]
    return table(("licence", "text", "asks"), rows)


def limits_table() -> str:
    """A row for each thing that is read whole."""
    most = {limit: f", {limit.values:,} values" if limit.values else "" for limit in TABLE}
    rows = [(limit.what, f"{limit.most:,} {limit.unit}{most[limit]}", limit.why) for limit in TABLE]
    return table(("what is read", "at most", "why so much"), rows)


def packed_table() -> str:
    """A row for each format of packed tensors."""
    rows = [(form.name, ", ".join(_stored_names(form)), form.how) for form in FORMATS.values()]
    return table(("format", "stored tensors (those in brackets may be missing)", "as which library reads it"), rows)


def _stored_names(form: PackedFormat) -> Iterator[str]:
    for role, ending in form.endings.items():
        name = f"`…{ending}`"
        yield f"({name})" if role in form.optional else name


def example(name: str) -> str:
    """A workflow of examples/, to be copied."""
    return f"```yaml\n{(ROOT / 'examples' / f'{name}.yml').read_text('utf-8')}```"


def inputs_table(inputs: Mapping[str, Mapping[str, Any]]) -> str:
    """A row for each of the Action's inputs."""
    rows = [(f"`{name}`", about["description"], value(str(about["default"]))) for name, about in inputs.items()]
    return table(("input", "what it is", "default"), rows)


def value(text: str) -> str:
    """A default as it is written; nothing for none."""
    return f"`{text}`" if text else ""


def outputs_table(outputs: Mapping[str, Mapping[str, Any]]) -> str:
    """A row for each of the Action's outputs."""
    return table(("output", "what it is"), [(f"`{name}`", about["description"]) for name, about in outputs.items()])


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |" for line in lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
