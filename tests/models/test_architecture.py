"""What tensor names tell: name lists as they stand in published checkpoints of many architectures."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from merger.models.architecture import (
    DEFAULT,
    Architecture,
    Place,
    is_before_layers,
    is_buffer,
    is_embedding,
    is_head,
    matrix_shape,
)

ATTENTION = ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight", "self_attn.o_proj.weight")
LLAMA = (*ATTENTION, "mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight", "input_layernorm.weight")
BERT = (
    "attention.self.query.weight",
    "attention.output.LayerNorm.gamma",
    "intermediate.dense.weight",
    "output.dense.bias",
)
VIT = ("norm1.weight", "attn.qkv.weight", "attn.proj.bias", "mlp.fc1.weight")


@dataclass(frozen=True)
class Case:
    """A checkpoint's names.

    Args:
        stacks: each stack's layers and the roles in each of them.
        before: what is outside of all and acts before the layers, the tokens' embedding first.
        after: what is outside of all and acts after them.
        embedding: whether the first of `before` holds a row for each token.
        head: the last of `after` makes logits.
    """

    stacks: dict[str, tuple[int, tuple[str, ...]]]
    before: tuple[str, ...]
    after: tuple[str, ...]
    embedding: bool = True
    head: bool = True

    @property
    def names(self) -> list[str]:
        inside = [
            f"{s}.{n}.{role}" for s, (count, roles) in self.stacks.items() for n in range(count) for role in roles
        ]
        return [*self.before, *inside, *self.after]


EMBED, LAST = ("model.embed_tokens.weight",), ("model.norm.weight", "lm_head.weight")
EXPERTS = tuple(f"mlp.experts.{n}.{part}_proj.weight" for n in range(12) for part in ("gate", "up", "down"))
CASES = {
    "llama": Case({"model.layers": (32, LLAMA)}, EMBED, LAST),
    "one layer": Case({"model.layers": (1, LLAMA)}, EMBED, LAST),
    "llama for sequences": Case({"model.layers": (4, LLAMA)}, EMBED, ("model.norm.weight", "score.weight"), head=False),
    "mixture": Case({"model.layers": (27, (*ATTENTION, *EXPERTS, "mlp.gate.weight"))}, EMBED, LAST),
    "gpt2 of the Hub": Case({"h": (12, ("attn.bias", "attn.c_attn.weight", "ln_1.weight", "mlp.c_fc.weight"))},
                            ("wte.weight", "wpe.weight"), ("ln_f.weight", "ln_f.bias"), head=False),
    "gpt2": Case({"transformer.h": (12, ("attn.c_attn.weight", "ln_1.weight", "mlp.c_fc.weight"))},
                 ("transformer.wte.weight", "transformer.wpe.weight"), ("transformer.ln_f.weight", "lm_head.weight")),
    "gpt-neox": Case({"gpt_neox.layers": (6, ("attention.query_key_value.weight", "attention.rotary_emb.inv_freq",
                                              "attention.masked_bias", "mlp.dense_h_to_4h.bias"))},
                     ("gpt_neox.embed_in.weight",), ("gpt_neox.final_layer_norm.bias", "embed_out.weight")),
    "bloom": Case({"h": (24, ("input_layernorm.weight", "mlp.dense_4h_to_h.bias"))},
                  ("word_embeddings.weight", "word_embeddings_layernorm.weight"), ("ln_f.bias",), head=False),
    "falcon": Case({"transformer.h": (32, ("ln_attn.weight", "self_attention.query_key_value.weight"))},
                   ("transformer.word_embeddings.weight",), ("transformer.ln_f.bias", "lm_head.weight")),
    "mpt": Case({"transformer.blocks": (3, ("norm_1.weight", "attn.Wqkv.weight"))}, ("transformer.wte.weight",),
                ("transformer.norm_f.weight",), head=False),
    "chatglm": Case({"transformer.encoder.layers": (28, ("self_attention.dense.weight", "mlp.dense_h_to_4h.weight"))},
                    ("transformer.embedding.word_embeddings.weight", "transformer.rotary_pos_emb.inv_freq"),
                    ("transformer.encoder.final_layernorm.weight", "transformer.output_layer.weight")),
    "internlm2": Case({"model.layers": (24, ("attention.wqkv.weight", "feed_forward.w1.weight", "ffn_norm.weight"))},
                      ("model.tok_embeddings.weight",), ("model.norm.weight", "output.weight")),
    "mamba": Case({"backbone.layers": (24, ("mixer.A_log", "mixer.D", "mixer.conv1d.weight", "norm.weight"))},
                  ("backbone.embeddings.weight",), ("backbone.norm_f.weight",), head=False),
    "bert": Case({"bert.encoder.layer": (12, BERT)},
                 ("bert.embeddings.word_embeddings.weight", "bert.embeddings.position_ids",
                  "bert.embeddings.LayerNorm.gamma"),
                 ("bert.pooler.dense.weight", "cls.predictions.bias", "cls.seq_relationship.weight"), head=False),
    "distilbert": Case({"distilbert.transformer.layer": (6, ("attention.q_lin.weight", "ffn.lin1.weight"))},
                       ("distilbert.embeddings.word_embeddings.weight",), ("vocab_projector.bias",), head=False),
    "t5": Case({"encoder.block": (6, ("layer.0.SelfAttention.q.weight", "layer.1.DenseReluDense.wi_0.weight")),
                "decoder.block": (6, ("layer.0.SelfAttention.q.weight", "layer.1.EncDecAttention.k.weight"))},
               ("shared.weight",), ("encoder.final_layer_norm.weight", "lm_head.weight")),
    "whisper": Case({"model.encoder.layers": (4, ("self_attn.q_proj.weight", "fc1.bias")),
                     "model.decoder.layers": (4, ("encoder_attn.q_proj.weight", "fc1.bias"))},
                    ("model.decoder.embed_tokens.weight", "model.encoder.embed_positions.weight"),
                    ("model.encoder.conv1.weight", "model.decoder.layer_norm.weight", "proj_out.weight"), head=False),
    "qwen2.5-vl": Case({"visual.blocks": (32, VIT), "model.layers": (28, LLAMA)},
                       (*EMBED, "visual.patch_embed.proj.weight"),
                       ("visual.merger.mlp.0.weight", "visual.merger.mlp.2.weight", *LAST)),
    "llava": Case({"language_model.model.layers": (2, LLAMA),
                   "vision_tower.vision_model.encoder.layers": (3, ("self_attn.q_proj.weight", "layer_norm1.bias"))},
                  ("language_model.model.embed_tokens.weight",
                   "vision_tower.vision_model.embeddings.patch_embedding.weight"),
                  ("multi_modal_projector.linear_1.weight", "language_model.lm_head.weight")),
    "open-clip": Case({"transformer.resblocks": (12, ("ln_1.weight", "attn.in_proj_weight")),
                       "visual.transformer.resblocks": (12, ("ln_1.weight", "attn.in_proj_weight"))},
                      ("token_embedding.weight", "positional_embedding"),
                      ("text_projection", "visual.proj", "logit_scale"), head=False),
    "a name nobody knows": Case({"net.towers": (5, ("a.weight", "b.weight", "c.weight", "d.bias"))},
                                ("net.position_embeddings.weight",), ("net.out.weight",), embedding=False, head=False),
}  # fmt: skip
every_case = pytest.mark.parametrize("name", CASES)


@every_case
def test_stacks_and_layers_are_read_off_the_names(name: str) -> None:
    """Each stack with its number of layers, and nothing else is one."""
    case = CASES[name]
    found = Architecture(case.names)
    assert found.stacks == {stack: count for stack, (count, _) in case.stacks.items()}


@every_case
def test_each_tensor_has_its_place(name: str) -> None:
    """Stack, layer and role inside; outside the name itself; and the place leads back to the name."""
    case = CASES[name]
    found = Architecture(case.names)
    for stack, (count, roles) in case.stacks.items():
        for layer in range(count):
            for role in roles:
                place = found.place(f"{stack}.{layer}.{role}")
                assert place == Place(stack, layer, role)
                assert place.at_layer(layer + 100) == f"{stack}.{layer + 100}.{role}"
    for tensor in (*case.before, *case.after):
        assert found.place(tensor) == Place(None, None, tensor)


@every_case
def test_a_single_stack_is_the_whole_model_and_several_are_modules(name: str) -> None:
    """`modules:` names the stacks where there are several, and `default` for the rest."""
    case = CASES[name]
    found = Architecture(case.names)
    several = len(case.stacks) > 1
    assert found.modules == ((*case.stacks, DEFAULT) if several else (DEFAULT,))
    for stack, (_, roles) in case.stacks.items():
        assert found.module(f"{stack}.0.{roles[0]}") == (stack if several else DEFAULT)
    assert {found.module(tensor) for tensor in (*case.before, *case.after)} == {DEFAULT}


@every_case
def test_what_is_outside_the_stacks_acts_before_or_after_them(name: str) -> None:
    """Embeddings before, norms, projections and heads after."""
    case = CASES[name]
    assert [tensor for tensor in (*case.before, *case.after) if is_before_layers(tensor)] == list(case.before)


@every_case
def test_embedding_and_head_are_known_by_name(name: str) -> None:
    """No layer's tensor is taken for one."""
    case = CASES[name]
    outside = (*case.before, *case.after)
    assert [tensor for tensor in outside if is_embedding(tensor)] == list(case.before[: int(case.embedding)])
    assert [tensor for tensor in outside if is_head(tensor)] == list(case.after[-1:] if case.head else ())


