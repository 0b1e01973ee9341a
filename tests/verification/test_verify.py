"""A published merge is compared with what its parents make: over the loopback Hub, and in folders."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import vocabularies
import yaml
from calls import Said, called
from loopback import Client, LoopbackHub
from places import ZOO

import merger
from merger.models.checkpoint import read_header
from merger.run.options import Options
from merger.verification.sample import whole_tensor
from merger.verification.verify import Extent, Report, verify

PARENTS = ("proof/base", "proof/kjv", "proof/python")
LOCK = "merger.lock.yaml"
RECIPE = """\
merge_method: {method}
base_model: proof/base
models:
  - model: proof/kjv
    parameters: {{weight: 0.6}}
  - model: proof/python
    parameters: {{weight: 0.5}}
"""


@pytest.fixture(scope="module")
def published(served: LoopbackHub, client: Client, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A merge of the zoo in three shards."""
    for name in PARENTS:
        served.add_model(name, ZOO / name.removeprefix("proof/"))
    recipe = tmp_path_factory.mktemp("work") / "mine.yaml"
    recipe.write_text(RECIPE.format(method="task_arithmetic"))
    said: Said = client(called, ["run", str(recipe), "--to", "hf://org/proven", "--shard-size", "1MB", "--quiet"])
    assert said.code == 0, said.err
    return "org/proven"


@pytest.fixture
def copy(published: str, served: LoopbackHub, tmp_path: Path) -> str:
    """Another repo with the same files, for a test to change."""
    name = f"org/{tmp_path.name}"
    served.add_model(name, served.files(published))
    return name


def flipped(raw: bytes, place: int) -> bytes:
    """The bytes with one bit of the byte at `place` the other way round."""
    return raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :]


def place_of(raw: bytes, file: str, tensor: str, entry: int) -> int:
    """Where in a shard of bfloat16 an entry of a tensor lies."""
    length = int.from_bytes(raw[:8], "little")
    found = next(each for each in read_header(raw[8 : 8 + length], file, len(raw)) if each.name == tensor)
    return found.start + 2 * entry


# What passes


@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_a_published_merge_passes_and_less_than_three_per_cent_is_read(
    method: str, published: str, served: LoopbackHub, client: Client, tmp_path: Path
) -> None:
    """Counted by the server: all answers together against the bytes of the parents and of the merge."""
    repo = published
    if method != "task_arithmetic":
        repo = "org/proven-too"
        (tmp_path / "mine.yaml").write_text(RECIPE.format(method=method))
        assert client(called, ["run", str(tmp_path / "mine.yaml"), "--to", f"hf://{repo}", "--quiet"]).code == 0
    served.clear_log()
    said = client(called, ["verify", f"hf://{repo}", "--json"])
    assert (said.code, said.report["passed"]) == (0, True), said
    trees = {name: served.tree(name) for name in (*PARENTS, repo)}
    held = sum(tree[file].size for tree in trees.values() for file in tree if file.endswith(".safetensors"))
    assert sum(request.sent for request in served.log) < 0.03 * held
    assert sum(request.sent for request in served.log if request.host == "cdn") == said.report["read"]
    assert said.report["read"] < 0.03 * said.report["of"]
    assert said.report["compared"]


def test_the_sample_has_some_entries_of_each_tensor_and_another_seed_has_others(published: str, client: Client) -> None:
    """The same seed draws the same sample, whatever is asked besides."""
    one, again, other = (
        client(called, ["verify", published, "--json", "--seed", seed, "--threads", threads]).report
        for seed, threads in (("1", "1"), ("1", "3"), ("2", "1"))
    )
    assert {piece["tensor"] for piece in one["compared"]} == set(tiny.read(ZOO / "base"))
    assert one["compared"] == again["compared"]
    assert one["compared"] != other["compared"]
    assert one["left_out"] == []


