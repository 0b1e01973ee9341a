"""The tables of docs/formats.md: each format and family, what is read, merged and written, and the test that holds it.

What the code lists is taken from there, and refusals say what the code says. Not here: the page's words, and writing it
(tables).
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from gguf import GGMLQuantizationType

from merger.errors import MergerError, Problem
from merger.models.checkpoint import FLOATS, TensorInfo, stem
from merger.models.formats.quantised import FORMATS, SCALED, unpack_checkpoint
from merger.models.gguf.families import FAMILIES, GgufModel
from merger.models.gguf.header import GgufHeader, find_gguf, kind_of
from merger.models.gguf.layout import KINDS
from merger.models.gguf.source import restore_model
from merger.models.mixtures import LAYOUTS

ROOT = Path(__file__).resolve().parents[1]
Row = tuple[str, ...]

_WIDE, _AS_IS, _BACK = "in the recipe's dtype", "as it is", "block by block"
_OPEN = (
    (f"safetensors in {', '.join(FLOATS)}, with `config.json`", _AS_IS, "yes", f"{_WIDE}, in the config model's files",
     "models/test_checkpoint.py::test_what_the_library_wrote_is_read_with_names_dtypes_shapes_and_places",
     "planning/test_output.py::test_a_model_in_several_files_comes_out_in_files_of_the_same_names_and_tensors"),
    ("a file of safetensors without a config", _AS_IS, "yes", "under its own name",
     "models/test_any_safetensors.py::test_the_published_recipe_of_single_files_runs"),
    ("a part of a diffusers pipeline", _AS_IS, "yes", "under diffusers' names",
     "models/test_any_safetensors.py::test_a_part_of_a_pipeline_comes_out_under_its_librarys_names"),
    ("pickles of torch (`pytorch_model.bin`)", "with `--allow-pickle`, without running them", "yes", "as safetensors",
     "models/test_pickles.py::test_models_of_pickles_merge_as_the_same_in_safetensors"),
    ("models of one structure under other names", _AS_IS, "yes", "under the base's names",
     "planning/test_matched.py::test_a_language_model_is_merged_into_a_model_that_sees"),
    ("checkpoints of one run", _AS_IS, "their mean is one model", _WIDE,
     "planning/test_checkpoints.py::test_a_mean_is_the_sum_in_order_rounded_once"),
    (f"{', '.join(SCALED)} with scales beside it", _BACK, "yes", _WIDE,
     "models/test_quantised.py::test_a_quantised_model_merges_as_what_it_stands_for"),
)  # fmt: skip
_PACKED = (
    "models/test_packed.py::test_a_packed_tensor_is_read_as_what_it_stands_for",
    "models/test_packed.py::test_a_library_reads_the_same",
)
_GGUF_READ = (
    "models/test_gguf_sources.py::test_each_type_is_read_as_gguf_reads_it",
    "models/test_gguf_sources.py::test_a_model_comes_back_from_its_gguf_file",
)
_MORE = (
    ("LoRA of PEFT", "rows at a time", "into its model, and with others", "as one adapter; from a fine-tune",
     "planning/test_lora_sources.py::test_a_model_with_an_adapter_is_what_peft_makes_of_them",
     "planning/test_merged_adapters.py::test_peft_makes_the_same_sum",
     "planning/test_extract_lora.py::test_a_low_rank_change_comes_back"),
    ("LoRA of PEFT on fused experts", "rows at a time", "into its model", "no",
     "planning/test_lora_experts.py::test_parameters_get_what_peft_adds_to_them"),
    ("LoRA of MLX", "transposed", "into its model, and with others", "as PEFT's",
     "planning/test_mlx_adapters.py::test_an_adapter_of_mlx_gives_what_the_same_of_peft_does"),
    ("pipelines of sentence-transformers", _AS_IS, "each step", "in the steps' folders",
     "planning/test_embedders.py::test_the_merge_of_a_pipeline_is_one_of_its_modules"),
    ("ColBERT of PyLate", _AS_IS, "each step", "in the steps' folders",
     "planning/test_embedders.py::test_the_merge_of_pylates_models_is_one_of_its_models"),
    (f"mixtures of experts: {', '.join(layout.name for layout in LAYOUTS)}", "as models that are mixtures", "yes",
     "made of models without experts",
     "planning/test_mixtures.py::test_each_layout_loads_and_holds_its_models_tensors"),
    ("GGUF in each type that `gguf` reads, of the families below", _BACK, "yes", "as safetensors",
     *_GGUF_READ, "models/test_gguf_sources.py::test_gguf_and_safetensors_of_one_model_are_merged"),
    (f"GGUF in {', '.join(KINDS)}", "as above", "yes", "beside safetensors or alone",
     "models/test_gguf.py::test_gguf_reads_what_is_written",
     "models/test_gguf.py::test_llama_cpp_continues_a_text_as_transformers_does",
     "models/test_gguf.py::test_llama_cpp_continues_a_text_from_every_type_and_from_parts"),
    ("fp8 with scales a block or a row", "as above", "yes", "`publish: {fp8: block}` or `channel`",
     "models/test_fp8.py::test_each_matrix_of_a_layer_has_the_bits_of_its_own_tool"),
    ("LoRA of diffusion models, in diffusers' and kohya's names", "rows at a time", "into its model", "no",
     "planning/test_lora_pipelines.py::test_a_model_with_an_adapter_is_what_diffusers_fuses"),
)  # fmt: skip


def _kinds() -> Iterator[str]:
    """The types of GGUF that are read."""
    for kind in GGMLQuantizationType:
        with suppress(ValueError):
            yield kind_of(kind)[0]


_POINTS = (
    ("LoRA on experts in one tensor", "PEFT on Qwen 3 MoE, Mixtral, gpt-oss, DeepSeek V3, GLM 4 MoE and a dozen more",
     "planning/test_lora_experts.py::test_parameters_get_what_peft_adds_to_them"),
    ("LoRA on a tied head", "PEFT on Mistral, Llama, Gemma, Gemma 2, Qwen 2, Qwen 3, Cohere, all tied, and with the "
     "embedding trained beside",
     "planning/test_lora_tokens.py::test_a_product_for_a_tied_head_gives_the_model_one_of_its_own"),
    ("LoRA of diffusion models", "diffusers on a transformer of Flux and of SD 3 and on a UNet, both spellings",
     "planning/test_lora_pipelines.py::test_a_model_with_an_adapter_is_what_diffusers_fuses"),
    ("other names", "transformers' pairs of a text model and one that sees; BERT with its prefix and without",
     "planning/test_matched.py::test_a_language_model_is_merged_into_a_model_that_sees",
     "planning/test_matched.py::test_bert_is_merged_with_and_without_its_prefix",
     "planning/test_matched.py::test_the_plan_says_what_was_matched_to_what"),
    ("quantised sources", f"{', '.join(FORMATS)}", *_PACKED),
    ("GGUF in", f"gguf's {', '.join(_kinds())}; transformers' own reading of eight families", *_GGUF_READ,
     "models/test_gguf_sources.py::test_transformers_reads_the_same"),
    ("eight bits out", "transformers' fp8 and compressed-tensors' float-quantized, of Llama, Qwen 3, Qwen 3 MoE, "
     "Mixtral, DeepSeek V3",
     "models/test_fp8.py::test_each_matrix_of_a_layer_has_the_bits_of_its_own_tool",
     "models/test_fp8.py::test_transformers_loads_what_is_written"),
    ("embedding models", "SentenceTransformer, SparseEncoder, CrossEncoder, MultiVectorEncoder, CLIP; PyLate",
     "planning/test_embedders.py::test_the_merge_of_a_pipeline_is_one_of_its_modules",
     "planning/test_embedders.py::test_the_merge_of_pylates_models_is_one_of_its_models",
     "planning/test_embedders.py::test_steps_in_pickles_merge_as_the_same_in_safetensors"),
    ("checkpoints of a run", "a trainer's folders with what lies beside; branches and tags; wherever a model stands",
     "planning/test_checkpoints.py::test_a_mean_is_the_sum_in_order_rounded_once",
     "planning/test_checkpoints.py::test_a_mean_stands_wherever_a_model_does",
     "planning/test_checkpoints.py::test_branches_of_the_hub_are_taken_at_their_commits"),
    ("mixtures made", f"transformers' {', '.join(layout.name for layout in LAYOUTS)}",
     "planning/test_mixtures.py::test_each_layout_loads_and_holds_its_models_tensors"),
    ("GGUF out", f"transformers' {', '.join(family.title for family in FAMILIES.values())}, by llama.cpp; experts in "
     "one tensor, too", "models/test_gguf.py::test_llama_cpp_continues_a_text_as_transformers_does",
     "models/test_gguf.py::test_experts_that_are_stored_in_one_tensor_are_written_as_others"),
    ("files as transformers cuts them", "transformers' Llama, Gemma 2, Qwen 3 MoE, DeepSeek V3, Mixtral",
     "planning/test_output.py::test_a_model_in_several_files_comes_out_in_files_of_the_same_names_and_tensors"),
)  # fmt: skip

_MAMBA = GgufHeader({"general.architecture": "mamba"}, ())
_FILES: tuple[tuple[str, Callable[[], Any], str], ...] = (
    ("several GGUF files, none of which is named", lambda: find_gguf(["m-Q4_K_M.gguf", "m-Q8_0.gguf"]),
     "models/test_gguf_sources.py::test_the_files_of_a_model_are_found"),
    ("GGUF of another architecture", lambda: restore_model({"": _MAMBA}, lambda *_: b"", lambda *_: None),
     "models/test_gguf_sources.py::test_a_file_that_is_not_what_it_says_is_refused"),
    ("pickles, without `--allow-pickle`", lambda: stem(["pytorch_model.bin"]),
     "models/test_checkpoint.py::test_a_model_of_pickles_is_refused_with_the_way_out"),
    ("a pipeline as a whole", lambda: stem(["model_index.json", "unet/diffusion_pytorch_model.safetensors"]),
     "models/test_any_safetensors.py::test_what_is_no_part_of_a_repo_is_refused"),
)  # fmt: skip
_CLASS = (
    "GGUF of another class", lambda: GgufModel({"architectures": ["OlmoForCausalLM"]}),
    "models/test_gguf.py::test_what_llama_cpp_would_compute_otherwise_is_refused",
)  # fmt: skip
_READ_BACK = "models/test_quantised.py::test_what_cannot_be_read_back_is_refused"
_QUANTISED: Mapping[str, tuple[Mapping[str, tuple[str, tuple[int, ...]]], Mapping[str, Any]]] = {
    "MLX": ({"weight": ("U32", (24, 2)), "scales": ("F16", (24, 1)), "biases": ("F16", (24, 1))}, {}),
    "AQLM": ({"codebooks": ("F16", (1, 256, 1, 8))}, {"quant_method": "aqlm"}),
    "HQQ": ({"W_q": ("U8", (12, 16))}, {"quant_method": "hqq"}),
    "AWQ in another order than gemm": (
        {"qweight": ("I32", (24, 2)), "qzeros": ("I32", (1, 3)), "scales": ("F16", (1, 24))},
        {"quant_method": "awq", "version": "gemv"}),
    "codes of 3 bits": (
        {"qweight": ("I32", (6, 32)), "qzeros": ("I32", (1, 3)), "scales": ("F16", (1, 32))},
        {"quant_method": "gptq", "bits": 3}),
    "int8 with zero points": (
        {"weight": ("I8", (24, 16)), "weight_scale": ("F32", (24, 1)), "weight_zero_point": ("I8", (24, 1))},
        {"quant_method": "compressed-tensors"}),
    "rotated weights": ({}, {"quant_method": "compressed-tensors", "transform_config": {"config_groups": {}}}),
    "inputs that are scaled": ({"pre_quant_scale": ("F32", (16,))}, {"quant_method": "modelopt"}),
    "sparse bit masks": ({"bitmask": ("U8", (24, 2))}, {"quant_method": "compressed-tensors"}),
    "fp8 without scales, where it is not only copied": ({"weight": ("F8_E4M3", (24, 16))}, {"quant_method": "fp8"}),
    "a method nobody knows": ({}, {"quant_method": "own"}),
}  # fmt: skip
"""What is stored in the place of a matrix, by the ends of names, and what config.json says of it."""


def forms() -> Iterator[Row]:
    """A row for each format: what it is, read, merged, written, held by."""
    for what, read, merged, written, *tests in (*_OPEN, (", ".join(FORMATS), _BACK, "yes", _WIDE, *_PACKED), *_MORE):
        yield what, read, merged, written, _held(*tests)


def points() -> Iterator[Row]:
    """A row for each kind of input or output: which layouts are rebuilt by whose code, and the tests of them."""
    for what, layouts, *tests in _POINTS:
        yield what, layouts, _held(*tests)


def families() -> Iterator[Row]:
    """A row for each class of transformers that a GGUF file can be made of."""
    for name, family in FAMILIES.items():
        yield family.title, f"`{name}`", f"`{family.arch}`", ", ".join(family.rope)


def refusals() -> Iterator[Row]:
    """A row for each kind that is refused: what it is, the sentence, the next step, held by."""
    for what, call, test in (
        *_FILES,
        *((what, _reading(*case), _READ_BACK) for what, case in _QUANTISED.items()),
        _CLASS,
    ):
        problem = _refused(what, call)
        yield what, problem.what, problem.hint or "", _held(test)


def _reading(stored: Mapping[str, tuple[str, tuple[int, ...]]], said: Mapping[str, Any]) -> Callable[[], Any]:
    names = {f"model.layers.0.mlp.up_proj.{end}": of for end, of in stored.items()}
    tensors = {name: TensorInfo(name, *of, "model.safetensors", 0, 0) for name, of in names.items()}
    config = {"torch_dtype": "bfloat16", **({"quantization_config": said} if said else {})}
    return lambda: unpack_checkpoint(tensors, config, lambda wanted: [])


def _refused(what: str, call: Callable[[], Any]) -> Problem:
    try:
        call()
    except MergerError as error:
        return error.problems[0]
    raise SystemExit(f"docs/formats.py: {what} is not refused")


def _held(*tests: str) -> str:
    """Links to tests, which have to be there."""
    links = []
    for file, _, name in (test.partition("::") for test in tests):
        if name not in _tests(file):
            raise SystemExit(f"docs/formats.py: there is no test {name} in tests/{file}")
        links.append(f"[{name.removeprefix('test_').replace('_', ' ')}](../tests/{file})")
    return ", ".join(links)


@cache
def _tests(file: str) -> frozenset[str]:
    tree = ast.parse((ROOT / "tests" / file).read_text("utf-8"))
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef))