@pytest.mark.parametrize(("names", "why"), [
    (["a.layers.0.w", "a.layers.2.w"], "a gap"),
    (["a.layers.1.w", "a.layers.2.w"], "counts from one"),
    (["layers.0.wte.weight", "layers.1.ln.weight", "layers.2.ln.weight"], "layers with nothing in common"),
    (["classifier.0.weight", "classifier.3.weight"], "a gap, and not called so"),
    (["merger.mlp.0.weight", "merger.mlp.1.weight", "merger.mlp.2.weight"], "one tensor each, and not called so"),
    (["a.layers.weight", "a.layers.0"], "no role"),
    (["a.layers.00.w", "a.layers.01.w"], "numbers that would be written otherwise"),
    (["a.layers." + "9" * 5000 + ".w", "a.layers.١.w"], "no numbers of layers"),
])  # fmt: skip
def test_what_only_looks_like_a_stack_is_none(names: list[str], why: str) -> None:
    """Numbers in names mean layers only where they count from zero and the layers are alike."""
    found = Architecture(names)
    assert found.stacks == {}, why
    assert [found.place(name) for name in names] == [Place(None, None, name) for name in names]


MATRICES = {
    # gpt-oss, Llama 4, Qwen3.5 MoE, Nemotron-H, Aria, Granite MoE, JetMoE, Step, Zamba, RecurrentGemma, CSM
    ("model.layers.0.mlp.experts.gate_up_proj", (32, 2880, 5760)): (2880, 5760),
    ("language_model.model.layers.0.feed_forward.experts.down_proj", (16, 8192, 5120)): (8192, 5120),
    ("model.language_model.layers.0.mlp.experts.down_proj", (256, 2048, 512)): (2048, 512),
    ("backbone.layers.1.mixer.experts.up_proj", (128, 1856, 2688)): (1856, 2688),
    ("language_model.model.layers.0.mlp.experts.fc1.weight", (64, 2560, 3328)): (2560, 3328),
    ("model.layers.0.block_sparse_moe.input_linear.weight", (32, 1024, 1024)): (1024, 1024),
    ("model.layers.0.mlp.output_linear.weight", (8, 2048, 5632)): (2048, 5632),
    ("model.layers.0.self_attention.experts.input_linear.weight", (8, 2048, 2048)): (2048, 2048),
    ("model.layers.4.moe.down_proj.weight", (48, 7168, 5120)): (7168, 5120),
    ("model.layers.0.mamba.x_proj_weight", (2, 264, 3712)): (264, 3712),
    ("model.layers.0.temporal_block.rg_lru.input_gate_weight", (10, 256, 256)): (256, 256),
    ("depth_decoder.codebooks_head.weight", (31, 1024, 2051)): (1024, 2051),
    # kernels, also those of numbered experts, and what is three-dimensional for other reasons (XLNet, positions)
    ("vision_tower.patch_embed.proj.weight", (1280, 3, 2, 14, 14)): (1280, 1176),
    ("model.layers.0.linear_attn.conv1d.weight", (8192, 1, 4)): (8192, 4),
    ("encoder.conv1.weight", (384, 80, 3)): (384, 240),
    ("model.layers.0.block_sparse_moe.experts.0.conv.weight", (8, 4, 3)): (8, 12),
    ("transformer.layer.0.rel_attn.q", (1024, 16, 64)): (1024, 1024),
    ("encoder.position_embeddings", (1, 197, 768)): (1, 151296),
    # two dimensions and fewer: biases of all experts, too, and experts side by side in rows (DBRX)
    ("model.layers.0.mlp.experts.gate_up_proj_bias", (32, 5760)): (32, 5760),
    ("transformer.blocks.0.ffn.experts.mlp.w1", (172032, 6144)): (172032, 6144),
    ("model.norm.weight", (64,)): (64,),
    ("logit_scale", ()): (),
}  # fmt: skip


