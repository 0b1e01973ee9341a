"""Edits of config.json, each of which transformers' own config classes must accept."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import transformers

from merger.models.config import (
    Config,
    Kind,
    Layer,
    is_tied,
    quantisation,
    section,
    stated_dtype,
    with_dtype,
    with_layers,
    with_prediction,
    without_quantisation,
    without_tie,
)

A, B, C = (frozenset({"norm", role}) for role in ("attention", "mamba", "experts"))


def taken(config: Config, numbers: Sequence[int], kinds: Sequence[Kind] | None = None) -> list[Layer]:
    return [Layer(config, number, A if kinds is None else kinds[number]) for number in numbers]


def stacked(config: Config, count: int, numbers: Sequence[int]) -> dict[str, Any]:
    """The config of `count` layers that are alike after the layers `numbers` were taken."""
    before = copy.deepcopy(config)
    edited = with_layers(config, [A] * count, taken(config, numbers))
    assert config == before
    return edited


STACK = [0, 1, 1, 2, 3, 3]


@pytest.mark.parametrize("key", ["num_hidden_layers", "n_layer", "n_layers", "num_layers"])
def test_the_number_of_layers_follows_under_the_key_in_use(key: str) -> None:
    """And no other number that happens to be the same."""
    edited = stacked({key: 4, "num_attention_heads": 4, "num_key_value_heads": 4, "pad_token_id": 4}, 4, STACK)
    assert edited == {key: 6, "num_attention_heads": 4, "num_key_value_heads": 4, "pad_token_id": 4}


@pytest.mark.parametrize(("key", "value", "expected"), [
    ("layer_types", ["full", "sliding", "full", "linear"], ["full", "sliding", "sliding", "full", "linear", "linear"]),
    ("layers_block_type", ["m", "a", "m", "h"], ["m", "a", "a", "m", "h", "h"]),
    ("no_rope_layers", [1, 1, 1, 0], [1, 1, 1, 1, 0, 0]),
    ("num_key_value_heads", [1, 2, 4, 8], [1, 2, 2, 4, 8, 8]),
    ("intermediate_size", [10, 20, 30, 40], [10, 20, 20, 30, 40, 40]),
    ("ffn_multipliers", [0.5, 1.0, 1.5, 2.0], [0.5, 1.0, 1.0, 1.5, 2.0, 2.0]),
    ("block_configs", [{"n": n} for n in range(4)], [{"n": n} for n in STACK]),
    ("hybrid_override_pattern", "M-E*", "M--E**"),
    ("hybrid_layer_pattern", [0, 1, 1, 0], [0, 1, 1, 1, 0, 0]),
    ("mlp_only_layers", [1, 3], [1, 2, 4, 5]),
    ("mlp_only_layers", [], []),
    ("attn_layer_indices", [2], [3]),
    ("moe_layers", [0, 1, 2, 3], [0, 1, 2, 3, 4, 5]),
    ("full_attn_idxs", [0, 3], [0, 4, 5]),
])  # fmt: skip
def test_lists_for_each_layer_and_lists_of_layers_follow(key: str, value: object, expected: object) -> None:
    """An entry or a letter moves with its layer; a layer's number becomes its new numbers."""
    assert stacked({"num_hidden_layers": 4, key: value}, 4, STACK) == {"num_hidden_layers": 6, key: expected}


@pytest.mark.parametrize(("key", "value"), [
    ("architectures", ["A", "B", "C", "D"]), ("eos_token_id", [1, 2, 3, 4]), ("image_mean", [0.1, 0.2, 0.3, 0.4]),
    ("hidden_sizes", [8, 16, 32, 64]), ("layer_types", ["full"]), ("rope_scaling", {"short_factor": [1.0] * 4}),
    ("id2label", {"0": "a"}), ("max_window_layers", 28), ("vision_feature_layer", [-2]), ("suppress_tokens", [220]),
    ("hidden_act", "silu"), ("mtp_hybrid_override_pattern", "*E-M"), ("mtp_layers_block_type", ["moe"] * 4),
    ("hybrid_override_pattern", "M*"), ("hybrid_override_pattern", None),
])  # fmt: skip
def test_what_is_not_about_layers_stays(key: str, value: object) -> None:
    """Token ids, image sizes and names are not cut, however many there are."""
    assert stacked({"num_hidden_layers": 4, key: value}, 4, STACK)[key] == value


