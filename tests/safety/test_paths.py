"""Where paths may lead: of a person, of a stranger, in a model's folder and in a lock. Not here: sizes (limits)."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import yaml
from calls import called
from loopback import Client, LoopbackHub
from naming import PLACES

from merger.card.templates import own_templates
from merger.errors import MergerError, ModelError, RecipeError
from merger.recipe.blocks.evaluate import named_files
from merger.recipe.model import Publish
from merger.run.options import Options
from merger.run.pipeline import merge
from merger.run.prepare import plan, read_recipe
from merger.safety import limits, paths
from merger.safety.paths import ANYWHERE, BarredError
from merger.stores.folder import FolderStore
from merger.stores.ports import Ticket

SECRET = "not-a-real-secret"
ENVIRONMENT = "/proc/self/environ"
OF_THE_ENVIRONMENT = max(Path(ENVIRONMENT).read_bytes().split(b"\0"), key=len)
"""What would be found in whatever the process's environment was written into."""

LINEAR = """\
merge_method: linear
models:
  - model: ./one
    parameters: {weight: 0.5}
  - model: ./two
    parameters: {weight: 0.5}
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with two models; beside it a text that is nobody's business."""
    place = tmp_path / "checkout"
    tiny.models(place, "one", "two")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/secret.txt").write_text(SECRET)
    monkeypatch.chdir(place)
    return place


def refusal(text: str, **options: object) -> str:
    """What is said of a recipe that cannot be planned."""
    Path("mine.yaml").write_text(text)
    with pytest.raises(MergerError) as refused:
        plan(read_recipe(Path("mine.yaml")), Options(**options))  # type: ignore[arg-type]
    return str(refused.value)


def held_in(folder: Path) -> bytes:
    """All that regular files hold there, which are no links."""
    found = (item for item in sorted(folder.rglob("*")) if item.is_file() and not item.is_symlink())
    return b"\0".join(item.read_bytes() for item in found)


# ---- whose words ----------------------------------------------------------------------------------------------------

WORDS = {
    ".": True, "one": True, "./one/../two": True, "one/config.json": True, "not/there": True, "../checkout/one": True,
    "inward": True, "..": False, "../elsewhere": False, "../checkout-2": False, "/": False, "/etc/passwd": False,
    "/not/there": False, "~": False, "~root/x": False, ENVIRONMENT: False, "/proc/self/cwd/../elsewhere": False,
    "outward": False, "outward/secret.txt": False, "outward/not-there": False, "loop/x/../../../elsewhere": False,
    "one\0": False, "one\ud800": False,
}  # fmt: skip


@pytest.mark.parametrize("words", WORDS)
def test_a_strangers_words_lead_into_the_root_and_nobodys_lead_out_of_it(words: str, here: Path) -> None:
    """After all links, and whether or not anything is there: a refusal tells nothing of what is."""
    (here / "inward").symlink_to("one")
    (here / "outward").symlink_to("../elsewhere")
    (here / "loop").symlink_to("loop")
    assert (paths.inside(words, here) is not None) == WORDS[words]
    if not WORDS[words]:
        with pytest.raises(ModelError, match="is outside of checkout, and its recipes name nothing else"):
            paths.resolve(words, here)
    with pytest.raises(ModelError, match="only what is on the Hub may be named here"):
        paths.resolve(words, None)


@pytest.mark.parametrize("words", [words for words in WORDS if words.isprintable()])
def test_a_persons_words_lead_anywhere(words: str, here: Path) -> None:
    """What they name is theirs to read."""
    assert paths.resolve(words, ANYWHERE) == Path(os.path.realpath(os.path.expanduser(words)))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("words", ["../elsewhere", "/etc", "./outward", "~/x", "/not/there"])
def test_wherever_a_strangers_recipe_names_a_model_it_lies_inside(place: str, words: str, here: Path) -> None:
    """At each place of the language, said with that place."""
    (here / "outward").symlink_to("../elsewhere")
    text = PLACES[place].replace("org/a", "./one").replace("org/b", "./two").replace("MODEL", words)
    told = refusal(text, root=here)
    assert f"{words!r} is outside of checkout" in told
    assert all(line.startswith("mine.yaml:") for line in told.splitlines() if "outside" in line)


@pytest.mark.parametrize("place", PLACES)
def test_nobodys_recipe_names_a_folder(place: str, here: Path) -> None:
    """A form, a comment and a lock on the Hub name no place of this machine, wherever they do."""
    text = PLACES[place].replace("org/a", "./one").replace("org/b", "./two").replace("MODEL", "./two")
    assert "is a place on a machine, and only what is on the Hub may be named here" in refusal(text, root=None)


