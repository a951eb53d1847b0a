"""The shipped tables of AnchorCoder's arms: what is stored follows from schedules and texts, to the byte."""

import pandas as pd
import pytest

from kvlib import paths
from kvlib.lab.lessons import arms
from kvlib.lab.results.anchored_studies import ANCHORED, FUNCTIONS, LENGTHS, SAMPLES, SMOLLM2_LENGTHS

TOKEN_BYTES = 16 * 8 * 2 * 32 * 4  # of minilm: layers, KV heads, keys and values, head_dim, float32
ARMS = [f"03_arms_{length}" for length in LENGTHS] + ["03_functions_arms"]
BOTH = "arms", "dense"
REAL_TOKEN_BYTES = 30 * 3 * 2 * 64 * 4  # of SmolLM2


def stored(*names: str) -> pd.DataFrame:
    """Bytes at the end of the prompts, one row per task and prompt, one column per contender, and those of the text."""
    rows = arms.contenders(pd.read_parquet(paths.RESULTS / f"{name}.parquet") for name in names)
    table = rows.pivot_table(index=["task", "length", "sample"], columns="contender", values="stored_bytes")
    return table.assign(text=rows.groupby(["task", "length", "sample"])["full_bytes"].first())


@pytest.mark.parametrize("name", ARMS)
def test_other_seeds_are_asked_where_arms_are_compared(name):
    models = pd.read_parquet(paths.RESULTS / f"{name}.parquet", columns=["model"])["model"]
    assert {*models} == {*ANCHORED[name].models} >= {"minilm-D2", "minilm-TML-4", "minilm-AnLLM"}
    seeds = {"minilm-D2-seed1", "minilm-TML-4-seed1"} & {*models}
    assert len(seeds) == (2 if name in ("03_arms_2048", "03_functions_arms") else 0)


@pytest.mark.parametrize("name", ARMS)
def test_arms_of_a_schedule_store_the_same_and_fewer_full_layers_less(name):
    table = stored(name)
    for other in {"T-4", "TM-4", "TL-4", "TML-4-seed1"} & {*table}:
        assert table[other].equals(table["TML-4"].rename(other))
    assert table["AnLLM"].equals(table["T0"].rename("AnLLM"))
    ordered = table[["D2", "text", "TML-4", "TML-6", "TML-8", "T0"]]
    assert (ordered.diff(axis=1).iloc[:, 1:] < 0).all(axis=None)
    anchors = (table["D2"] - table["text"]) / TOKEN_BYTES  # every layer of D2 keeps them and the text
    assert (anchors == anchors.round()).all()
    own = table["T0"] / TOKEN_BYTES - anchors  # BOS, and the tokens of a line that has not ended
    for full, arm in ((4, "TML-4"), (3, "TML-6"), (2, "TML-8")):
        expected = (full * (table["text"] / TOKEN_BYTES + anchors) + (16 - full) * (anchors + own)) / 16
        assert (expected * TOKEN_BYTES == table[arm]).all()


@pytest.mark.parametrize("per", [4, 6])
@pytest.mark.parametrize("name", ARMS)
def test_other_methods_store_as_much_but_for_less_than_a_token(name, per):
    table = stored(name, name.replace("arms", f"dense_per{per}")).dropna()
    less = table[[f"TML-{per}"]].to_numpy() - table[["h2o", "vatp (host=h2o)", "snapkv", "random", "streaming_llm"]]
    assert len(table) and (less >= 0).all(axis=None) and (less < TOKEN_BYTES).all(axis=None)
    assert (table["full"] == table["text"]).all()


@pytest.mark.parametrize("part", ["functions", *SMOLLM2_LENGTHS])
def test_smollm2_stores_five_of_thirty_layers_whole_and_other_methods_but_for_a_token_as_much(part):
    """Without regard to MHPE and LAA: T-6 stores what TML-6 does."""
    names = [f"03_real_{part}_{which}" if part == "functions" else f"03_real_{which}_{part}" for which in BOTH]
    table = stored(*names)
    asked = FUNCTIONS if part == "functions" else len(SMOLLM2_LENGTHS[part]) * SAMPLES
    assert len(table) == asked and table.notna().all(axis=None) and (table["full"] == table["text"]).all()
    assert table["T-6"].equals(table["TML-6"].rename("T-6"))
    tokens = table["D2"] / REAL_TOKEN_BYTES  # with anchors, read line by line
    kept = (table["TML-6"] / REAL_TOKEN_BYTES - 5 / 30 * tokens) * 30 / 25  # in the others: anchors, the last line
    assert ((kept - kept.round()).abs() < 1e-6).all() and (kept < tokens / 2).all() and (kept >= 2).all()
    less = table[["TML-6"]].to_numpy() - table[["h2o", "vatp (host=h2o)", "snapkv", "random", "streaming_llm"]]
    assert (less >= 0).all(axis=None) and (less < REAL_TOKEN_BYTES).all(axis=None)


def test_arms_whose_weights_were_all_trained_store_as_much_as_those_with_adapters():
    table = stored("03_arms_2048", "03_whole_2048").xs("code_bits")
    assert len(table) == SAMPLES
    for arm in ("D2", "TML-4"):
        assert table[f"{arm}-whole"].equals(table[arm].rename(f"{arm}-whole"))
