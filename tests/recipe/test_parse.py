"""The recipe language: what recipes mean, what is answered to those that mean nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from merger.errors import RecipeError, Span
from merger.methods.registry import Method, methods
from merger.recipe.model import Evaluate, ModelRef, Perplexity, Publish, Recipe
from merger.recipe.parse import parse

from .conftest import HERE, WILD

Read = Callable[[str], Recipe]

A_METHOD_IN_A_SLICE = """
slices:
  - sources:
      - model: OpenPipe/mistral-ft-optimized-1218
        layer_range: [0, 32]
      - model: mlabonne/NeuralHermes-2.5-Mistral-7B
        layer_range: [0, 32]
    merge_method: slerp
    base_model: OpenPipe/mistral-ft-optimized-1218
    parameters:
      t:
        - filter: self_attn
          value: [0, 0.5, 0.3, 0.7, 1]
        - filter: mlp
          value: [1, 0.5, 0.7, 0.3, 0]
        - value: 0.5
"""

# the essentials of every published recipe that can be merged: method, base model, models of each slice, dtype
ESSENTIALS = {
    "01-linear": ("linear", None, [["psmathur/orca_mini_v3_13b", "WizardLM/WizardLM-13B-V1.2",
                                    "garage-bAInd/Platypus2-13B"]], "float16"),
    "02-ties-gradients-filters": (
        "ties", "TheBloke/Llama-2-13B-fp16",
        [["psmathur/orca_mini_v3_13b", "garage-bAInd/Platypus2-13B", "WizardLM/WizardMath-13B-V1.0",
          "TheBloke/Llama-2-13B-fp16"]], "float16"),
    "03-gradient-slerp-slices": ("slerp", "psmathur/orca_mini_v3_13b",
                                 [["psmathur/orca_mini_v3_13b[0:40]", "garage-bAInd/Platypus2-13B[0:40]"]], "float16"),
    "04-passthrough-44layer": ("passthrough", None, [["psmathur/orca_mini_v3_13b[0:24]"],
                                                     ["garage-bAInd/Platypus2-13B[20:40]"]], "float16"),
    "05-multimerge-docs": ("dare_ties", "mistralai/Mistral-7B-v0.1",
                           [["second-merge", "teknium/OpenHermes-2.5-Mistral-7B", "mistralai/Mistral-7B-v0.1"]], None),
    "09-slerp-v-curve-models-form": (
        "slerp", "NousResearch/Hermes-2-Pro-Mistral-7B",
        [["NousResearch/Hermes-2-Pro-Mistral-7B", "WizardLM/WizardMath-7B-V1.1"]], "bfloat16"),
    "10-dare-ties-three": (
        "dare_ties", "mistralai/Mistral-7B-v0.1",
        [["mistralai/Mistral-7B-v0.1", "samir-fama/SamirGPT-v1", "abacusai/Slerp-CM-mist-dpo",
          "EmbeddedLLM/Mistral-7B-Merge-14-v0.2"]], "bfloat16"),
    "24-raw-pytorch": ("dare_ties", "model_base.safetensors",
                       [["model_a.safetensors", "model_b.safetensors", "model_base.safetensors"]], None),
    "22-passthrough-scale-filters": (
        "passthrough", None,
        [["g:/11b/Mistral-Nemo-Instruct-2407-12B[0:14]"], ["G:/11B/Rocinante-12B-v1.1[8:24]"],
         ["g:/11b/Mistral-Nemo-Instruct-2407-12B[14:22]"], ["g:/11b/Mistral-Nemo-Instruct-2407-12B[22:31]"],
         ["G:/11B/Rocinante-12B-v1.1[24:40]"]], "bfloat16"),
}  # fmt: skip

# of every published mixture: base model, gate mode, and for each expert its model and its numbers of prompts
MIXTURES = {
    "07-moe-hidden-clowncar": (
        "NousResearch/Hermes-2-Pro-Mistral-7B",
        "hidden",
        [
            ("NousResearch/Hermes-2-Pro-Mistral-7B", 2, 0),
            ("BioMistral/BioMistral-7B-DARE", 1, 0),
            ("PocketDoc/Dans-AdventurousWinds-7b", 3, 0),
            ("VAGOsolutions/SauerkrautLM-7b-HerO", 2, 0),
        ],
    ),
    "08-moe-random-upcycle": (
        "BEE-spoke-data/smol_llama-220M-GQA",
        "random",
        [("BEE-spoke-data/smol_llama-220M-GQA", 0, 0)] * 8,
    ),
    "25-moe-yaml-anchors": (
        "Joseph717171/Llama-3.1-SuperNova-8B-Lite_TIES_with_Base",
        "hidden",
        [
            ("Joseph717171/Llama-3.1-SuperNova-8B-Lite_TIES_with_Base", 15, 5),
            ("ArliAI/Llama-3.1-8B-ArliAI-RPMax-v1.2", 5, 15),
        ],
    ),
}

# what the others are answered: every problem's sentence, in the file's order
NOT_BUILT = {
    "13-della-linear-filters-union-chatml": ["della_linear is not built yet"],
    "14-model-stock-ignored-weights": ["model_stock is not built yet"],
    "15-model-stock-lora-refs": ["model_stock is not built yet"],
    "18-sce-lora-base": ["sce is not built yet"],
    "20-breadcrumbs": ["breadcrumbs is not built yet"],
}


def essentials(recipe: Recipe) -> tuple[str, str | None, list[list[str]], str | None]:
    pieces = [[_with_layers(source.model, source.layer_range) for source in piece.sources] for piece in recipe.slices]
    (method,) = {piece.method for piece in recipe.slices}
    return method, str(recipe.base_model) if recipe.base_model else None, pieces, recipe.dtype


def _with_layers(model: ModelRef, layers: tuple[int, int] | None) -> str:
    return f"{model}[{layers[0]}:{layers[1]}]" if layers else str(model)


def refusal(read: Read, text: str) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        read(text)
    return caught.value


def warnings(recipe: Recipe) -> list[str]:
    return [str(warning).split("\n")[0].removeprefix("mine.yaml:") for warning in recipe.warnings]


def test_every_published_recipe_has_an_expectation() -> None:
    """No recipe of the field lies in the folder without a word about what becomes of it."""
    assert {file.stem for file in WILD} == {*ESSENTIALS, *MIXTURES, *NOT_BUILT}


@pytest.mark.parametrize("name", ESSENTIALS)
def test_published_recipes_parse(table: Mapping[str, Method], name: str) -> None:
    """A recipe of the field whose method is built means what it says, without a warning; also to the real methods."""
    for known in (table, methods()):
        recipe = parse((HERE / "wild" / f"{name}.yaml").read_text(), "wild.yaml", known)
        assert essentials(recipe) == ESSENTIALS[name]
        assert recipe.warnings == ()


@pytest.mark.parametrize("name", NOT_BUILT)
def test_what_is_not_built_is_said_by_name(table: Mapping[str, Method], name: str) -> None:
    """A recipe of the field that cannot be merged yet is answered with what exactly is missing, and nothing else."""
    with pytest.raises(RecipeError) as caught:
        parse((HERE / "wild" / f"{name}.yaml").read_text(), "wild.yaml", table)
    assert [problem.what for problem in caught.value.problems] == NOT_BUILT[name]
    assert all(problem.hint and problem.at for problem in caught.value.problems)


@pytest.mark.parametrize("file", sorted((HERE / "errors").glob("*.yaml")), ids=lambda file: file.stem)
def test_mistakes_are_answered_word_for_word(table: Mapping[str, Method], file: Path) -> None:
    """Each mistake is answered at its place, in a sentence, with the next step, all at once and in the file's order."""
    start = time.process_time()
    with pytest.raises(RecipeError) as caught:
        parse(file.read_text(), file.name, table)
    assert time.process_time() - start < 1
    assert str(caught.value) + "\n" == file.with_suffix(".txt").read_text()
    assert all(problem.at and problem.hint for problem in caught.value.problems)
    assert caught.value.exit_code == 2


