"""What recipes say of tokens: the tokenizer block, tokenizer_source and chat_template."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from merger.errors import Span
from merger.methods.registry import methods
from merger.recipe.model import ChatTemplate, ModelRef, Recipe, Tokenizer, TokenOf, TokenRow
from merger.recipe.parse import parse

from .conftest import HERE

Read = Callable[[str], Recipe]
ONE = "merge_method: linear\nmodels: [{model: org/a, parameters: {weight: 1}}]\n"


def test_every_key_of_the_block(read: Read) -> None:
    """Tokens keep their order; a token's row comes from a model, a model's other token, zeros, or wherever it is."""
    recipe = read(
        ONE + "tokenizer:\n"
        "  source: org/b@v2\n"
        "  tokens:\n"
        "    <a>: {source: org/c}\n"
        "    <b>: {source: {kind: model_token, model: org/d, token: <s>}, force: true}\n"
        "    <c>: {source: {kind: model_token, model: org/d, token_id: 7}}\n"
        "    <d>: {source: {kind: zero}}\n"
        "    <e>:\n"
        "  pad_to_multiple_of: 64\n"
        "  missing: omp\n"
        "  k: 8\n"
    )
    source, other = ModelRef("org/c"), ModelRef("org/d")
    assert recipe.tokenizer == Tokenizer(
        ModelRef("org/b", "v2"),
        (
            TokenRow("<a>", TokenOf(source)),
            TokenRow("<b>", TokenOf(other, token="<s>"), force=True),
            TokenRow("<c>", TokenOf(other, id=7)),
            TokenRow("<d>", "zero"),
            TokenRow("<e>"),
        ),
        pad_to_multiple_of=64,
        missing="omp",
        k=8,
    )
    assert recipe.tokenizer.tokens[1].at == Span("mine.yaml", 7, 5)
    assert recipe.models == (ModelRef("org/a"), ModelRef("org/b", "v2"), source, other)
    assert recipe.merged == (ModelRef("org/a"),)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("tokenizer: {}", Tokenizer()),
        ("tokenizer: {source: union}", Tokenizer("union")),
        ("tokenizer_source: union", Tokenizer("union")),
        ("tokenizer_source: base", Tokenizer("base")),
        ("tokenizer_source: org/a", Tokenizer(ModelRef("org/a"))),
        ("tokenizer_source: {model: {path: org/a, revision: v1}}", Tokenizer(ModelRef("org/a", "v1"))),
        ("dtype: float32", None),
    ],
)
def test_the_ways_to_name_a_tokenizer(read: Read, written: str, meant: Tokenizer | None) -> None:
    """The block without a source means union, as an empty one does; tokenizer_source says the same in one line."""
    assert read(ONE + written).tokenizer == meant


@pytest.mark.parametrize("text", ["auto", "chatml", "{{ messages }}", "{% generation %}{{ x }}{%- endgeneration -%}"])
def test_a_chat_template_is_a_name_or_jinja(read: Read, text: str) -> None:
    """The text is kept as it is; a tag that only transformers knows is no mistake."""
    assert read(ONE + f'chat_template: "{text}"').chat_template == ChatTemplate(text)


def test_k_without_omp_is_warned_of(read: Read) -> None:
    """A number that nothing uses is said to have no effect, at its key."""
    (warning,) = read(ONE + "tokenizer: {k: 8}").warnings
    assert str(warning) == "mine.yaml:3:13: tokenizer.k: k has no effect without missing: omp\n    take it out"


def test_the_published_recipe_with_a_union() -> None:
    """A recipe of the field that unites vocabularies parses with the methods that are built, without a warning."""
    text = (HERE / "wild" / "13-della-linear-filters-union-chatml.yaml").read_text()
    recipe = parse(text, "wild.yaml", methods())
    assert (recipe.tokenizer, recipe.chat_template) == (Tokenizer("union"), ChatTemplate("chatml"))
