"""The command line's words: what each command takes, its help, and what is said of words that it does not know.

Not here: what the commands do (cli).
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypeVar

from merger.errors import Problem, RecipeError, did_you_mean
from merger.runtime import PACKAGE
from merger.safety import numbers

if TYPE_CHECKING:
    from merger.planning.shards import Part

    Commands = argparse._SubParsersAction["_Parser"]

T = TypeVar("T")

_RECIPES = (".yaml", ".yml")
_OPTION = re.compile(r"--[a-z][a-z-]*")

_GGUF = "Q8_0, Q5_0, Q4_0, MXFP4, BF16, F16, F32"
_OTHER_COMMANDS = {
    "help": "merger --help",
    "merge": "merger run",
    "mergekit-yaml": "merger run",
    "mergekit-moe": "merger run",
    "dry-run": "merger plan",
    "validate": "merger check",
    "lint": "merger check",
    "push": "merger run --to hf://owner/name",
    "upload": "merger run --to hf://owner/name",
    "compare": "merger diff",
    "list": "merger methods",
    "quantize": "merger convert",
    "mergekit-evolve": "merger search",
    "tune": "merger search",
}
"""What commands of other tools are called here."""

_NOTHING = "leave it out: "
_OTHER_OPTIONS = {
    "--cuda": "write --device cuda",
    "--gpu": "write --device cuda",
    "--dry-run": "merger plan RECIPE shows what run would make",
    "--output": "write --to DEST",
    "--out": "write --to DEST",
    "-o": "write --to DEST",
    "--out-path": "write --to DEST",
    "--random-seed": "write --seed N",
    "--out-shard-size": "write --shard-size SIZE",
    "--num-threads": "write --threads N",
    "--overwrite": "write --force",
    "--lazy-unpickle": "write --allow-pickle",
    "--no-write-model-card": f"{_NOTHING}a card is written always",
    "--write-model-card": f"{_NOTHING}a card is written always",
    "--low-cpu-memory": f"{_NOTHING}a merge never takes more than --max-memory",
    "--copy-tokenizer": f"{_NOTHING}the tokenizer comes along; tokenizer: in the recipe says which",
    "--clone-tensors": f"{_NOTHING}nothing of it is needed",
    "--safe-serialization": f"{_NOTHING}all is written as safetensors",
    "--trust-remote-code": f"{_NOTHING}no model's code is run",
    "--allow-crimes": f"{_NOTHING}what can be made is made",
    "--transformers-cache": f"{_NOTHING}HF_HOME says where the cache lies",
    "--lora-merge-cache": f"{_NOTHING}adapters are added as tensors are read",
    "--read-to-gpu": "write --device cuda",
    "--gpu-rich": "write --device cuda",
    "--multi-gpu": "write --engine ray --parts N --device cuda",
    "--token": "set HF_TOKEN in the environment: what stands on a command line is for all to see",
    "--verbose": f"{_NOTHING}all is told, but for --quiet",
    "-v": f"{_NOTHING}all is told, but for --quiet",
    "-q": "write --quiet",
    "-f": "write --force",
}  # fmt: skip
"""What options of other tools, or of old habits, are here."""


class _Version(argparse.Action):
    """Shows the version; who does not ask for it does not wait until the installed packages are looked through."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print(f"merger {version(PACKAGE)}")
        parser.exit()


class _Parser(argparse.ArgumentParser):
    """Refuses as everything else does: with a sentence, a next step and the exit code of what cannot be meant."""

    def error(self, message: str) -> NoReturn:
        raise RecipeError(Problem(f"{self.prog}: {message}", hint=f"{self.prog} --help shows how it is written"))


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; `command` names the command. No words at all show the help, as pip does, and exit with 0.

    Raises:
        RecipeError: words that cannot be meant.
        SystemExit: help or the version was asked for, and shown.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    parser, commands = _parser()
    if "_ARGCOMPLETE" in os.environ:  # a shell asks, by what `register-python-argcomplete merger` has told it
        import argcomplete

        argcomplete.autocomplete(parser)
    if not words:
        parser.print_help()
        raise SystemExit(0)
    named = next((word for word in words if not word.startswith("-")), None)
    if named is not None and named not in commands:
        raise RecipeError(_no_command(named, commands))
    arguments, rest = parser.parse_known_args(words)
    if unknown := [word for word in rest if word.startswith("-")]:
        raise RecipeError([_no_option(word.partition("=")[0], arguments.command, commands) for word in unknown])
    if rest:
        arguments.to = _destination(rest, arguments)
    return arguments


