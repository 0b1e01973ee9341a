"""Recipes of org/a and org/b that name one more model, MODEL, at each place where the language lets them. No tests."""

from __future__ import annotations

BODY = "merge_method: linear\nmodels:\n  - model: org/a\n  - model: org/b\nparameters: {weight: 1}\n"
PLACES = {
    "base_model": BODY + "base_model: MODEL\n",
    "an adapter": BODY.replace("org/b", "org/b+MODEL"),
    "a slice's source": """\
slices:
  - sources: [{model: org/a, layer_range: [0, 1]}, {model: "MODEL", layer_range: [0, 1]}]
merge_method: slerp
base_model: org/a
parameters: {t: 0.5}
""",
    "tensors": BODY + "tensors: [{filter: norm, model: 'MODEL'}]\n",
    "tokenizer_source": BODY + "tokenizer_source: MODEL\n",
    "a token's source": BODY
    + "tokenizer: {source: org/a, tokens: {x: {source: {kind: model_token, model: 'MODEL', token: y}}}}\n",
    "an expert": "base_model: org/a\nexperts:\n  - {source_model: 'MODEL', positive_prompts: [a]}\n",
    "a shared expert": """\
base_model: org/a
experts: [{source_model: org/a, positive_prompts: [a]}]
shared_experts: [{source_model: 'MODEL'}]
""",
    "a fine-tune to extract": "extract_lora: {model: 'MODEL', base_model: org/a, rank: 4}\n",
    "a base to extract from": "extract_lora: {model: org/a, base_model: 'MODEL', rank: 4}\n",
    "adapters to merge": "merge_method: linear\nadapters: [{model: 'MODEL', parameters: {weight: 1}}]\n",
    "a stage": """\
name: first
merge_method: linear
parameters: {weight: 1}
models: [{model: 'MODEL'}]
---
merge_method: linear
parameters: {weight: 1}
models: [{model: first}, {model: org/b}]
""",
}
