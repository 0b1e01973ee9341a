"""The command `merger`: calls the line as its arguments say, ends with an exit code.

Not here: the arguments (arguments), the work (run) and its words (cli.text).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from merger.cli.arguments import parse_arguments
from merger.errors import MergerError, Problem, RecipeError, VerificationError
from merger.runtime import Halt, halting, take_over, tell_limits
from merger.safety import secrets
from merger.safety.text import guard_streams, line

if TYPE_CHECKING:
    from merger.distributed.start import Engine, PartMade, PartStarted
    from merger.engine.execute import BytesWritten
    from merger.recipe.model import Recipe
    from merger.run.found import SearchFacts
    from merger.run.options import Options
    from merger.run.pipeline import Event


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 0, or that of the error's class. No token gets into what it prints."""
    with guard_streams():
        return secrets.watch(lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    take_over()
    try:
        arguments = parse_arguments(argv)
        with halting(), tell_limits():
            return _COMMANDS[arguments.command](arguments)
    except MergerError as error:
        _report(error, "--json" in (sys.argv if argv is None else argv))
        return error.exit_code
    except Halt as halt:
        print(halt, file=sys.stderr)
        return halt.exit_code
    except BrokenPipeError:
        sys.stderr.close()
        return 0


def _report(error: MergerError, as_json: bool) -> None:
    from merger.cli import text

    if as_json:
        print(json.dumps({"exit_code": error.exit_code, "problems": [asdict(problem) for problem in error.problems]}))
    print(text.format_problems(error), file=sys.stderr)


# ---- commands -------------------------------------------------------------------------------------------------------


def _check(arguments: argparse.Namespace) -> int:
    from merger.cli import text
    from merger.run.extras import refuse_missing
    from merger.run.prepare import named_recipes, read_recipe

    code = 0
    named = {os.path.expanduser(name): named_recipes(os.path.expanduser(name)) for name in arguments.recipes}
    for name in (name for name, found in named.items() if not found):
        _report(RecipeError(Problem(f"{name}: no recipe is there", hint="recipes end with .yaml or .yml")), False)
        code = RecipeError.exit_code
    for path in (path for found in named.values() for path in found):
        try:
            refuse_missing(recipe := read_recipe(Path(path)))
        except MergerError as error:
            _report(error, as_json=False)
            code = error.exit_code
            continue
        for note in recipe.warnings:
            print(text.warning(note), file=sys.stderr)
        used = dict.fromkeys(piece.method for document in recipe.documents for piece in document.slices)
        methods = ", ".join([*used, *(["mixture of experts"] if recipe.mixture else [])])
        count = len(recipe.models)
        found = "" if recipe.search is None else f"; {len(recipe.search.variables)} numbers are searched"
        print(line(f"{path}: well formed ({methods}; {count} {'model' if count == 1 else 'models'}{found})"))
    return code


def _options(arguments: argparse.Namespace) -> Options:
    from merger.run.options import Options

    known = {each.name for each in fields(Options)}
    return Options(**{name: said for name, said in vars(arguments).items() if name in known and said is not None})


def _plan(arguments: argparse.Namespace) -> int:
    from merger.card.facts import PlanSummary
    from merger.card.relations import Relations
    from merger.cli import reports, text
    from merger.run.look import sample_relations
    from merger.run.options import needed_disk, stated_destination
    from merger.run.prepare import plan, read_recipe
    from merger.statistics.kept import find_kept

    recipe = read_recipe(arguments.recipe)
    options, awaited = find_kept(recipe, _options(arguments))
    planned, store = plan(recipe, options)
    if options.max_disk is not None:
        needed_disk(planned, options, planned.shards)
    for note in recipe.warnings:
        print(text.warning(note), file=sys.stderr)
    related = Relations() if arguments.look is False else sample_relations(planned, store)
    found = PlanSummary(planned, stated_destination(recipe, options), related.doubts)
    measures = {} if not awaited else {"measures": [reports.measurement_json(each.planned) for each in awaited]}
    for each in awaited if not arguments.json else ():
        print(reports.measurement_text(each.planned, each.disk), end="\n\n")
    print(json.dumps(text.plan_json(found) | measures) if arguments.json else text.plan_text(found))
    if arguments.look:
        print(text.relations_text(related), file=sys.stderr if arguments.json else sys.stdout)
    return 0


def _engine(arguments: argparse.Namespace) -> Engine | None:
    from merger.distributed.start import Engine

    kind, parts = getattr(arguments, "engine", None), getattr(arguments, "parts", None)
    if (kind is None) != (parts is None):
        hint = "write for example --engine ray --parts 4; a single part is made with --part 1/4"
        raise RecipeError(Problem("--engine and --parts go together", hint=hint))
    return None if kind is None or parts is None else Engine(kind, parts, arguments.flavor, arguments.timeout)


def _run(arguments: argparse.Namespace) -> int:
    from merger.run.prepare import read_recipe

    return _merge(read_recipe(arguments.recipe), arguments)


def _search(arguments: argparse.Namespace) -> int:
    from merger.cli import reports
    from merger.run.extras import refuse_missing
    from merger.run.options import stated_destination, with_free_memory
    from merger.run.prepare import read_recipe
    from merger.searching.effort import Effort

    recipe, given = read_recipe(arguments.recipe), _options(arguments)
    stated_destination(recipe, given)  # a destination that cannot be called so is said before anything is tried
    effort = Effort(*(getattr(arguments, key) for key in ("trials", "minutes", "storage", "top", "join")))
    searched = effort.of(recipe)
    refuse_missing(replace(recipe, search=searched), given.device)
    # before torch is there: threads that wait actively take the cores of other workers
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from merger.cli.workers import at_work_beside  # takes what may be missing
    from merger.searching.search import Event as SearchEvent
    from merger.searching.search import search, write_study

    options = _measured(recipe, with_free_memory(given), arguments)
    told = None if arguments.quiet else reports.Trials(searched)
    with at_work_beside(arguments, replace(recipe, search=searched), given, effort) as look:

        def tell(event: SearchEvent) -> None:
            look(event)
            if told is not None:
                told.show(event)

        study = search(recipe, options, effort, tell)
    if arguments.join:
        return 0
    written = write_study(study)
    if arguments.json:
        print(json.dumps(reports.study_json(study, written)))
    elif not arguments.quiet:
        print(reports.study_text(study, written))
    arguments.measured = options.measured  # planned and measured by now
    return 0 if arguments.to is None else _merge(read_recipe(written[0]), arguments, study.found)


def _extract(arguments: argparse.Namespace) -> int:
    from merger.run.prepare import extraction_recipe

    keys = ("model", "base_model", "rank", "alpha", "include", "exclude", "distribute_scale", "skip_rest")
    settings = {key: getattr(arguments, key) for key in keys} | {"embeddings": arguments.embed}
    return _merge(extraction_recipe(settings, arguments.dtype, arguments.license), arguments)


def _convert(arguments: argparse.Namespace) -> int:
    from merger.run.prepare import conversion_recipe

    return _merge(conversion_recipe(arguments.model, arguments.gguf, arguments.license), arguments)


def _measure(arguments: argparse.Namespace) -> int:
    from merger.cli import reports, text
    from merger.run.options import with_free_memory
    from merger.statistics.measure import disk_at_once, measure_statistics
    from merger.statistics.plan import plan_measurement

    options = with_free_memory(_options(arguments))
    asked = arguments.model, arguments.kind, arguments.data, arguments.tokens, arguments.length
    planned, store = plan_measurement(*asked, options, arguments.blocks)
    disk = disk_at_once(planned, options)
    if arguments.plan or not arguments.quiet:
        print(reports.measurement_text(planned, disk), file=sys.stdout if arguments.plan else sys.stderr)
    if arguments.plan:
        return 0
    result = measure_statistics(planned, store, options, partial(_tell, arguments))
    if arguments.json:
        print(json.dumps({"plan": planned.identity, **text.as_json(result)}))
    elif not arguments.quiet:
        print(text.result_text(result).replace("merged into", "measured into"))
    return 0


def _tell(arguments: argparse.Namespace, event: Event) -> None:
    from merger.cli import text

    for words in () if arguments.quiet else text.event_words(event):
        print(line(words), file=sys.stderr, flush=True)


def _measured(recipe: Recipe, options: Options, arguments: argparse.Namespace) -> Options:
    """The options with what the recipe has measured on the way, which is measured where it is not kept yet."""
    from merger.cli import reports
    from merger.statistics.kept import Awaited, find_kept, measure_awaited

    options, awaited = find_kept(recipe, options)
    if awaited:
        from merger.run.prepare import plan

        plan(recipe, options)  # what is refused is refused before hours of work

    def begin(each: Awaited) -> None:
        if not arguments.quiet:
            print(reports.measurement_text(each.planned, each.disk), file=sys.stderr)

    measure_awaited(awaited, partial(_tell, arguments), begin)
    return options


def _merge(recipe: Recipe, arguments: argparse.Namespace, found: SearchFacts | None = None) -> int:
    from merger.card.facts import PlanSummary
    from merger.cli import text
    from merger.distributed.start import distribute, options_of_parts
    from merger.run.look import sampled_doubts
    from merger.run.options import destination, with_free_memory
    from merger.run.pipeline import Ready, merge
    from merger.run.prepare import plan

    options, engine = _options(arguments), _engine(arguments)
    options = with_free_memory(options) if engine is None else options_of_parts(options, engine)
    to = destination(recipe, options)  # a missing destination is said before the models are asked for
    options = _measured(recipe, options, arguments)
    planned, store = plan(recipe, options)
    progress = None if arguments.quiet else text.Progress(planned.nbytes)
    looks = getattr(arguments, "look", False) and options.part is None

    def tell(event: Event | PartStarted | PartMade) -> None:
        if progress is None:
            return
        if isinstance(event, Ready):
            notes = [text.warning(note) for note in recipe.warnings]  # by now the destination has not refused
            found = PlanSummary(planned, to, sampled_doubts(planned, store) if looks else ())
            print("\n".join([*notes, text.plan_text(found), ""]), file=sys.stderr)
        text.show(event, progress)

    try:
        if engine is None:
            result = merge(planned, store, options, tell, found)
        else:
            result = distribute(planned, store, options, engine, tell)
    finally:
        if progress is not None:
            progress.close()
    if arguments.json:
        print(json.dumps({"plan": planned.hash, **text.as_json(result)}))
    elif not arguments.quiet:
        print(text.result_text(result))
    return 0


def _status(arguments: argparse.Namespace) -> int:
    from merger.cli import text
    from merger.run.pipeline import leftovers

    print(text.leftovers_text(arguments.to, leftovers(arguments.to)))
    return 0


def _clean(arguments: argparse.Namespace) -> int:
    from merger.cli import text
    from merger.run.pipeline import clean, leftovers

    found = leftovers(arguments.to)
    print(text.leftovers_text(arguments.to, found))
    for leftover in found if arguments.yes else ():
        clean(arguments.to, leftover)
        print(line(f"removed {leftover.where}"))
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from merger.cli import reports, text
    from merger.run.options import Options, with_free_memory
    from merger.verification.verify import Begun, Extent, verify

    means = Options(
        max_memory=arguments.max_memory,
        threads=arguments.threads,
        cache=arguments.cache,
        allow_pickle=arguments.allow_pickle,
    )
    extent = Extent(arguments.all, arguments.tensors, arguments.seed)
    shown: list[text.Progress] = []

    def tell(event: Begun | BytesWritten) -> None:
        if isinstance(event, Begun):
            shown.append(text.Progress(event.nbytes, doing="comparing"))
        else:
            text.show(event, shown[0])

    try:
        report = verify(arguments.model, with_free_memory(means), extent, tell)
    finally:
        for progress in shown:
            progress.close()
    print(json.dumps(reports.report_json(report)) if arguments.json else reports.report_text(report))
    return 0 if report.passed else VerificationError.exit_code


def _diff(arguments: argparse.Namespace) -> int:
    from merger import system
    from merger.cli import reports, text
    from merger.verification.diff import contrast, pair

    both = pair(arguments.a, arguments.b)
    progress = text.Progress(both.nbytes, doing="comparing")
    try:
        found = contrast(both, arguments.threads or system.cores(), progress.add)
    finally:
        progress.close()
    print(json.dumps(reports.contrast_json(found)) if arguments.json else reports.contrast_text(found))
    return 0 if found.same else VerificationError.exit_code


def _card(arguments: argparse.Namespace) -> int:
    from merger.cli import text
    from merger.verification.rerender import recard, write_card

    options = _options(arguments)
    made = recard(arguments.model, options, arguments.template, arguments.new_version)
    for note in made.merge.recipe.warnings if arguments.template is None else ():
        print(text.warning(note), file=sys.stderr)
    if arguments.print_only:
        print(made.text, end="")
    else:
        print(text.card_result_text(made, write_card(made, options)))
    return 0


def _methods(arguments: argparse.Namespace) -> int:
    from merger.cli import text
    from merger.methods.registry import START, methods_by_use, named_method

    if arguments.name is None:
        print(text.methods_text(methods_by_use(), START))
    else:
        print(text.method_text(named_method(arguments.name)))
    return 0


def _schema(arguments: argparse.Namespace) -> int:
    from merger.methods.registry import methods
    from merger.recipe.schema import schema

    print(json.dumps(schema(methods()), indent=2, ensure_ascii=False))
    return 0


def _init(arguments: argparse.Namespace) -> int:
    from merger.methods.registry import named_method
    from merger.run.draft import Draft, write_draft

    models = arguments.models or _ask("Which models? (org/name or ./folder, with spaces between)").split()
    method = arguments.method or _ask(
        "By which method? (linear, task_arithmetic, ties, slerp; `merger methods` has all)"
    )
    base = arguments.base
    if base is None and named_method(method).needs_base:
        base = _ask("What were they fine-tuned from? (for slerp: at which of them does it begin?)")
    to = arguments.to or _ask("Where shall the result go? (hf://owner/name, or a folder)")
    for path in write_draft(Draft(tuple(models), method, to, base), Path()):
        print(line(f"wrote {path}"))
    return 0


def _ask(question: str) -> str:
    try:
        return input(f"{question}\n> ").strip()
    except EOFError:
        hint = "give it all: merger init --help shows how"
        raise RecipeError(Problem("merger init asks, and nobody answers", hint=hint)) from None


def _doctor(arguments: argparse.Namespace) -> int:
    from merger.cli import text
    from merger.run.doctor import examine

    code = 0
    for finding in examine():
        print(text.finding_text(finding), flush=True)
        code = code or finding.exit_code
    return code


_COMMANDS: Mapping[str, Callable[[argparse.Namespace], int]] = {
    "check": _check,
    "plan": _plan,
    "run": _run,
    "publish": _run,
    "search": _search,
    "extract-lora": _extract,
    "convert": _convert,
    "measure": _measure,
    "status": _status,
    "clean": _clean,
    "verify": _verify,
    "diff": _diff,
    "card": _card,
    "methods": _methods,
    "schema": _schema,
    "init": _init,
    "doctor": _doctor,
}