@pytest.mark.parametrize(("key", "value", "expected"), [
    ("layers_block_type", ["m", "a", "m", "h"], ["m", "a", "a", "m", "h", "h"]),
    ("hybrid_override_pattern", "MEM*", "MEEM**"),
])  # fmt: skip
def test_a_list_may_say_the_number_of_layers_alone(key: str, value: object, expected: object) -> None:
    """As Nemotron-H's does; a list of something else says nothing of it."""
    assert stacked({key: value}, 4, STACK) == {key: expected}
    for config in ({"depths": [1, 1, 2, 1]}, {key: value, "num_hidden_layers": 5}, {"block_names": value}):
        with pytest.raises(ValueError, match="does not say that there are 4 layers"):
            stacked(config, 4, STACK)


def test_layers_that_two_configs_tell_of_in_different_words_are_refused_where_that_breaks_them() -> None:
    """One list names what the other writes as letters: the entry taken instead must be one for layers of this kind."""
    kinds = [A, B, A, B]
    donor: Config = {"num_hidden_layers": 4, "pattern": "MEME"}
    other: Config = {"num_hidden_layers": 4, "layers_block_type": ["e", "m"] * 2}
    alike = [*taken(donor, [0, 1], kinds), *taken(other, [2, 3], kinds)]
    assert with_layers(donor, kinds, alike)["pattern"] == "MEME"
    turned = [*taken(donor, [0, 1], kinds), *taken(other, [2, 3], [B, A, B, A])]
    with pytest.raises(ValueError, match=r"not all alike, and the models' config\.json say it in different ways"):
        with_layers(donor, kinds, turned)


def test_each_layer_brings_the_entry_of_its_own_model() -> None:
    """A stack of two models takes each one's entries; a model without the list has the donor's."""
    one = {"num_hidden_layers": 2, "layer_types": ["a", "b"], "mlp_only_layers": [0]}
    other = {"num_hidden_layers": 3, "layer_types": ["x", "y", "z"], "mlp_only_layers": [2]}
    layers = [*taken(one, [0, 1]), *taken(other, [1, 2]), *taken({}, [0])]
    edited = with_layers(one, [A, A], layers)
    assert edited["layer_types"] == ["a", "b", "y", "z", "a"]
    assert edited["mlp_only_layers"] == [0, 3, 4]


def test_a_layer_of_which_no_list_speaks_is_refused() -> None:
    """The donor's list is too short for a layer of a deeper model that has no list."""
    donor = {"num_hidden_layers": 2, "layer_types": ["a", "b"]}
    with pytest.raises(ValueError, match="layer_types has 2 entries, none of them for layer 2"):
        with_layers(donor, [A, A], [*taken(donor, [0]), *taken({"num_hidden_layers": 3}, [2])])


@pytest.mark.parametrize("part", ["text_config", "llm_config", "language_config"])
def test_the_language_models_part_is_edited_and_the_vision_part_is_not(part: str) -> None:
    """It holds the layers' number and lists."""
    config = {
        part: {"num_hidden_layers": 4, "layer_types": ["a", "b", "c", "d"]},
        "vision_config": {"num_hidden_layers": 4, "layer_types": ["v"] * 4},
    }
    assert stacked(config, 4, [0, 3]) == {
        part: {"num_hidden_layers": 2, "layer_types": ["a", "d"]},
        "vision_config": {"num_hidden_layers": 4, "layer_types": ["v"] * 4},
    }


def test_a_config_that_does_not_count_the_layers_can_not_be_told_another_number() -> None:
    """A checkpoint may hold a layer more than its config counts, for predicting further ahead."""
    with pytest.raises(ValueError, match="does not say that there are 5 layers, so it cannot be told 6"):
        stacked({"num_hidden_layers": 4}, 5, [0, 1, 2, 3, 4, 4])
    assert stacked({"num_hidden_layers": 4}, 5, [4, 3, 2, 1, 0]) == {"num_hidden_layers": 4}