def test_all_of_it_passes_and_every_tensor_and_file_is_compared(
    published: str, served: LoopbackHub, client: Client
) -> None:
    """Every byte of every tensor, of the parents and of the merge, is read once."""
    served.clear_log()
    said = client(called, ["verify", f"{published}@main", "--all", "--json"])
    assert said.code == 0, said
    assert sum(piece["stop"] - piece["start"] for piece in said.report["compared"]) == said.report["entries"]
    sent = {request.path.split("/")[-1] for request in served.log if request.host == "hub" and request.method == "GET"}
    assert {"tokenizer.json", "config.json", "recipe.yaml", "merger.measured.json"} <= sent
    assert said.report["read"] == said.report["of"] == sum(r.sent for r in served.log if r.host == "cdn")


def test_it_is_told_in_words(published: str, served: LoopbackHub, client: Client) -> None:
    """What was compared, how much was read of how much, and that it is the same."""
    said = client(called, ["verify", published, "--tensors", "4", "--seed", "7"])
    assert said.code == 0, said
    first, second, third, last = said.out.splitlines()
    assert first.startswith(f"org/proven at commit {served.head(published)[:12]}: made with merger 0.")
    assert second.startswith("compared  ")
    assert second.endswith(" of 1,369,728 numbers, in 4 of 56 tensors (a sample, seed 7)")
    assert third.startswith("read      ")
    assert last == "the same: all that was compared"


# What was changed


def test_a_bit_of_a_sampled_tensor_is_found_and_the_tensor_named(
    copy: str, served: LoopbackHub, client: Client
) -> None:
    """Also where the lock was changed so that it fits: the entry is told, as it is and as it is made again."""
    sample = client(called, ["verify", copy, "--json", "--seed", "3"]).report["compared"]
    piece = max(sample, key=lambda piece: piece["start"])
    raw, entry = served.read(copy, piece["file"]), piece["stop"] - 1
    changed = flipped(raw, place_of(raw, piece["file"], piece["tensor"], entry))
    served.commit(copy, {piece["file"]: changed})
    said = client(called, ["verify", copy, "--json", "--seed", "3"])
    assert said.code == 7
    assert f"{piece['file']} is another file: its SHA-256 is" in said.report["problems"][0]["what"]
    (difference,) = said.report["differences"]
    assert (difference["tensor"], difference["file"], difference["entry"]) == (piece["tensor"], piece["file"], entry)

    was, now = (
        next(e.sha256 for n, e in served.tree(name).items() if n == piece["file"]) for name in ("org/proven", copy)
    )
    served.commit(copy, {LOCK: served.read(copy, LOCK).replace(was.encode(), now.encode())})
    said = client(called, ["verify", copy, "--json", "--seed", "3"])
    assert (said.code, said.report["problems"]) == (7, [])
    (found,) = said.report["differences"]
    assert found["found"] != found["expected"]
    assert {**found, "compared": 0} == {**difference, "compared": 0}
    words = client(called, ["verify", copy, "--seed", "3"])
    assert f"tensor {piece['tensor']} is another one: entry {entry} is {found['found']}, made again it is" in words.out
    assert words.out.endswith("NOT THE SAME: 1 of the tensors that were compared differ\n")


def test_a_bit_anywhere_is_found_with_all_and_by_the_files_checksum(
    copy: str, served: LoopbackHub, client: Client
) -> None:
    """A file that is not the lock's is compared in full at once; with --all even where the lock was changed with it."""
    file = "model-00002-of-00003.safetensors"
    raw = served.read(copy, file)
    served.commit(copy, {file: flipped(raw, len(raw) - 1)})
    length = int.from_bytes(raw[:8], "little")
    last = read_header(raw[8 : 8 + length], file, len(raw))[-1]
    said = client(called, ["verify", copy, "--json"])
    assert said.code == 7
    assert [item["tensor"] for item in said.report["differences"]] == [last.name]
    was, now = (served.tree(name)[file].sha256 for name in ("org/proven", copy))
    served.commit(copy, {LOCK: served.read(copy, LOCK).replace(was.encode(), now.encode())})
    said = client(called, ["verify", copy, "--json", "--all"])
    assert said.code == 7
    (difference,) = said.report["differences"]
    assert (difference["tensor"], difference["entry"]) == (last.name, last.entries - 1)
    assert (difference["count"], difference["compared"]) == (1, last.entries)
    assert [problem["what"] for problem in said.report["problems"]] == [
        f"the lock says that {file} has the SHA-256 {now}, but made again it has {was}"
    ]


