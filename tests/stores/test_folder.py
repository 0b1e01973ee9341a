"""Folders as the place that models come from and go to: nothing is lost, nothing half made looks like a model."""

import errno
import hashlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from merger import runtime as machine
from merger.errors import BudgetError, MergerError, ModelError, UploadError
from merger.models.formats.safetensors import WrittenShard
from merger.stores import folder as folder_module
from merger.stores.folder import FolderReader, FolderStore
from merger.stores.ports import Leftover, Located, Published, Ticket
from merger.stores.results import FolderSession, ResultFolder

FILES = {"README.md": b"a card", "templates/chat.jinja": b"{{ x }}", "config.json": b"{}"}
MARK = ".merger-in-work"


def a_model(folder: Path, **files: bytes) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_bytes(b'{"old": true}')
    (folder / "old.safetensors").write_bytes(b"old")
    return folder


def begin(place: ResultFolder, identity: str = "a" * 64, shared: bool = False) -> FolderSession:
    """A run's work there."""
    session = place.open(identity, shared)
    assert isinstance(session, FolderSession)
    return session


def fill(session: FolderSession) -> FolderSession:
    """Make one shard."""
    path = session._work.new / "model.safetensors"
    path.write_bytes(b"tensors")
    session.take(WrittenShard(path.name, 7, hashlib.sha256(path.read_bytes()).hexdigest()))
    return session


def listing(folder: Path) -> dict[str, bytes]:
    return {item.relative_to(folder).as_posix(): item.read_bytes() for item in folder.rglob("*") if item.is_file()}


def hint(error: MergerError) -> str:
    (problem,) = error.problems
    assert problem.hint, problem
    return str(problem)


# ---- the store ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["./no", "../no", "/no", "~/no", "~nobody-of-this-name/no", "C:/no"])
def test_a_path_written_as_a_folder_never_means_the_hub(path: str) -> None:
    """What is written as a folder is one, whether it exists or not."""
    assert FolderStore().has(path)


def test_a_name_means_a_folder_only_where_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`org/model` is a folder if it lies in the working directory, else it is left to the Hub."""
    monkeypatch.chdir(tmp_path)
    a_model(tmp_path / "org/here")
    assert FolderStore().has("org/here")
    assert not FolderStore().has("org/elsewhere")
    assert not FolderStore().has("x" * 5000)


def test_a_folder_is_listed_with_its_sizes_one_level_deep(tmp_path: Path) -> None:
    """All that a merge may want of a model: its files, those of its folders, links as what they point to."""
    folder = a_model(tmp_path / "model")
    (folder / "templates").mkdir()
    (folder / "templates/a.jinja").write_bytes(b"12345")
    (folder / "tokenizer.json").symlink_to(folder / "templates/a.jinja")
    found = FolderStore().locate(str(folder), None)
    assert (found.name, found.commit) == ("model", None)
    assert {name: info.size for name, info in found.files.items()} == {
        "config.json": 13, "old.safetensors": 3, "templates/a.jinja": 5, "tokenizer.json": 5,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("path", "revision", "words"),
    [
        ("./missing", None, "there is no folder './missing'"),
        ("~nobody-of-this-name/x", None, "there is no folder '~nobody-of-this-name/x'"),
        ("./model", "main", "'./model' is a folder, which has no revision 'main'"),
    ],
)
def test_a_folder_that_is_not_there_or_pinned_is_refused(
    path: str, revision: str | None, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The refusal says what is wrong with the path and what to do."""
    monkeypatch.chdir(tmp_path)
    a_model(tmp_path / "model")
    with pytest.raises(ModelError) as refusal:
        FolderStore().locate(path, revision)
    assert words in hint(refusal.value)


def located(folder: Path) -> Located:
    return FolderStore().locate(str(folder), None)


def test_parts_of_files_are_fetched(tmp_path: Path) -> None:
    """A file, or a run of its bytes."""
    model, store = located(a_model(tmp_path / "model")), FolderStore()
    assert store.fetch(model, "config.json") == b'{"old": true}'
    assert store.fetch(model, "config.json", 2, 5) == b"old"


def test_a_file_that_cannot_be_read_names_its_model(tmp_path: Path) -> None:
    """Several models have files of the same name, so the model is said too."""
    model = located(a_model(tmp_path / "model"))
    (tmp_path / "model/config.json").unlink()
    with pytest.raises(ModelError) as refusal:
        FolderStore().fetch(model, "config.json")
    assert "model: config.json cannot be read (No such file or directory)" in hint(refusal.value)