@pytest.mark.parametrize("words", ["../elsewhere/secret.txt", ENVIRONMENT, "./outward", "/not/there", "~/x"])
@pytest.mark.parametrize(
    ("block", "at"),
    [
        ("publish: {template: %s}", "mine.yaml:7:21: publish.template: "),
        ("evaluate: {perplexity: {text: %s}}", "mine.yaml:7:31: evaluate.perplexity: "),
        ("evaluate: {tasks: [%s.yaml]}", "mine.yaml:7:1: evaluate.tasks: "),
    ],
)
def test_a_strangers_templates_texts_and_tasks_lie_inside(block: str, at: str, words: str, here: Path) -> None:
    """Of what lies outside nobody is told whether it is there."""
    for name in ("outward", "outward.yaml"):
        (here / name).symlink_to("../elsewhere/secret.txt")
    told = refusal(LINEAR + block % words, root=here)
    assert told.startswith(at)
    assert "is outside of checkout" in told


@pytest.mark.parametrize("words", ["../elsewhere/secret.txt", ENVIRONMENT, "own.md", "hf://", "/not/there"])
def test_nobodys_templates_and_texts_are_files(words: str, here: Path) -> None:
    """They are on the Hub; as models are."""
    (here / "own.md").write_text("inside, too")
    with pytest.raises(RecipeError, match=r"publish\.template: .* is a place on a machine"):
        own_templates(Publish(template=words), FolderStore(None), FolderStore(None))
    if not words.startswith("hf:"):
        more = f"evaluate: {{perplexity: {{text: {words}}}}}\n"
        assert "evaluate.perplexity: " in refusal(LINEAR + more, root=None)


def test_what_lies_inside_may_be_named(here: Path) -> None:
    """Models, a template and a text of the checkout, also by links that stay in it."""
    (here / "three").symlink_to("two")
    (here / "card.md.j2").write_text("# {{ title }}\n")
    (here / "text.txt").symlink_to("card.md.j2")
    more = "publish: {template: card.md.j2}\nevaluate: {perplexity: {text: text.txt}}\n"
    Path("mine.yaml").write_text(LINEAR.replace("./two", "three") + more)
    planned, _ = plan(read_recipe(Path("mine.yaml")), Options(root=here))
    assert planned.locked.templates == {"card.md.j2": "# {{ title }}\n"}


# ---- files that are none --------------------------------------------------------------------------------------------


def fifo(place: Path) -> None:
    os.mkfifo(place)


