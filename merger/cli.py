"""The command `merger`: check, plan, run, methods, schema. Not here: the work (run) and its words (console)."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from merger.errors import MergerError, Problem, RecipeError, did_you_mean

if TYPE_CHECKING:
    from merger.run import Done, Options

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 0, or that of the error's class."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.command(arguments))
    except MergerError as error:
        _report(error, getattr(arguments, "json", False))
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted: the destination is as it was before", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()
        return 0


def _report(error: MergerError, as_json: bool) -> None:
    from merger import console

    if as_json:
        print(json.dumps({"exit_code": error.exit_code, "problems": [asdict(problem) for problem in error.problems]}))
    print(console.problems(error), file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="merger",
        description="Merge models from a YAML recipe, tensor by tensor in bounded memory, to a folder or the Hub.",
        epilog="Exit codes: 2 recipe, 3 a model cannot be read, 4 models do not fit each other, 5 not enough memory or "
        "disk, 6 upload refused, 7 verification failed. Environment: HF_TOKEN, HF_ENDPOINT, HF_HOME.",
    )
    parser.add_argument("--version", action="version", version=f"merger {version('hub-merger')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_check(commands)
    _add_plan(commands)
    _add_run(commands)
    _add_methods(commands)
    schema = commands.add_parser("schema", help="print the JSON Schema of recipes, for editors")
    schema.set_defaults(command=_schema)
    return parser


def _add_check(commands: Commands) -> None:
    check = commands.add_parser("check", help="find what is wrong with recipes, without looking at their models")
    check.add_argument("recipes", nargs="+", type=Path, metavar="RECIPE")
    check.set_defaults(command=_check)


def _add_plan(commands: Commands) -> None:
    plan = commands.add_parser("plan", help="show what a recipe makes and what it takes, without reading any tensor")
    _add_budget(plan)
    plan.set_defaults(command=_plan)


def _add_run(commands: Commands) -> None:
    run = commands.add_parser("run", help="make the merge")
    _add_budget(run)
    run.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the arithmetic is done")
    run.add_argument("--force", action="store_true", help="replace a model at the destination")
    run.add_argument("--quiet", action="store_true", help="print nothing but problems")
    run.set_defaults(command=_run)


def _add_budget(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=Path, metavar="RECIPE")
    parser.add_argument("--to", metavar="DEST", help="a folder, or hf://owner/name; default: the recipe's publish.repo")
    parser.add_argument(
        "--max-memory", type=_bytes, metavar="SIZE", help="the most memory the run may take, such as 4GB"
    )
    parser.add_argument("--shard-size", type=_bytes, metavar="SIZE", help="the largest size of a file (default 5GB)")
    parser.add_argument(
        "--threads", type=_positive, metavar="N", help="threads that compute (default: one for each core)"
    )
    parser.add_argument(
        "--seed", type=int, metavar="N", help="for methods that draw random numbers; the recipe's otherwise"
    )
    parser.add_argument("--json", action="store_true", help="print the outcome as JSON")


def _add_methods(commands: Commands) -> None:
    methods = commands.add_parser("methods", help="list the merge methods, or tell all about one")
    methods.add_argument("name", nargs="?", metavar="NAME")
    methods.set_defaults(command=_methods)


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]I?)?B?", text.strip().upper())
    if match is None or float(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write for example 500MB, 4GB or 4GiB")
    return int(float(match[1]) * _UNITS[match[2] or ""])


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of threads")
    return int(text)


# ---- commands -------------------------------------------------------------------------------------------------------


def _check(arguments: argparse.Namespace) -> int:
    from merger import console
    from merger.run import read

    code = 0
    for path in arguments.recipes:
        try:
            recipe = read(path)
        except MergerError as error:
            _report(error, as_json=False)
            code = error.exit_code
            continue
        for note in recipe.warnings:
            print(console.warning(note), file=sys.stderr)
        methods = ", ".join(dict.fromkeys(piece.method for piece in recipe.slices))
        print(f"{path}: well formed ({methods}; {len(recipe.models)} models)")
    return code


def _options(arguments: argparse.Namespace) -> Options:
    from merger.run import Options

    return Options(
        to=arguments.to,
        max_memory=arguments.max_memory,
        shard_size=arguments.shard_size,
        threads=arguments.threads,
        device=getattr(arguments, "device", "cpu"),
        seed=arguments.seed,
        force=getattr(arguments, "force", False),
    )


def _plan(arguments: argparse.Namespace) -> int:
    from merger import console
    from merger.run import plan, read

    recipe = read(arguments.recipe)
    planned, _ = plan(recipe, _options(arguments))
    for note in recipe.warnings:
        print(console.warning(note), file=sys.stderr)
    print(json.dumps(planned.as_json()) if arguments.json else console.plan_text(planned))
    return 0


def _run(arguments: argparse.Namespace) -> int:
    from merger import console
    from merger.run import Done, destination, plan, read, run

    recipe, options = read(arguments.recipe), _options(arguments)
    destination(recipe, options)  # a missing destination is said before the models are asked for
    planned, store = plan(recipe, options)
    quiet = arguments.quiet
    if not quiet:
        notes = [console.warning(note) for note in recipe.warnings]
        print("\n".join([*notes, console.plan_text(planned), ""]), file=sys.stderr)
    progress = None if quiet else console.Progress(sum(job.nbytes for job in planned.jobs))
    done: Done | None = None
    try:
        for event in run(planned, store, options):
            done = event if isinstance(event, Done) else done
            if progress is not None:
                console.show(event, progress)
    finally:
        if progress is not None:
            progress.close()
    assert done is not None
    _finished(done, planned.hash, arguments)
    return 0


def _finished(done: Done, identity: str, arguments: argparse.Namespace) -> None:
    if arguments.json:
        shards = [{"name": shard.name, "size": shard.size, "sha256": shard.sha256} for shard in done.shards]
        print(json.dumps({"plan": identity, "shards": shards, **asdict(done.published)}))
    elif not arguments.quiet:
        commit = f" at commit {done.published.commit[:12]}" if done.published.commit else ""
        print(f"merged into {done.published.where}{commit}")


def _methods(arguments: argparse.Namespace) -> int:
    from merger import console
    from merger.methods.registry import methods

    table = methods()
    if arguments.name is None:
        print(console.methods_text(table.values()))
        return 0
    if arguments.name not in table:
        raise RecipeError(Problem(f"there is no method {arguments.name!r}", hint=did_you_mean(arguments.name, table)))
    print(console.method_text(table[arguments.name]))
    return 0


def _schema(arguments: argparse.Namespace) -> int:
    from merger.methods.registry import methods
    from merger.recipe.schema import schema

    print(json.dumps(schema(methods()), indent=2, ensure_ascii=False))
    return 0