def test_a_reader_hands_out_tickets_at_any_offset_as_often_as_asked(tmp_path: Path) -> None:
    """A disk can be read again, in any order, and the reader says so."""
    folder = a_model(tmp_path / "model")
    (folder / "old.safetensors").write_bytes(bytes(range(200)))
    tickets = [Ticket(located(folder), "old.safetensors", 10, 20), Ticket(located(folder), "old.safetensors", 100, 200)]
    reader = FolderStore().reader(tickets, 0)
    out = bytearray(5)
    for ticket, offset, first in [(1, 50, 150), (0, 0, 10), (0, 5, 15), (0, 5, 15)]:
        reader.read(ticket, offset, memoryview(out))
        assert bytes(out) == bytes(range(first, first + 5))
    assert reader.repeatable(0)
    reader.close()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda file: os.truncate(file, 15), "model: old.safetensors became shorter while it was read"),
        (lambda file: file.unlink(), "model: old.safetensors cannot be read"),
    ],
)
def test_a_file_that_changes_under_a_run_is_noticed(spoil: Callable[[Path], None], words: str, tmp_path: Path) -> None:
    """A file cut short or gone is a refusal that names model and file, never a short or zeroed tensor."""
    folder = a_model(tmp_path / "model")
    (folder / "old.safetensors").write_bytes(bytes(range(200)))
    reader = FolderReader([Ticket(located(folder), "old.safetensors", 10, 20)])
    spoil(folder / "old.safetensors")
    with pytest.raises(ModelError) as refusal:
        reader.read(0, 0, memoryview(bytearray(10)))
    assert words in hint(refusal.value)


# ---- results -------------------------------------------------------------------------------------------------------


def test_a_finished_run_leaves_the_folder_and_nothing_else(tmp_path: Path) -> None:
    """The folder holds shards and small files, and there is no work left beside it."""
    session = fill(begin(ResultFolder(tmp_path / "deep/out")))
    assert session.finish(FILES, "").where == str(tmp_path / "deep/out")
    assert ResultFolder(tmp_path / "deep/out").name == "out"
    assert listing(tmp_path / "deep/out") == {**FILES, "model.safetensors": b"tensors"}
    assert os.listdir(tmp_path / "deep") == ["out"]


def test_nothing_looks_like_a_model_before_the_end(tmp_path: Path) -> None:
    """While a run lasts there is no destination, and what is being made has no config.json."""
    fill(begin(ResultFolder(tmp_path / "out")))
    assert not (tmp_path / "out").exists()
    work = {MARK, "new/model.safetensors", "done/model.safetensors"}
    assert listing(tmp_path).keys() == {f"out.merging/{name}" for name in work}


def test_a_run_that_fails_before_its_first_shard_leaves_nothing(tmp_path: Path) -> None:
    """What was half made is removed; a second call does no harm."""
    session = begin(ResultFolder(tmp_path / "out"))
    (session._work.new / "model.safetensors").write_bytes(b"half a shard")
    session.leave()
    session.leave()
    assert os.listdir(tmp_path) == []


def test_finished_shards_wait_for_a_run_of_the_same_identity(tmp_path: Path) -> None:
    """The next such run finds them, another one does not; half a shard is gone in any case."""
    first = fill(begin(ResultFolder(tmp_path / "out")))
    (first._work.new / "half.safetensors").write_bytes(b"half a shard")
    first.leave()
    assert not (tmp_path / "out").exists()
    second = begin(ResultFolder(tmp_path / "out"))
    assert [(shard.name, shard.size) for shard in second.held().values()] == [("model.safetensors", 7)]
    assert os.listdir(second._work.new) == ["model.safetensors"]
    second.leave()
    other = begin(ResultFolder(tmp_path / "out", force=True), "b" * 64)
    assert not other.held()
    assert os.listdir(other._work.new) == []


def test_a_finished_shard_that_changed_is_made_again(tmp_path: Path) -> None:
    """Its checksum is looked at, not only its size."""
    session = fill(begin(ResultFolder(tmp_path / "out")))
    (session._work.new / "model.safetensors").write_bytes(b"tensorz")
    session.leave()
    assert not begin(ResultFolder(tmp_path / "out")).held()


def test_parts_work_beside_each_other_and_nobody_else_does(tmp_path: Path) -> None:
    """Runs that share an identity share the work folder; a whole run and another identity are kept out."""
    place = ResultFolder(tmp_path / "out")
    one, two = (begin(place, shared=True) for _ in range(2))
    for identity, shared in (("a" * 64, False), ("b" * 64, True)):
        with pytest.raises(UploadError, match="another run is writing to 'out'"):
            place.open(identity, shared=shared)
    fill(one)
    assert two.held().keys() == {"model.safetensors"}
    one.leave()
    two.leave()
    assert begin(place).held().keys() == {"model.safetensors"}