def test_layers_beyond_those_that_the_config_counts_may_be_left_out() -> None:
    """The first five of six, where the config counts five: it is right as it is."""
    config = {"num_hidden_layers": 5, "layer_types": ["a"] * 5}
    assert stacked(config, 6, [0, 1, 2, 3, 4]) == config
    with pytest.raises(ValueError, match="cannot be told 5"):
        stacked(config, 6, [1, 2, 3, 4, 5])


def test_a_window_behind_all_layers_stays_behind_all_layers() -> None:
    """Qwen2's max_window_layers, where it is the number of layers, says that none of them slides."""
    assert stacked({"n_layer": 4, "max_window_layers": 4}, 4, STACK) == {"n_layer": 6, "max_window_layers": 6}


# ---- layers that are not alike --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("donor", "numbers"), [
    ([B, A, B, A], [0, 1, 0, 1, 2, 3]),  # a period of two
    ([B, B, A, B, B, A], [0, 1, 2, 0, 1, 5, 3, 1, 2]),
    ([B, A, B, A], [0, 1, 2]),
    ([A, B, B, B], [0, 1, 1, 2, 3, 3]),  # the first differs
    ([A, A, B, B, B], [1, 0, 2, 2, 2, 4]),
])  # fmt: skip
def test_an_order_of_kinds_that_goes_on_as_it_began_needs_no_list(donor: list[Kind], numbers: list[int]) -> None:
    """What the config's rule makes of a position can be seen in the donor."""
    config = {"num_hidden_layers": len(donor)}
    assert with_layers(config, donor, taken(config, numbers, donor)) == {"num_hidden_layers": len(numbers)}


@pytest.mark.parametrize(("donor", "numbers"), [
    ([B, A, B, A], [0, 1, 1, 2]),
    ([B, A, B, A], [1, 2]),
    ([A, B, B, B], [1, 2]),
    ([A, B, B, B], [0, 1, 0, 1]),
    ([A, B, B, A, C], [0, 1, 2, 3, 4, 4]),  # no rule to be seen
    ([B, B, B, A], [0, 1, 2, 3, 3]),
])  # fmt: skip
def test_an_order_of_kinds_that_breaks_the_rule_is_refused(donor: list[Kind], numbers: list[int]) -> None:
    """It would load with other layers than were written."""
    config = {"num_hidden_layers": len(donor)}
    with pytest.raises(ValueError, match=r"not all alike, and config\.json cannot say that they come in this order"):
        with_layers(config, donor, taken(config, numbers, donor))


@pytest.mark.parametrize(("lists", "told"), [
    ({"layer_types": ["m", "a", "m", "a"]}, True),
    ({"attn_layer_indices": [1, 3]}, True),
    ({"layer_types": ["m", "m", "m", "m"]}, False),
    ({"attn_layer_indices": [1]}, False),
    ({"eos_token_id": [1, 2, 1, 2]}, False),
])  # fmt: skip
def test_a_list_that_tells_the_kinds_apart_allows_any_order(lists: dict[str, Any], told: bool) -> None:
    """The list follows the layers, so the config says which comes where."""
    config = {"num_hidden_layers": 4, **lists}
    layers = taken(config, [1, 1, 0], [B, A, B, A])
    if told:
        assert with_layers(config, [B, A, B, A], layers)["num_hidden_layers"] == 3
    else:
        with pytest.raises(ValueError, match="not all alike"):
            with_layers(config, [B, A, B, A], layers)


def test_two_lists_together_tell_four_kinds_apart() -> None:
    """One says where attention is, the other where experts are."""
    kinds = [B, A, C, B | C]
    config = {"num_hidden_layers": 4, "layers_block_type": ["m", "a", "a", "m"], "moe_layers": [2, 3]}
    edited = with_layers(config, kinds, taken(config, [3, 2, 0], kinds))
    assert edited == {"num_hidden_layers": 3, "layers_block_type": ["m", "a", "m"], "moe_layers": [0, 1]}


