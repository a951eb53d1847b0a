"""Kept sets as a file, what replays them, and what neither may take."""

import json
import re

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_generic import ARCHITECTURES, METHODS, NARROW, on, spread
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import kvlib
from kvlib.__main__ import main
from kvlib.export import KeptSet, Replay, refusal
from kvlib.paths import MODELS, ROOT

EXPORTABLE = [method for method in METHODS if refusal(method) is None]
ROWS = 21, 9, 14
SNAPKV = kvlib.method("snapkv", budget=0.4, **NARROW)
MIXED = [  # heads of one length, heads of several, layers of several, both
    SNAPKV,
    kvlib.method("pyramidkv", budget=0.5, window=2, kernel=3, beta=3),
    kvlib.method("adakv", budget=0.4, **NARROW),
    kvlib.method("kv_compress", budget=0.4, **NARROW, protected=2),
    kvlib.method("uncomp", budget=0.4, **NARROW, spread=0.5),
    kvlib.method("streaming_llm", budget=0.5, sinks=2, renumber=False),
    kvlib.method("full"),
]


def rows(lengths=ROWS, seed=0):
    return [tiny.tokens(length, seed=seed + i) for i, length in enumerate(lengths)]


def read(run, prompts, extra=0, chunk=None):
    ids, mask = tiny.pad(prompts, extra)
    run.read(input_ids=ids, attention_mask=mask, prefill_chunk_size=chunk)


def exported(model, method, path, prompts=None, **arguments):
    """Reads the prompts, saves what is kept, and returns it as the run reports it, with bytes and stored keys."""
    with method(model) as run:
        read(run, rows() if prompts is None else prompts, **arguments)
        KeptSet.of(run).save(path)
    return tiny.kept(run), run.stored_bytes(), stored(run)


def replayed(model, path, prompts=None, **arguments):
    with Replay(KeptSet.load(path))(model) as run:
        read(run, rows() if prompts is None else prompts, **arguments)
    return tiny.kept(run), run.stored_bytes(), stored(run)


def stored(run) -> list[torch.Tensor]:
    """Keys and values of each layer in text order, `(batch, kv_heads, slots, head_dim)`, 0 in empty slots."""
    found = []
    for layer in run.cache.layers:
        at = layer.tail.position_rectangle().long()
        at = at.masked_fill(at < 0, 10**6)
        order = at.argsort(-1)
        for name in ("key", "value"):
            x = layer.tail.rectangle(layer.tail.fields[name])
            x = x.gather(2, order[..., None].expand_as(x)).masked_fill(at.gather(-1, order)[..., None] == 10**6, 0)
            found.append(x[:, :, : int(layer.lengths.max())])
    return found


def plainly(path) -> list[list[list[list[int]]]]:
    """What the file says, `[row][layer][head] -> positions`, by numpy and the schema alone."""
    with safe_open(path, "numpy") as file:
        layers = json.loads(file.metadata()["model"])["layers"]
        found = []
        for row in range(len(file.get_tensor("prompt.lengths"))):
            found.append([])
            for layer in range(layers):
                counts, flat = (file.get_tensor(f"layer.{layer}.{name}") for name in ("counts", "positions"))
                starts = np.concatenate([[0], np.cumsum(counts)])
                first = row * counts.shape[1]
                heads = [flat[starts[first + i] : starts[first + i + 1]].tolist() for i in range(counts.shape[1])]
                found[-1].append(heads)
        return found


@spread("architecture", ARCHITECTURES, EXPORTABLE, each=1)
def test_a_replay_is_the_method_at_the_end_of_its_prompt(architecture, method, tmp_path):
    model, path = tiny.model(architecture), tmp_path / "kept.safetensors"
    kept, size, tensors = exported(model, method, path)
    assert plainly(path) == kept
    again, same_size, same_tensors = replayed(model, path)
    assert (again, same_size) == (kept, size)
    for x, y in zip(tensors, same_tensors, strict=True):
        torch.testing.assert_close(x, y)
    if not method.evicts_in_decode:
        ours, theirs = (tiny.once(model, m, rows(), new=5) for m in (Replay(KeptSet.load(path)), method))
        assert ours.tokens.tolist() == theirs.tokens.tolist()
        assert ours.kept == theirs.kept
        torch.testing.assert_close(ours.logits, theirs.logits)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_prompts_padding_and_chunks(data, tmp_path_factory):
    lengths = data.draw(st.lists(st.integers(6, 24), min_size=1, max_size=3))
    method, model = data.draw(st.sampled_from(MIXED)), tiny.model(data.draw(st.sampled_from(ARCHITECTURES)))
    prompts, path = rows(lengths, data.draw(st.integers(0, 99))), tmp_path_factory.mktemp("kept") / "kept.safetensors"
    way = st.fixed_dictionaries({"extra": st.integers(0, 3), "chunk": st.none() | st.integers(1, 30)})
    kept, size, _ = exported(model, method, path, prompts, **data.draw(way))
    assert plainly(path) == kept
    assert load_file(path)["prompt.ids"].tolist() == torch.cat(prompts).tolist()
    assert load_file(path)["prompt.lengths"].tolist() == lengths
    assert replayed(model, path, prompts, **data.draw(way))[:2] == (kept, size)