def test_leftovers_are_listed_and_removed_unless_a_run_is_at_work(tmp_path: Path) -> None:
    """The list says how much is there; removing takes the work folder and nothing beside it."""
    assert ResultFolder(tmp_path / "out").leftovers() == []
    session = fill(begin(ResultFolder(tmp_path / "out")))
    (leftover,) = ResultFolder(tmp_path / "out").leftovers()
    assert leftover == Leftover(str(tmp_path / "out.merging"), 1, 7, busy=True)
    with pytest.raises(UploadError, match="another run is writing"):
        ResultFolder(tmp_path / "out").clean(leftover)
    session.leave()
    (leftover,) = ResultFolder(tmp_path / "out").leftovers()
    assert not leftover.busy
    ResultFolder(tmp_path / "out").clean(leftover)
    assert os.listdir(tmp_path) == []


def test_the_same_result_is_not_made_twice(tmp_path: Path) -> None:
    """A finished folder of the same identity is the answer, as long as its files have their sizes."""
    lock = f"identity: {'a' * 64}\noutput:\n- {{file: model.safetensors, size: 7}}\n".encode()
    session = fill(begin(ResultFolder(tmp_path / "out")))
    session.finish({**FILES, "merger.lock.yaml": lock}, "")
    assert ResultFolder(tmp_path / "out").open("a" * 64) == Published(str(tmp_path / "out"))
    assert os.listdir(tmp_path) == ["out"]
    (tmp_path / "out/model.safetensors").write_bytes(b"short")
    with pytest.raises(UploadError, match="exists and is not empty"):
        ResultFolder(tmp_path / "out").open("a" * 64)


KILLED = """
import sys
from pathlib import Path
from merger.stores.results import ResultFolder
session = ResultFolder(Path(sys.argv[1])).open("a" * 64)
(session._work.new / "model.safetensors").write_bytes(b"half a shard")
(session._work.new / "templates").mkdir()
(session._work.new / "templates/left.jinja").write_bytes(b"left")
print("ready", flush=True)
sys.stdin.read()
"""


REPLACING = """
import os, signal
from pathlib import Path
from merger.stores.results import ResultFolder
session = ResultFolder(Path({out!r}), force=True).open("a" * 64)
rename, done = Path.rename, []
def dying(self, target):
    if done:
        os.kill(os.getpid(), signal.SIGKILL)
    done.append(rename(self, target))
Path.rename = dying
session.finish({{"config.json": b"new"}}, "")
"""


def test_another_run_is_left_alone_while_it_lives_and_cleared_away_once_it_is_killed(tmp_path: Path) -> None:
    """Two runs never write to one folder; the leftover of a killed one is no obstacle and does not get in."""
    out = tmp_path / "out"
    line = [sys.executable, "-c", KILLED, str(out)]
    other = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdin is not None
    assert other.stdout is not None
    try:
        assert other.stdout.readline() == "ready\n"
        second = ResultFolder(out)
        with pytest.raises(UploadError, match="another run is writing to 'out'"):
            second.open("a" * 64)
        assert (tmp_path / "out.merging/new/model.safetensors").read_bytes() == b"half a shard"
    finally:
        other.send_signal(signal.SIGKILL)
        other.communicate()
    session = begin(ResultFolder(out), "b" * 64)
    assert os.listdir(session._work.new) == []
    session.finish(FILES, "")
    assert listing(out) == FILES


def test_a_folder_of_the_works_name_that_is_not_ours_is_kept(tmp_path: Path) -> None:
    """Only what carries our mark is cleared away."""
    a_model(tmp_path / "out.merging")
    session = ResultFolder(tmp_path / "out", force=True)
    with pytest.raises(UploadError, match=r"'out\.merging' .* something else is there"):
        session.open("a" * 64)
    assert (tmp_path / "out.merging/old.safetensors").exists()


def test_an_empty_folder_is_a_free_destination(tmp_path: Path) -> None:
    """A folder made beforehand by mkdir or mktemp can be filled."""
    (tmp_path / "out").mkdir()
    session = fill(begin(ResultFolder(tmp_path / "out")))
    session.finish(FILES, "")
    assert listing(tmp_path / "out") == {**FILES, "model.safetensors": b"tensors"}