def test_a_parents_commit_that_was_changed_in_the_lock_is_told(copy: str, served: LoopbackHub, client: Client) -> None:
    """By its files where they are others, and the tensors differ too; by the plan where only the commit is another."""
    lock = served.read(copy, LOCK)
    then = next(model["commit"] for model in yaml.safe_load(lock)["models"] if model["model"] == "proof/kjv")
    same = served.commit("proof/kjv", {"README.md": b"moved on"})
    assert client(called, ["verify", copy]).code == 0, "the locked commit is read, not the newest"
    served.commit(copy, {LOCK: lock.replace(then.encode(), same.encode())})
    said = client(called, ["verify", copy, "--json"])
    assert said.code == 7
    assert [problem["what"].split(",")[0] for problem in said.report["problems"]] == [
        f"the lock names the plan {yaml.safe_load(lock)['plan'][:16]}"
    ]
    assert said.report["differences"] == []
    other = served.commit("proof/kjv", {"model.safetensors": ZOO / "base/model.safetensors"})
    served.commit(copy, {LOCK: lock.replace(then.encode(), other.encode())})
    said = client(called, ["verify", copy, "--json"])
    assert said.code == 7
    first = said.report["problems"][0]["what"]
    assert first.startswith(f"proof/kjv at commit {other}: model.safetensors is another file: its SHA-256 is")
    assert len(said.report["differences"]) > 10


def test_a_commit_that_is_gone_is_a_model_that_cannot_be_read(copy: str, served: LoopbackHub, client: Client) -> None:
    """Nothing is said of the merge then: exit code 3."""
    lock = served.read(copy, LOCK)
    then = yaml.safe_load(lock)["models"][0]["commit"]
    served.commit(copy, {LOCK: lock.replace(then.encode(), b"de" * 20)})
    said = client(called, ["verify", copy])
    assert said.code == 3
    assert "has no revision" in said.err


def test_what_is_no_merge_of_ours_cannot_be_verified(published: str, client: Client) -> None:
    """Without a lock nothing is promised: like what is not there at all, it cannot be read."""
    said = client(called, ["verify", "proof/base"])
    assert (said.code, said.err.splitlines()[0]) == (3, f"proof/base holds no {LOCK}")
    assert client(called, ["verify", "proof/nothing"]).code == 3
    assert client(called, ["verify", "proof/base@nowhere"]).code == 3


def test_another_tokenizer_on_the_hub_is_seen_without_reading_it(
    copy: str, served: LoopbackHub, client: Client
) -> None:
    """Git's name of its content is not that of the model it was taken from; with --all its SHA-256 tells the same."""
    served.commit(copy, {"tokenizer.json": flipped(served.read(copy, "tokenizer.json"), 1000)})
    served.clear_log()
    said = client(called, ["verify", copy, "--json"])
    assert said.code == 7
    assert [problem["what"] for problem in said.report["problems"]] == [
        "tokenizer.json is not the file that was taken from proof/base"
    ]
    assert not [request for request in served.log if request.path.endswith("tokenizer.json")]
    every = client(called, ["verify", copy, "--json", "--all"]).report["problems"]
    assert any(problem["what"].startswith("tokenizer.json is another file: its SHA-256 is ") for problem in every)


# In folders


def merged(folder: Path, text: str, **options: Any) -> Path:
    """A merge of the zoo's models in a folder; its path."""
    (folder / "mine.yaml").write_text(text.replace("proof/", f"{ZOO}/"))
    merger.merge(folder / "mine.yaml", str(folder / "out"), options=Options(force=True, **options))
    return folder / "out"


def report(folder: Path, **extent: Any) -> Report:
    """What a comparison says of a merge in a folder."""
    return verify(str(folder), Options(threads=2), Extent(**extent))


