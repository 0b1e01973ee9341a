"""`python -m space.publish owner/name`: put the Space on the Hub, and the small models of its first recipes beside it.

One commit for the Space, one for each model; what is there already is brought up to date, and nothing else is touched.
The token is the one that the Hub's client finds (HF_TOKEN, or `hf auth login`). Not here: hardware, storage, secrets.
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

from merger.safety.names import is_repo
from space.page.texts import ZOO, zoo_repo

_ROOT = Path(__file__).resolve().parents[1]
_AT_THE_TOP = {
    "README.md": "space/README.md",
    "requirements.txt": "space/requirements.txt",
    "app.py": "space/__main__.py",
    "LICENSE": "LICENSE",
}
_WHOLE = ("merger/**/*", "space/**/*", "templates/**/*", "examples/recipes/*", "examples/workflow*.yml")
_NOT = ("__pycache__", ".pyc")
_HUBS_OWN = ".gitattributes"


def main(arguments: list[str]) -> int:
    """Publish; the exit code is 2 where the name is none."""
    if len(arguments) != 1 or not is_repo(arguments[0]):
        print("usage: python -m space.publish owner/name", file=sys.stderr)
        return 2
    api, repo = HfApi(), arguments[0]
    for name in ZOO:
        _upload(api, zoo_repo(repo.split("/")[0], name), "model", _folder(_ROOT / "examples" / "zoo" / name))
    _upload(api, repo, "space", dict(_space()))
    return 0


def _space() -> Iterator[tuple[str, Path | bytes]]:
    for place, source in _AT_THE_TOP.items():
        yield place, _ROOT / source
    for pattern in _WHOLE:
        for path in sorted(_ROOT.glob(pattern)):
            if path.is_file() and not any(part in str(path) for part in _NOT):
                yield path.relative_to(_ROOT).as_posix(), path
    about = tomllib.loads((_ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    name, version = about["name"], about["version"]
    urls = "".join(f"Project-URL: {label}, {url}\n" for label, url in about["urls"].items())
    # The package is not installed there, and cards and lock files tell its version and where it is had from.
    place = f"{name.replace('-', '_')}-{version}.dist-info/METADATA"
    yield place, f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{urls}".encode()


def _folder(folder: Path) -> Mapping[str, Path | bytes]:
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.iterdir()) if path.is_file()}


def _upload(api: HfApi, repo: str, kind: str, files: Mapping[str, Path | bytes]) -> None:
    """One commit after which the repo holds these files and no others."""
    api.create_repo(repo, repo_type=kind, space_sdk="gradio" if kind == "space" else None, exist_ok=True)
    old = set(api.list_repo_files(repo, repo_type=kind)) - {*files, _HUBS_OWN}
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        *(CommitOperationAdd(place, content) for place, content in files.items()),
        *(CommitOperationDelete(place) for place in sorted(old)),
    ]
    made = api.create_commit(repo, list(operations), repo_type=kind, commit_message="Publish Merger")
    print(f"{kind} {repo}: {made.commit_url}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