def test_a_model_is_replaced_only_by_force_and_only_at_the_end(tmp_path: Path) -> None:
    """Without --force it is refused; with it the old model stands, whole, until the new one does."""
    out = a_model(tmp_path / "out")
    before = listing(out)
    with pytest.raises(UploadError) as refusal:
        ResultFolder(out).open("a" * 64)
    assert "--force" in hint(refusal.value)
    session = fill(begin(ResultFolder(out, force=True)))
    assert listing(out) == before
    session.finish(FILES, "")
    assert listing(out) == {**FILES, "model.safetensors": b"tensors"}
    assert os.listdir(tmp_path) == ["out"]


def test_force_replaces_models_only(tmp_path: Path) -> None:
    """A folder of anything else survives --force, and so does a file."""
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter1.tex").write_text("years of work")
    (tmp_path / "note").write_text("a file")
    for name, words in [("thesis", "holds something that is no model"), ("note", "is a file")]:
        with pytest.raises(UploadError, match=words):
            ResultFolder(tmp_path / name, force=True).open("a" * 64)
    assert listing(tmp_path).keys() == {"thesis/chapter1.tex", "note"}


@pytest.mark.parametrize("parent", ["out", "out/checkpoint-100", "link"])
def test_a_parent_is_never_replaced(parent: str, tmp_path: Path) -> None:
    """Not by force, not as a folder inside the destination, not by another name."""
    a_model(tmp_path / "out")
    a_model(tmp_path / "out/checkpoint-100")
    (tmp_path / "link").symlink_to(tmp_path / "out")
    before = listing(tmp_path)
    with pytest.raises(UploadError, match="is or holds one of the models that are merged"):
        ResultFolder(tmp_path / "out", True, [tmp_path / parent]).open("a" * 64)
    assert listing(tmp_path) == before


def test_a_link_is_followed_to_the_folder_it_means(tmp_path: Path) -> None:
    """The folder behind a link is replaced, and the link still leads there."""
    a_model(tmp_path / "disk/real")
    (tmp_path / "out").symlink_to(tmp_path / "disk/real")
    session = fill(begin(ResultFolder(tmp_path / "out", force=True)))
    session.finish(FILES, "")
    assert (tmp_path / "out").is_symlink()
    assert listing(tmp_path / "disk/real") == {**FILES, "model.safetensors": b"tensors"}


def test_a_destination_that_fills_up_in_the_meantime_is_not_overwritten(tmp_path: Path) -> None:
    """Whoever was first keeps what they wrote."""
    session = fill(begin(ResultFolder(tmp_path / "out")))
    a_model(tmp_path / "out")
    with pytest.raises(UploadError, match="exists and is not empty"):
        session.finish(FILES, "")
    session.leave()
    assert (tmp_path / "out/old.safetensors").exists()
    assert sorted(os.listdir(tmp_path)) == ["out", "out.merging"]  # the finished shard waits


@pytest.mark.parametrize("force", [True, False])
def test_a_run_killed_in_the_middle_of_a_replacement_loses_nothing(force: bool, tmp_path: Path) -> None:
    """The old model was moved aside and the new one had not come: the next run puts the old one back first."""
    out = a_model(tmp_path / "out")
    before = listing(out)
    killed = REPLACING.format(out=str(out))
    assert subprocess.run([sys.executable, "-c", killed], check=False).returncode == -signal.SIGKILL
    assert not out.exists()
    place = ResultFolder(out, force=force)
    if force:
        session = fill(begin(place))
        assert listing(out) == before
        session.finish(FILES, "")
        assert listing(out) == {**FILES, "model.safetensors": b"tensors"}
    else:
        with pytest.raises(UploadError, match="exists and is not empty"):
            place.open("a" * 64)
        assert listing(out) == before
    assert os.listdir(tmp_path) == ["out"]


