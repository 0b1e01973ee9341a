"""The small files beside the tensors that a model needs to be used: tokenizer, chat template, processor, generation;
the rest of its pipeline, its code, and its licence. What else lies there is left out, each file with its reason; and
what a loader may take a file for, by its name.

Not here: config.json, which is edited (config), and the card, which is written anew (card).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from merger.models.checkpoint import SUFFIX, is_weights
from merger.models.licence import LICENCES, is_notice, licence_files

# ---- what a loader takes a file for ---------------------------------------------------------------------------------


ADAPTER, WEIGHTS, CODE = "an adapter, which transformers loads on top by itself", "weights", "code"
TOKENIZER, TEMPLATE, CONFIG, UNKNOWN = "of a tokenizer", "a template", "a config", "of a kind that is not known"

_READ = {
    ADAPTER: r"(^|/) adapter_[^/]*$",
    WEIGHTS: r"""\.( safetensors | bin | pt[12ehl]? | pth | ckpt | h5 | hdf5 | keras | msgpack | gguf | ggml | onnx
        | onnx_data | ort | npz | npy | pkl | pickle | joblib | dill | pdparams | pdmodel | nemo | tflite | mlmodel
        | mar | engine | plan | distcp | safetensors\.index\.json | bin\.index\.json )$""",
    CODE: r"""\.( py[cdiow]? | so(\.[\d.]+)? | dll | dylib | sh | bash | bat | ps1 | js | mjs | ts | wasm | ipynb | exe
        | c | cc | cpp | cu | h | jar | lua | rb | pl | php | rs | go )$
        | (^|/) custom_generate/ | (^|/) (requirements|constraints)[^/]*\.txt$""",
    TOKENIZER: r"""(^|/) (tokenizer | tokenization | vocab | merges | special_tokens | added_tokens | spiece
        | sentencepiece | source\.spm | target\.spm | tekken | bpe | dict\. ) [^/]*$
        | \.( model(\.v\d+)? | tiktoken | spm | bpe | vocab )$""",
    TEMPLATE: r"""\.( jinja2? | j2 | tmpl | tpl )$ | (^|/) (chat_template | additional_chat_templates/)
        | (^|/) system_prompt\.txt$""",
}
_HARMLESS = r"""\.( md | markdown | mdx | rst | txt | pdf | tex | bib | html? | css | log | csv | tsv | png | jpe?g
        | gif | webp | svg | avif | bmp | ico | tiff? | mp3 | wav | flac | ogg | mp4 | webm | mov )$
    | (^|/) (licen[sc]e | copying | notice | authors | citation | changelog | readme | use_policy) [^/.]*$
    | (^|/) \.(gitattributes | gitignore | gitkeep | ds_store)$ | (^|/) events\.out\.tfevents\.
    | ^ (merge | recipe | mergekit_config) (\.lock)? \.ya?ml$"""
_CONFIG = r"\.( jsonl? | ya?ml | toml | ini | cfg | conf | xml )$"

_KINDS = {kind: re.compile(pattern, re.VERBOSE) for kind, pattern in {**_READ, "": _HARMLESS, CONFIG: _CONFIG}.items()}


def loaded_as(name: str) -> str:
    """What a loader may take the file for; empty where none reads it.

    >>> kind("pytorch_model.bin"), kind("custom_generate/a/generate.py"), kind("eval/plot.png")
    ('weights', 'code', '')
    """
    small = name.lower()
    return next((kind for kind, pattern in _KINDS.items() if pattern.search(small)), UNKNOWN)


# ---- which files come along -----------------------------------------------------------------------------------------


_SIDE_FILE = re.compile(
    r"""^( tokenizer(_config)?\.json | tokenizer\.model(\.v\d+)? | [^/]*\.tiktoken | tekken\.json
        | vocab\.(json|txt) | merges\.txt | special_tokens_map\.json | added_tokens\.json
        | spiece\.model | source\.spm | target\.spm | sentencepiece\.bpe\.model
        | chat_template\.(jinja|json) | additional_chat_templates/[^/]+\.jinja
        | generation_config\.json | (image_|video_|audio_)?(pre)?processor(_config)?\.json
        | feature_extractor_config\.json
    )$""",
    re.VERBOSE,
)
_OF_A_TOKENIZER = re.compile(
    r"(^|/)(tokenizer|vocab|merges|special_tokens_map|added_tokens|spiece|source|target|sentencepiece|tekken|chat_template)"
    r"|\.tiktoken$|^additional_chat_templates/"
)
CARD_NAME = "README.md"
"""What a model says of itself to people."""

LOCK_NAME = "merger.lock.yaml"
"""What a merge was made of, beside its result."""

MEASURED_NAME = "merger.measured.json"
"""How parents and result lie to each other, as it was measured on the way: what a card is rendered from again."""

EVALUATED_NAME = "merger.evaluation.json"
"""What was measured of a result's use, beside it."""