def _no_command(word: str, known: Mapping[str, argparse.ArgumentParser]) -> Problem:
    if word.endswith(_RECIPES):
        return Problem(f"{word!r} is no command", hint=f"write merger run {word}, or merger check {word}")
    other = _OTHER_COMMANDS.get(word.lower())
    hint = f"did you mean {other}?" if other else did_you_mean(word.lower(), known)
    return Problem(f"there is no command {word!r}", hint=hint)


def _no_option(word: str, command: str, commands: Mapping[str, argparse.ArgumentParser]) -> Problem:
    has = {name: _OPTION.findall(parser.format_usage()) for name, parser in commands.items()}
    elsewhere = [name for name, options in has.items() if word in options]
    near = difflib.get_close_matches(word, has[command], n=1, cutoff=0.6)
    if word in has[command]:
        hint = f"write it after the command: merger {command} ... {word}"
    elif elsewhere:
        hint = f"it is an option of merger {' and '.join(elsewhere)}"
    elif word in _OTHER_OPTIONS:
        hint = _OTHER_OPTIONS[word]
    else:
        hint = f"did you mean {near[0]}?" if near else f"merger {command} --help lists its options"
    return Problem(f"merger {command} has no option {word}", hint=hint)


def _destination(rest: Sequence[str], arguments: argparse.Namespace) -> str:
    """The word behind the recipe, where mergekit has the folder of the result; --to says the same.

    Raises:
        RecipeError: it can be no destination.
    """
    command = arguments.command
    if not hasattr(arguments, "to") or len(rest) > 1 or rest[0].endswith(_RECIPES):
        one = "it takes one recipe at a time; " if hasattr(arguments, "recipe") else ""
        hint = f"{one}merger {command} --help shows how it is written"
        raise RecipeError(Problem(f"merger {command} has no use for {' '.join(rest)!r}", hint=hint))
    if arguments.to is not None:
        both = f"merger {command} is given two destinations: {arguments.to!r} and {rest[0]!r}"
        raise RecipeError(Problem(both, hint="name one, as --to DEST"))
    return rest[0]


# ---- the commands ---------------------------------------------------------------------------------------------------