def test_too_little_disk_is_told_in_numbers_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run is refused before it writes, and what it had made for itself is gone."""
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=999))
    session = begin(ResultFolder(tmp_path / "out"))
    with pytest.raises(BudgetError) as refusal:
        session.reserve(1000)
    session.leave()
    assert "needs 1.0 kB of disk, and 999 B are free" in hint(refusal.value)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["x" * 300, "file/out", "/", "/proc/out"])
def test_a_destination_that_cannot_be_is_a_refusal(name: str, tmp_path: Path) -> None:
    """Names too long, files in the way and folders closed to us end in a sentence and a next step."""
    (tmp_path / "file").write_text("a file")
    with pytest.raises(UploadError) as refusal:
        ResultFolder(tmp_path / name).open("a" * 64)
    assert hint(refusal.value)


def test_a_card_is_written_into_the_folder_and_through_no_link(tmp_path: Path) -> None:
    """Whoever made the folder may have laid some where we write: to a file, and to a folder elsewhere."""
    out = a_model(tmp_path / "out")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/mine").write_bytes(b"mine")
    (out / ".README.md.unfinished").symlink_to("../elsewhere/mine")
    (out / "README.md").symlink_to("../elsewhere/mine")
    ResultFolder(out).amend({"README.md": b"a card"}, "", located(out))
    assert (out / "README.md").read_bytes() == b"a card"
    (out / "pictures").symlink_to("../elsewhere")
    with pytest.raises(UploadError, match=r"pictures/a\.svg lies behind a link that leads out of it"):
        ResultFolder(out).amend({"pictures/a.svg": b"drawn"}, "", located(out))
    assert listing(tmp_path / "elsewhere") == {"mine": b"mine"}


def test_a_disk_that_fails_at_the_end_puts_the_old_model_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the new folder cannot take the name, the old one has it again."""
    out = a_model(tmp_path / "out")
    before = listing(out)
    session = fill(begin(ResultFolder(out, force=True)))
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name == "new":
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(BudgetError) as refusal:
        session.finish(FILES, "")
    assert "No space left on device" in hint(refusal.value)
    session.leave()
    assert listing(out) == before
    assert sorted(os.listdir(tmp_path)) == ["out", "out.merging"]  # the finished shard waits


# What the system refuses

USED_UP = ("ENOSPC", "EDQUOT", "EFBIG", "EMFILE", "ENFILE", "ENOMEM")
REFUSED = ("EACCES", "EPERM", "EROFS", "EIO", "ENAMETOOLONG", "ELOOP", "ENOTDIR", "ESTALE")


@pytest.mark.parametrize("name", [*USED_UP, *REFUSED])
def test_each_refusal_of_the_system_has_its_own_words(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is used up is told as that, with exit code 5, whether it is read or written; each with its own next step."""
    number = getattr(errno, name)

    def refuse(*arguments: object, **options: object) -> None:
        raise OSError(number, os.strerror(number))

    (tmp_path / "model").mkdir()
    (tmp_path / "model/x.safetensors").write_bytes(b"12345678")
    store = FolderStore()
    model = store.locate(str(tmp_path / "model"), None)
    session = begin(ResultFolder(tmp_path / "out"))
    monkeypatch.setattr(os, "preadv", refuse)
    monkeypatch.setattr(Path, "rename", refuse)
    reader = store.reader([Ticket(model, "x.safetensors", 0, 8)], 0)
    with pytest.raises(MergerError) as reading:
        reader.read(0, 0, memoryview(bytearray(8)))
    with pytest.raises(MergerError) as writing:
        session.finish({"config.json": b"{}"}, "")
    monkeypatch.undo()
    reader.close()
    session.leave()
    used_up = name in USED_UP
    assert (reading.value.exit_code, writing.value.exit_code) == ((5, 5) if used_up else (3, 6))
    (read,), (written,) = reading.value.problems, writing.value.problems
    assert os.strerror(number) in read.what
    assert os.strerror(number) in written.what
    assert read.hint == written.hint
    assert ("free some disk" in str(read.hint)) == (name == "ENOSPC")


def test_no_two_kinds_of_refusal_share_a_next_step() -> None:
    """But for the two names of missing rights."""
    hints = [machine._USED_UP.get(number) or machine._REFUSED[number]
             for number in (getattr(errno, name) for name in (*USED_UP, *REFUSED) if name != "EPERM")]  # fmt: skip
    assert len(set(hints)) == len(hints)


def test_more_files_are_read_than_a_process_may_open(tmp_path: Path) -> None:
    """As many models of many files have: a few dozen stay open, by several threads too, and none in the end."""
    folder, count = tmp_path / "model", 300
    folder.mkdir()
    for number in range(count):
        (folder / f"{number}.safetensors").write_bytes(number.to_bytes(8, "little"))
    store = FolderStore()
    model = store.locate(str(folder), None)
    reader = store.reader([Ticket(model, f"{number}.safetensors", 0, 8) for number in range(count)], 0)
    before = len(os.listdir("/proc/self/fd"))
    most: list[int] = []

    def read(number: int) -> int:
        out = bytearray(8)
        reader.read(number % count, 0, memoryview(out))
        most.append(len(os.listdir("/proc/self/fd")))
        return int.from_bytes(out, "little")

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(read, range(2 * count)))
    assert found == [*range(count), *range(count)]
    assert max(most) <= before + folder_module._OPEN_FILES + 4 + 4  # each thread's own file, and its look at the folder
    reader.close()
    assert len(os.listdir("/proc/self/fd")) == before
