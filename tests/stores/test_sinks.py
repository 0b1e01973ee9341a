"""What every way out of the line promises, one suite over all: a folder, and the Hub by LFS, by Xet and by a stream.

Xet is the real hf_xet, over its own storage in a folder; what lies there is read back by hf_xet too.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from itertools import count
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import patch

import pytest
from calls import WRITER
from loopback import Client, ClientError, LoopbackHub, Request

from merger.models.formats.safetensors import ShardWriter, WrittenShard, header
from merger.stores.folder import FolderStore
from merger.stores.ports import Copy, Published, Session

IDENTITY = "fedcba9876543210" * 4
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
FILES = {
    "README.md": b"---\nlicense: mit\n---\n# merged\n",
    "tokenizer.model": b"\0large enough" * 4000,
    "config.json": b"{}",
}
WAYS = ("folder", "lfs", "lfs beside xet", "xet", "stream")
"""By LFS with a client that has no Xet, and with one that has while the Hub has not."""
HUB_WAYS = WAYS[1:]
NAMES = count()


class Raw:
    """A tensor of bytes, as a shard's header names it."""

    dtype = "U8"

    def __init__(self, name: str) -> None:
        self.name, self.data = name, Random(name).randbytes(300_000)
        self.shape, self.nbytes = (len(self.data),), len(self.data)


