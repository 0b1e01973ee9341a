"""The classes of models that are tried, each with a config small enough for a test, and what such a model computes on.

Not here: merging them (trial), and the page that tells of it (page).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

Inputs = Mapping[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A class of models.

    Args:
        config: the config's class; `model`: the model's.
        inputs: what it computes on.
        settings: what the config is made with.
        behind: what the names of a layer of multi-token prediction begin with, which transformers never saves.
    """

    config: str
    model: str
    inputs: Callable[[], Inputs]
    settings: Mapping[str, Any]
    behind: str | None = None

    def make(self, seed: int) -> transformers.PreTrainedModel:
        """A model drawn from `seed`; models of other seeds differ in every trained tensor."""
        torch.manual_seed(seed)
        settings = {key: dict(value) if isinstance(value, Mapping) else value for key, value in self.settings.items()}
        model = getattr(transformers, self.model)(getattr(transformers, self.config)(**settings))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return model.eval()


# ---- what a model computes on ----------------------------------------------------------------------------------------

_IDS = [1, 7, 3, 20, 11, 5]
_IMAGE = 39
"""The token that stands for an image, or for a part of one."""


def text() -> Inputs:
    """Six tokens."""
    return {"input_ids": torch.tensor([_IDS])}


def both() -> Inputs:
    """Six tokens for the encoder, three for the decoder."""
    return {"input_ids": torch.tensor([_IDS]), "decoder_input_ids": torch.tensor([[2, 4, 6]])}


def image() -> Inputs:
    """One picture of 8 by 8."""
    return {"pixel_values": _noise(1, 3, 8, 8)}


def large_image() -> Inputs:
    """One picture of 32 by 32."""
    return {"pixel_values": _noise(1, 3, 32, 32)}


def captioned() -> Inputs:
    """A picture, and text to compare it with."""
    return {**text(), **image()}


def sound() -> Inputs:
    """A short wave."""
    return {"input_values": _noise(1, 400)}


def spectrum() -> Inputs:
    """Sixteen frames of eight bands for the encoder, three tokens for the decoder."""
    return {"input_features": _noise(1, 8, 16), "decoder_input_ids": torch.tensor([[2, 4, 6]])}


def looking(tokens: int) -> Callable[[], Inputs]:
    """Text in which a picture takes so many tokens."""
    return lambda: {"input_ids": torch.tensor([[1, *[_IMAGE] * tokens, 7, 3]]), **image()}


def looking_at_patches(size: int) -> Callable[[], Inputs]:
    """The same for models that are given the picture in 16 patches of `size` numbers each."""
    kinds = torch.tensor([[0, 0, 1, 1, 1, 1, 0, 0]], dtype=torch.int)
    seen = {"pixel_values": _noise(16, size), "image_grid_thw": torch.tensor([[1, 4, 4]]), "mm_token_type_ids": kinds}
    return lambda: {"input_ids": torch.tensor([[1, 37, *[_IMAGE] * 4, 36, 7]]), **seen}


def looking_at_places() -> Inputs:
    """The same for models that are told where in the picture each of its 16 patches of 48 numbers is."""
    places = torch.cartesian_prod(torch.arange(4), torch.arange(4))
    kinds = torch.tensor([[0, 1, 1, 1, 1, 0, 0]])
    seen = {"pixel_values": _noise(1, 16, 48), "image_position_ids": places[None], "mm_token_type_ids": kinds}
    return {**looking(4)(), **seen}


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


# ---- their configs ---------------------------------------------------------------------------------------------------
# fmt: off
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SMALL: Mapping[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 40,
    "max_position_embeddings": 64, **IDS,
}
DECODER = {**SMALL, "num_key_value_heads": 2, "head_dim": 4}
EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
ROUTED = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "first_k_dense_replace": 2,
    "n_group": 1, "topk_group": 1,
}
LATENT = {
    "num_key_value_heads": 4, "kv_lora_rank": 4, "q_lora_rank": 4, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
    "v_head_dim": 4,
}
GPT = {"n_embd": 16, "n_layer": 4, "n_head": 4, "vocab_size": 40, "n_positions": 64, "bos_token_id": 1,
       "eos_token_id": 2}