def test_a_slice_may_bring_its_own_method(read: Read) -> None:
    """Method, base model and parameters may all stand in the slice, and nothing at the top."""
    (piece,) = read(A_METHOD_IN_A_SLICE).slices
    assert (piece.method, str(piece.base_model)) == ("slerp", "OpenPipe/mistral-ft-optimized-1218")
    assert [rule.filter for rule in piece.parameters["t"].rules] == ["self_attn", "mlp", None]
    assert [source.layer_range for source in piece.sources] == [(0, 32), (0, 32)]
    assert piece.at == Span("mine.yaml", 3, 5)


def test_slices_may_differ_in_method(read: Read) -> None:
    """One recipe may copy some layers and merge others; the top's method serves the slices that name none."""
    recipe = read(
        "merge_method: passthrough\n"
        "base_model: org/a\n"
        "slices:\n"
        "  - sources: [{model: org/a, layer_range: [0, 2.0]}]\n"
        "  - merge_method: ties\n"
        "    parameters: {weight: 1}\n"
        "    sources: [{model: org/a, layer_range: [2, 4]}, {model: org/b, layer_range: [2, 4]}]\n"
    )
    assert [piece.method for piece in recipe.slices] == ["passthrough", "ties"]
    assert recipe.slices[0].sources[0].layer_range == (0, 2)
    assert recipe.models == (ModelRef("org/a"), ModelRef("org/b"))