def a_socket(place: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(os.path.relpath(place))


def link(target: str) -> Callable[[Path], None]:
    return lambda place: place.symlink_to(target)


STRANGE: dict[str, Callable[[Path], None]] = {
    "the environment": link(ENVIRONMENT),
    "a text outside": link(os.path.relpath("elsewhere/secret.txt", "checkout/one")),
    "an endless device": link("/dev/zero"),
    "an empty device": link("/dev/null"),
    "a terminal": link("/dev/tty"),
    "our own input": link("/dev/stdin"),
    "a file of the kernel": link("/proc/cpuinfo"),
    "a setting of the kernel": link("/sys/kernel/mm/transparent_hugepage/enabled"),
    "a pipe": fifo,
    "a link to a pipe": lambda place: (fifo(place.with_name("pipe")), place.symlink_to("pipe"))[0],
    "a socket": a_socket,
    "nothing": link("nowhere"),
    "itself": link("LICENSE"),
}
PUBLISHED = (
    "LICENSE", "NOTICE", "COPYING.md", "README.md", "config.json", "generation_config.json", "tokenizer.json",
    "tokenizer_config.json", "tokenizer.model", "chat_template.jinja", "special_tokens_map.json",
)  # fmt: skip
"""What is published of a model, or read for what is."""


@pytest.mark.parametrize("kind", STRANGE)
def test_a_file_of_a_model_that_is_none_of_its_own_is_refused(kind: str, here: Path) -> None:
    """Told with its name, before anything is made; nothing waits for it."""
    STRANGE[kind](here / "one/LICENSE")
    told = refusal(LINEAR)
    assert told.startswith("mine.yaml:3:12: models[./one]: LICENSE ")
    store, folder = FolderStore(), FolderStore().locate("./one", None)
    with pytest.raises(ModelError, match="one: LICENSE "):
        store.fetch(folder, "LICENSE")


@pytest.mark.parametrize("name", PUBLISHED)
def test_nothing_that_is_published_is_a_link_out_of_its_models_folder(name: str, here: Path) -> None:
    """Whatever a merge takes over, or reads for its card; also where it is the other model's."""
    (here / "two" / name).unlink(missing_ok=True)
    (here / "two" / name).symlink_to("../../elsewhere/secret.txt")
    told = refusal(LINEAR)
    assert f"{name} is a link that leads out of its folder" in told
    assert SECRET not in told


@pytest.mark.parametrize("folder", ["additional_chat_templates", "licences"])
def test_nor_does_it_lie_in_a_folder_that_is_one(folder: str, here: Path) -> None:
    """A folder inside of the model's may be a link, too."""
    (here.parent / "elsewhere/x.jinja").write_text(SECRET)
    (here / "one" / folder).symlink_to("../../elsewhere")
    assert f"{folder}/x.jinja is a link that leads out of its folder" in refusal(LINEAR)


def test_all_such_files_are_told_at_once(here: Path) -> None:
    """With the names of both."""
    (here / "one/LICENSE").symlink_to(ENVIRONMENT)
    (here / "one/chat_template.jinja").symlink_to("/etc/hostname")
    told = refusal(LINEAR)
    assert told.count("is a link that leads out of its folder\n    put the file itself there") == 2
    assert {"LICENSE", "chat_template.jinja"} <= set(told.split())


def test_links_of_which_a_merge_takes_nothing_are_no_obstacle(here: Path) -> None:
    """A log, a folder of runs; they are never read."""
    (here / "one/train.log").symlink_to("/dev/zero")
    (here / "one/runs").symlink_to("/proc/self")
    fifo(here / "one/pipe")
    Path("mine.yaml").write_text(LINEAR)
    assert plan(read_recipe(Path("mine.yaml")), Options())[0].jobs


def test_weights_may_be_links_to_regular_files_anywhere(here: Path) -> None:
    """As labs have them; a model's folder, too. Files that stay inside may be links in any case."""
    shared = here.parent / "shared"
    (here / "one").rename(shared)
    (here / "one").mkdir()
    for file in shared.iterdir():
        kept = file.name.endswith(".safetensors")
        (here / "one" / file.name).symlink_to(file) if kept else file.rename(here / "one" / file.name)
    (here / "one/licence.txt").write_text("MIT")
    (here / "one/LICENSE").symlink_to("licence.txt")
    (here / "two").rename(here.parent / "moved")
    (here / "two").symlink_to("../moved")
    Path("mine.yaml").write_text(LINEAR)
    options = Options(to="out", threads=1)
    merge(*plan(read_recipe(Path("mine.yaml")), options), options)
    assert Path("out/LICENSE").read_text() == "MIT"
    assert "model.safetensors is a link that leads out of the repository" in refusal(
        LINEAR.replace("./two", "./one"), root=here
    )


def test_weights_that_are_no_regular_file_are_refused(here: Path) -> None:
    """A device has no end and a pipe may have no beginning."""
    for make in (link("/dev/zero"), fifo, link(ENVIRONMENT), link("nowhere")):
        (here / "one/model.safetensors").unlink()
        make(here / "one/model.safetensors")
        assert refusal(LINEAR).startswith("mine.yaml:3:12: models[./one]: ")


def test_weights_that_have_become_a_pipe_are_not_waited_for(here: Path) -> None:
    """What was found at plan time is looked at again when it is opened."""
    model = FolderStore().locate("./one", None)
    (here / "one/model.safetensors").unlink()
    fifo(here / "one/model.safetensors")
    reader = FolderStore().reader([Ticket(model, "model.safetensors", 0, 8)], 0)
    with pytest.raises(ModelError, match=r"one: model\.safetensors is no regular file"):
        reader.read(0, 0, memoryview(bytearray(8)))


@pytest.mark.parametrize("inside", ["", "text_encoder"])
def test_the_hubs_cache_is_read_as_it_is_laid_out(inside: str, here: Path) -> None:
    """Its snapshots are links to blobs beside them, also of a repo's folder; nothing else is let through by that."""
    cache = here.parent / "hub/models--org--one"
    snapshot = cache / "snapshots" / ("1f" * 20) / inside
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    (here / "one/LICENSE").write_text("MIT")
    for number, file in enumerate(sorted((here / "one").iterdir())):
        blob = file.rename(cache / "blobs" / f"{number}")
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    text = LINEAR.replace("./one", str(snapshot))
    Path("mine.yaml").write_text(text)
    options = Options(to="out", threads=1)
    merge(*plan(read_recipe(Path("mine.yaml")), options), options)
    assert Path("out/LICENSE").read_text() == "MIT"
    (cache / "blobs/secret").symlink_to(here.parent / "elsewhere/secret.txt")
    (snapshot / "LICENSE").unlink()
    (snapshot / "LICENSE").symlink_to(os.path.relpath(cache / "blobs/secret", snapshot))
    assert "LICENSE is a link that leads out of its folder" in refusal(text)


def test_a_file_that_is_another_length_than_the_disk_says_is_not_read(here: Path) -> None:
    """The kernel's own files say that they are empty, and are not."""
    with pytest.raises(OSError, match="another length"):
        paths.read_file(Path(os.path.realpath(ENVIRONMENT)))
    with pytest.raises(BarredError, match="no regular file"):
        paths.reach("/dev", "zero", ANYWHERE, leaves=True)
    assert paths.read_file(here.parent / "elsewhere/secret.txt", 4, 5) == b"a"


TEMPLATES: dict[str, Callable[[Path], None]] = {
    **{kind: make for kind, make in STRANGE.items() if kind not in ("itself", "a link to a pipe")},
    "an empty folder": Path.mkdir,
    "bytes": lambda place: (place.write_bytes(b"\xff\xfe\0"), None)[1],
}


@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_template_is_a_regular_file_with_text(kind: str, here: Path) -> None:
    """Also a person's own: what is no such file is refused at its place, as a file and in a folder."""
    (here / "own").mkdir()
    TEMPLATES[kind](here / "own/card.md.j2")
    for words in ("own/card.md.j2", "own"):
        told = refusal(f"{LINEAR}publish: {{template: {words}}}\n")
        assert told.startswith("mine.yaml:7:21: publish.template: ")
        assert SECRET not in told


@pytest.mark.parametrize("words", [ENVIRONMENT, "/proc/self/mem", "/dev/zero", "/dev/stdin", "/proc/self", "/dev"])
def test_nothing_of_the_kernel_is_a_template_or_a_text(words: str, here: Path) -> None:
    """Nor is it measured on."""
    assert refusal(f"{LINEAR}publish: {{template: {words}}}\n").startswith("mine.yaml:7:21: publish.template: ")
    Path("mine.yaml").write_text(f"{LINEAR}evaluate: {{perplexity: {{text: {words}}}}}\n")
    ((path, *_),) = named_files(read_recipe(Path("mine.yaml")).evaluate)  # type: ignore[arg-type]
    with pytest.raises(ModelError):
        paths.read_named(path, ANYWHERE, limits.TEXT)


# ---- locks ----------------------------------------------------------------------------------------------------------

NAMED = {
    "the environment as a template": f"publish: {{template: {ENVIRONMENT}}}",
    "a text as a template": "publish: {template: ../elsewhere/secret.txt}",
    "a folder of templates": "publish: {template: ../elsewhere}",
    "a text to measure on": "evaluate: {perplexity: {text: ../elsewhere/secret.txt}}",
    "the environment to measure on": f"evaluate: {{perplexity: [{{text: {ENVIRONMENT}}}]}}",
    "a task, whose file may run code": "evaluate: {tasks: [../elsewhere/task.yaml]}",
}
COMMANDS = (
    "check out/merger.lock.yaml",
    "plan out/merger.lock.yaml",
    "run out/merger.lock.yaml --to again",
    "run out/merger.lock.yaml --to parts --part 1/1",
    "publish out/merger.lock.yaml --to parts",
    "plan beside.yaml",
    "verify ./out",
    "card ./out --print",
    "card ./out",
    "diff ./out ./one",
    "status ./out",
)


def hostile(block: str) -> None:
    """Write into the lock in out/ that its recipe has this block, too: the plan stays the same."""
    lock = Path("out/merger.lock.yaml")
    content = yaml.safe_load(lock.read_text())
    content["recipe"] += block + "\n"
    lock.write_text(yaml.safe_dump(content, sort_keys=False))


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working directory of a merge in out/, made of folders."""
    place = tmp_path_factory.mktemp("merge") / "checkout"
    tiny.models(place, "one", "two")
    (place.parent / "elsewhere").mkdir()
    (place.parent / "elsewhere/card.md.j2").write_text(SECRET)
    (place.parent / "elsewhere/secret.txt").write_text(SECRET)
    (place.parent / "elsewhere/task.yaml").write_text(SECRET)
    (place / "beside.yaml").write_text(LINEAR)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        options = Options(to="out", threads=1)
        merge(*plan(read_recipe(Path("beside.yaml")), options), options)
    (place / "beside.lock.yaml").symlink_to("out/merger.lock.yaml")
    return place


@pytest.mark.parametrize("named", NAMED)
def test_a_lock_names_nothing_of_the_machine_but_its_models(
    named: str, checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever command is pointed at it, nothing of it is printed or written; what is left out is said."""
    monkeypatch.chdir(checkout)
    lock = Path("out/merger.lock.yaml")
    before = lock.read_bytes()
    hostile(NAMED[named])
    try:
        said = {line: called(line.split()) for line in COMMANDS}
    finally:
        lock.write_bytes(before)
    for line, done in said.items():
        assert SECRET not in done.out + done.err, line
        assert OF_THE_ENVIRONMENT.decode() not in done.out + done.err, line
    found = held_in(checkout)
    assert SECRET.encode() not in found
    assert OF_THE_ENVIRONMENT not in found
    expected = {"verify ./out": 7, "diff ./out ./one": 7}  # its recipe is not recipe.yaml any more
    assert {line: done.code for line, done in said.items()} == {line: expected.get(line, 0) for line in COMMANDS}
    for line in ("check out/merger.lock.yaml", "plan out/merger.lock.yaml", "run out/merger.lock.yaml --to again",
                 "card ./out"):  # fmt: skip
        assert "is left out: a lock names nothing of the machine but the folders of its models" in said[line].err


def test_a_lock_on_the_hub_names_no_folder(checkout: Path, served: LoopbackHub, client: Client, tmp_path: Path) -> None:
    """A stranger's repo would have files of this machine read: as models, and as a template for its card."""
    for name in ("one", "two"):
        served.add_model(f"paths/{name}", checkout / name)
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(LINEAR.replace("./", "paths/"))
    assert client(called, ["run", str(recipe), "--to", "hf://org/kind", "--quiet"]).code == 0
    lock = served.read("org/kind", "merger.lock.yaml").decode()
    for number, words in enumerate([str(checkout / "one"), "/etc", "./one"]):
        place = f"org/hostile-{number}"
        served.add_model(place, {**served.files("org/kind"), "merger.lock.yaml": lock.replace("paths/one", words)
                                 .encode()})  # fmt: skip
        for line in (["verify", place], ["card", place], ["card", place, "--print"]):
            done = client(called, line)
            assert (done.code, f"{words!r} is a place on a machine" in done.err) == (3, True), done.err
    content = yaml.safe_load(lock)
    content["recipe"] += f"publish: {{template: {ENVIRONMENT}}}\n"
    served.commit("org/kind", {"merger.lock.yaml": yaml.safe_dump(content, sort_keys=False).encode()})
    for line in (["card", "org/kind", "--print"], ["card", "org/kind"]):
        done = client(called, line)
        assert done.code == 0, done.err
        assert f"{ENVIRONMENT!r} is left out" in done.err
        assert OF_THE_ENVIRONMENT.decode() not in done.out
    assert b"\nmerge_method: linear" in served.read("org/kind", "README.md")


def test_a_merge_of_folders_is_verified_where_they_are(checkout: Path, served: LoopbackHub, client: Client) -> None:
    """On the Hub nothing says that folders of these names are those that it was made of."""
    served.add_model("org/of-folders", checkout / "out")
    done = client(called, ["verify", "org/of-folders"])
    assert done.code == 3
    assert "org/of-folders was made of folders of another machine (one, two)" in done.err


@pytest.mark.parametrize("kind", [kind for kind in STRANGE if kind != "a link to a pipe"])
def test_a_lock_that_is_no_file_is_not_read(kind: str, here: Path) -> None:
    """Beside a recipe, and in a merge's folder."""
    STRANGE[kind](here / "one/merger.lock.yaml")
    Path("mine.lock.yaml").symlink_to("one/merger.lock.yaml")
    Path("mine.yaml").write_text(LINEAR)
    for line in (["plan", "mine.yaml"], ["verify", "./one"], ["card", "./one"], ["run", "mine.yaml", "--to", "./one"]):
        done = called(line)
        assert done.code in (2, 3, 6, 7), (line, done.err)
        assert SECRET not in done.err


def test_a_recipe_error_is_told_of_a_lock_beside_it_outside_of_the_root(here: Path) -> None:
    """It is part of what a stranger says."""
    Path("mine.lock.yaml").symlink_to("../elsewhere/secret.txt")
    Path("mine.yaml").write_text(LINEAR)
    with pytest.raises(RecipeError, match=r"'mine\.lock\.yaml' is outside of checkout"):
        plan(read_recipe(Path("mine.yaml")), Options(root=here))