@pytest.mark.parametrize("method", ["linear", "slerp", "dare_ties", "della", "tsvm", "passthrough", "model_stock"])
def test_every_kind_of_method_is_made_again(method: str, tmp_path: Path) -> None:
    """By entries, by rows, by whole matrices, measured or drawn at random: a sample, some tensors, and all, pass."""
    one = f"merge_method: {method}\nbase_model: proof/base\nseed: 3\nmodels:\n  - model: proof/kjv\n"
    more = "  - model: proof/python\n"
    numbers = {"slerp": "{t: 0.4}", "passthrough": "{scale: 0.5}", "tsvm": "{weight: 1}"}.get(
        method, "{weight: 0.5, density: 0.5}" if method in ("dare_ties", "della") else "{}"
    )
    text = f"{one}{'' if method in ('slerp', 'passthrough') else more}parameters: {numbers}\n"
    if method == "passthrough":
        text = text.replace("base_model: proof/base\n", "")
    out = merged(tmp_path, text.replace("parameters: {}\n", ""), shard_size=1_000_000)
    for extent in ({"seed": 1}, {"seed": 1, "tensors": 3}, {"everything": True}):
        found = report(out, **extent)
        assert found.passed, found
        assert found.compared
    (shard,) = out.glob("model-00001-of-*")
    shard.write_bytes(flipped(shard.read_bytes(), shard.stat().st_size - 1))
    assert len(report(out, everything=True).differences) == 1


def test_rows_by_token_are_made_again(tmp_path: Path) -> None:
    """Where vocabularies were united, whole tables are compared, and with --all the tokenizer that was written."""
    one = vocabularies.model(tmp_path / "one", 1, ["<a>"])
    other = vocabularies.model(tmp_path / "other", 2, ["<b>", "<c>"])
    out = merged(tmp_path, f"merge_method: linear\nmodels: [{{model: {one}}}, {{model: {other}}}]\n"
                           "parameters: {weight: 0.5}\ntokenizer: {source: union}\n")  # fmt: skip
    for extent in ({"seed": 1, "tensors": 100}, {"everything": True}):
        assert report(out, **extent).passed
    tokenizer = out / "tokenizer.json"
    tokenizer.write_bytes(tokenizer.read_bytes().replace(b'"<b>"', b'"<d>"'))
    assert [problem.what.split(":")[0] for problem in report(out, everything=True).problems] == [
        "tokenizer.json is another file"
    ]


def test_a_sample_of_a_folder_sees_what_it_reads_and_no_more(tmp_path: Path) -> None:
    """A bit that was flipped elsewhere is found by --all alone, which names the tensor."""
    out = merged(tmp_path, RECIPE.format(method="task_arithmetic"))
    pieces = report(out, seed=5).compared
    piece = next(piece for piece in pieces if piece.stop - piece.start < 4096 and piece.start > 64)
    file = out / piece.file
    raw = file.read_bytes()
    for entry, seen in ((piece.start - 1, False), (piece.start, True)):
        file.write_bytes(flipped(raw, place_of(raw, piece.file, piece.tensor, entry)))
        assert [each.tensor for each in report(out, seed=5).differences] == ([piece.tensor] if seen else [])
        full = report(out, everything=True)
        assert [(each.tensor, each.entry) for each in full.differences] == [(piece.tensor, entry)]
        assert [problem.what.split(":")[0] for problem in full.problems] == [f"{piece.file} is another file"]


