"""Keys are moved to other positions as the model itself rotates them, layer by layer, or not at all."""

import families
import pytest
import tiny
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

import kvlib
from kvlib.core.rotary import Rotary, rotaries, rotate, rotation

HEAD = {"head_dim": 8}
LATENT = {"num_key_value_heads": 4, "moe_intermediate_size": 16, "n_routed_experts": 4, "n_group": 2, "topk_group": 1,
          "num_experts_per_tok": 2, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4,
          "v_head_dim": 6, "first_k_dense_replace": 2}  # fmt: skip
HALVES, NEIGHBOURS = [0, 1, 2, 3, 4, 5, 6, 7], [0, 2, 4, 6, 1, 3, 5, 7]
LAYOUTS = [
    ("LlamaForCausalLM", {}, HALVES),
    ("MistralForCausalLM", {}, HALVES),
    ("Qwen2ForCausalLM", {}, HALVES),
    ("Qwen3ForCausalLM", HEAD, HALVES),
    ("Phi3ForCausalLM", {}, HALVES),
    ("SmolLM3ForCausalLM", {"no_rope_layers": [1]}, HALVES),
    ("SmolLM3ForCausalLM", {"no_rope_layers": [0]}, None),
    ("CohereForCausalLM", {}, NEIGHBOURS),
    ("Cohere2ForCausalLM", {"layer_types": ["sliding_attention"]}, NEIGHBOURS),
    ("Cohere2ForCausalLM", {"layer_types": ["full_attention"]}, None),
    ("Ernie4_5ForCausalLM", HEAD, NEIGHBOURS),
    ("GPTNeoXForCausalLM", {"rope_parameters": {"rope_theta": 100.0, "partial_rotary_factor": 0.5}}, [0, 1, 2, 3]),
    ("PhiForCausalLM", {}, [0, 1, 2, 3]),
    ("GlmForCausalLM", HEAD, [0, 2, 1, 3]),
    ("Gemma3ForCausalLM", {**HEAD, "layer_types": ["sliding_attention"]}, HALVES),
    ("Gemma3ForCausalLM", {**HEAD, "layer_types": ["full_attention"]}, HALVES),
    ("DeepseekV3ForCausalLM", LATENT, [6, 7, 8, 9]),
]
layouts = pytest.mark.parametrize(
    ("cls", "config", "channels"), LAYOUTS, ids=[f"{c[:-11]}-{i}" for i, (c, *_) in enumerate(LAYOUTS)]
)


def one_layer(cls, config, dtype=torch.float64):
    return families.build(cls, dtype, **{**config, "num_hidden_layers": 1})


@layouts
def test_renumbered_tokens_are_read_as_if_there_were_no_others(cls, config, channels):
    # In one layer keys and values depend on the token and its position alone.
    model, ids, seen = one_layer(cls, config), tiny.tokens(1, 48), []
    with torch.no_grad(), kvlib.method("streaming_llm", budget=12)(model) as run:
        model(ids[:, :40])
        for step in range(40, 48):
            kept = run.kept(0)[0, 0].tolist()
            seen.append(([*kept, step], model(ids[:, step : step + 1], past_key_values=run.cache).logits[0, -1]))
    for step, (tokens, logits) in enumerate(seen):
        assert tokens == [0, 1, 2, 3, *range(32 + step, 41 + step)]
        torch.testing.assert_close(logits, model(ids[:, tokens]).logits[0, -1], rtol=0, atol=2e-5)  # float32 angles


@layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_each_family_has_its_layout(cls, config, channels, dtype):
    (rotary,) = rotaries(one_layer(cls, config, dtype))
    assert (None if rotary is None else rotary.channels.tolist()) == channels


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_layers_may_differ(dtype):
    one, other = rotaries(families.build("SmolLM3ForCausalLM", dtype, no_rope_layers=[0, 1]))
    assert one is None and other.channels.tolist() == HALVES
    local, everywhere = rotaries(
        families.build("Gemma3ForCausalLM", dtype, **HEAD, layer_types=["sliding_attention", "full_attention"])
    )
    assert local.frequencies[1].item() == pytest.approx(1e4**-0.25, rel=0.01)
    assert everywhere.frequencies[1].item() == pytest.approx(1e6**-0.25, rel=0.01)