@pytest.mark.parametrize("key", ["first_k_dense_replace", "num_dense_layers"])
@pytest.mark.parametrize(("numbers", "expected"), [([0, 1, 1, 2, 3], 3), ([2, 3], 0), ([0, 1], 2), ([1, 2], 1)])
def test_the_number_of_leading_layers_of_another_kind_follows(key: str, numbers: list[int], expected: int) -> None:
    """DeepSeek's first layers have no experts, and its config counts them."""
    config = {"num_hidden_layers": 4, key: 2}
    edited = with_layers(config, [A, A, C, C], taken(config, numbers, [A, A, C, C]))
    assert edited == {"num_hidden_layers": len(numbers), key: expected}


def test_leading_layers_behind_others_are_refused() -> None:
    """A number of leading layers cannot say that one of them comes later."""
    config = {"num_hidden_layers": 4, "first_k_dense_replace": 2}
    with pytest.raises(ValueError, match="not all alike"):
        with_layers(config, [A, A, C, C], taken(config, [0, 2, 1], [A, A, C, C]))


@pytest.mark.parametrize(("numbers", "expected"), [([0, 1, 2, 3, 2, 3], 4), ([0, 1], 0), ([0, 1, 2, 2, 3, 3], 4),
                                                   ([2, 3, 0, 1], None), ([0, 1, 2, 3, 1, 2, 3], None)])  # fmt: skip
def test_the_number_of_last_layers_that_share_keys_and_values_follows(numbers: list[int], expected: int | None) -> None:
    """Gemma 3n's and 4's: a layer that shares must not come to have its own, nor one with its own share another's."""
    config = {"num_hidden_layers": 4, "num_kv_shared_layers": 2}
    if expected is None:
        with pytest.raises(ValueError, match="counts the last layers by num_kv_shared_layers: 2"):
            stacked(config, 4, numbers)
    else:
        assert stacked(config, 4, numbers)["num_kv_shared_layers"] == expected


def test_lists_that_go_on_for_layers_of_prediction_keep_their_ends() -> None:
    """Step's configs list the layers behind the stack, too."""
    config = {"num_hidden_layers": 3, "num_nextn_predict_layers": 1, "layer_types": ["a", "b", "c", "behind"]}
    told = stacked(config, 3, [0, 1, 1, 2])
    assert told == {**config, "num_hidden_layers": 4, "layer_types": ["a", "b", "b", "c", "behind"]}
    assert with_prediction(told, 0, {}) == {
        "num_hidden_layers": 4, "num_nextn_predict_layers": 0, "layer_types": ["a", "b", "b", "c"],
    }  # fmt: skip
    assert with_prediction({"num_hidden_layers": 4}, 1, config) == {
        "num_hidden_layers": 4,
        "num_nextn_predict_layers": 1,
    }


@pytest.mark.parametrize(("key", "value"), [
    ("sliding_window_pattern", 3), ("sliding_window_pattern", "LLG"), ("global_attn_every_n_layers", 3),
    ("attn_layer_period", 3),
])  # fmt: skip
def test_layers_that_differ_by_a_count_alone_keep_step_or_are_refused(key: str, value: object) -> None:
    """Where every third layer attends to all, no tensor's name tells; a list beside it does."""
    config = {"num_hidden_layers": 6, key: value}
    assert stacked(config, 6, [0, 1, 2, 0, 1, 2, 3, 4, 5]) == {"num_hidden_layers": 9, key: value}
    with pytest.raises(ValueError, match=f"counts layers by {key}: 3, which this order of layers would break"):
        stacked(config, 6, [0, 1, 1, 2])
    listed = {**config, "layer_types": ["s", "s", "f", "s", "s", "f"]}
    assert stacked(listed, 6, [0, 1, 1, 2])["layer_types"] == ["s", "s", "s", "f"]


# ---- transformers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Qwen2", "Qwen3", "Gemma2", "Gemma3Text", "SmolLM3", "GptOss", "Cohere2", "Llama",
                                  "Mistral", "Olmo2", "ModernBert"])  # fmt: skip
