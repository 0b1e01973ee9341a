"""The command `merger`: reads arguments, calls the line, ends with an exit code.

Not here: the work (run) and its words (console).
"""

from __future__ import annotations

import argparse
import atexit
import gc
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from merger.errors import MergerError, Problem, RecipeError, VerificationError, did_you_mean
from merger.machine import Halt, halting, limits_told
from merger.safety import numbers, secrets
from merger.safety.text import guarded, line

if TYPE_CHECKING:
    from merger.options import Options, Part
    from merger.plan.plan import Plan
    from merger.recipe.model import Recipe
    from merger.spread import Engine

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

T = TypeVar("T")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 0, or that of the error's class. No token gets into what it prints."""
    with guarded():
        return secrets.watched(lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    # torch's import makes so many lasting objects that to look for garbage among them took 0.3 s, at the exit 0.45 s
    gc.set_threshold(200_000)
    atexit.register(gc.freeze)
    arguments = _parser().parse_args(argv)
    try:
        with halting(), limits_told():
            return int(arguments.command(arguments))
    except MergerError as error:
        _report(error, getattr(arguments, "json", False))
        return error.exit_code
    except Halt as halt:
        print(halt, file=sys.stderr)
        return halt.exit_code
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
        "disk, 6 upload refused, 7 verification failed or models differ, 8 a part is not made, "
        "9 the result cannot be measured. "
        "Environment: HF_TOKEN, HF_ENDPOINT, HF_HOME.",
    )
    parser.add_argument("--version", action="version", version=f"merger {version('hub-merger')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_check(commands)
    _add_plan(commands)
    _add_run(commands)
    _add_publish(commands)
    _add_extract(commands)
    _add_status(commands)
    _add_verify(commands)
    _add_diff(commands)
    _add_card(commands)
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
    plan.add_argument(
        "--look", action="store_true", help="read a sample of the tensors, and say how the parents relate"
    )
    plan.set_defaults(command=_plan)


def _add_run(commands: Commands) -> None:
    run = commands.add_parser("run", help="make the merge")
    _add_budget(run)
    run.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the arithmetic is done")
    spread = run.add_mutually_exclusive_group()
    spread.add_argument(
        "--part", type=_part, metavar="I/N", help="make the I-th of N shares of the files; `merger publish` ends it"
    )
    run.add_argument(
        "--stream", action="store_true", help="send files to the Hub as they are made, without any on this disk"
    )
    spread.add_argument(
        "--engine", choices=("ray", "jobs"), help="have --parts made on a Ray cluster, or by Hugging Face Jobs (paid)"
    )
    parts = "how many parts the engine makes at the same time"
    run.add_argument("--parts", type=_whole(numbers.PARTS), metavar="N", help=parts)
    run.add_argument("--flavor", default="cpu-basic", help="hardware of a Hub job (default cpu-basic)")
    run.add_argument("--timeout", type=_duration, default="6h", help="how long a Hub job may run (default 6h)")
    _add_end(run)
    run.set_defaults(command=_run)


def _add_publish(commands: Commands) -> None:
    publish = commands.add_parser("publish", help="make a model of what the parts of a run have made")
    _add_budget(publish)
    _add_end(publish)
    publish.set_defaults(command=_run, publish_only=True)


def _add_extract(commands: Commands) -> None:
    extract = commands.add_parser("extract-lora", help="take what a fine-tune changed in its base as a LoRA adapter")
    extract.add_argument("model", metavar="FINE_TUNE", help="org/name, org/name@revision or ./folder")
    extract.add_argument("base_model", metavar="BASE", help="the model that it was made from")
    rank, alpha = _whole(numbers.RANK), _argument(partial(numbers.decimal, within=numbers.ALPHA))
    extract.add_argument("--rank", type=rank, required=True, metavar="N", help="directions of each matrix")
    extract.add_argument("--alpha", type=alpha, metavar="X", help="lora_alpha (default: the rank)")
    extract.add_argument("--include", metavar="REGEX", help="only tensors whose names match it somewhere")
    extract.add_argument("--exclude", metavar="REGEX", help="no tensors whose names match it")
    extract.add_argument("--embed", action="store_true", help="take embeddings apart too (default: held whole)")
    extract.add_argument("--distribute-scale", action="store_true", help="share singular values between A and B")
    extract.add_argument("--skip-rest", action="store_true", help="leave out what is no matrix (default: held whole)")
    extract.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="default: the fine-tune's")
    extract.add_argument("--license", metavar="ID", help="the licence that the card states")
    _add_limits(extract)
    _add_end(extract)
    extract.set_defaults(command=_extract)