HUB_SCORES_NAME = ".eval_results/merger.yaml"
"""Those of them that the Hub shows on the model's page and on leaderboards, in its own form."""

SEARCHED_NAME, TRIALS_NAME = "merger.search.json", "merger.search.csv"
"""What a search has found, and each of its trials."""

PICTURES = "pictures/"
"""The folder beside a card that holds its pictures."""

MODULES = "modules.json"
"""Of sentence-transformers: what comes after the model, each step in a folder such as ``1_Pooling``."""

PIPELINE_CONFIG = "config_sentence_transformers.json"
"""Which of its classes loads it."""

EMBEDDERS = ("SentenceTransformer", "SparseEncoder", "CrossEncoder", "MultiVectorEncoder")
"""Those classes; where the file says nothing, it is the first."""

COLBERT = "ColBERT"
"""PyLate's."""

_MODULE = r"(\w+_)?\d+_[A-Za-z]\w*"
_PIPELINE = re.compile(
    rf"{re.escape(MODULES)} | {re.escape(PIPELINE_CONFIG)} | sentence_\w+_config\.json | router_config\.json"
    rf"| {_MODULE}/[^/]+\.(json|txt|model)",
    re.VERBOSE,
)
_SHARD = r"(-\d{5}-of-\d{5})?"
_STEP = re.compile(rf"({_MODULE}/)(model{_SHARD}\.safetensors|pytorch_model{_SHARD}\.bin)")
_PROMPT = re.compile(r"system_prompt\.txt", re.IGNORECASE)
_CODE = re.compile(r"[^/]+\.py")


def side_files(files: Collection[str], config: Mapping[str, Any]) -> tuple[str, ...]:
    """Those of a model's files that its merge takes over; code files only where the config refers to some."""
    folders = code_folders(config)
    wanted = [name for name in files if _SIDE_FILE.match(name) or _PROMPT.fullmatch(name) or _is_code(name, folders)]
    wanted += [*pipeline(files), *(name for name in licence_files(files) if not is_notice(name))]
    return tuple(sorted(set(wanted)))


def pipeline(files: Collection[str]) -> tuple[str, ...]:
    """Those that say what sentence-transformers does after the model or in its place, without the tensors for that."""
    found = sorted(name for name in files if _PIPELINE.fullmatch(name) and not is_weights(name))
    return tuple(found) if MODULES in files else ()


def steps_with_tensors(files: Collection[str], pickles: bool = False) -> tuple[str, ...]:
    """The folders of such a pipeline in which tensors lie, as ``2_Dense/``: they are merged.

    Args:
        pickles: those, too, in which torch.save wrote them.
    """
    found = filter(None, map(_STEP.fullmatch, files)) if MODULES in files else ()
    return tuple(sorted({step[1] for step in found if pickles or step[0].endswith(SUFFIX)}))


def is_modular(files: Collection[str], pickles: bool = False) -> bool:
    """Whether all tensors of a model are in such folders, and it has no config of its own either."""
    return bool(steps_with_tensors(files, pickles)) and not any("/" not in name and is_weights(name) for name in files)