@pytest.mark.parametrize("numbers", [[0, 1, 2, 1, 2, 3, 4, 5, 2, 5], [0, 3, 5]])
def test_transformers_accepts_the_edited_config(name: str, numbers: list[int]) -> None:
    """The class reads as many layers as were taken, and each keeps its type of attention."""
    kind = getattr(transformers, f"{name}Config")
    config = kind(num_hidden_layers=6).to_dict()
    found = kind.from_dict(stacked(config, 6, numbers))
    assert found.num_hidden_layers == len(numbers)
    for key in ("layer_types", "no_rope_layers"):
        if config.get(key) is not None:
            assert getattr(found, key) == [config[key][number] for number in numbers]


# ---- head, dtype, quantisation --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("config", "tied"), [
    ({"tie_word_embeddings": True}, True), ({"tie_word_embeddings": False}, False), ({}, False),
    ({"text_config": {"tie_word_embeddings": True}}, True), ({"text_config": {}}, False),
    ({"llm_config": {"tie_word_embeddings": True}}, True), ({"llm": "a name"}, False),
    ({"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}}, False),
])  # fmt: skip
def test_whether_the_head_is_the_embedding_is_read_from_the_config(config: Config, tied: bool) -> None:
    """The outermost statement counts."""
    assert is_tied(config) is tied


@pytest.mark.parametrize(("config", "expected"), [
    ({"tie_word_embeddings": True}, {"tie_word_embeddings": False}),
    ({}, {"tie_word_embeddings": False}),
    ({"text_config": {"tie_word_embeddings": True}}, {"text_config": {"tie_word_embeddings": False}}),
    ({"tie_word_embeddings": True, "text_config": {"tie_word_embeddings": True}},
     {"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": False}}),
    ({"text_config": {}}, {"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": False}}),
])  # fmt: skip
def test_untying_says_so_wherever_it_was_said(config: Config, expected: Config) -> None:
    """And where nothing was said, since classes differ in what they then take for granted."""
    assert without_tie(config) == expected
    assert is_tied(without_tie(config)) is False


@pytest.mark.parametrize(("config", "expected"), [
    ({}, {"dtype": "bfloat16"}),
    ({"torch_dtype": "float32"}, {"torch_dtype": "bfloat16"}),
    ({"dtype": "float32", "vocab_size": 4}, {"dtype": "bfloat16", "vocab_size": 4}),
    ({"torch_dtype": "float32", "vision_config": {"torch_dtype": "float32"}, "text_config": {"a": 1}},
     {"torch_dtype": "bfloat16", "vision_config": {"torch_dtype": "bfloat16"}, "text_config": {"a": 1}}),
])  # fmt: skip
def test_the_dtype_stands_under_the_name_that_was_in_use(config: Config, expected: Config) -> None:
    """`torch_dtype` for older readers, `dtype` for newer ones, in each part that names one."""
    before = copy.deepcopy(config)
    assert with_dtype(config, "bfloat16") == expected
    assert config == before


@pytest.mark.parametrize(("config", "expected"), [
    ({}, "BF16"), ({"dtype": "float32"}, "F32"), ({"torch_dtype": "torch.float16"}, "F16"),
    ({"model_type": "float32", "dtype": "int4", "torch_dtype": "float16"}, "F16"),
    ({"text_config": {"dtype": "float32"}}, "F32"),
])  # fmt: skip
def test_the_dtype_is_what_the_config_states_under_either_name(config: Config, expected: str) -> None:
    """No other key counts, nor a word that is no dtype of floats."""
    assert stated_dtype(config) == expected


def test_quantised_models_are_known_by_their_config() -> None:
    """Their stored numbers are no parameters."""
    assert quantisation({"quantization_config": {"quant_method": "fp8"}}) == {"quant_method": "fp8"}
    assert quantisation({"text_config": {"quantization_config": {}}}) == {}
    assert quantisation({"text_config": {}}) is None


def test_a_tensor_that_is_read_back_leaves_no_word_of_quantisation() -> None:
    """Neither in the config nor in its language model's part; nothing else changes."""
    said = {"quantization_config": {"quant_method": "fp8"}, "text_config": {"quantization_config": {}, "n_layer": 2}}
    assert without_quantisation(said) == {"text_config": {"n_layer": 2}}
    assert said["quantization_config"] == {"quant_method": "fp8"}