def _parser() -> tuple[_Parser, Mapping[str, argparse.ArgumentParser]]:
    parser = _Parser(
        prog="merger",
        description="Merge models from a YAML recipe, tensor by tensor in bounded memory, to a folder or the Hub.",
        epilog="Exit codes: 2 recipe, 3 a model cannot be read, 4 models do not fit each other, 5 not enough memory or "
        "disk, 6 upload refused, 7 verification failed or models differ, 8 a part is not made, "
        "9 the result cannot be measured. "
        "Environment: HF_TOKEN, HF_ENDPOINT, HF_HOME.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for add in (_add_check, _add_plan, _add_run, _add_publish, _add_search, _add_extract, _add_convert, _add_measure):
        add(commands)
    for add in (_add_status, _add_verify, _add_diff, _add_card, _add_methods, _add_schema, _add_init, _add_doctor):
        add(commands)
    return parser, commands.choices


def _add(commands: Commands, name: str, sentence: str, *examples: str) -> argparse.ArgumentParser:
    """A command: its sentence stands in the list of all, and with examples in its own help."""
    shown = "\n".join(["example:" if len(examples) == 1 else "examples:", *(f"  merger {line}" for line in examples)])
    return commands.add_parser(
        name,
        help=sentence,
        description=f"{sentence[0].upper()}{sentence[1:]}.",
        epilog=shown,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _add_check(commands: Commands) -> None:
    sentence = "find what is wrong with recipes, without looking at their models"
    check = _add(commands, "check", sentence, "check mine.yaml", "check merges/", 'check "merges/**/*.yaml"')
    check.add_argument("recipes", nargs="+", metavar="RECIPE", help="a recipe, a folder of them, or a pattern")


def _add_plan(commands: Commands) -> None:
    sentence = "show what a recipe makes, what it takes, and what speaks against it"
    plan = _add(commands, "plan", sentence, "plan mine.yaml", "plan mine.yaml --look --max-memory 8GB")
    _add_budget(plan)
    words = "say how the parents relate, layer by layer; --no-look: read no tensor (default: a sample, for warnings)"
    plan.add_argument("--look", action=argparse.BooleanOptionalAction, help=words)


def _add_run(commands: Commands) -> None:
    examples = ("run mine.yaml --to ./out", "run mine.yaml --to hf://owner/name --max-memory 4GB")
    run = _add(commands, "run", "make the merge", *examples, "run mine.yaml ./out    (the same as --to ./out)")
    _add_budget(run)
    run.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the arithmetic is done")
    spread = run.add_mutually_exclusive_group()
    spread.add_argument(
        "--part", type=_part, metavar="I/N", help="make the I-th of N shares of the files; `merger publish` ends it"
    )
    words = "warn of no merge that means little: read no sample of the tensors beforehand"
    run.add_argument("--no-look", dest="look", action="store_false", help=words)
    _add_stream(run)
    spread.add_argument(
        "--engine", choices=("ray", "jobs"), help="have --parts made on a Ray cluster, or by Hugging Face Jobs (paid)"
    )
    parts = "how many parts the engine makes at the same time"
    run.add_argument("--parts", type=_whole(numbers.PARTS), metavar="N", help=parts)
    run.add_argument("--flavor", default="cpu-basic", help="hardware of a Hub job (default cpu-basic)")
    run.add_argument("--timeout", type=_duration, default="6h", help="how long a Hub job may run (default 6h)")
    _add_end(run)


def _add_publish(commands: Commands) -> None:
    sentence = "make a model of what the parts of a run have made"
    publish = _add(commands, "publish", sentence, "publish mine.yaml --to hf://owner/name")
    _add_budget(publish)
    _add_end(publish)
    publish.set_defaults(publish_only=True)


def _add_search(commands: Commands) -> None:
    sentence = "find the numbers that a recipe leaves open, by trying candidates in memory"
    examples = ("search mine.yaml --trials 200", "search mine.yaml --minutes 60 --workers 2 --to hf://owner/name")
    search = _add(commands, "search", sentence, *examples)
    search.add_argument("recipe", type=_file, metavar="RECIPE", help="a recipe with a search: block")
    count, trials = _whole(numbers.COUNT), "how many candidates are tried in all; the recipe's otherwise"
    search.add_argument("--trials", type=count, metavar="N", help=trials)
    search.add_argument("--minutes", type=_whole(numbers.MINUTES), metavar="N", help="how long it may take, at most")
    search.add_argument("--top", type=count, default=1, metavar="N", help="write the recipes of the N best (default 1)")
    where = "where the study is kept: a file, or a database's address (default: beside the recipe)"
    search.add_argument("--storage", metavar="PLACE", help=where)
    search.add_argument("--workers", type=_whole(numbers.PARTS), default=1, metavar="N", help="processes that try")
    engine = "have all --workers but this one started on a Ray cluster"
    search.add_argument("--engine", dest="launcher", choices=("ray",), help=engine)
    search.add_argument("--join", action="store_true", help="try candidates for another process of the same storage")
    search.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where models are made and run")
    _add_limits(search)
    _add_end(search)


def _add_extract(commands: Commands) -> None:
    sentence = "take what a fine-tune changed in its base as a LoRA adapter"
    example = "extract-lora owner/fine-tune owner/base --rank 32 --to ./adapter"
    extract = _add(commands, "extract-lora", sentence, example)
    extract.add_argument("model", metavar="FINE_TUNE", help="org/name, org/name@revision or ./folder")
    extract.add_argument("base_model", metavar="BASE", help="the model that it was made from")
    rank, alpha = _whole(numbers.RANK), _argument(partial(numbers.parse_decimal, within=numbers.ALPHA))
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


def _add_convert(commands: Commands) -> None:
    sentence = "bring a model into GGUF, as llama.cpp reads it, or from GGUF into safetensors"
    example = "convert owner/model --gguf Q8_0 --to hf://you/model-GGUF"
    convert = _add(commands, "convert", sentence, example, "convert ./out --gguf Q4_0,Q8_0 --to ./gguf")
    convert.add_argument("model", metavar="MODEL", help="org/name, org/name@revision, ./folder or a file.gguf")
    types = "types of files, none for safetensors: " + _GGUF
    convert.add_argument("--gguf", type=_gguf, default=(), metavar="TYPE,...", help=types)
    convert.add_argument("--license", metavar="ID", help="the licence that the card states (default: the model's)")
    _add_stream(convert)
    _add_limits(convert)
    _add_end(convert)


def _add_measure(commands: Commands) -> None:
    sentence = "measure what data-aware methods have to know of a model, for statistics: in recipes"
    examples = ("measure org/model --kind gram --data texts.jsonl --to hf://you/model-gram",
                "measure ./model --kind fisher --data random-tokens --to ./model-fisher --plan")  # fmt: skip
    measure = _add(commands, "measure", sentence, *examples)
    measure.add_argument("model", metavar="MODEL", help="org/name, org/name@revision or ./folder")
    kinds = "fisher: squared gradients; gram: products of layers' inputs; activations: their magnitudes"
    measure.add_argument("--kind", choices=("fisher", "gram", "activations"), required=True, help=kinds)
    texts = "texts.jsonl with a text in each line, text.txt, hf://datasets/owner/name/file, or random-tokens"
    measure.add_argument("--data", required=True, metavar="DATA", help=texts)
    count = _whole(numbers.COUNT)
    measure.add_argument("--tokens", type=count, default=65_536, metavar="N", help="of these so many (default 65536)")
    measure.add_argument("--length", type=count, default=512, metavar="N", help="in one sequence (default 512)")
    blocks = "of Gram matrices blocks of N inputs along the diagonal (1: the diagonal alone), and nothing else"
    measure.add_argument("--blocks", type=count, metavar="N", help=blocks)
    measure.add_argument("--plan", action="store_true", help="only show what it takes")
    _add_place(measure, "")
    _add_end(measure)
    measure.set_defaults(shard_size=None)


def _add_stream(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--stream", action="store_true", help="send files to the Hub as they are made, without any on this disk"
    )


def _add_end(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--force", action="store_true", help="replace a model at the destination")
    parser.add_argument("--quiet", action="store_true", help="print nothing but problems")


def _add_status(commands: Commands) -> None:
    sentence = "show what unfinished runs left at a destination"
    status = _add(commands, "status", sentence, "status ./out", "status hf://owner/name")
    status.add_argument("to", metavar="DEST", help="a folder, or hf://owner/name")
    sentence = "remove what unfinished runs left at a destination, and nothing else"
    clean = _add(commands, "clean", sentence, "clean ./out --yes")
    clean.add_argument("to", metavar="DEST", help="a folder, or hf://owner/name")
    clean.add_argument("--yes", action="store_true", help="remove it; else only show it")


def _add_verify(commands: Commands) -> None:
    sentence = "make a sample of a merge again from its parents, and compare"
    verify = _add(commands, "verify", sentence, "verify owner/merged", "verify ./out --all")
    verify.add_argument("model", metavar="MODEL", help="hf://owner/name[@revision], owner/name or a folder")
    much = verify.add_mutually_exclusive_group()
    much.add_argument(
        "--tensors",
        type=_whole(numbers.COUNT),
        metavar="N",
        help="compare N tensors in full (default: a little of each)",
    )
    much.add_argument("--all", action="store_true", help="compare every tensor, and the SHA-256 of every file")
    verify.add_argument(
        "--seed", type=_whole(numbers.GIVEN_SEED), metavar="N", help="what the sample is drawn from (default: chance)"
    )
    _add_pickles(verify)
    _add_means(verify)


def _add_diff(commands: Commands) -> None:
    sentence = "compare two checkpoints tensor by tensor; exit code 7 where they differ"
    diff = _add(commands, "diff", sentence, "diff ./out owner/name@main")
    for name in ("A", "B"):
        diff.add_argument(name.lower(), metavar=name, help="hf://owner/name[@revision], owner/name or a folder")
    diff.add_argument(
        "--threads", type=_whole(numbers.THREADS), metavar="N", help="threads that compute (default: one for each core)"
    )
    diff.add_argument("--json", action="store_true", help="print the outcome as JSON")


def _add_card(commands: Commands) -> None:
    sentence = "render the card of a finished merge again, without merging"
    card = _add(commands, "card", sentence, "card owner/merged --print", "card ./out --template mine.md.j2")
    card.add_argument("model", metavar="MODEL", help="hf://owner/name, owner/name or a folder")
    card.add_argument("--template", metavar="FILE", help="in place of the lock's publish.template")
    card.add_argument("--new-version", metavar="REPO", help="a newer model, to which the Hub points from its page")
    _add_pickles(card)
    card.add_argument("--print", dest="print_only", action="store_true", help="print it, and write nothing")


def _add_methods(commands: Commands) -> None:
    methods = _add(commands, "methods", "list the merge methods, or tell all about one", "methods", "methods ties")
    methods.add_argument("name", nargs="?", metavar="NAME")


def _add_schema(commands: Commands) -> None:
    _add(commands, "schema", "print the JSON Schema of recipes, for editors", "schema > merger.schema.json")


def _add_init(commands: Commands) -> None:
    sentence = "write a recipe and a workflow to begin with; what is not given is asked for"
    example = "init org/chat org/code --base org/base --method ties --to hf://you/merged"
    init = _add(commands, "init", sentence, "init", example)
    init.add_argument("models", nargs="*", metavar="MODEL", help="org/name or ./folder")
    init.add_argument("--method", metavar="NAME", help="a merge method; `merger methods` lists them")
    init.add_argument("--base", metavar="MODEL", help="what the models were fine-tuned from")
    init.add_argument("--to", metavar="DEST", help="a folder, or hf://owner/name")


def _add_doctor(commands: Commands) -> None:
    _add(commands, "doctor", "tell what this machine and environment let a merge do, and what they lack", "doctor")


def _add_budget(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=_file, metavar="RECIPE", help="a recipe, or the lock file of a merge")
    parser.add_argument(
        "--gguf", type=_gguf, metavar="TYPE,...", help="write GGUF files for llama.cpp beside: " + _GGUF
    )
    _add_limits(parser)


def _add_limits(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shard-size", type=_bytes, metavar="SIZE", help="the largest size of a file (default 5GB; GGUF 45GB)"
    )
    _add_place(parser)


def _add_place(parser: argparse.ArgumentParser, default: str = "; default: the recipe's publish.repo") -> None:
    """Where it goes, and what else every command that makes something is told."""
    parser.add_argument("--to", metavar="DEST", help=f"a folder, or hf://owner/name{default}")
    parser.add_argument(
        "--max-disk", type=_bytes, metavar="SIZE", help="the most disk the run may take at once, such as 10GB"
    )
    parser.add_argument(
        "--seed",
        type=_whole(numbers.GIVEN_SEED),
        metavar="N",
        help="for methods that draw random numbers; the recipe's otherwise",
    )
    _add_pickles(parser)
    _add_means(parser)


def _add_pickles(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--allow-pickle",
        action="store_true",
        help="of models without safetensors, read pytorch_model.bin: its tensors alone, nothing in it is run",
    )


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


# ---- values ---------------------------------------------------------------------------------------------------------


def _file(text: str) -> Path:
    """A shell leaves ``~`` as it is in quotes."""
    return Path(os.path.expanduser(text))


def _argument(parse: Callable[[str], T]) -> Callable[[str], T]:
    """A reader of text for argparse, which tells a ValueError's sentence only where it is asked to."""

    def read(text: str) -> T:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return read


def _whole(within: numbers.Range) -> Callable[[str], int]:
    return _argument(partial(numbers.parse_whole, within=within))


_bytes = _argument(numbers.parse_size)


@_argument
def _gguf(text: str) -> tuple[str, ...]:
    from merger.recipe.blocks.publish import parse_kinds

    return parse_kinds(text)


@_argument
def _part(text: str) -> Part:
    from merger.planning.shards import Part

    return Part.parse(text)


@_argument
def _duration(text: str) -> str:
    if re.fullmatch(r"[1-9][0-9]{0,6}[smhd]", text) is None:
        raise ValueError(f"{numbers.quoted_short(text)} is no duration; write for example 90m or 6h")
    return text