STATES = {"hidden_size": 16, "num_hidden_layers": 4, "vocab_size": 40, "state_size": 4, **IDS}
STATE_HEADS = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_n_groups": 1}
HYBRID = {
    **{key: value for key, value in DECODER.items() if key != "num_hidden_layers"}, "ssm_state_size": 4, "n_groups": 1,
    "mamba_num_heads": 4, "mamba_head_dim": 8, "chunk_size": 8, "n_routed_experts": 3, "moe_intermediate_size": 8,
    "moe_shared_expert_intermediate_size": 8,
    "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
}
NEXT = {
    **DECODER, **EXPERTS, "shared_expert_intermediate_size": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 4, "linear_value_head_dim": 4,
}
TWO_SIDES = {
    "d_model": 16, "encoder_layers": 4, "decoder_layers": 3, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "vocab_size": 40, "decoder_start_token_id": 2, **IDS,
}
VISION: Mapping[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 8,
    "patch_size": 4,
}
PER_LAYER = {
    **DECODER, "hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": 40, "num_kv_shared_layers": 0,
    "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2,
}
T5 = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 4, "num_heads": 4, "vocab_size": 40}
QWEN_TEXT = {**DECODER, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 0], "rope_theta": 1e4}}
QWEN_IDS = {"image_token_id": _IMAGE, "video_token_id": 38, "vision_start_token_id": 37, "vision_end_token_id": 36}

