"""What a file beside a model is to those who load it, by its name: weights, code, a tokenizer; or nothing to them.

A table that grows. A name that it does not know is taken for something that a loader reads. Not here: which files a
merge takes over (sidefiles), and which of them are whose (published).
"""

from __future__ import annotations

import re

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


def kind(name: str) -> str:
    """What a loader may take the file for; empty where none reads it.

    >>> kind("pytorch_model.bin"), kind("custom_generate/a/generate.py"), kind("eval/plot.png")
    ('weights', 'code', '')
    """
    small = name.lower()
    return next((kind for kind, pattern in _KINDS.items() if pattern.search(small)), UNKNOWN)