def test_modules_keep_their_names_and_settings(read: Read) -> None:
    """The modules form names each part, made of slices or of whole models, with settings of its own."""
    recipe = read(
        "merge_method: linear\n"
        "base_model: org/a\n"
        "modules:\n"
        "  text_decoder:\n"
        "    slices: [{sources: [{model: org/a, layer_range: [0, 4]}]}]\n"
        "    parameters: {weight: 2}\n"
        "  vision_tower:\n"
        "    models: [{model: org/b, parameters: {weight: 1}}]\n"
    )
    assert [module.name for module in recipe.modules] == ["text_decoder", "vision_tower"]
    assert recipe.modules[0].parameters["weight"].rules[0].values == (2.0,)
    assert [(str(source.model), source.added) for source in recipe.modules[1].slices[0].sources] == [
        ("org/b", False),
        ("org/a", True),
    ]


@pytest.mark.parametrize(
    ("written", "model"),
    [
        ("org/a", ModelRef("org/a")),
        ("org/a@v1.0", ModelRef("org/a", "v1.0")),
        ("g:/11b/x", ModelRef("g:/11b/x")),
        ("C:\\models\\x", ModelRef("C:\\models\\x")),
        ("./folder", ModelRef("./folder")),
        ("~/x", ModelRef("~/x")),
        ("{model: {path: org/a, revision: main}}", ModelRef("org/a", "main")),
        ("{model: {path: ./a+b@c}}", ModelRef("./a+b@c")),
        ("{model: org/a@v1}", ModelRef("org/a", "v1")),
    ],
)
def test_the_ways_to_name_a_model(read: Read, written: str, model: ModelRef) -> None:
    """A model is a repo, pinned or not, or a folder, in a text or in a map."""
    recipe = read(f"merge_method: passthrough\nmodels:\n  - model: {written}\n")
    assert recipe.models == (model,)
    assert recipe.models[0].at == Span("mine.yaml", 3, 12)


def test_references_are_equal_part_by_part(read: Read) -> None:
    """A base model of another revision, or written as a folder, is another model, and joins the sources."""
    recipe = read("merge_method: ties\nbase_model: a/b@v1\nmodels: [{model: a/b, parameters: {weight: 1}}]\n")
    assert [(str(source.model), source.added) for source in recipe.slices[0].sources] == [
        ("a/b", False),
        ("a/b@v1", True),
    ]


def test_out_dtype_counts_before_dtype(read: Read) -> None:
    """All arithmetic is float32, so only the dtype that is written last matters; torch. may stand before it."""
    head = "merge_method: passthrough\nmodels: [{model: org/a}]\n"
    assert read(head).dtype is None
    assert read(head + "dtype: float32\nout_dtype: torch.bfloat16\n").dtype == "bfloat16"
    assert read(head + "dtype: float32\nout_dtype:\n").dtype == "float32"


def test_evaluate(read: Read) -> None:
    """One text or several, in windows of half a stride; everything that is not said has a value."""
    start = "merge_method: linear\nmodels: [{model: org/a, parameters: {weight: 1}}]\n"
    assert read(start).evaluate is None
    short = read(start + "evaluate: {perplexity: {text: a.txt, window: 9}}\n").evaluate
    assert short == Evaluate((Perplexity("a.txt", 9, 4, 100_000),), (), None, False, "float32")
    assert short.perplexity[0].at == Span("mine.yaml", 3, 31)
    long = read(
        start + "evaluate:\n  perplexity: [{text: a.txt, limit: 50, stride: 1}, {text: hf://datasets/o/n@v1/b.txt}]\n"
        "  tasks: [arc_easy, ./own.yaml]\n  limit: 10\n  parents: true\n  dtype: bfloat16\n"
    ).evaluate
    texts = (Perplexity("a.txt", 512, 1, 50), Perplexity("hf://datasets/o/n@v1/b.txt", 512, 256, 100_000))
    assert long == Evaluate(texts, ("arc_easy", "./own.yaml"), 10, True, "bfloat16")