def module_of(tensor: str) -> str:
    """The folder in which a tensor lies, which its name then begins with; empty: beside config.json.

    >>> module_of("2_Dense/linear.weight"), module_of("encoder.layer.0.output.dense.weight")
    ('2_Dense', '')
    """
    folder, slash, _ = tensor.partition("/")
    return folder if slash and re.fullmatch(_MODULE, folder) else ""


def code_folders(config: Mapping[str, Any]) -> frozenset[str]:
    """The folders, "" the model's own, with the code that a config refers to; of other repos' code none.

    >>> sorted(code_folders({"auto_map": {"AutoModel": "code/modeling.Tiny", "AutoConfig": "org/other--config.Tiny"}}))
    ['', 'code']
    """
    named = config.get("auto_map")
    if named is None:
        return frozenset()
    values = named.values() if isinstance(named, Mapping) else ()
    texts = [each for value in values for each in (value if isinstance(value, list) else [value])]
    paths = [text for text in texts if isinstance(text, str) and "--" not in text]
    return frozenset(["", *(path.rpartition("/")[0] for path in paths)])


def _is_code(name: str, folders: Collection[str]) -> bool:
    folder, _, file = name.rpartition("/")
    return folder in folders and _CODE.fullmatch(file) is not None


def since_later(name: str, format: int) -> bool:
    """Whether it is taken over, though versions of a lock's format passed over it, so that the lock lacks it."""
    return format < 2 and (
        _PIPELINE.fullmatch(name) is not None
        or _PROMPT.fullmatch(name) is not None
        or ("/" in name and name.endswith(".py"))
    )


# ---- what is left out -----------------------------------------------------------------------------------------------

_WRITTEN = re.compile(
    rf"config\.json | {re.escape(CARD_NAME)} | {re.escape(LOCK_NAME)} | recipe\.yaml | {re.escape(MEASURED_NAME)}"
    rf"| {re.escape(EVALUATED_NAME)} | merger\.search\.(json|csv)"
    rf"| mergekit_config\.ya?ml | {PICTURES}.* | {LICENCES}.* | (.*/)?\.[^/]+(/.*)?",
    re.VERBOSE,
)
_WHY = {
    ADAPTER: "an adapter lies beside the model, and is merged only where the recipe names it",
    CODE: "code that its config.json does not name",
    TOKENIZER: "no part of the tokenizer that the result has",
    TEMPLATE: "no part of the tokenizer that the result has",
    "": "about that model itself",
}


def left_beside(files: Collection[str], taken: Collection[str]) -> dict[str, str]:
    """The reasons why a result lacks files that lie beside its base's tensors; weights of other formats are none.

    Args:
        taken: those that the result has, whoever they are from.
    """
    passed = {*taken, *licence_files(files)}
    rest = [name for name in sorted(files) if name not in passed and not _WRITTEN.fullmatch(name)]
    return {name: why for name in rest if (why := _why(name, files))}


def _why(name: str, files: Collection[str]) -> str | None:
    what, folder = loaded_as(name), name.rpartition("/")[0]
    if what == WEIGHTS:
        is_step = MODULES in files and re.fullmatch(_MODULE, folder) is not None and not name.endswith(".json")
        is_step = is_step and not any(of.startswith(f"{folder}/") and of.endswith(SUFFIX) for of in files)
        return "a pickle, which is read with --allow-pickle only: the pipeline lacks its weights" if is_step else None
    if name == "params.json" or (
        folder and any(loaded_as(of) == WEIGHTS for of in files if of.startswith(f"{folder}/"))
    ):
        return "goes with weights that the result does not have"
    return _WHY.get(what, "not known to be read by what loads the result")


def read_beside(files: Collection[str], config: Mapping[str, Any]) -> tuple[str, ...]:
    """Those of a model's files beside tensors and config that its merge takes over, or reads for what it publishes."""
    return tuple(dict.fromkeys([*side_files(files, config), *licence_files(files), *({CARD_NAME} & set(files))]))


def tokenizer_files(files: Collection[str]) -> tuple[str, ...]:
    """Those of a model's side files that make up its tokenizer and its chat template."""
    return tuple(name for name in side_files(files, {}) if _OF_A_TOKENIZER.search(name))
