"""What we take of huggingface_hub and hf_xet undocumented still is what we rely on, and no other room takes any."""

from __future__ import annotations

import ast
import inspect
import tomllib
from collections.abc import Callable
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from unittest.mock import patch

import hf_xet  # type: ignore[import-untyped]
import pytest
from huggingface_hub import CommitOperationAdd, HfApi, _commit_api, lfs
from huggingface_hub.utils._http import default_client_factory
from places import ROOT

from merger.models.formats.safetensors import WrittenShard
from merger.stores.hub import client

SHARD = WrittenShard("a", 5, "01" * 32)
NOWHERE = "http://127.0.0.1:9"


def client_of_its_own() -> bool:
    with default_client_factory() as made:
        return made.follow_redirects and len(made.event_hooks["request"]) == 1


def what_it_says() -> bool:
    """All that we look for in its words, it says in words of its own."""
    asked = client.MALFORMED.pattern.replace("Invalid (server response|etag)", "Invalid server response|Invalid etag")
    return all(words in inspect.getsource(lfs) for words in asked.split("|"))


def error_of_an_upload() -> bool:
    """An action without its two fields is no answer of the Hub's."""
    with pytest.raises(RuntimeError) as failed:
        _commit_api._upload_lfs_files(
            actions=[{"oid": "a", "actions": {}}], oid2addop={"a": client.describe(SHARD, b"", b"")}, headers={}
        )
    return isinstance(failed.value.__cause__, ValueError)


def open_files() -> bool:
    """Not by Xet, which would start a session."""
    file = client.describe(SHARD, b"", BytesIO(b"12345"))  # type: ignore[arg-type]
    with (
        patch.object(_commit_api, "is_xet_available", lambda: True),
        patch.object(_commit_api, "post_lfs_batch_info", return_value=([], [], None)) as asked,
        patch.object(_commit_api.logger, "warning") as advice,
    ):
        _commit_api._upload_files(additions=[file], repo_type="model", repo_id="a/b", headers={})
    return asked.call_count == 1 and client._ADVICE in advice.call_args.args[0]


def checksum() -> bool:
    info = client.describe(SHARD, b"by", b"").upload_info
    return (info.size, info.sample, info.sha256.hex(), info.is_hashed) == (5, b"by", SHARD.sha256, True)


def sent_already() -> bool:
    """Fresh ones are not; the client asks nobody about what is: there is nobody."""
    fresh = CommitOperationAdd("a", b"")
    api = HfApi(endpoint=NOWHERE, token="hf_none")
    api.preupload_lfs_files("a/b", [client.describe_sent(SHARD, b"")])
    ((payload),) = [
        item
        for item in _commit_api._prepare_commit_payload([client.describe_sent(SHARD, b"")], {}, "", "")
        if item["key"] != "header"
    ]
    unset = (fresh._upload_mode, fresh._should_ignore, fresh._is_uploaded) == (None, None, False)
    return unset and payload["key"] == "lfsFile" and payload["value"]["oid"] == SHARD.sha256


def takes(name: str, *wanted: str) -> Callable[[], bool]:
    """Whether a function of hf_xet takes such arguments."""
    kind, _, method = name.partition(".")
    return lambda: {*wanted} <= inspect.signature(getattr(getattr(hf_xet, kind), method)).parameters.keys()


def has(kind: str, *names: str) -> Callable[[], bool]:
    """Whether what hf_xet gives has such attributes."""
    return lambda: {*names} <= {*dir(getattr(hf_xet, kind))}


def uploads_at_once() -> bool:
    with patch.dict("os.environ", HF_XET_CLIENT_AC_MAX_UPLOAD_CONCURRENCY="3"):
        return hf_xet.XetConfig().get("client.ac_max_upload_concurrency") == 3


READ = "read what it calls for now in its place, and mend stores/hub/client.py"
STREAM = f"{READ}; if nothing does it, refuse --stream (uploads.refuse_no_streams)"
HELD: dict[str, tuple[Callable[[], bool], str]] = {
    "utils._http.default_client_factory": (client_of_its_own, "make a Client with the hooks of get_session()"),
    "the words of its ValueErrors": (what_it_says, "write its words into MALFORMED: such answers are asked for again"),
    "RuntimeError around an upload's error": (error_of_an_upload, "mend cause(): addresses expire, and are asked anew"),
    "open files go by LFS, with advice": (open_files, "find another way to keep a client with Xet from a Hub without"),
    "CommitOperationAdd.upload_info": (checksum, f"{READ}, or leave it out: each shard is then read once more"),
    "CommitOperationAdd._upload_mode, _should_ignore, _is_uploaded": (sent_already, STREAM),
    "XetSession.new_upload_commit": (
        takes("XetSession.new_upload_commit", "token_refresh_url", "token_refresh_headers", "custom_headers"), STREAM),
    "XetUploadCommit.start_upload_stream": (takes("XetUploadCommit.start_upload_stream", "name"), STREAM),
    "XetUploadCommit": (has("XetUploadCommit", "wait_to_finish", "abort"), STREAM),
    "XetStreamUpload": (has("XetStreamUpload", "write", "finish", "abort"), STREAM),
    "XetFileMetadata": (has("XetFileMetadata", "xet_info"), STREAM),
    "XetFileInfo": (has("XetFileInfo", "file_size", "sha256"), STREAM),
    "HF_XET_CLIENT_AC_MAX_UPLOAD_CONCURRENCY": (uploads_at_once, f"{READ}: or the memory of --max-memory is not kept"),
}  # fmt: skip


@pytest.mark.parametrize("name", HELD)
def test_what_is_not_documented_still_is_what_we_rely_on(name: str) -> None:
    """That a stream is described as the client describes its own, and arrives, tests/stores/test_sinks.py holds."""
    holds, instead = HELD[name]
    assert holds(), f"{name} of huggingface_hub {version('huggingface_hub')} has changed: {instead}"


def reaches_in(path: Path) -> bool:
    """Whether a room imports a name with an underscore of the client, or anything of hf_xet."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        module = f"{getattr(node, 'module', None) or ''}."
        for parts in (f"{module}{name}".strip(".").split(".") for name in names):
            if parts[0] == "hf_xet" or (parts[0] == "huggingface_hub" and any(part[0] == "_" for part in parts)):
                return True
        if isinstance(node, ast.Attribute) and node.attr in client._SET_BY_US and node.attr.startswith("_"):
            return True
        if isinstance(node, ast.Constant) and str(node.value).startswith("huggingface_hub."):
            return True
    return False


def test_one_room_reaches_into_the_client() -> None:
    """All others keep to what is documented."""
    rooms = [path for top in ("merger", "space") for path in (ROOT / top).rglob("*.py") if reaches_in(path)]
    assert [path.relative_to(ROOT).as_posix() for path in rooms] == ["merger/stores/hub/client.py"]


@pytest.mark.parametrize("name", ["huggingface_hub", "hf-xet"])
def test_the_series_that_is_asked_for_is_the_one_that_this_ran_with(name: str) -> None:
    """Widen it in pyproject.toml together with constraints.txt, once this file is green with the newer one."""
    major, minor, *_ = map(int, version(name).split("."))
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["dependencies"]
    (range_,) = [each.partition(";")[0].removeprefix(name) for each in asked if each.startswith(name)]
    assert range_ == f">={major}.{minor},<{major}.{minor + 1}"