def test_publish_and_seed(read: Read) -> None:
    """The keys that other tools do not have: a seed, and where the result goes."""
    recipe = read(
        "name: mine\nmerge_method: passthrough\nmodels: [{model: org/a}]\nseed: 7\n"
        "publish:\n  repo: org/new-model_1.0\n  private: true\n  license: apache-2.0\n  template: card.md\n"
    )
    assert recipe.seed == 7
    expected = Publish("org/new-model_1.0", private=True, license="apache-2.0", template="card.md")
    assert recipe.publish == expected
    assert (recipe.publish.at, recipe.publish.license_at) == (Span("mine.yaml", 5, 1), Span("mine.yaml", 8, 12))


def test_text_and_path_are_kept(read: Read) -> None:
    """A recipe carries its own text and file name, byte for byte, for the card and the lock."""
    text = "# mine\r\nmerge_method: passthrough\r\nmodels: [{model: org/a}]\r\n"
    assert (read(text).text, read(text).path) == (text, "mine.yaml")


WARNED = {
    "one number for the whole merge": (
        "merge_method: slerp\nbase_model: org/a\nparameters: {t: 0.5}\n"
        "models:\n  - model: org/a\n  - model: org/b\n    parameters: {t: 0.7}\n",
        ["7:18: models[org/b].parameters.t: t is one number for the whole merge; here it has no effect"]),
    "parameters of other methods, of which published recipes are full": (
        "merge_method: passthrough\nmodels: [{model: org/a, parameters: {weight: 1}}]\n"
        "parameters: {rounds: 2, select_topk: 0.5, int8_mask: true}\n",
        ["2:38: models[org/a].parameters.weight: weight has no meaning for passthrough; it has no effect",
         "3:14: parameters.rounds: rounds has no meaning for passthrough; it has no effect",
         "3:25: parameters.select_topk: select_topk has no meaning for passthrough; it has no effect"]),
    "what is likely not meant": (
        "merge_method: ties\nbase_model: org/a\nmodels:\n  - {model: org/a, parameters: {weight: 1}}\n"
        "  - {model: org/b, parameters: {weight: [{value: 1}, {value: 2, filter: mlp}]}}\n"
        "  - {model: org/b, parameters: {weight: 1}}\n",
        ["4:5: models[org/a]: org/a is the base model; here weight has no effect",
         "5:54: models[org/b].parameters.weight[mlp]: never reached: a rule above it already speaks about every tensor",
         "6:5: models[org/b]: org/b is listed twice, and counts twice (mergekit: once, with the numbers of the first)"],
    ),
    "a key that other tools read and never use": (
        "merge_method: passthrough\nslices:\n  - sources: [{model: org/a, layer_range: [0, 4]}]\n"
        "    residual_weight: 0.5\n",
        ["4:5: slices[0].residual_weight: residual_weight has no effect"]),
}  # fmt: skip


@pytest.mark.parametrize("what", WARNED)
def test_what_has_no_effect_or_is_not_meant_is_warned_of(read: Read, what: str) -> None:
    """At its place, and it is merged all the same."""
    text, told = WARNED[what]
    assert warnings(read(text)) == told


ON_BASE = "models:\n- {model: org/base+org/one}\n- {model: org/base+org/two}\n"
FEW_DIRECTIONS = {
    "adapters alone": ("iso_c", "adapters:\n- {model: org/one}\n- {model: org/two}\n", "2:1: adapters"),
    "the base with adapters": ("iso_cts", f"base_model: org/base\n{ON_BASE}", "3:1: models"),
    "a lambda of one's own": ("iso_c", f"base_model: org/base\n{ON_BASE}parameters: {{lambda: 1}}\n", None),
    "in the adapters' directions": ("iso_c", "adapters: [{model: org/one}]\nlora: {core: true}\n", None),
    "another model with an adapter": ("iso_c", f"base_model: org/other\n{ON_BASE}", None),
    "a model without": ("iso_c", f"base_model: org/base\n{ON_BASE}- {{model: org/three}}\n", None),
    "a method that keeps strength": ("tsvm", f"base_model: org/base\n{ON_BASE}", None),
}


@pytest.mark.parametrize("case", FEW_DIRECTIONS)
def test_methods_that_spread_the_few_directions_of_adapters_are_warned_of(case: str) -> None:
    """Where no lambda is given, and all that is merged are changes of few directions."""
    method, rest, where = FEW_DIRECTIONS[case]
    recipe = parse(f"merge_method: {method}\n{rest}", "mine.yaml", methods())
    told = [str(warning).splitlines() for warning in recipe.warnings]
    says = f"{method} spreads the few directions of adapters over all of a matrix: at lambda 1 little is left"
    hint = "    write a lambda near the matrices' smaller side, divided by the sum of the adapters' ranks"
    assert told == ([[f"mine.yaml:{where}: {says}", hint]] if where else [])