def rewritten(file: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Write the tensors of a file anew, changed, by the safetensors library."""
    from safetensors.torch import load_file, save_file

    save_file(change(load_file(file)), file, metadata={"format": "pt"})


NORM = "model.norm.weight"
OTHER = f"1 of the tensors are of another dtype or shape than the recipe makes: {NORM}"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda held: {name: held[name] for name in held if name != NORM}, f"1 of the tensors are missing: {NORM}"),
        (lambda held: {**held, "b": held[NORM] + 1}, "1 of the tensors are there that the recipe does not make: b"),
        (lambda held: {**held, NORM: held[NORM].float()}, OTHER),
        (lambda held: {**held, NORM: held[NORM].view(2, 64)}, OTHER),
    ],
    ids=["missing", "more", "dtype", "shape"],
)  # fmt: skip
def test_a_header_that_is_not_the_plans_is_told(
    change: Callable[[dict[str, Any]], dict[str, Any]], said: str, tmp_path: Path
) -> None:
    """With the tensors' names; those that have only moved are still compared, and are the same."""
    out = merged(tmp_path, RECIPE.format(method="linear"))
    rewritten(out / "model.safetensors", change)
    for extent in ({"seed": 1}, {"everything": True}):
        found = report(out, **extent)
        assert not found.passed
        assert said in [problem.what for problem in found.problems]
        assert not found.differences
        assert len({piece.tensor for piece in found.compared} - {NORM}) == 55


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("config.json", lambda raw: b"{}", "config.json has 2 bytes, the lock says 716"),
        ("config.json", lambda raw: None, "config.json is missing"),
        ("config.json", lambda raw: raw.replace(b"6", b"7"), "config.json is not what the lock's recipe makes"),
        ("recipe.yaml", lambda raw: raw.replace(b"0.6", b"0.7"), "recipe.yaml is not what the lock's recipe makes"),
        ("extra.safetensors", lambda raw: b"", "extra.safetensors is no file of this merge"),
    ],
)
def test_other_files_are_compared_too(
    name: str, change: Callable[[bytes], bytes | None], said: str, tmp_path: Path
) -> None:
    """Those that the plan makes, without being asked; whatever else the lock lists, with --all."""
    out = merged(tmp_path, RECIPE.format(method="linear"))
    content = change((out / name).read_bytes() if (out / name).exists() else b"")
    (out / name).unlink() if content is None else (out / name).write_bytes(content)
    assert [problem.what for problem in report(out, seed=1).problems] == [said]


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json", "merger.measured.json"])
def test_a_small_file_that_was_changed_is_seen_by_any_sample(name: str, tmp_path: Path) -> None:
    """Small files are read whole, so that it takes no --all."""
    out = merged(tmp_path, RECIPE.format(method="linear"))
    file = out / name
    file.write_bytes(flipped(file.read_bytes(), 100))
    (problem,) = report(out, seed=1).problems
    assert problem.what.startswith(f"{name} is another file: its SHA-256 is ")


def test_a_parents_other_file_in_a_folder_is_told(tmp_path: Path) -> None:
    """By what the sample comes to, and with --all by its checksum."""
    tiny.models(tmp_path, "base", "kjv", "python")
    (tmp_path / "mine.yaml").write_text(RECIPE.format(method="linear").replace("proof/", f"{tmp_path}/"))
    planned = merger.plan(tmp_path / "mine.yaml")
    merger.merge(tmp_path / "mine.yaml", str(tmp_path / "out"))
    tiny.model(tmp_path / "kjv", seed=9)
    found = report(tmp_path / "out", everything=True)
    assert found.problems[0].what.startswith("kjv: model.safetensors is another file: its SHA-256 is ")
    assert len(found.differences) > 5
    assert found.of > sum(whole_tensor("", job).cost for job in planned.jobs)


# What lies beside a merge

READ = [
    "pytorch_model.bin", "model.gguf", "extra.safetensors", "weights/more.safetensors", "model.safetensors.index.json",
    "adapter_config.json", "adapter_model.safetensors", "adapter/adapter_model.bin", "optimizer.pt", "a/b/c/d.pkl",
    "chat_template.jinja", "additional_chat_templates/tool.jinja", "special_tokens_map.json", "tokenizer.model",
    "vocab.txt", "merges.txt", "modeling_tiny.py", "code/modeling_tiny.py", "custom_generate/x/generate.py",
    "custom_generate/notes.md", "custom_generate/requirements.txt", "setup.sh", "params.json",
    "preprocessor_config.json", "1_Pooling/config.json", "hyperparams.yaml", "SYSTEM_PROMPT.txt", "unknown.kind",
    "no-ending", "LICENSE.py", ".hidden/x.py", "a name\nof two lines.bin", "pictures/model.onnx",
]  # fmt: skip
"""What a loader may read, or what nobody here knows: fit for a table that grows."""

NOT_READ = [
    "notes.txt", "docs/usage.md", "plot.png", "LICENSE", "results.csv", "merge.yaml", "merge.lock.yaml", ".gitignore",
]  # fmt: skip
SILENT = [".gitattributes", "pictures/own.png", ".git/objects/ab/cd", ".cache/huggingface/download/x.metadata"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merge in a folder, to be copied."""
    return merged(tmp_path_factory.mktemp("made"), RECIPE.format(method="linear"))


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(made, tmp_path / "out"))


def added(folder: Path, names: list[str]) -> None:
    """Files of these names."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")


