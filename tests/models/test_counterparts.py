"""Names of one model as its classes and its published files have them: one is found by another, or it is not clear."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from merger.models.lora.counterparts import Shape, counterparts

GEMMA = {
    "language_model.model.embed_tokens.weight": (40, 16),
    "language_model.model.norm.weight": (16,),
    "vision_tower.vision_model.post_layernorm.weight": (16,),
    "multi_modal_projector.mm_soft_emb_norm.weight": (16,),
    **{f"language_model.model.layers.{n}.{role}.weight": (16, 16) for n in range(3) for role in
       ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")},
    **{f"vision_tower.vision_model.encoder.layers.{n}.{role}.weight": (16, 16) for n in range(3) for role in
       ("self_attn.q_proj", "self_attn.out_proj")},
}  # fmt: skip
QWEN = {
    "lm_head.weight": (40, 16),
    "model.embed_tokens.weight": (40, 16),
    "model.norm.weight": (16,),
    "visual.merger.mlp.0.weight": (16, 16),
    "visual.merger.mlp.2.weight": (16, 16),
    **{f"model.layers.{n}.{role}.weight": (16, 16) for n in range(3) for role in ("self_attn.q_proj", "mlp.down_proj")},
    **{f"visual.blocks.{n}.{role}.weight": (16, 16) for n in range(3) for role in ("attn.qkv", "mlp.down_proj")},
}


def renamed(tensors: Mapping[str, Shape], *changes: tuple[str, str]) -> dict[str, Shape]:
    """With other first words."""
    found = dict(tensors)
    for before, after in changes:
        found = {after + name.removeprefix(before) if name.startswith(before) else name: of
                 for name, of in found.items()}  # fmt: skip
    return found


MISTRAL = renamed(GEMMA, ("vision_tower.vision_model.encoder.", "vision_tower.transformer."))
QWEN_3_5 = renamed(QWEN, ("model.", "model.language_model."), ("visual.", "model.visual."))
SAVED_ANEW = renamed(GEMMA, ("language_model.model.", "model.language_model."),
                     ("vision_tower.vision_model.", "model.vision_tower."))  # fmt: skip
CLIP = {
    **{f"text_model.encoder.layers.{n}.self_attn.{role}.weight": (16, 16) for n in range(2) for role in ("k", "q")},
    **{f"vision_model.encoder.layers.{n}.self_attn.{role}.weight": (16, 16 if role == "q" else 8)
       for n in range(2) for role in ("k", "q")},
}  # fmt: skip
OMNI = {f"{part}.model.layers.0.q.weight": (size, 16) for part, size in {"thinker": 16, "talker": 8}.items()}
TEXT = {"embed_tokens.weight": (40, 16), **{f"layers.{n}.self_attn.q_proj.weight": (16, 16) for n in range(3)}}
SEAMLESS = {f"{part}.layers.0.q.weight": (16, 16) for part in ("text_encoder", "text_decoder", "speech_encoder")}
TWO_EYES = {f"{part}.encoder.layers.0.q.weight": (16, 16) for part in ("vision_tower", "vision_model")}

Q, DOWN = "layers.1.self_attn.q_proj.weight", "layers.1.mlp.down_proj.weight"
CASES: Mapping[str, tuple[Mapping[str, Shape], Mapping[str, Sequence[str]]]] = {
    "Gemma 3": (GEMMA, {
        f"model.language_model.{Q}": [f"language_model.model.{Q}"],
        f"model.vision_tower.encoder.{Q}": [f"vision_tower.vision_model.encoder.{Q}"],
        "model.language_model.embed_tokens.weight": ["language_model.model.embed_tokens.weight"],
        "model.language_model.norm.weight": ["language_model.model.norm.weight"],
        "model.vision_tower.post_layernorm.weight": ["vision_tower.vision_model.post_layernorm.weight"],
        "model.multi_modal_projector.mm_soft_emb_norm.weight": ["multi_modal_projector.mm_soft_emb_norm.weight"],
    }),
    "Gemma 3 by earlier classes": (SAVED_ANEW, {
        f"language_model.model.{Q}": [f"model.language_model.{Q}"],
        f"vision_tower.vision_model.encoder.{Q}": [f"model.vision_tower.encoder.{Q}"],
    }),
    "Gemma 3 by its text class": (GEMMA, {f"model.{Q}": [f"language_model.model.{Q}"]}),
    "Gemma 3 by its text class, saved anew": (SAVED_ANEW, {f"model.{Q}": [f"model.language_model.{Q}"]}),
    "Gemma 3 by its text model": (SAVED_ANEW, {Q: [f"model.language_model.{Q}"]}),
    "Gemma 3 by its vision tower": (GEMMA, {f"vision_model.encoder.{Q}": [f"vision_tower.vision_model.encoder.{Q}"]}),
    "Gemma 3 by its vision tower, new": (GEMMA, {f"encoder.{Q}": [f"vision_tower.vision_model.encoder.{Q}"]}),
    "Qwen2.5-VL": (QWEN, {
        f"model.language_model.{DOWN}": [f"model.{DOWN}"],
        "model.visual.blocks.1.mlp.down_proj.weight": ["visual.blocks.1.mlp.down_proj.weight"],
        "model.visual.merger.mlp.2.weight": ["visual.merger.mlp.2.weight"],
        "model.language_model.embed_tokens.weight": ["model.embed_tokens.weight"],
        "lm_head.weight": ["lm_head.weight"],
    }),
    "LLaVA": ({**GEMMA, "language_model.lm_head.weight": (40, 16)}, {
        f"model.language_model.{Q}": [f"language_model.model.{Q}"],
        f"model.vision_tower.encoder.{Q}": [f"vision_tower.vision_model.encoder.{Q}"],
        "lm_head.weight": ["language_model.lm_head.weight"],
    }),
    "Mistral 3": (MISTRAL, {
        f"model.language_model.{Q}": [f"language_model.model.{Q}"],
        f"model.vision_tower.transformer.{Q}": [f"vision_tower.transformer.{Q}"],
    }),
    "Qwen3.5": (QWEN_3_5, {f"model.{DOWN}": [f"model.language_model.{DOWN}"], "lm_head.weight": ["lm_head.weight"]}),
    "Qwen3.5, saved by its text class": (renamed(QWEN, ("visual.", "mtp.visual.")), {
        f"model.language_model.{DOWN}": [f"model.{DOWN}"],
    }),
    "a tower that may be either of two": (CLIP, {
        "encoder.layers.1.self_attn.q.weight":
            ["text_model.encoder.layers.1.self_attn.q.weight", "vision_model.encoder.layers.1.self_attn.q.weight"],
    }),
    "a tower that only one has the sizes of": (CLIP, {
        "encoder.layers.1.self_attn.q.weight": ["text_model.encoder.layers.1.self_attn.q.weight"],
        "encoder.layers.1.self_attn.k.weight": ["text_model.encoder.layers.1.self_attn.k.weight"],
    }),
    "towers neither of which has all of it": (
        {"text_model.layers.0.q.weight": (16, 16), "vision_model.layers.0.k.weight": (16, 16)},
        {"layers.0.q.weight": [], "layers.0.k.weight": []},
    ),
    "a language model that may be either of two": (OMNI | {"talker.model.layers.0.q.weight": (16, 16)}, {
        "model.language_model.layers.0.q.weight": ["thinker.model.layers.0.q.weight", "talker.model.layers.0.q.weight"],
    }),
    "a language model that only one has the sizes of": (OMNI, {
        "model.language_model.layers.0.q.weight": ["thinker.model.layers.0.q.weight"],
    }),
    "no such tower": (TEXT, {
        f"model.vision_tower.{Q}": [], f"vision_tower.vision_model.encoder.{Q}": [], f"language_model.model.{Q}": [Q],
    }),
    "an encoder is no decoder": (SEAMLESS, {
        "model.text_decoder.layers.0.q.weight": ["text_decoder.layers.0.q.weight"],
        "model.text_encoder.layers.0.q.weight": ["text_encoder.layers.0.q.weight"],
        "model.decoder.layers.0.q.weight": [],
    }),
    "two towers of one sense": (TWO_EYES, {
        "model.vision_model.encoder.layers.0.q.weight": ["vision_model.encoder.layers.0.q.weight"],
    }),
    "two of which one is nearer to the tower": (
        {f"{part}.layers.0.q.weight": (16, 16) for part in ("thinker.model", "language_model")},
        {"model.layers.0.q.weight": ["language_model.layers.0.q.weight"]},
    ),
    "two that only have other orders of words": (
        {f"{part}.layers.0.q.weight": (16, 16) for part in ("language_model.model", "model.language_model")},
        {"model.language_model.layers.0.q.weight": ["model.language_model.layers.0.q.weight"]},
    ),
    "what is in a tower is in no other place": ({"vision_tower.transformer.layers.0.q.weight": (16, 16)}, {
        "layers.0.q.weight": [], "model.vision_tower.layers.0.q.weight": [],
        "transformer.layers.0.q.weight": ["vision_tower.transformer.layers.0.q.weight"],
    }),
    "what is in no tower is not in a part of one": ({"backbone.layers.0.q.weight": (16, 16)}, {
        "model.vision_tower.transformer.backbone.layers.0.q.weight": [],
        "layers.0.q.weight": ["backbone.layers.0.q.weight"],
    }),
    "a tower that is itself a stack": ({"visual.0.q.weight": (16, 16), "text.0.q.weight": (16, 16)}, {
        "model.vision_tower.0.q.weight": ["visual.0.q.weight"],
    }),
    "more words than a class has": ({"layers.0.q.weight": (16, 16)}, {
        "a.b.c.layers.0.q.weight": ["layers.0.q.weight"], "a.b.c.d.layers.0.q.weight": [],
    }),
    "a side is no other's": ({"decoder.layers.0.q.weight": (16, 16)}, {
        "model.decoder.layers.0.q.weight": ["decoder.layers.0.q.weight"],
        "model.encoder.layers.0.q.weight": [], "layers.0.q.weight": [],
    }),
    "a side within a side": (
        {"encoder.encoder.layer.0.q.weight": (16, 16), "decoder.encoder.layer.0.cross.weight": (16, 16)},
        {"vit.encoder.layer.0.q.weight": ["encoder.encoder.layer.0.q.weight"]},
    ),
    "a decoder that reads text is no encoder that does": ({"text_encoder.layers.0.q.weight": (16, 16)}, {
        "text_decoder.layers.0.q.weight": [],
        "model.text_encoder.layers.0.q.weight": ["text_encoder.layers.0.q.weight"],
    }),
    "a class's own prefix": ({"h.0.q.weight": (16, 16)}, {"transformer.h.0.q.weight": ["h.0.q.weight"]}),
    "another class's prefix": ({"bert.encoder.layer.0.q.weight": (16, 16)}, {
        "encoder.layer.0.q.weight": ["bert.encoder.layer.0.q.weight"], "roberta.encoder.layer.0.q.weight": [],
    }),
    "no such layer, no such role": (GEMMA, {
        "model.language_model.layers.7.self_attn.q_proj.weight": [],
        "model.language_model.layers.1.attn.q_proj.weight": [],
        f"model.language_model.{Q}": [f"language_model.model.{Q}"],
    }),
    "a tensor that is in no module": ({"model.probe": (1,), "other.probe": (1,)}, {"probe": ["model.probe"]}),
    "hosts of modules that are alike": ({f"{n}a.layers.0.q.weight": (16, 16) for n in range(200)}, {
        "model.layers.0.q.weight": [],
    }),
}  # fmt: skip


def shape_of(places: Sequence[str], held: Mapping[str, Shape]) -> Shape | None:
    return held[places[0]] if places else (16, 16)


@pytest.mark.parametrize("case", CASES)
def test_a_tensor_is_found_by_layer_role_and_tower(case: str) -> None:
    """One name where it is clear, two that it could be where not, none where nothing is like it."""
    held, expected = CASES[case]
    wanted = {name: shape_of(places, held) for name, places in expected.items()}
    assert counterparts(wanted, held) == expected


@pytest.mark.parametrize("case", CASES)
def test_a_name_of_the_files_is_that_tensor(case: str) -> None:
    """Whatever else is alike."""
    held, _ = CASES[case]
    assert counterparts(held, held) == {name: [name] for name in held}