def _add_end(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--force", action="store_true", help="replace a model at the destination")
    parser.add_argument("--quiet", action="store_true", help="print nothing but problems")


def _add_status(commands: Commands) -> None:
    status = commands.add_parser("status", help="show what unfinished runs left at a destination")
    status.add_argument("to", metavar="DEST", help="a folder, or hf://owner/name")
    status.set_defaults(command=_status)
    clean = commands.add_parser("clean", help="remove what unfinished runs left at a destination, and nothing else")
    clean.add_argument("to", metavar="DEST", help="a folder, or hf://owner/name")
    clean.add_argument("--yes", action="store_true", help="remove it; else only show it")
    clean.set_defaults(command=_clean)


def _add_verify(commands: Commands) -> None:
    verify = commands.add_parser("verify", help="make a sample of a merge again from its parents, and compare")
    verify.add_argument("model", metavar="MODEL", help="hf://owner/name[@revision], owner/name or a folder")
    much = verify.add_mutually_exclusive_group()
    much.add_argument(
        "--tensors",
        type=_whole(numbers.COUNT),
        metavar="N",
        help="compare N tensors in full (default: a little of each)",
    )
    much.add_argument("--all", action="store_true", help="compare every tensor, and the SHA-256 of every file")
    seed = "what the sample is drawn from (default: chance)"
    verify.add_argument("--seed", type=_whole(numbers.GIVEN_SEED), metavar="N", help=seed)
    _add_means(verify)
    verify.set_defaults(command=_verify)


def _add_diff(commands: Commands) -> None:
    diff = commands.add_parser("diff", help="compare two checkpoints tensor by tensor; exit code 7 where they differ")
    for name in ("A", "B"):
        diff.add_argument(name.lower(), metavar=name, help="hf://owner/name[@revision], owner/name or a folder")
    diff.add_argument(
        "--threads", type=_whole(numbers.THREADS), metavar="N", help="threads that compute (default: one for each core)"
    )
    diff.add_argument("--json", action="store_true", help="print the outcome as JSON")
    diff.set_defaults(command=_diff)


def _add_card(commands: Commands) -> None:
    card = commands.add_parser("card", help="render the card of a finished merge again, without merging")
    card.add_argument("model", metavar="MODEL", help="hf://owner/name, owner/name or a folder")
    card.add_argument("--template", metavar="FILE", help="in place of the lock's publish.template")
    card.add_argument("--print", dest="print_only", action="store_true", help="print it, and write nothing")
    card.set_defaults(command=_card)


def _add_budget(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="a recipe, or the lock file of a merge")
    _add_limits(parser)


def _add_limits(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--to", metavar="DEST", help="a folder, or hf://owner/name; default: the recipe's publish.repo")
    parser.add_argument(
        "--max-disk", type=_bytes, metavar="SIZE", help="the most disk the run may take at once, such as 10GB"
    )
    parser.add_argument("--shard-size", type=_bytes, metavar="SIZE", help="the largest size of a file (default 5GB)")
    parser.add_argument(
        "--seed",
        type=_whole(numbers.GIVEN_SEED),
        metavar="N",
        help="for methods that draw random numbers; the recipe's otherwise",
    )
    parser.add_argument(
        "--allow-pickle",
        action="store_true",
        help="of models without safetensors, read pytorch_model.bin: its tensors alone, nothing in it is run",
    )
    _add_means(parser)


def _add_means(parser: argparse.ArgumentParser) -> None:
    """What a command may use, and how it tells what came of it."""
    parser.add_argument(
        "--max-memory",
        type=_bytes,
        metavar="SIZE",
        help="the most memory to take, such as 4GB (default: all that is free)",
    )
    parser.add_argument(
        "--threads", type=_whole(numbers.THREADS), metavar="N", help="threads that compute (default: one for each core)"
    )
    parser.add_argument(
        "--no-cache",
        dest="cache",
        action="store_false",
        help="download also what lies in Hugging Face's cache on this disk",
    )
    parser.add_argument("--json", action="store_true", help="print the outcome as JSON")


def _add_methods(commands: Commands) -> None:
    methods = commands.add_parser("methods", help="list the merge methods, or tell all about one")
    methods.add_argument("name", nargs="?", metavar="NAME")
    methods.set_defaults(command=_methods)


def _argument(parse: Callable[[str], T]) -> Callable[[str], T]:
    """A reader of text for argparse, which tells a ValueError's sentence only where it is asked to."""

    def read(text: str) -> T:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return read


def _whole(within: numbers.Range) -> Callable[[str], int]:
    return _argument(partial(numbers.whole, within=within))


_bytes = _argument(numbers.nbytes)


@_argument
def _part(text: str) -> Part:
    from merger.options import Part

    return Part.parse(text)


@_argument
def _duration(text: str) -> str:
    if re.fullmatch(r"[1-9][0-9]{0,6}[smhd]", text) is None:
        raise ValueError(f"{numbers.shortened(text)} is no duration; write for example 90m or 6h")
    return text


# ---- commands -------------------------------------------------------------------------------------------------------


def _check(arguments: argparse.Namespace) -> int:
    from merger import console
    from merger.planning import read

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
        named = dict.fromkeys(piece.method for document in recipe.documents for piece in document.slices)
        methods = ", ".join([*named, *(["mixture of experts"] if recipe.mixture else [])])
        count = len(recipe.models)
        print(line(f"{path}: well formed ({methods}; {count} {'model' if count == 1 else 'models'})"))
    return code


def _options(arguments: argparse.Namespace) -> Options:
    from merger.options import Options

    return Options(
        to=arguments.to,
        max_memory=arguments.max_memory,
        max_disk=arguments.max_disk,
        shard_size=arguments.shard_size,
        threads=arguments.threads,
        device=getattr(arguments, "device", "cpu"),
        seed=arguments.seed,
        force=getattr(arguments, "force", False),
        part=getattr(arguments, "part", None),
        publish_only=getattr(arguments, "publish_only", False),
        stream=getattr(arguments, "stream", False),
        allow_pickle=arguments.allow_pickle,
        cache=arguments.cache,
    )


def _plan(arguments: argparse.Namespace) -> int:
    from merger import console
    from merger.options import needed_disk, stated_destination
    from merger.planning import looked, plan, read

    recipe = read(arguments.recipe)
    options = _options(arguments)
    planned, store = plan(recipe, options)
    if options.max_disk is not None:
        needed_disk(planned, options, planned.shards)
    for note in recipe.warnings:
        print(console.warning(note), file=sys.stderr)
    to = stated_destination(recipe, options)
    print(json.dumps(console.plan_json(planned, to)) if arguments.json else console.plan_text(planned, to))
    if arguments.look:
        print(console.relations_text(looked(planned, store)), file=sys.stderr if arguments.json else sys.stdout)
    return 0


def _engine(arguments: argparse.Namespace) -> Engine | None:
    from merger.spread import Engine

    kind, parts = getattr(arguments, "engine", None), getattr(arguments, "parts", None)
    if (kind is None) != (parts is None):
        hint = "write for example --engine ray --parts 4; a single part is made with --part 1/4"
        raise RecipeError(Problem("--engine and --parts go together", hint=hint))
    return None if kind is None or parts is None else Engine(kind, parts, arguments.flavor, arguments.timeout)


def _run(arguments: argparse.Namespace) -> int:
    from merger.planning import read

    return _made(read(arguments.recipe), arguments)


def _extract(arguments: argparse.Namespace) -> int:
    from merger.planning import extraction

    keys = ("model", "base_model", "rank", "alpha", "include", "exclude", "distribute_scale", "skip_rest")
    settings = {key: getattr(arguments, key) for key in keys} | {"embeddings": arguments.embed}
    return _made(extraction(settings, arguments.dtype, arguments.license), arguments)


def _made(recipe: Recipe, arguments: argparse.Namespace) -> int:
    from merger import console
    from merger.options import destination, fitted
    from merger.planning import plan
    from merger.run import run
    from merger.spread import spread, suited

    options, engine = _options(arguments), _engine(arguments)
    options = fitted(options) if engine is None else suited(options, engine)
    to = destination(recipe, options)  # a missing destination is said before the models are asked for
    planned, store = plan(recipe, options)
    quiet = arguments.quiet
    if not quiet:
        notes = [console.warning(note) for note in recipe.warnings]
        print("\n".join([*notes, console.plan_text(planned, to), ""]), file=sys.stderr)
    progress = None if quiet else console.Progress(sum(job.nbytes for job in planned.jobs))
    event: object = None
    try:
        events = run(planned, store, options) if engine is None else spread(planned, store, options, engine)
        for event in events:
            if progress is not None:
                console.show(event, progress)
    finally:
        if progress is not None:
            progress.close()
    _finished(event, planned, arguments)
    return 0


def _finished(event: object, planned: Plan, arguments: argparse.Namespace) -> None:
    from merger import console
    from merger.run import Done, PartDone

    assert isinstance(event, (Done, PartDone))
    if arguments.json:
        print(json.dumps({"plan": planned.hash, **console.as_json(event)}))
    elif not arguments.quiet:
        print(console.ended(event))


def _status(arguments: argparse.Namespace) -> int:
    from merger import console
    from merger.run import leftovers

    print(console.leftovers_text(arguments.to, leftovers(arguments.to)))
    return 0


def _clean(arguments: argparse.Namespace) -> int:
    from merger import console
    from merger.run import clean, leftovers

    found = leftovers(arguments.to)
    print(console.leftovers_text(arguments.to, found))
    for leftover in found if arguments.yes else ():
        clean(arguments.to, leftover)
        print(line(f"removed {leftover.where}"))
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from merger import console, reports
    from merger.options import Options, fitted
    from merger.verify import Begun, Extent, Report, verify

    means = Options(max_memory=arguments.max_memory, threads=arguments.threads, cache=arguments.cache)
    extent = Extent(arguments.all, arguments.tensors, arguments.seed)
    progress: console.Progress | None = None
    event: object = None
    try:
        for event in verify(arguments.model, fitted(means), extent):
            if isinstance(event, Begun):
                progress = console.Progress(event.nbytes, doing="comparing")
            elif progress is not None:
                console.show(event, progress)
    finally:
        if progress is not None:
            progress.close()
    assert isinstance(event, Report)
    print(json.dumps(reports.report_json(event)) if arguments.json else reports.report_text(event))
    return 0 if event.passed else VerificationError.exit_code


def _diff(arguments: argparse.Namespace) -> int:
    from merger import console, machine, reports
    from merger.diff import Contrast, contrast, pair

    both = pair(arguments.a, arguments.b)
    progress = console.Progress(both.nbytes, doing="comparing")
    found: object = None
    try:
        for found in contrast(both, arguments.threads or machine.cores()):
            if isinstance(found, int):
                progress.add(found)
    finally:
        progress.close()
    assert isinstance(found, Contrast)
    print(json.dumps(reports.contrast_json(found)) if arguments.json else reports.contrast_text(found))
    return 0 if found.same else VerificationError.exit_code


def _card(arguments: argparse.Namespace) -> int:
    from merger import console
    from merger.options import Options
    from merger.recard import keep, recard

    made = recard(arguments.model, Options(), arguments.template)
    for note in made.merge.recipe.warnings if arguments.template is None else ():
        print(console.warning(note), file=sys.stderr)
    if arguments.print_only:
        print(made.text, end="")
    else:
        print(console.carded(made, keep(made, Options())))
    return 0


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