DECODERS = {
    "Apertus": Case("ApertusConfig", "ApertusForCausalLM", text, DECODER),
    "BLOOM": Case("BloomConfig", "BloomForCausalLM", text,
                  {"hidden_size": 16, "n_layer": 4, "n_head": 4, "vocab_size": 40}),
    "Cohere": Case("CohereConfig", "CohereForCausalLM", text, DECODER),
    "Cohere 2": Case("Cohere2Config", "Cohere2ForCausalLM", text, {**DECODER, "sliding_window": 8}),
    "EXAONE 4": Case("Exaone4Config", "Exaone4ForCausalLM", text, {**DECODER, "sliding_window": 8}),
    "Falcon": Case("FalconConfig", "FalconForCausalLM", text, SMALL),
    "Gemma": Case("GemmaConfig", "GemmaForCausalLM", text, DECODER),
    "Gemma 2": Case("Gemma2Config", "Gemma2ForCausalLM", text, {**DECODER, "sliding_window": 8}),
    "Gemma 3, text": Case("Gemma3TextConfig", "Gemma3ForCausalLM", text,
                          {**DECODER, "sliding_window": 8, "sliding_window_pattern": 2}),
    "Gemma 3n, text": Case("Gemma3nTextConfig", "Gemma3nForCausalLM", text,
                           {**PER_LAYER, "altup_num_inputs": 2, "laurel_rank": 4,
                            "activation_sparsity_pattern": [0.0] * 4}),
    "Gemma 4, text": Case("Gemma4TextConfig", "Gemma4ForCausalLM", text, {**PER_LAYER, "global_head_dim": 4}),
    "GLM 4": Case("Glm4Config", "Glm4ForCausalLM", text, DECODER),
    "GPT-2": Case("GPT2Config", "GPT2LMHeadModel", text, GPT),
    "GPT-J": Case("GPTJConfig", "GPTJForCausalLM", text, {**GPT, "rotary_dim": 4}),
    "GPT-Neo": Case("GPTNeoConfig", "GPTNeoForCausalLM", text,
                    {"hidden_size": 16, "num_layers": 4, "num_heads": 4, "vocab_size": 40, "bos_token_id": 1,
                     "eos_token_id": 2, "max_position_embeddings": 64, "attention_types": [[["global", "local"], 2]]}),
    "GPT-NeoX": Case("GPTNeoXConfig", "GPTNeoXForCausalLM", text, SMALL),
    "Granite": Case("GraniteConfig", "GraniteForCausalLM", text, DECODER),
    "Llama": Case("LlamaConfig", "LlamaForCausalLM", text, DECODER),
    "Llama, head tied": Case("LlamaConfig", "LlamaForCausalLM", text, {**DECODER, "tie_word_embeddings": True}),
    "Mistral": Case("MistralConfig", "MistralForCausalLM", text, DECODER),
    "MPT": Case("MptConfig", "MptForCausalLM", text,
                {"d_model": 16, "n_layers": 4, "n_heads": 4, "vocab_size": 40, "max_seq_len": 64}),
    "Nemotron": Case("NemotronConfig", "NemotronForCausalLM", text, DECODER),
    "OLMo 2": Case("Olmo2Config", "Olmo2ForCausalLM", text, DECODER),
    "OLMo 3": Case("Olmo3Config", "Olmo3ForCausalLM", text, {**DECODER, "sliding_window": 8}),
    "OPT": Case("OPTConfig", "OPTForCausalLM", text, {**SMALL, "ffn_dim": 24, "word_embed_proj_dim": 16}),
    "Phi": Case("PhiConfig", "PhiForCausalLM", text, SMALL),
    "Phi 3": Case("Phi3Config", "Phi3ForCausalLM", text, DECODER),
    "Qwen 2": Case("Qwen2Config", "Qwen2ForCausalLM", text, DECODER),
    "Qwen 3": Case("Qwen3Config", "Qwen3ForCausalLM", text, DECODER),
    "SmolLM 3": Case("SmolLM3Config", "SmolLM3ForCausalLM", text, DECODER),
    "StableLM": Case("StableLmConfig", "StableLmForCausalLM", text, DECODER),
    "StarCoder 2": Case("Starcoder2Config", "Starcoder2ForCausalLM", text, DECODER),
}
MIXTURES = {
    "DeepSeek V2": Case("DeepseekV2Config", "DeepseekV2ForCausalLM", text,
                        {**SMALL, **LATENT, **ROUTED, "n_shared_experts": 1}),
    "DeepSeek V3": Case("DeepseekV3Config", "DeepseekV3ForCausalLM", text, {**SMALL, **LATENT, **ROUTED}),
    "DeepSeek V3, predicting": Case("DeepseekV3Config", "DeepseekV3ForCausalLM", text,
                                    {**SMALL, **LATENT, **ROUTED, "num_nextn_predict_layers": 1}, "model.layers.4"),
    "GLM 4 MoE": Case("Glm4MoeConfig", "Glm4MoeForCausalLM", text, {**DECODER, **ROUTED}),
    "GLM 4 MoE, predicting": Case("Glm4MoeConfig", "Glm4MoeForCausalLM", text,
                                  {**DECODER, **ROUTED, "num_nextn_predict_layers": 1}, "model.layers.4"),
    "gpt-oss": Case("GptOssConfig", "GptOssForCausalLM", text,
                    {**DECODER, "num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": 8}),
    "Granite MoE": Case("GraniteMoeConfig", "GraniteMoeForCausalLM", text, {**DECODER, "num_local_experts": 3}),
    "Llama 4, text": Case("Llama4TextConfig", "Llama4ForCausalLM", text,
                          {**DECODER, "num_local_experts": 2, "intermediate_size_mlp": 24, "attention_chunk_size": 8}),
    "Mixtral": Case("MixtralConfig", "MixtralForCausalLM", text, {**DECODER, "num_local_experts": 3}),
    "OLMoE": Case("OlmoeConfig", "OlmoeForCausalLM", text, {**DECODER, "num_experts": 3, "num_experts_per_tok": 2}),
    "Phi 3.5 MoE": Case("PhimoeConfig", "PhimoeForCausalLM", text, {**DECODER, "num_local_experts": 3}),
    "Qwen 2 MoE": Case("Qwen2MoeConfig", "Qwen2MoeForCausalLM", text,
                       {**DECODER, **EXPERTS, "shared_expert_intermediate_size": 8}),
    "Qwen 3 MoE": Case("Qwen3MoeConfig", "Qwen3MoeForCausalLM", text, {**DECODER, **EXPERTS, "mlp_only_layers": [1]}),
}
STATE_SPACES = {
    "Bamba": Case("BambaConfig", "BambaForCausalLM", text,
                  {**DECODER, **STATE_HEADS, "attn_layer_indices": [1, 3], "mamba_chunk_size": 8}),
    "Falcon H1": Case("FalconH1Config", "FalconH1ForCausalLM", text,
                      {**DECODER, **STATE_HEADS, "mamba_d_ssm": 16, "mamba_d_head": 4, "mamba_chunk_size": 8}),
    "Granite 4": Case("GraniteMoeHybridConfig", "GraniteMoeHybridForCausalLM", text,
                      {**DECODER, **STATE_HEADS, "num_local_experts": 3, "shared_intermediate_size": 24,
                       "layer_types": ["mamba", "attention", "mamba", "attention"]}),
    "Jamba": Case("JambaConfig", "JambaForCausalLM", text,
                  {**SMALL, "num_key_value_heads": 2, "num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1,
                   "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 4, "mamba_d_conv": 2,
                   "mamba_dt_rank": 2}),
    "LFM 2": Case("Lfm2Config", "Lfm2ForCausalLM", text,
                  {**DECODER, "layer_types": ["conv", "full_attention", "conv", "full_attention"]}),
    "Mamba": Case("MambaConfig", "MambaForCausalLM", text, {**STATES, "time_step_rank": 2}),
    "Mamba 2": Case("Mamba2Config", "Mamba2ForCausalLM", text,
                    {**STATES, "num_heads": 4, "head_dim": 8, "n_groups": 1, "chunk_size": 8}),
    "Nemotron H": Case("NemotronHConfig", "NemotronHForCausalLM", text, HYBRID),
    "Qwen 3 Next": Case("Qwen3NextConfig", "Qwen3NextForCausalLM", text, NEXT),
    "Qwen 3 Next, predicting": Case("Qwen3NextConfig", "Qwen3NextForCausalLM", text,
                                    {**NEXT, "mtp_num_hidden_layers": 1}, "mtp.layers.0"),
    "RecurrentGemma": Case("RecurrentGemmaConfig", "RecurrentGemmaForCausalLM", text,
                           {**DECODER, "lru_width": 16, "attention_window_size": 8}),
    "RWKV": Case("RwkvConfig", "RwkvForCausalLM", text,
                 {"hidden_size": 16, "attention_hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4,
                  "vocab_size": 40, "context_length": 64}),
}
ENCODERS = {
    "ALBERT": Case("AlbertConfig", "AlbertForMaskedLM", text, {**SMALL, "embedding_size": 8}),
    "BERT": Case("BertConfig", "BertForMaskedLM", text, SMALL),
    "DeBERTa v2": Case("DebertaV2Config", "DebertaV2ForMaskedLM", text, SMALL),
    "DistilBERT": Case("DistilBertConfig", "DistilBertForMaskedLM", text,
                       {"dim": 16, "hidden_dim": 24, "n_layers": 4, "n_heads": 4, "vocab_size": 40,
                        "max_position_embeddings": 64}),
    "ELECTRA": Case("ElectraConfig", "ElectraForPreTraining", text, {**SMALL, "embedding_size": 16}),
    "ESM": Case("EsmConfig", "EsmForMaskedLM", text, {**SMALL, "num_attention_heads": 2, "mask_token_id": 3,
                                                      "position_embedding_type": "absolute"}),
    "ModernBERT": Case("ModernBertConfig", "ModernBertForMaskedLM", text,
                       {**SMALL, "cls_token_id": 1, "sep_token_id": 2}),
    "MPNet": Case("MPNetConfig", "MPNetModel", text, SMALL),
    "RoBERTa, classifier": Case("RobertaConfig", "RobertaForSequenceClassification", text, SMALL),
    "XLM-RoBERTa": Case("XLMRobertaConfig", "XLMRobertaForMaskedLM", text, SMALL),
}
TRANSLATORS = {
    "BART": Case("BartConfig", "BartForConditionalGeneration", both, {**TWO_SIDES, "max_position_embeddings": 64}),
    "Marian": Case("MarianConfig", "MarianMTModel", both,
                   {**TWO_SIDES, "decoder_layers": 4, "max_position_embeddings": 64}),
    "T5": Case("T5Config", "T5ForConditionalGeneration", both, T5),
    "Whisper": Case("WhisperConfig", "WhisperForConditionalGeneration", spectrum,
                    {**TWO_SIDES, "num_mel_bins": 8, "max_source_positions": 8, "max_target_positions": 16}),
}
SIGHT_AND_SOUND = {
    "BEiT": Case("BeitConfig", "BeitModel", image, VISION),
    "CLIP": Case("CLIPConfig", "CLIPModel", captioned,
                 {"text_config": {**SMALL, "projection_dim": 8}, "vision_config": {**VISION, "projection_dim": 8},
                  "projection_dim": 8}),
    "ConvNeXt": Case("ConvNextConfig", "ConvNextModel", large_image,
                     {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 2, 1], "image_size": 32}),
    "DeiT": Case("DeiTConfig", "DeiTModel", image, VISION),
    "DINOv2": Case("Dinov2Config", "Dinov2Model", image, VISION),
    "SigLIP": Case("SiglipConfig", "SiglipModel", captioned, {"text_config": SMALL, "vision_config": VISION}),
    "Swin": Case("SwinConfig", "SwinModel", image,
                 {"image_size": 8, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2],
                  "window_size": 2}),
    "ViT, classifier": Case("ViTConfig", "ViTForImageClassification", image, VISION),
    "wav2vec 2.0": Case("Wav2Vec2Config", "Wav2Vec2ForCTC", sound,
                        {**SMALL, "conv_dim": [8, 8], "conv_stride": [5, 2], "conv_kernel": [10, 3],
                         "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}),
    "wav2vec 2.0, classifier": Case("Wav2Vec2Config", "Wav2Vec2ForSequenceClassification", sound,
                                    {**SMALL, "conv_dim": [8, 8], "conv_stride": [5, 2], "conv_kernel": [10, 3],
                                     "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
                                     "use_weighted_layer_sum": True, "classifier_proj_size": 8}),
}
LOOKERS = {
    "Gemma 3": Case("Gemma3Config", "Gemma3ForConditionalGeneration", looking(4),
                    {"vision_config": VISION, "text_config": {**DECODER, "sliding_window": 8},
                     "image_token_index": _IMAGE, "mm_tokens_per_image": 4, "boi_token_index": 37,
                     "eoi_token_index": 38}),
    "Gemma 4": Case("Gemma4Config", "Gemma4ForConditionalGeneration", looking_at_places,
                    {"text_config": {**PER_LAYER, "global_head_dim": 4}, "audio_config": None,
                     "vision_config": {**VISION, "num_key_value_heads": 4, "head_dim": 4, "position_embedding_size": 16,
                                       "pooling_kernel_size": 2},
                     "image_token_id": _IMAGE, "video_token_id": 38, "boi_token_id": 37, "eoi_token_id": 36}),
    "InternVL": Case("InternVLConfig", "InternVLForConditionalGeneration", looking(1),
                     {"vision_config": {**VISION, "image_size": [8, 8], "patch_size": [4, 4]}, "image_seq_length": 1,
                      "text_config": {"model_type": "qwen2", **DECODER}, "image_token_id": _IMAGE}),
    "LLaVA": Case("LlavaConfig", "LlavaForConditionalGeneration", looking(4),
                  {"vision_config": {"model_type": "clip_vision_model", **VISION},
                   "text_config": {"model_type": "llama", **DECODER}, "image_token_index": _IMAGE}),
    "Mistral 3": Case("Mistral3Config", "Mistral3ForConditionalGeneration",
                      lambda: {**looking(2)(), "pixel_values": _noise(1, 3, 8, 16),
                               "image_sizes": torch.tensor([[8, 16]])},
                      {"vision_config": {"model_type": "pixtral", **VISION, "image_size": 16},
                       "text_config": {"model_type": "mistral", **DECODER}, "image_token_index": _IMAGE,
                       "spatial_merge_size": 2}),
    "PaliGemma": Case("PaliGemmaConfig", "PaliGemmaForConditionalGeneration", looking(4),
                      {"vision_config": {"model_type": "siglip_vision_model", **VISION},
                       "text_config": {"model_type": "gemma", **DECODER}, "image_token_index": _IMAGE,
                       "projection_dim": 16}),
    "Qwen 2 VL": Case("Qwen2VLConfig", "Qwen2VLForConditionalGeneration", looking_at_patches(96),
                      {"text_config": QWEN_TEXT, **QWEN_IDS,
                       "vision_config": {"depth": 4, "embed_dim": 16, "hidden_size": 16, "num_heads": 4,
                                         "mlp_ratio": 2, "patch_size": 4}}),
    "Qwen 2.5 VL": Case("Qwen2_5_VLConfig", "Qwen2_5_VLForConditionalGeneration", looking_at_patches(96),
                        {"text_config": QWEN_TEXT, **QWEN_IDS,
                         "vision_config": {"depth": 4, "hidden_size": 16, "intermediate_size": 24, "num_heads": 4,
                                           "out_hidden_size": 16, "patch_size": 4, "window_size": 16,
                                           "fullatt_block_indexes": [1, 3]}}),
    "Qwen 3 VL": Case("Qwen3VLConfig", "Qwen3VLForConditionalGeneration", looking_at_patches(96),
                      {"text_config": QWEN_TEXT, **QWEN_IDS,
                       "vision_config": {"depth": 4, "hidden_size": 16, "intermediate_size": 24, "num_heads": 4,
                                         "out_hidden_size": 16, "patch_size": 4, "num_position_embeddings": 16,
                                         "deepstack_visual_indexes": [1]}}),
    "SmolVLM": Case("SmolVLMConfig", "SmolVLMForConditionalGeneration",
                    lambda: {**looking(1)(), "pixel_values": _noise(1, 1, 3, 8, 8)},
                    {"vision_config": VISION, "text_config": {"model_type": "llama", **DECODER},
                     "image_token_id": _IMAGE, "scale_factor": 2}),
}
# fmt: on
GROUPS: Mapping[str, Mapping[str, Case]] = {
    "Language models": DECODERS,
    "Mixtures of experts": MIXTURES,
    "State spaces and hybrids": STATE_SPACES,
    "Encoders": ENCODERS,
    "Encoder and decoder": TRANSLATORS,
    "Vision and sound": SIGHT_AND_SOUND,
    "Vision and language": LOOKERS,
}
CASES: Mapping[str, Case] = {name: case for group in GROUPS.values() for name, case in group.items()}