# ---- several stacks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("config", "stacks", "stack", "path"), [
    ({"text_config": {}, "vision_config": {}}, ("language_model.model.layers", "vision_tower.encoder.layers"),
     "vision_tower.encoder.layers", ("vision_config",)),
    ({"text_config": {}, "vision_config": {}}, ("model.language_model.layers", "model.visual.blocks"),
     "model.language_model.layers", ("text_config",)),
    ({"text_encoder": {}, "audio_encoder": {}}, ("text_encoder.block", "audio_encoder.layers"),
     "text_encoder.block", ("text_encoder",)),
    ({"thinker_config": {"text_config": {}, "audio_config": {}}}, ("thinker.text.layers", "thinker.audio_tower.layers"),
     "thinker.audio_tower.layers", ("thinker_config", "audio_config")),
    ({"llm_config": {}, "vision_config": {}}, ("language_model.model.layers", "vision_model.encoder.layers"),
     "language_model.model.layers", ("llm_config",)),
    ({"vision_config": {}}, ("model.layers", "visual.blocks"), "model.layers", ()),
])  # fmt: skip
def test_a_stack_is_told_of_where_the_words_of_its_name_lead(
    config: Config, stacks: tuple[str, ...], stack: str, path: tuple[str, ...]
) -> None:
    """Of nested configs the one whose name the stack's words make; without one, the config itself."""
    assert section(config, stack, dict.fromkeys(stacks, 4)).path == path


def test_a_part_inside_of_which_the_language_model_has_one_speaks_of_its_layers() -> None:
    """`thinker.model.layers` says no more than whose they are."""
    config = {"thinker_config": {"text_config": {"num_hidden_layers": 4}, "audio_config": {"num_hidden_layers": 4}}}
    here = section(config, "thinker.model.layers", {"thinker.model.layers": 4, "thinker.audio_tower.layers": 4})
    edited = with_layers(config, [A] * 4, taken(config, STACK), here)["thinker_config"]
    assert edited == {"text_config": {"num_hidden_layers": 6}, "audio_config": {"num_hidden_layers": 4}}


def test_encoder_and_decoder_in_one_part_have_their_own_keys() -> None:
    """Each stack's count changes under its own key; a key that names neither is the encoder's."""
    config = {"encoder_layers": 2, "num_hidden_layers": 2, "decoder_layers": 2, "d_model": 2}
    stacks = {"model.encoder.layers": 2, "model.decoder.layers": 2}
    for stack, changed in (("model.encoder.layers", {"encoder_layers", "num_hidden_layers"}),
                           ("model.decoder.layers", {"decoder_layers"})):  # fmt: skip
        edited = with_layers(config, [A, A], taken(config, [0, 1, 1]), section(config, stack, stacks))
        assert {key for key in config if edited[key] != config[key]} == changed


def test_two_stacks_that_no_word_tells_apart_keep_their_layers() -> None:
    """With equal numbers of layers a count could be either's; with different ones it is not."""
    config = {"num_hidden_layers": 4}
    with pytest.raises(ValueError, match=r"does not tell the layers of upper\.layers from those of lower\.layers"):
        section(config, "upper.layers", {"upper.layers": 4, "lower.layers": 4})
    found = section(config, "upper.layers", {"upper.layers": 4, "lower.layers": 3})
    assert with_layers(config, [A] * 4, taken(config, [0, 1]), found) == {"num_hidden_layers": 2}


def test_layers_that_each_have_a_module_of_their_own_keep_their_number() -> None:
    """Qwen 3 VL's list of layers that feed the language model: renumbered, but not longer or shorter."""
    config = {"depth": 4, "deepstack_visual_indexes": [1, 3]}
    assert stacked(config, 4, [0, 1, 2, 2, 3]) == {"depth": 5, "deepstack_visual_indexes": [1, 4]}
    with pytest.raises(ValueError, match="names 2 layers, each with a module of its own, not 3"):
        stacked(config, 4, [0, 1, 1, 2, 3])