@pytest.mark.parametrize(("name", "shape"), MATRICES)
def test_the_matrix_of_a_tensor(name: str, shape: tuple[int, ...]) -> None:
    """An expert of a stack, a kernel unfolded; what is no matrix keeps its shape."""
    assert matrix_shape(name, shape) == MATRICES[name, shape]


def test_layers_of_two_kinds_are_one_stack() -> None:
    """A hybrid's layers share their norms; the layer is the first number, whatever numbers follow."""
    names = [f"model.layers.{n}.input_layernorm.weight" for n in range(12)]
    names += [f"model.layers.{n}.{'mamba.A_log' if n % 2 else 'self_attn.q_proj.weight'}" for n in range(12)]
    names += [f"model.layers.11.feed_forward.experts.{n}.up_proj.weight" for n in range(3)]
    found = Architecture(names)
    assert found.stacks == {"model.layers": 12}
    assert found.place("model.layers.11.feed_forward.experts.2.up_proj.weight").layer == 11


@pytest.mark.parametrize("name", [
    "model.layers.0.self_attn.rotary_emb.inv_freq", "transformer.rotary_pos_emb.inv_freq", "rope.freqs",
    "transformer.h.0.attn.bias", "h.3.attn.masked_bias", "gpt_neox.layers.0.attention.masked_bias",
    "bert.embeddings.position_ids", "roberta.embeddings.token_type_ids", "model.rotary_emb.cos_cached",
])  # fmt: skip
def test_constants_that_old_checkpoints_carry_are_known(name: str) -> None:
    """They are computed from the config, so no arithmetic is done on them."""
    assert is_buffer(name)


@pytest.mark.parametrize("name", [
    "transformer.h.0.attn.c_attn.bias", "model.layers.0.self_attn.q_proj.bias", "lm_head.bias",
    "embed_positions.weight", "token_type_embeddings.weight", "model.layers.0.self_attn.bias",
])  # fmt: skip
def test_trained_biases_and_positions_are_no_constants(name: str) -> None:
    """A name must end in a constant's whole name."""
    assert not is_buffer(name)
