"""Chat templates: where models keep them, how they are replaced, and what the built-in ones render to."""

from __future__ import annotations

import json
from typing import Any

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from merger.models.chat import built_in, template, with_template
from merger.recipe.blocks.tokenizer import CHAT_TEMPLATES

MESSAGES = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi"},
    {"role": "user", "content": "Bye"},
]
RENDERED = {
    "alpaca": "Be kind.\n\n### Instruction:\nHello\n\n"
    "### Response:\nHi</s>\n\n### Instruction:\nBye\n\n### Response:\n",
    "chatml": "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    "Hi<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n",
    "exaone": "[|system|]Be kind.[|endofturn|]\n[|user|]Hello\n"
    "[|assistant|]Hi[|endofturn|]\n[|user|]Bye\n[|assistant|]",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nHi<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s>[INST] Be kind.\n\nHello [/INST] Hi</s>[INST] Bye [/INST]",
}


def text(content: Any) -> bytes:
    return json.dumps(content).encode()


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_what_built_in_templates_render_to(name: str) -> None:
    """A system message, a question, an answer, a question, and the beginning of an answer, as each format has them."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    rendered = environment.from_string(built_in(name)).render(
        messages=MESSAGES, bos_token="<s>", eos_token="</s>", add_generation_prompt=True
    )
    assert rendered == RENDERED[name]


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({}, None),
        ({"chat_template.jinja": b"one", "tokenizer_config.json": text({"chat_template": "two"})}, "one"),
        ({"tokenizer_config.json": text({"chat_template": "two"})}, "two"),
        ({"chat_template.json": text({"chat_template": "three"}), "tokenizer_config.json": text({})}, "three"),
        ({"tokenizer_config.json": text({"chat_template": [{"name": "rag", "template": "no"},
                                                           {"name": "default", "template": "four"}]})}, "four"),
        ({"tokenizer_config.json": text({"chat_template": [{"name": "rag", "template": "no"}]})}, None),
        ({"tokenizer_config.json": b"{"}, None),
    ],
)  # fmt: skip
def test_where_a_model_keeps_its_template(files: dict[str, bytes], found: str | None) -> None:
    """In a file of its own, else in the processor's or the tokenizer's settings; of several the default one counts."""
    assert template(files) == found


def test_a_template_is_replaced_where_it_stood() -> None:
    """In every file that has one, other named ones and other settings stay; else in a file of its own."""
    named = [{"name": "rag", "template": "r"}, {"name": "default", "template": "old"}]
    files = {"tokenizer_config.json": text({"bos_token": "<s>", "chat_template": named}), "chat_template.jinja": b"old"}
    made = with_template(files, "new")
    assert made["chat_template.jinja"] == b"new"
    assert json.loads(made["tokenizer_config.json"]) == {
        "bos_token": "<s>",
        "chat_template": [{"name": "default", "template": "new"}, {"name": "rag", "template": "r"}],
    }
    assert with_template({"tokenizer_config.json": text({"chat_template": "old"})}, "new").keys() == {
        "tokenizer_config.json"
    }
    assert with_template({"tokenizer_config.json": text({})}, "new") == {"chat_template.jinja": b"new"}