@pytest.mark.parametrize("everything", [False, True])
def test_whatever_was_added_is_named_and_what_a_loader_may_read_fails(everything: bool, out: Path) -> None:
    """However deep it lies, and with or without --all; pictures, .gitattributes and what a clone holds are ours."""
    added(out, [*READ, *NOT_READ, *SILENT])
    (out / "linked").symlink_to(out.parent)
    found = report(out, everything=everything, seed=1)
    assert list(found.added) == sorted([*READ, *NOT_READ, "linked/"])
    shown = [name.replace("\n", "\\n") for name in sorted([*READ, "linked/"])]
    assert [problem.what for problem in found.problems] == [f"{name} is no file of this merge" for name in shown]
    assert list(found.notes) == [f"{name} was added beside the merge" for name in sorted(NOT_READ)]


def test_what_no_loader_reads_is_a_line(out: Path) -> None:
    """Exit code 0."""
    added(out, NOT_READ)
    said = called(["verify", str(out)])
    assert said.code == 0
    assert "note: notes.txt was added beside the merge" in said.out
    assert said.out.endswith("the same: all that was compared\n")


def test_added_files_are_named_on_the_hub_too(copy: str, served: LoopbackHub, client: Client) -> None:
    """In words and as data, whatever the lock says of them."""
    names = ["model.gguf", "custom_generate/x/generate.py"]
    lock = served.read(copy, LOCK).decode()
    listed = lock.replace(
        "output:\n", f"output:\n- {{file: model.gguf, size: 2, sha256: {hashlib.sha256(b'{}').hexdigest()}}}\n"
    )
    served.commit(copy, {LOCK: listed.encode(), "notes.md": b"x"} | dict.fromkeys(names, b"{}"))
    said = client(called, ["verify", copy])
    assert said.code == 7
    assert "model.gguf is no file of this merge\n    it was added beside the merge, and a loader may" in said.out
    assert "note: notes.md was added beside the merge" in said.out
    data = client(called, ["verify", copy, "--json"]).report
    assert data["added"] == ["custom_generate/x/generate.py", "model.gguf", "notes.md"]
    assert [problem["what"].split()[0] for problem in data["problems"]] == sorted(names)


def test_a_lock_without_a_checksum_or_a_file_is_told(out: Path) -> None:
    """merger writes both of every file: nothing that was left out goes unsaid."""
    content = yaml.safe_load((out / LOCK).read_text())
    content["output"][0]["sha256"] = None
    content["output"] = [
        each for each in content["output"] if each["file"] not in ("tokenizer.json", "merger.measured.json")
    ]
    (out / LOCK).write_text(yaml.safe_dump(content))
    assert [problem.what for problem in report(out, seed=1).problems] == [
        "the lock says nothing of tokenizer.json",
        "the lock holds no SHA-256 of model.safetensors",
        "merger.measured.json is no file of this merge",
    ]


def test_an_edited_card_is_told_and_fails_nothing(out: Path) -> None:
    """From which line on it is another one; where it has a template of its own, that it is not compared."""
    card = (out / "README.md").read_text().splitlines(keepends=True)
    card[8] = "edited\n"
    (out / "README.md").write_text("".join(card))
    (out / "merger.evaluation.json").write_text("[ ]")
    said = report(out, seed=1)
    assert said.passed
    assert said.notes == (
        "README.md is not what merger writes of this merge here and now: it differs from line 9 on",
        "merger.evaluation.json is not what merger writes of this merge here and now: it differs from line 1 on",
    )


def test_a_card_from_a_template_of_its_own_is_not_compared(tmp_path: Path) -> None:
    """A lock's template is a stranger's: verify runs none."""
    (tmp_path / "own.md.j2").write_text("# {{ title }}\n")
    text = RECIPE.format(method="linear") + f"publish: {{template: {tmp_path}/own.md.j2}}\n"
    assert report(merged(tmp_path, text), seed=1).notes == (
        "README.md was rendered with a template of its own: it is not compared",
    )
