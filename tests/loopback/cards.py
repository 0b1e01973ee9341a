"""What the Hub reads out of a repo's files: the card's metadata and its faults, tags, parameter counts.

Not the Hub's full validator: only the keys that a model card of ours carries are checked. PyYAML (which huggingface_hub
itself requires) is the one thing here from outside the standard library.
"""

import json
import re
import struct
from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

import yaml

RELATIONS = ("adapter", "merge", "quantized", "finetune")
_LICENCES = """
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0
lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl
openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license
fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 grok2-community gemma unknown
other
"""
LICENCES = tuple(_LICENCES.split())
"""What the Hub takes for `license`, as it said itself in May 2026 (issue 4218 of huggingface_hub)."""
_ID = r"[\w-][\w.-]*(/[\w.-]+)?"
PATTERNS = {"language": r"[a-z]{2,3}(-[A-Za-z0-9]+)*|code|multilingual", "base_model": _ID, "datasets": _ID,
            "pipeline_tag": r"[a-z0-9-]+", "library_name": r"[a-z0-9._-]+"}  # fmt: skip
FRONT_MATTER = re.compile(r"^\s*---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)
# key -> may it be one string, may it be a list of strings
KINDS = {
    "base_model": (True, True), "base_model_relation": (True, False), "datasets": (True, True),
    "language": (True, True), "library_name": (True, False), "license": (True, True), "license_link": (True, False),
    "license_name": (True, False), "pipeline_tag": (True, False), "tags": (False, True),
}  # fmt: skip


def front_matter(text: str) -> Any:
    """The YAML between the dashes, parsed; None when there is none. Raises yaml.YAMLError."""
    found = FRONT_MATTER.match(text)
    return yaml.safe_load(found.group(1)) if found else None


def card_data(text: str) -> dict[str, Any]:
    """The metadata, or nothing when it is faulty: a card in a repo does not break its listing."""
    try:
        data = front_matter(text)
    except yaml.YAMLError:
        return {}
    return data if isinstance(data, dict) else {}


def problems(text: str) -> tuple[list[str], list[str]]:
    """Errors and warnings about a card, in the Hub's words where we know them."""
    try:
        data = front_matter(text)
    except yaml.YAMLError as error:
        return [f"bad YAML in metadata: {str(error).splitlines()[0]}"], []
    if data is None:
        return [], ["empty or missing yaml metadata in repo card"]
    if not isinstance(data, dict):
        return ["metadata must be a mapping"], []
    return [fault for key, kind in KINDS.items() if key in data for fault in _faults(key, data[key], *kind)], []


def _faults(key: str, value: Any, one: bool, many: bool) -> list[str]:
    if isinstance(value, list) and many:
        named = [(f'"{key}[{i}]"', item) for i, item in enumerate(value)]
        return [fault for name, item in named for fault in _fault(name, key, item)]
    if not (isinstance(value, str) and one):
        return [f'"{key}" must be {"a string" if one else "an array"}']
    return _fault(f'"{key}"', key, value)


def _fault(name: str, key: str, value: Any) -> list[str]:
    if not isinstance(value, str):
        return [f"{name} must be a string"]
    if key == "license" and value not in LICENCES:
        return [f"{name} must be one of [{', '.join(LICENCES)}, array]"]
    if key in PATTERNS and not re.fullmatch(PATTERNS[key], value):
        return [f"{name} with value {value!r} is not valid"]
    if key == "base_model_relation" and value not in RELATIONS:
        return [f"{name} must be one of [{', '.join(RELATIONS)}]"]
    return []


def base_models(data: dict[str, Any]) -> dict[str, Any] | None:
    """The Hub's answer for `expand=baseModels`; two or more models are taken for a merge."""
    ids = _many(data.get("base_model"))
    if not ids:
        return None
    relation = data.get("base_model_relation") or ("merge" if len(ids) > 1 else "finetune")
    return {"relation": relation, "models": [{"_id": name, "id": name} for name in ids]}


def tags(data: dict[str, Any]) -> list[str]:
    """The repo's tags: those of the card and those the Hub makes from its other keys."""
    found = [str(data["library_name"])] if "library_name" in data else []
    found += _many(data.get("tags")) + _many(data.get("language"))
    found += [f"license:{name}" for name in _many(data.get("license"))]
    if bases := base_models(data):
        for model in bases["models"]:
            found += [f"base_model:{model['id']}", f"base_model:{bases['relation']}:{model['id']}"]
    return found


def parameters(paths: list[Path]) -> dict[str, Any] | None:
    """How many numbers of each dtype these safetensors files hold; None where one cannot be read so."""
    counts: Counter[str] = Counter()
    try:
        for path in paths:
            for name, tensor in _header(path).items():
                if name != "__metadata__":
                    counts[tensor["dtype"]] += prod(tensor["shape"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error):
        return None
    return {"parameters": dict(counts), "total": sum(counts.values())} if paths else None


def _header(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header: dict[str, Any] = json.loads(file.read(min(length, 25_000_000)))
    return header


def _many(value: Any) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list) else [str(value)] if value else []