def test_the_cases_differ_in_heads_layers_and_rows(tmp_path):
    # Else order in the file would not matter, and the tests above would not see it.
    kept = exported(tiny.model(), MIXED[3], tmp_path / "kept.safetensors")[0]
    lengths = np.array([[[len(head) for head in layer] for layer in row] for row in kept])
    assert all((lengths.take(0, axis) != lengths.take(1, axis)).any() for axis in range(3))


def test_what_the_file_tells(tmp_path):
    path = tmp_path / "kept.safetensors"
    exported(tiny.model(), SNAPKV, path)
    with safe_open(path, "pt") as file:
        told = file.metadata()
    assert {x.dtype for x in load_file(path).values()} == {torch.int32}
    assert (told["format"], told["version"], told["positions"]) == ("kvlib.kept", "1", "original")
    assert told["method"] == "snapkv"
    assert json.loads(told["arguments"]).items() >= {"budget": 0.4, "window": 4, "kernel": 3}.items()
    assert json.loads(told["model"]).items() >= {"layers": 2, "kv_heads": 2, "query_heads": 4, "head_dim": 8}.items()
    kept = KeptSet.load(path)
    assert kvlib.method(kept.method, **kept.arguments) == SNAPKV


def test_questions_and_snapshots(tmp_path):
    model, path, question = tiny.model(), tmp_path / "kept.safetensors", tiny.tokens(3, 4, seed=9)
    asked = {"max_new_tokens": 5, "do_sample": False}
    with SNAPKV(model) as run:
        read(run, rows())
        answer = run.ask(question, **asked)
        KeptSet.of(run).save(path)  # of the document, whatever was asked
    with Replay(KeptSet.load(path))(model) as run:
        read(run, rows())
        assert run.ask(question, **asked).tolist() == answer.tolist()
        assert tiny.kept(run) != plainly(path)  # the copy, with the question
    ids, mask = tiny.pad(rows())
    shared = kvlib.snapshot(model, input_ids=ids, attention_mask=mask)
    with Replay(KeptSet.load(path))(model) as run:
        run.fork(shared)
        assert tiny.kept(run) == plainly(path)


@on([method for method in METHODS if refusal(method) is not None])
def test_a_cache_that_is_more_than_kept_sets_is_refused(method):
    with method(tiny.model()) as run, pytest.raises(ValueError, match="cannot be exported"):
        KeptSet.of(run)


def test_all_that_evicts_and_does_nothing_else_can_be_exported():
    names = {method.name for method in EXPORTABLE}
    assert names >= {"full", "random", "h2o", "snapkv", "pyramidkv", "knorm", "adakv", "vatp", "uncomp", "kvzip"}
    assert not names & {"int8", "kivi", "think", "minicache", "quest", "tidaldecode", "elastic_cache", "anchorcoder"}
    assert [m.renumber for m in EXPORTABLE if m.name == "streaming_llm"] == [False]


@pytest.mark.parametrize("changes", [{"own_prefill": True}, {"before_layer": lambda self, run, layer_idx: None}])
def test_prompts_read_in_another_way_are_refused(changes):
    assert "in another way" in refusal(type("Other", (kvlib.Method,), changes)())


def test_nothing_to_export():
    with SNAPKV(tiny.model()) as run:
        with pytest.raises(RuntimeError, match="run.read"):
            KeptSet.of(run)
        run.read(inputs_embeds=torch.zeros(1, 20, 32, dtype=torch.float64))
        with pytest.raises(ValueError, match="embeddings"):
            KeptSet.of(run)


@pytest.mark.parametrize(
    "prompts, message",
    [
        (rows()[:2], "of 3 prompts, and 2 were read"),
        (rows()[::-1], "row 0 has 14 tokens"),
        ([*rows()[:2], rows()[2][:-1]], "row 2 has 13 tokens, of which the first 13 are those of its 14"),
        ([*rows()[:2], rows()[2] % 63 + 1], "row 2 has 14 tokens, of which the first 0 are those of its 14"),
        (rows((22, 9, 14)), "row 0 has 22 tokens"),
    ],
)
def test_other_prompts_are_refused(prompts, message, tmp_path):
    path = tmp_path / "kept.safetensors"
    exported(tiny.model(), SNAPKV, path)
    with pytest.raises(ValueError, match=message):
        replayed(tiny.model(), path, prompts)


def test_a_second_prompt_is_refused(tmp_path):
    model, path = tiny.model(), tmp_path / "kept.safetensors"
    exported(model, SNAPKV, path)
    with Replay(KeptSet.load(path))(model) as run:
        first = tiny.generate(model, run, rows())
        with pytest.raises(ValueError, match="row 0 has"):
            tiny.generate(model, run, rows((8, 8, 8), seed=5), before=first)


