"""What methods store if the model runs in bfloat16: measured on a copy, the model itself stays as it is."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kvlib
from kvlib.lab import tasks
from kvlib.lab.evaluation import sixteen_bits
from kvlib.lab.evaluation.configuration import Configuration

LENGTH, TASK = 512, "needle"
CONFIGURATIONS = [
    Configuration("full", 1.0),
    Configuration("int8", 1.0),
    Configuration("snapkv", 0.2),
    Configuration("quest", 0.2),
    Configuration("combined", 0.4, '{"evictor": "snapkv", "store": "int8"}'),
]


@pytest.fixture(scope="module")
def pair():
    tokenizer = kvlib.load("minilm")[1]
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=len(tokenizer), max_position_embeddings=1024)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval(), tokenizer


@pytest.fixture(scope="module")
def rows(pair):
    found = sixteen_bits.evaluate(*pair, CONFIGURATIONS, TASK, LENGTH, range(2), name="tiny", block=2)
    return found.set_index(["method", "sample"])


def test_shares_are_those_of_a_cache_of_sixteen_bits(pair, rows):
    for sample in range(2):
        prompt = tasks.sample(TASK, LENGTH, sample, tokenizer=pair[1])
        tokens = sum(map(len, prompt.ids(pair[1]))) - 1  # the last one is fed behind
        full = tokens * 3 * 2 * 2 * 8 * 2  # layers, keys and values, heads, channels, bytes
        kept = 3 * 2 * int(0.2 * tokens) * 2 * 8 * 2
        coded = 3 * 2 * int(0.4 * tokens) * 2 * (8 + 2)
        expected = {"full": full, "int8": full * 10 // 16, "snapkv": kept, "quest": full, "combined": coded}
        for method, stored in expected.items():
            row = rows.loc[(method, sample)]
            assert (row["stored_bytes"], row["full_bytes"]) == (stored, full)
            assert row["value"] == stored / full
    assert (rows.loc["quest", "read_bytes"] < rows.loc["quest", "stored_bytes"]).all()
    assert rows[["divergence", "agreement"]].isna().all(axis=None)


def test_the_model_stays_as_it_is(pair, rows):
    assert {weight.dtype for weight in pair[0].parameters()} == {torch.float32}


def test_what_it_refuses(pair):
    for protocol, length, message in (("asked", LENGTH, "protocol='asked': bfloat16"), ("bfloat16", 2000, "window")):
        with pytest.raises(ValueError, match=message):
            sixteen_bits.evaluate(*pair, CONFIGURATIONS, TASK, length, [0], name="", protocol=protocol)