@pytest.fixture(scope="module")
def client(served: LoopbackHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A child whose client has Xet and gives up at once."""
    home = tmp_path_factory.mktemp("home")
    quick = {"HF_HUB_DISABLE_XET": "0", "HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "0", "TMPDIR": str(home)}
    with Client({**served.env(home, WRITER), **quick}) as child:
        yield child


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    """One of the ways."""
    return str(request.param)


@pytest.fixture
def to(way: str, hub: LoopbackHub, tmp_path: Path) -> Iterator[str]:
    """A destination that no other test uses; a Hub with Xet or without, as the way needs it."""
    storage = tmp_path / "storage"
    storage.mkdir()
    hub.xet(storage if way in ("xet", "stream") else None)
    yield str(tmp_path / "out") if way == "folder" else f"org/sink-{next(NAMES)}"
    hub.xet(None)


# What the child runs


@contextmanager
def begun(way: str, to: str) -> Iterator[Session]:
    """A run's work on the way, left in the end as a run leaves it."""
    from huggingface_hub import constants

    from merger.stores.hub.staging import HubRepo
    from merger.stores.results import ResultFolder

    place = ResultFolder(Path(to)) if way == "folder" else HubRepo(to, stream=way == "stream")
    with patch.object(constants, "HF_HUB_DISABLE_XET", way == "lfs"), patch("time.sleep"):
        session = place.open(IDENTITY)
        assert not isinstance(session, Published)
        try:
            yield session
        finally:
            session.leave()


def made(session: Session, name: str) -> WrittenShard:
    """A shard of one tensor, written as the engine does, through a buffer that is used again."""
    tensor, buffer = Raw(name), bytearray(100_000)
    start = header([tensor])
    with ShardWriter(name, session.open(name), start, len(start) + tensor.nbytes) as writer:
        for start in range(0, tensor.nbytes, len(buffer)):
            buffer[:] = tensor.data[start : start + len(buffer)]
            writer.write(memoryview(buffer))
        return writer.close()


def take(way: str, to: str, names: tuple[str, ...], half: bool = False) -> list[dict[str, Any]]:
    """Take shards and leave, in the middle of another one if so wished."""
    with begun(way, to) as session:
        shards = []
        for name in names:
            shards.append(made(session, name))
            session.take(shards[-1])
        if half:
            session.open(SECOND).write(memoryview(b"half a shard" * 10_000))
    return [asdict(shard) for shard in shards]


def held(way: str, to: str) -> list[dict[str, Any]]:
    """What a run finds of an earlier one."""
    with begun(way, to) as session:
        return [asdict(shard) for shard in session.held().values()]


def finish(way: str, to: str) -> list[str]:
    """Make what is not held, publish, and say what is left in the temporary folder meanwhile."""
    with begun(way, to) as session:
        for name in (FIRST, SECOND):
            if name not in session.held():
                session.take(made(session, name))
        at_most = os.listdir(tempfile.gettempdir())
        with tempfile.TemporaryDirectory() as folder:
            session.finish({**FILES, **copied(Path(folder))}, "Merge of a, b")
        return at_most


def copied(folder: Path) -> dict[str, Copy]:
    """One of the small files as a model's file that is not held, which travels piece by piece."""
    content = FILES["tokenizer.model"]
    (folder / "tokenizer.model").write_bytes(content)
    model = FolderStore().locate(str(folder), None)
    return {"tokenizer.model": Copy(FolderStore(), model, "tokenizer.model", hashlib.sha256(content).hexdigest())}


def broken_folder(way: str, to: str) -> None:
    """The work folder is removed by somebody else before the shard is taken."""
    import shutil

    with begun(way, to) as session:
        shard = made(session, FIRST)
        shutil.rmtree(f"{to}.merging")
        session.take(shard)


def from_xet(storage: str, content: bytes) -> bytes:
    """What Xet's storage gives for these contents' hash."""
    import hf_xet
    from huggingface_hub.utils._xet import get_xet_session

    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        (hashed,) = hf_xet.hash_files([file.name])
    group = get_xet_session().new_download_stream_group(endpoint=f"local://{storage}")
    return b"".join(group.download_stream(hf_xet.XetFileInfo(hashed.hash, hashed.file_size)))


# Promises


def content_of(name: str) -> bytes:
    """The whole file that `made` makes."""
    from merger.models.formats.safetensors import header

    tensor = Raw(name)
    return header([tensor]) + tensor.data


def described(*names: str) -> list[dict[str, Any]]:
    contents = {name: content_of(name) for name in names}
    return [
        {"name": name, "size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()} for name, raw in contents.items()
    ]


def visible(way: str, to: str, hub: LoopbackHub) -> list[str]:
    """The files of a model that somebody who looks at the destination sees."""
    if way == "folder":
        return sorted(os.listdir(to)) if Path(to).exists() else []
    return sorted(set(hub.tree(to)) - {".gitattributes"})


def test_a_taken_shard_is_held_by_the_next_run(way: str, to: str, client: Client) -> None:
    """With the size and the SHA-256 of its bytes."""
    assert client(take, way, to, (FIRST, SECOND)) == described(FIRST, SECOND)
    assert client(held, way, to) == described(FIRST, SECOND)


def test_the_bytes_are_those_that_were_written(
    way: str, to: str, client: Client, hub: LoopbackHub, tmp_path: Path
) -> None:
    """Read back from where they lie: the disk, the Hub, or Xet's storage."""
    client(finish, way, to)
    for name in (FIRST, SECOND):
        if way == "folder":
            assert (Path(to) / name).read_bytes() == content_of(name)
        elif way.startswith("lfs"):
            assert hub.read(to, name) == content_of(name)
        else:
            assert client(from_xet, str(tmp_path / "storage"), content_of(name)) == content_of(name)
            entry = hub.tree(to)[name]
            assert [{"name": name, "size": entry.size, "sha256": entry.sha256}] == described(name)


def test_what_was_taken_is_kept_and_the_half_shard_is_not(way: str, to: str, client: Client) -> None:
    """A run that ends in the middle of the second shard leaves the first for the next one, which finishes."""
    client(take, way, to, (FIRST,), True)
    assert client(held, way, to) == described(FIRST)
    client(finish, way, to)


def test_nothing_is_visible_before_the_end(way: str, to: str, client: Client, hub: LoopbackHub) -> None:
    """And then all of it at once."""
    client(take, way, to, (FIRST, SECOND))
    assert visible(way, to, hub) == []
    client(finish, way, to)
    assert visible(way, to, hub) == sorted([FIRST, SECOND, *FILES])
    if way != "folder":
        assert [commit.title for commit in hub.commits(to)] == [f"Merge of a, b [{IDENTITY[:16]}]", "initial commit"]
        assert list(hub.branches(to)) == ["main"]


def to_staging(request: Request) -> bool:
    return request.method == "POST" and "/commit/merge-staging" in request.path


def to_storage(request: Request) -> bool:
    return request.method == "PUT" or request.path.endswith("/objects/batch")


def test_a_failing_upload_is_a_sentence(way: str, to: str, client: Client, hub: LoopbackHub) -> None:
    """Where the bytes go, and where the commit goes: an UploadError each time, and nothing on main."""
    if way == "folder":
        with pytest.raises(ClientError, match="cannot write to the destination") as refusal:
            client(broken_folder, way, to)
        assert "UploadError" in refusal.value.kinds
        return
    tokens = count()  # by the first the Hub says that it has Xet
    places = [to_staging]
    places += [to_storage] if way.startswith("lfs") else [lambda r: "xet-write" in r.path and next(tokens) > 0]
    for place in places:
        fault = hub.fail(place, status=403, times=100)
        with pytest.raises(ClientError) as refusal:
            client(take, way, to, (FIRST,))
        assert "UploadError" in refusal.value.kinds, refusal.value
        assert fault.left < 100
        assert WRITER not in str(refusal.value)
        hub.clear_faults()
    assert visible(way, to, hub) == []
    client(finish, way, to)


@pytest.mark.parametrize("way", HUB_WAYS, indirect=True)
def test_each_way_is_the_one_that_was_taken(way: str, to: str, client: Client, hub: LoopbackHub) -> None:
    """The log shows how the bytes went; only a stream puts no file on this disk."""
    on_disk = client(finish, way, to)
    puts = [request for request in hub.log if request.method == "PUT"]
    tokens = [request for request in hub.log if "/xet-write-token/" in request.path]
    assert len(puts) == (3 if way.startswith("lfs") else 0)
    assert [request.status for request in tokens] == (
        [] if way == "lfs" else [404] if way == "lfs beside xet" else [200] * len(tokens)
    )
    assert len(tokens) >= {"xet": 3, "stream": 3}.get(way, 0)
    assert bool([name for name in on_disk if name.startswith("merger-")]) == (way != "stream")


# A stream


def as_the_client_does(to: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The client's own description of a file that it uploaded, and ours of one that we streamed."""
    from huggingface_hub import CommitOperationAdd, HfApi

    with begun("stream", to) as session:
        way = session._uploads.sending  # type: ignore[attr-defined]
        ours = way.shard(made(session, FIRST))
        theirs = CommitOperationAdd(FIRST, content_of(FIRST))
        HfApi().preupload_lfs_files(to, [theirs])
        way.committed(FIRST)
    names = {*vars(theirs), *(field.name for field in fields(theirs))} - {"upload_info"}
    return [({name: getattr(one, name) for name in names}, vars(one.upload_info)) for one in (theirs, ours)]


@pytest.mark.parametrize("way", ["stream"], indirect=True)
def test_a_streamed_shard_is_described_as_the_client_describes_its_own(to: str, client: Client) -> None:
    """Attribute by attribute, private ones included: a client that changes them fails here, not in a user's run."""
    theirs, ours = client(as_the_client_does, to)
    assert ours == theirs
    assert theirs[0]["_is_uploaded"] is True


def without(name: str, to: str) -> None:
    """A client whose additions lack an attribute that we set."""
    from merger.stores.hub import client

    with patch.object(client, "_SET_BY_US", frozenset({name})), begun("stream", to):
        pass


def switched_off(to: str) -> None:
    from huggingface_hub import constants

    from merger.stores.hub.staging import HubRepo

    with patch.object(constants, "HF_HUB_DISABLE_XET", True):
        HubRepo(to, stream=True).open(IDENTITY)


def refusal_of(client: Client, *call: Any) -> str:
    with pytest.raises(ClientError) as refusal:
        client(*call)
    assert "UploadError" in refusal.value.kinds
    return str(refusal.value)


@pytest.mark.parametrize("way", ["stream"], indirect=True)
def test_a_stream_that_this_machine_cannot_make_is_refused_before_anything_is_asked(
    to: str, client: Client, hub: LoopbackHub
) -> None:
    """Xet is switched off, or the client has changed."""
    assert "--stream cannot be kept: Xet is switched off" in refusal_of(client, switched_off, to)
    assert "knows nothing of _is_elsewhere\n    leave out --stream" in refusal_of(client, without, "_is_elsewhere", to)
    assert not hub.exists(to)


@pytest.mark.parametrize("way", ["stream"], indirect=True)
def test_a_stream_to_a_hub_without_xet_is_refused_before_a_tensor_is_made(
    to: str, client: Client, hub: LoopbackHub
) -> None:
    """The repo is made, for only then can the Hub be asked; no branch is."""
    hub.xet(None)
    said = refusal_of(client, take, "stream", to, ())
    assert "--stream cannot be kept: this Hub has no Xet storage\n    leave out --stream" in said
    assert list(hub.branches(to)) == ["main"]