def test_a_few_large_channels_hide_nothing(monkeypatch):
    """As biases make them in some models: neither a layout, nor that it is none of the known ones."""
    model = families.build("Qwen2ForCausalLM", torch.bfloat16)
    for layer in model.model.layers:
        layer.self_attn.k_proj.bias.view(2, 8)[:, 3] = 300
    assert [rotary.channels.tolist() for rotary in rotaries(model)] == [HALVES] * 2
    monkeypatch.setattr("transformers.models.qwen2.modeling_qwen2.rotate_half", lambda x: x.roll(4, -1))
    with pytest.raises(ValueError, match="no known rotary embedding"):
        rotaries(model)


@pytest.mark.parametrize(
    ("cls", "config", "reason"),
    [
        ("GPT2LMHeadModel", {}, "GPT2Attention of layer 0: .* (no known rotary embedding)"),
        ("OPTForCausalLM", {"word_embed_proj_dim": 32}, "OPTAttention of layer 0: .* (no known rotary embedding)"),
        ("LlamaForCausalLM", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
         "LlamaAttention of layer 0: .* with rotary embedding 'dynamic'"),
        ("LlamaForCausalLM",
         {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0, "short_factor": [1.0] * 4,
                              "long_factor": [2.0] * 4, "original_max_position_embeddings": 64}},
         "LlamaAttention of layer 0: .* with rotary embedding 'longrope'"),
    ],
    ids=lambda x: x if isinstance(x, str) and x.endswith("M") else "",
)  # fmt: skip
def test_what_cannot_be_moved_is_refused_at_once(cls, config, reason):
    model = families.build(cls, torch.float32, **config)
    message = reason.replace("(", r"\(").replace(")", r"\)").replace(".*", "keys cannot be moved to other positions")
    with pytest.raises(ValueError, match=message), kvlib.method("streaming_llm", budget=0.5)(model):
        pass
    for method in (kvlib.method("streaming_llm", budget=0.5, renumber=False), kvlib.method("streaming_llm")):
        with method(model):
            model(tiny.tokens(1, 8))


def test_a_layout_that_nobody_knows_is_refused(monkeypatch):
    model = families.build("LlamaForCausalLM")
    monkeypatch.setattr(
        "transformers.models.llama.modeling_llama.rotate_half",
        lambda x: torch.stack([-x.flip(-1)[..., :4], x.flip(-1)[..., 4:]], dim=-1).flatten(-2),
    )
    with pytest.raises(ValueError, match="no known rotary embedding"):
        rotaries(model)


# Turning


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-4), (torch.float16, 1e-2)])
@pytest.mark.parametrize("kind", ["default", "linear", "llama3", "yarn"])
def test_rotating_further_is_rotating_from_scratch(kind, dtype, tolerance):
    scaling = {
        "default": {},
        "linear": {"factor": 2.0},
        "llama3": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    }[kind]
    rope = {"rope_type": kind, "rope_theta": 10000.0, **scaling}
    rotary = LlamaRotaryEmbedding(
        LlamaConfig(hidden_size=32, num_attention_heads=2, max_position_embeddings=256, rope_parameters=rope)
    )
    x = torch.randn(2, 3, 20, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    position = torch.randint(0, 200, (2, 20), generator=torch.Generator().manual_seed(1))
    goal = torch.randint(0, 200, (2, 20), generator=torch.Generator().manual_seed(2))

    def rotated(positions):
        if dtype == torch.float64:  # the module computes in float32
            angle = (positions[..., None] * rotary.inv_freq.double()).repeat(1, 1, 2)
            cos, sin = angle.cos() * rotary.attention_scaling, angle.sin() * rotary.attention_scaling
        else:
            cos, sin = rotary(x.to(dtype), positions)
        return apply_rotary_pos_emb(x.to(dtype), x.to(dtype), cos, sin)[0]

    halves = Rotary(torch.arange(16), rotary.inv_freq.to(torch.promote_types(dtype, torch.float32)))
    moved = rotate(rotated(position), (goal - position)[:, None], halves)
    assert moved.dtype == dtype
    torch.testing.assert_close(moved, rotated(goal), rtol=tolerance, atol=tolerance)
    still = rotate(rotated(position), torch.zeros(2, 1, 20), halves)
    assert torch.equal(still, rotated(position))
    matrix = rotation(goal - position, halves, 16)[:, None]
    by_matrix = (rotated(position)[..., None, :].to(matrix) @ matrix).squeeze(-2)
    torch.testing.assert_close(by_matrix.to(dtype), moved, rtol=tolerance, atol=tolerance)
