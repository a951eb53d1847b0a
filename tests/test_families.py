"""Models that are not a plain causal decoder: other towers are left alone, and what is not supported says so."""

import families
import pytest
import tiny
import torch
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

import kvlib

SNAPKV = kvlib.method("snapkv", budget=0.5)
GREEDY = {"max_new_tokens": 5, "do_sample": False}
IMAGE = 63  # the token that stands for a part of an image


def with_tower(cls, config):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = cls(config).double().eval().requires_grad_(False)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


def llava():
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = LlavaConfig(
        vision_config=vision, text_config=LlamaConfig(**families.SIZE), image_token_index=IMAGE, image_seq_length=4
    )
    return with_tower(LlavaForConditionalGeneration, config)


def qwen2_vl():
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 1}
    text = {**families.SIZE, "rope_parameters": rope}
    return with_tower(
        Qwen2VLForConditionalGeneration,
        Qwen2VLConfig(
            text_config=text, vision_config=vision, image_token_id=IMAGE, video_token_id=62, vision_start_token_id=61
        ),
    )


def gemma3():
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 8, "patch_size": 4}  # fmt: skip
    text = {**families.SIZE, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=IMAGE)
    return with_tower(Gemma3ForConditionalGeneration, config)


def seeing(*shape):
    """Ids with an image in four of them, its pixels, and what marks its tokens."""
    ids = tiny.tokens(*shape).clamp(max=60)
    ids[:, 3:7] = IMAGE
    pixels = torch.randn(len(ids), 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "pixel_values": pixels}


def test_an_image_is_read_by_a_tower_of_its_own():
    model, inputs = llava(), seeing(2, 20)
    stock = model.generate(**inputs, **GREEDY)
    with kvlib.method("full")(model) as run:
        assert torch.equal(model.generate(**inputs, **GREEDY), stock)
        assert model.config.vision_config._attn_implementation == "sdpa"
        assert len(run.cache.layers) == 2
    with SNAPKV(model) as run:
        out = model.generate(**inputs, **GREEDY)
    assert run.stored_bytes() < 0.8 * run.full_bytes()
    blind = inputs | {"pixel_values": -inputs["pixel_values"]}
    assert not torch.equal(model(**inputs).logits, model(**blind).logits)  # the image counts
    assert out.shape == stock.shape
    assert {c._attn_implementation for c in (model.config, model.config.text_config)} == {"sdpa"}


def test_positions_of_several_dimensions_that_are_equal():
    model, ids, mask = qwen2_vl(), *tiny.pad([tiny.tokens(20).clamp(max=60), tiny.tokens(13, seed=1).clamp(max=60)])
    stock = model.generate(input_ids=ids, attention_mask=mask, **GREEDY)
    with kvlib.method("full")(model):
        assert torch.equal(model.generate(input_ids=ids, attention_mask=mask, **GREEDY), stock)
    with kvlib.method("streaming_llm", budget=0.5)(model) as run:
        model.generate(input_ids=ids, attention_mask=mask, **GREEDY)
        assert tiny.kept(run)[0][0][0] == [0, 1, 2, 3, *range(18, 24)]
        with pytest.raises(ValueError, match="position_ids must count the real tokens"):
            model(ids, attention_mask=mask, position_ids=torch.arange(20).expand(3, 2, 20))


def test_images_with_positions_of_several_dimensions():
    model, inputs = qwen2_vl(), seeing(1, 20)
    with SNAPKV(model), pytest.raises(ValueError, match="with pixel_values: positions of several dimensions are not"):
        model(**inputs)


def test_images_that_look_at_themselves():
    model, inputs = gemma3(), seeing(1, 20)
    kinds = {"token_type_ids": (inputs["input_ids"] == IMAGE).long()}
    with SNAPKV(model), pytest.raises(ValueError, match="are to attend to later ones, which kvlib does not support"):
        model(**inputs, **kinds)
    text = tiny.tokens(1, 20).clamp(max=60)
    stock = model.generate(input_ids=text, **GREEDY)
    with kvlib.method("full")(model):
        assert torch.equal(model.generate(input_ids=text, **GREEDY), stock)


@pytest.mark.parametrize(
    ("cls", "config", "message"),
    [
        ("BertLMHeadModel", {}, "BertSelfAttention attends to later tokens too"),
        ("RobertaForCausalLM", {}, "RobertaSelfAttention attends to later tokens too"),
        ("RobertaForCausalLM", {"is_decoder": True, "pad_token_id": 1},
         "RobertaForCausalLM counts positions from its padding token's id, kvlib from 0"),
    ],
)  # fmt: skip
def test_encoders_are_refused(cls, config, message):
    model = families.build(cls, **config)
    with pytest.raises(ValueError, match=message):
        SNAPKV(model)


def test_an_encoder_s_architecture_as_a_decoder():
    model = families.build("BertLMHeadModel", is_decoder=True)
    ids, mask = tiny.pad([tiny.tokens(20), tiny.tokens(13, seed=1)])
    stock = model.generate(ids, attention_mask=mask, **GREEDY)
    with kvlib.method("full")(model):
        assert torch.equal(model.generate(ids, attention_mask=mask, **GREEDY), stock)


def test_a_decoder_that_was_told_to_look_both_ways():
    model = families.build("LlamaForCausalLM", is_causal=False)
    with SNAPKV(model), pytest.raises(ValueError, match="are to attend to later ones"):
        model(tiny.tokens(1, 9))


def test_chunks_hold_until_the_next_would_begin():
    config = {"head_dim": 8, "num_local_experts": 2, "no_rope_layers": [1, 0], "attention_chunk_size": 16}
    model = families.build("Llama4ForCausalLM", torch.float32, **config)
    stock = model.generate(tiny.tokens(1, 11), **GREEDY)
    with kvlib.method("full")(model):
        assert torch.equal(model.generate(tiny.tokens(1, 11), **GREEDY), stock)
        with pytest.raises(ValueError, match="17 tokens exceed the attention chunk of 16 in layer 0"):
            model(tiny.tokens(1, 17))


def test_a_layer_attends_once():
    model = families.build("DiffLlamaForCausalLM")
    with SNAPKV(model) as run:
        for _ in range(2):
            with pytest.raises(ValueError, match="DiffLlamaAttention attends twice in a layer"):
                model(tiny.tokens(1, 9))
        with pytest.raises(ValueError, match="interrupted half-way"):
            model(tiny.tokens(1, 1), past_key_values=run.cache)