@pytest.mark.parametrize(
    "name, changes, field",
    [
        ("llama-mha", {}, "kv_heads"),
        ("mistral", {"num_key_value_heads": 2}, "type"),
        ("llama-gqa", {"num_hidden_layers": 3}, "layers"),
        ("llama-gqa", {"head_dim": 16}, "head_dim"),
        ("llama-gqa", {"num_attention_heads": 8, "head_dim": 8}, "query_heads"),
        ("llama-gqa", {"vocab_size": 80}, "vocabulary"),
        ("llama-gqa", {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}, "rotation"),
    ],
)
def test_other_models_are_refused(name, changes, field, tmp_path):
    path = tmp_path / "kept.safetensors"
    exported(tiny.model(), SNAPKV, path)
    with pytest.raises(ValueError, match=f"of a model with {field} "):
        replayed(tiny.build(name, **changes), path)


@pytest.fixture
def written(tmp_path):
    """A file, its tensors, and a function that writes others in their place."""
    path = tmp_path / "kept.safetensors"
    exported(tiny.model(), MIXED[3], path)
    with safe_open(path, "pt") as file:
        told = file.metadata()

    def write(tensors, **metadata):
        save_file(tensors, path, told | metadata)

    return path, load_file(path), write


def test_damaged_files_are_refused(written):
    path, tensors, write = written
    whole = path.read_bytes()
    for end in (0, 5, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:end])
        with pytest.raises(ValueError, match="no safetensors file, or not all of one"):
            KeptSet.load(path)
    for metadata in ({"version": "2"}, {"format": "pt"}):
        write(tensors, **metadata)
        with pytest.raises(ValueError, match="format and version"):
            KeptSet.load(path)
    save_file(tensors, path)
    with pytest.raises(ValueError, match="format and version"):
        KeptSet.load(path)
    for name in tensors:
        write({other: x for other, x in tensors.items() if other != name})
        with pytest.raises(ValueError, match=f"lacks '{name}'"):
            KeptSet.load(path)


def test_tensors_that_do_not_fit_together_are_refused(written):
    path, tensors, write = written
    name = "layer.1.positions"
    at = tensors[name]
    end = int(tensors["layer.1.counts"][0].sum())  # where the second row begins
    wrong = [
        {name: at[:-1]},
        {name: at.flip(0)},
        {name: at.index_fill(0, torch.tensor(0), -1)},
        {name: at.index_fill(0, torch.tensor(1), int(at[0]))},
        {name: at.index_fill(0, torch.tensor(len(at) - 1), ROWS[2])},  # inside of the longest row, not of its own
        {name: at.index_fill(0, torch.tensor(end - 1), ROWS[0])},
        {"layer.1.counts": tensors["layer.1.counts"][:2].contiguous()},
        {"layer.1.counts": tensors["layer.1.counts"] + 1},
        {"layer.1.counts": tensors["layer.1.counts"].flatten()},
        {"layer.1.counts": tensors["layer.1.counts"] + torch.tensor([-99, 99], dtype=torch.int32)},
        {"prompt.lengths": tensors["prompt.lengths"] + 1},
        {"prompt.ids": tensors["prompt.ids"][1:].contiguous()},
    ]
    for change in wrong:
        write(tensors | change)
        with pytest.raises(ValueError, match="do not fit together"):
            KeptSet.load(path)
    write(tensors)
    KeptSet.load(path)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        KeptSet.load(tmp_path / "none.safetensors")


def test_the_page_s_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ids, mask = tiny.pad(rows())
    names = {"model": tiny.model(), "method": MIXED[2], "inputs": {"input_ids": ids, "attention_mask": mask}}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "serving.md").read_text(), re.DOTALL):
        exec(compile(block, "docs/serving.md", "exec"), names)
    kept = [[[head.tolist() for head in row] for row in layer] for layer in names["kept"]]
    assert [list(row) for row in zip(*kept)] == tiny.kept(names["run"])
    assert [prompt.tolist() for prompt in names["prompts"]] == [row.tolist() for row in rows()]


def test_from_a_shell(tmp_path, capsys):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(MODELS / "minilm").save_pretrained(tmp_path / "model")
    (tmp_path / "prompt.py").write_text("def half(x):\n    return x / 2\n\n\n" * 5, encoding="utf-8")
    options = f"--model {tmp_path / 'model'} --prompt-file {tmp_path / 'prompt.py'} --budget 12".split()
    main(["export", *options, "--method", "knorm", "--out", str(tmp_path / "kept.safetensors")])
    kept = KeptSet.load(tmp_path / "kept.safetensors")
    assert [counts.tolist() for counts in kept.counts] == [[[12] * 4]] * 2
    size = (tmp_path / "kept.safetensors").stat().st_size
    assert capsys.readouterr().err.endswith(f"kept.safetensors has {size:,}\n")
    with pytest.raises(SystemExit, match="kvlib: .* cannot be exported: it reads other things"):
        main(["export", *options, "--method", "quest", "--out", str(tmp_path / "other")])
    with pytest.raises(SystemExit, match="kvlib: "):
        main(["export", *options, "--method", "knorm", "--out", str(tmp_path / "none" / "kept")])