def test_an_overridden_architecture_is_warned_of(read: Read) -> None:
    """mergekit's key for models that it does not know: there is nothing to override, so the recipe runs without it."""
    recipe = read(
        "merge_method: passthrough\nmodels:\n"
        "  - model: {model: {path: org/a}, override_architecture: MistralForCausalLM}\n"
    )
    assert [str(model) for model in recipe.models] == ["org/a"]
    what = "override_architecture has no effect: the architecture is learned from the tensors' names"
    what += " (mergekit: the table of tensors that it takes for the model)"
    assert warnings(recipe) == [f"3:35: models[org/a].model.override_architecture: {what}"]


@pytest.mark.parametrize(
    ("base", "listed", "fits"),
    [("org/a", ["org/a", "org/b"], True), ("org/a", ["org/b"], True), ("org/c", ["org/a", "org/b"], False)],
)
def test_a_base_model_that_comes_first_counts(read: Read, base: str, listed: list[str], fits: bool) -> None:
    """SLERP takes two models, and its base model is one of them, listed or not."""
    models = ", ".join(f"{{model: {name}}}" for name in listed)
    text = f"merge_method: slerp\nbase_model: {base}\nmodels: [{models}]\nparameters: {{t: 0.5}}\n"
    if fits:
        assert len(read(text).slices[0].sources) == 2
    else:
        assert "exactly 2 models, found 3" in str(refusal(read, text))


def test_a_base_model_that_is_no_input_is_kept_aside(read: Read) -> None:
    """A method that has no use for a base model still merges as many models as it takes; the base only gives files."""
    recipe = read("merge_method: passthrough\nbase_model: org/base\nmodels: [{model: org/a}]\n")
    assert [source.added for source in recipe.slices[0].sources] == [False, True]
    assert recipe.config_model == ModelRef("org/base")


def test_empty_keys_say_nothing(read: Read) -> None:
    """A key with nothing behind it is as good as no key."""
    recipe = read(
        "merge_method: passthrough\nmodels: [{model: org/a, parameters: }]\n"
        "base_model:\nparameters:\ndtype:\nseed:\npublish:\ntokenizer_source:\ntokenizer:\nchat_template:\n"
    )
    assert (recipe.base_model, recipe.parameters, recipe.dtype, recipe.seed) == (None, {}, None, 0)


def test_an_unbuilt_method_hides_no_other_mistake(read: Read) -> None:
    """A recipe whose method is not built is still read to its end, except for the parameters nobody knows."""
    error = refusal(
        read,
        "merge_method: sce\nbase_model: org/a\ndtype: half\n"
        "models:\n  - {model: org/b, parameters: {sparkle: .nan}}\n  - {modell: org/c}\n",
    )
    assert [problem.what for problem in error.problems] == [
        "sce is not built yet",
        "'half' is no dtype that a result can have",
        "expected a finite number, found the number nan",
        "unknown key 'modell'",
    ]


def test_a_stage_nobody_uses_and_one_that_would_be_published_are_warned_of(read: Read) -> None:
    """Neither changes the result, and neither is likely meant."""
    recipe = read(
        "name: lost\nmerge_method: passthrough\nmodels: [{model: org/a}]\n---\n"
        "name: first\nmerge_method: passthrough\nmodels: [{model: org/b}]\npublish: {repo: org/x}\n---\n"
        "merge_method: passthrough\nmodels: [{model: first}]\n"
    )
    assert warnings(recipe) == ["1:7: nothing is made of the stage lost", "8:1: publish has no effect in a stage"]
    assert [stage.name for stage in recipe.stages] == ["first"]
    assert [str(ref) for ref in recipe.models] == ["org/b"]


def test_where_all_documents_have_names_the_last_is_the_result(read: Read) -> None:
    """As in files that were written for a tool that puts each of them into a folder of its own."""
    recipe = read(
        "name: first\nmerge_method: passthrough\nmodels: [{model: org/a}]\n---\n"
        "name: last\nmerge_method: passthrough\nmodels: [{model: first}]\n"
    )
    assert (recipe.name, [stage.name for stage in recipe.stages]) == ("last", ["first"])


def test_more_documents_than_a_recipe_needs_are_refused(read: Read) -> None:
    """Each names the one before it: fifty are read, the next is pointed at."""
    text = "---\n".join(f"name: s{n}\nmerge_method: passthrough\nmodels: [{{model: s{n - 1}}}]\n" for n in range(51))
    assert str(refusal(read, text)).startswith("mine.yaml:201:1: the file holds more than 50 documents")
