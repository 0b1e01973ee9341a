"""What is larger than its limit is refused before it is read, whatever kind of file it is; what is copied is not held.

Large files are sparse: they take no disk. Not here: the limits of a request to the Space (tests/space).
"""

from __future__ import annotations

import os
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from loopback import Client, LoopbackHub
from merging import merged

from merger.errors import MergerError, ModelError, RecipeError
from merger.models.formats.safetensors import file_sha256
from merger.models.plain_yaml import load_yaml
from merger.run.options import Options
from merger.run.prepare import plan, read_recipe
from merger.safety import limits
from merger.safety.limits import Limit
from merger.safety.numbers import DOWN, UP, size
from merger.stores.folder import FolderStore
from merger.stores.ports import Copy, size_of, write
from merger.stores.resolve import Library
from merger.verification.published import open_merge

MOST_HELD = 30_000_000
"""Bytes of Python's memory; the limits below are larger, or what is read is refused at once."""

RECIPE = """\
merge_method: linear
models:
  - {model: ./one, parameters: {weight: 0.5}}
  - {model: ./two, parameters: {weight: 0.5}}
%s
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with two small models and a recipe that merges them."""
    tiny.models(tmp_path, "one", "two")
    (tmp_path / "mine.yaml").write_text(RECIPE % "")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def sparse(file: str, size: int) -> None:
    """A file of that size; what it holds already stays."""
    path = Path(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    os.truncate(path, size)


@contextmanager
def little() -> Iterator[None]:
    """Nothing in here takes much memory or time."""
    tracemalloc.start()
    begun = time.process_time()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < MOST_HELD
        assert time.process_time() - begun < 10
    finally:
        tracemalloc.stop()


def planned(more: str = "") -> None:
    Path("mine.yaml").write_text(RECIPE % more)
    plan(read_recipe(Path("mine.yaml")), Options())


def with_template() -> None:
    planned("publish: {template: own.md}")


def with_tokens() -> None:
    planned("tokenizer: {source: union}")


def from_lock() -> None:
    read_recipe(Path("a.lock.yaml"))


def of_adapter() -> None:
    Path("mine.yaml").write_text("merge_method: linear\nadapters: [{model: ./lora}, {model: ./lora}]\n")
    plan(read_recipe(Path("mine.yaml")), Options())


FILES: tuple[tuple[str, Limit, Callable[[], None], int], ...] = (
    ("one/config.json", limits.CONFIG, planned, 3),
    ("two/config.json", limits.CONFIG, planned, 3),
    ("one/model.safetensors.index.json", limits.INDEX, planned, 3),
    ("one/tokenizer.json", limits.TOKENIZER, with_tokens, 3),
    ("two/tokenizer.json", limits.TOKENIZER, with_tokens, 3),
    ("one/vocab.txt", limits.SIDE, planned, 3),
    ("one/merges.txt", limits.SIDE, planned, 3),
    ("one/chat_template.jinja", limits.SIDE, planned, 3),
    ("one/LICENSE", limits.LICENCE, planned, 3),
    ("two/LICENSE-MODEL.txt", limits.LICENCE, planned, 3),
    ("two/NOTICE", limits.LICENCE, planned, 3),
    ("two/licences/MIT", limits.LICENCE, planned, 3),
    ("lora/adapter_config.json", limits.CONFIG, of_adapter, 3),
    ("own.md", limits.TEMPLATE, with_template, 2),
    ("mine.yaml", limits.RECIPE, lambda: plan(read_recipe(Path("mine.yaml")), Options()) and None, 2),
    ("mine.lock.yaml", limits.LOCK, planned, 2),
    ("a.lock.yaml", limits.LOCK, from_lock, 2),
    ("one/merger.lock.yaml", limits.LOCK, lambda: open_merge("./one", False) and None, 3),
)


@pytest.mark.parametrize(("file", "limit", "reading", "code"), FILES, ids=[row[0] for row in FILES])
def test_a_file_beyond_its_limit_is_refused_before_it_is_read(
    file: str, limit: Limit, reading: Callable[[], None], code: int
) -> None:
    """With its name, its size and the limit."""
    Path("lora").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        Path("lora", name).write_text("{}")
    sparse(file, limit.most + 1)
    with little(), pytest.raises(MergerError) as refused:
        reading()
    assert refused.value.exit_code == code
    problem = refused.value.problems[0]
    assert Path(file).name in problem.what
    told = (f"{limit.most + 1:,} {limit.unit}", f"{limit.most:,}")
    if limit.unit == "bytes":
        told = size(limit.most + 1, UP), size(limit.most, DOWN)
    assert f"has {told[0]}, and at most {told[1]} are read" in problem.what


def test_every_kind_of_file_of_a_model_is_refused_by_a_store_that_would_read_it_whole() -> None:
    """Whoever reads: the store itself looks at the size, also of a name that nobody thought of."""
    names = ["config.json", "x.index.json", "tokenizer.json", "spiece.model", "README.md", "NOTICE", "own.j2",
             "whatever", "merger.measured.json", "merger.lock.yaml", "chat_template.jinja",
             "mergekit_config.yml"]  # fmt: skip
    for name in names:
        sparse(f"one/{name}", limits.of(name).most + 1)
    located = FolderStore().locate("./one", None)
    for name in names:
        with little(), pytest.raises(ModelError, match=f"{name} has .*B, and at most"):
            FolderStore().fetch(located, name)


def test_a_file_that_grows_after_it_was_listed_is_not_read_on() -> None:
    """Its size is a word; what is read is counted."""
    located = FolderStore().locate("./one", None)
    sparse("one/config.json", 50_000_000)
    with little(), pytest.raises(ModelError, match=r"config\.json has 50\.0 MB, and at most 5\.0 MB"):
        FolderStore().fetch(located, "config.json")


def fetched(repo: str, file: str) -> str:
    from merger.stores.hub.store import HubStore

    store = HubStore()
    try:
        return str(len(store.fetch(store.locate(repo, None), file)))
    except ModelError as error:
        return str(error)


def test_a_file_of_the_hub_is_refused_by_the_size_that_the_hub_tells(hub: LoopbackHub, client: Client) -> None:
    """Its bytes are never asked for."""
    hub.add_model("org/large", {"config.json": b" " * (limits.CONFIG.most + 1), "README.md": b"small"})
    hub.clear_log()
    assert "config.json has 5.1 MB, and at most 5.0 MB are read" in client(fetched, "org/large", "config.json")
    assert not [request for request in hub.log if "resolve" in request.path]
    assert client(fetched, "org/large", "README.md") == "5"


# ---- headers --------------------------------------------------------------------------------------------------------


def safetensors(file: str, header: bytes) -> None:
    Path(file).write_bytes(len(header).to_bytes(8, "little") + header)


HEADERS = {
    "tensors": b"{" * 300_001,
    "lists": b"[" * 600_002,
    "numbers": b"," * 2_400_008,
}


@pytest.mark.parametrize("kind", HEADERS)
def test_a_header_of_too_many_tensors_is_refused_before_it_is_parsed(kind: str) -> None:
    """Also one of lists or numbers that take as much memory."""
    safetensors("one/model.safetensors", HEADERS[kind])
    with little(), pytest.raises(ModelError, match=r"model\.safetensors has 300,001 tensors .*at most 300,000"):
        planned()


def test_a_long_header_is_refused_by_its_length() -> None:
    """Of several files together, too: each takes a part of what one model may have."""
    for number in (1, 2):
        name = f"one/model-0000{number}-of-00002.safetensors"
        safetensors(name, b"")
        size = 70_000_000
        Path(name).write_bytes(size.to_bytes(8, "little"))
        sparse(name, size + 8)
    Path("one/model.safetensors").unlink()
    index = '{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}'
    Path("one/model.safetensors.index.json").write_text(index)
    with pytest.raises(ModelError, match=r"has 350,000 tensors .*at most 300,000|damaged"):
        planned()


def test_all_models_of_a_recipe_share_a_limit() -> None:
    """Many models of just as many tensors as one may have."""
    tally = limits.Tally(limits.ALL_TENSORS)
    assert [tally.add("m", 250_000) for _ in range(2)] == [None, None]
    assert str(tally.add("m", 250_000)).startswith("m has 750,000 tensors")


def test_a_tensors_name_has_an_end() -> None:
    """It stands in plan, lock and card."""
    header = b'{"%s": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}' % (b"a" * 1_001)
    safetensors("one/model.safetensors", header)
    with pytest.raises(ModelError, match=r"has 1,001 characters, and at most 1,000 are read"):
        planned()


# ---- JSON and YAML --------------------------------------------------------------------------------------------------

JSON = {
    "deep lists": b"[" * 500 + b"]" * 500,
    "deeper lists": b"[" * 100_000,
    "deep maps": b'{"a":' * 100 + b"1" + b"}" * 100,
    "a long number": b'{"a": ' + b"9" * 41 + b"}",
    "a huge number": b'{"a": ' + b"9" * 100_000 + b"}",
    "many values": b"[" + b"[]," * 500_000 + b"[]]",
    "nothing": b"",
    "bytes": b"\xff\xfe\xfd",
}


@pytest.mark.parametrize("kind", JSON)
def test_json_that_is_built_to_hurt_is_no_json(kind: str) -> None:
    """Deep, wide or with numbers of no end: whoever reads it hears what is wrong with it, in one kind of error."""
    with little(), pytest.raises(ValueError):  # noqa: PT011  all of them say it in their own words
        limits.parse_json(JSON[kind], limits.CONFIG)
    if JSON[kind].startswith(b"{"):
        Path("one/config.json").write_bytes(JSON[kind])
        with pytest.raises(ModelError, match=r"config\.json is no JSON"):
            planned()


def test_json_as_models_have_it_is_read() -> None:
    """With 1e30 as a whole number, as tokenizers write it, and lists in maps in lists."""
    text = '{"model_max_length": 1000000000000000019884624838656, "a": [[{"b": [1.5, null, true]}]]}'
    assert limits.parse_json(text, limits.CONFIG)["model_max_length"] == int(1e30)
    assert limits.parse_json(b"[" * 64 + b"]" * 64) is not None


YAML = {
    "aliases": "a: &a [1,1,1,1,1,1,1,1,1,1]\n"
    + "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
    "an alias in itself": "a: &a [*a]\n",
    "values": "- 1\n" * 400_000,
    "depth": "[" * 1_000 + "]" * 1_000,
    "a number of sixties": "a: " + "1:" * 100_000 + "1",
    "length": "a" * (limits.LOCK.most + 1),
}


@pytest.mark.parametrize("kind", YAML)
def test_yaml_that_is_built_to_hurt_is_no_lock(kind: str) -> None:
    """It is counted before anything is made of it."""
    begun = time.process_time()
    with pytest.raises(ValueError):  # noqa: PT011
        load_yaml(YAML[kind], limits.LOCK)
    assert time.process_time() - begun < 5
    Path("a.lock.yaml").write_text(YAML[kind])
    with pytest.raises(RecipeError):
        from_lock()


def test_yaml_as_locks_and_cards_have_it_is_read() -> None:
    """As PyYAML reads it."""
    text = "format: 1\nmodels:\n- {model: org/a, commit: null, files: []}\nx: &x [1, 2.5, yes]\ny: *x\n"
    assert load_yaml(text, limits.LOCK) == yaml.safe_load(text)
    assert load_yaml("language: no\nlicense: 1.10\n", limits.CARD, only_text=True) == {
        "language": "no",
        "license": "1.10",
    }


RECIPES = {
    "documents": "merge_method: linear\n---\n" * 2_500,
    "empty documents": "---\n" * 16_000,
    "deep": "[" * 60_000,
    "values": "x: [" + "1," * 30_000 + "]",
    "aliases": YAML["aliases"],
    "keys": "".join(f"k{number}: 1\n" for number in range(7_000)),
}


@pytest.mark.parametrize("kind", RECIPES)
def test_a_short_recipe_that_is_built_to_hurt_is_refused_in_well_under_a_second(kind: str) -> None:
    """64 kB, as the Space takes them."""
    assert len(RECIPES[kind]) <= 64_100
    Path("mine.yaml").write_text(RECIPES[kind])
    begun = time.process_time()
    with pytest.raises(RecipeError):
        read_recipe(Path("mine.yaml"))
    assert time.process_time() - begun < 3  # seconds of computing, 0.8 at most on a quiet machine


# ---- copies ---------------------------------------------------------------------------------------------------------


def test_a_large_file_beside_a_model_is_copied_without_being_held(folder: Path) -> None:
    """The result has it to the byte, and the lock its checksum."""
    sparse("one/merges.txt", 100_000_000)
    Path("one/LICENSE").write_text("words")
    located = FolderStore().locate("./one", None)
    store = Library([FolderStore()])
    located = store.locate("./one", None)
    with little():
        large, small = store.taken([(located, "merges.txt"), (located, "LICENSE")])
        assert (isinstance(large, Copy), small) == (True, b"words")
        assert size_of(large) == 100_000_000
        write(large, folder, "copy/merges.txt")
    assert file_sha256(folder / "copy/merges.txt") == file_sha256(folder / "one/merges.txt")


def test_files_that_are_small_one_by_one_are_not_held_all_together() -> None:
    """Of many only the first are read at once."""
    for number in range(20):
        sparse(f"one/LICENSE-{number}", 4_000_000)
    store = Library([FolderStore()])
    located = store.locate("./one", None)
    found = store.taken([(located, f"LICENSE-{number}") for number in range(20)])
    assert sum(len(content) for content in found if isinstance(content, bytes)) <= 33_554_432
    assert sum(map(size_of, found)) == 80_000_000


def test_a_file_that_changes_while_it_is_copied_is_refused(folder: Path) -> None:
    """Else the lock would tell another checksum than the result's."""
    sparse("one/merges.txt", 5_000_000)
    store = Library([FolderStore()])
    located = store.locate("./one", None)
    (content,) = store.taken([(located, "merges.txt")])
    Path("one/merges.txt").write_bytes(b"x" * 5_000_000)
    with pytest.raises(ModelError, match=r"one: merges\.txt changed while it was copied"):
        write(content, folder, "copy")


def test_a_result_has_its_large_side_files_and_the_lock_says_which(folder: Path) -> None:
    """They go into the folder as they are, and what was made stays the same for verify."""
    sparse("one/merges.txt", 6_000_000)
    merged(RECIPE % "", folder / "out")
    told: list[dict[str, Any]] = yaml.safe_load(Path("out/merger.lock.yaml").read_text())["output"]
    sha256 = file_sha256(folder / "one/merges.txt")
    assert {"file": "merges.txt", "size": 6_000_000, "sha256": sha256} in told
    assert file_sha256(folder / "out/merges.txt") == sha256


def test_side_files_count_in_a_plans_memory(folder: Path) -> None:
    """What is held of them while they are committed may be more than the tensors take."""

    def memory() -> int:
        return plan(read_recipe(Path("mine.yaml")), Options())[0].peak_memory

    before = memory()
    for number in range(60):
        sparse(f"one/additional_chat_templates/{number}.jinja", 5_000_000)
    assert memory() > before + 500_000_000
    sparse("one/additional_chat_templates/x.jinja", 100_000_000)
    for number in range(60, 100):
        sparse(f"one/additional_chat_templates/{number}.jinja", 5_000_000)
    with pytest.raises(ModelError, match=r"together has 600\.\d MB, and at most 500\.0 MB are read"):
        memory()


def test_a_store_reads_a_range_as_long_as_it_is_asked_for() -> None:
    """Weights have no limit: whoever reads them says how much."""
    sparse("one/other.bin", 10_000_000)
    located = FolderStore().locate("./one", None)
    assert len(FolderStore().fetch(located, "other.bin", 0, 8)) == 8


def test_the_table_has_every_limit() -> None:
    """What docs/security.md shows is all there is."""
    held = [value for value in vars(limits).values() if isinstance(value, Limit)]
    assert set(held) == set(limits.TABLE)
