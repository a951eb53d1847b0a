"""`python -m kvlib`: what each command prints, and the errors a user can mend."""

import re
import subprocess
import sys

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import kvlib
from kvlib.__main__ import main
from kvlib.paths import MODELS, ROOT


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A tiny random model with the shipped tokenizer, as a path."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(MODELS / "minilm").save_pretrained(folder)
    return str(folder)


@pytest.fixture
def prompt(tmp_path) -> str:
    file = tmp_path / "prompt.py"
    file.write_text("def half(x):\n    return x / 2\n\n\n" * 5, encoding="utf-8")
    return str(file)


def test_list_names_every_method(capsys):
    main(["list"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == sorted(kvlib.METHODS)
    assert all(len(line.split(maxsplit=1)[1]) > 10 for line in lines)


def test_generate_reports_what_was_kept(model, prompt, capsys):
    main(f"generate --method snapkv --budget 0.5 --model {model} --max-new-tokens 3 --prompt-file {prompt}".split())
    out, err = capsys.readouterr()
    assert out.strip()
    tokens = int(re.search(r"prompt tokens +(\d+)", err)[1])
    kept = [int(count) for count in re.search(r"kept tokens by layer ([\d, ]+)", err)[1].split(",")]
    assert kept == [tokens // 2 + 2] * 2  # two of the three new tokens were fed back
    stored, full = (int(x.replace(",", "")) for x in re.search(r"stored +([\d,]+) of ([\d,]+) bytes", err).groups())
    assert (stored, full) == tuple(2 * 2 * 2 * 8 * 4 * n for n in (kept[0], tokens + 2))
    assert re.search(r"time +[\d.]+ s", err)


def test_whole_numbers_are_tokens(model, prompt, capsys):
    main(f"generate --method knorm --budget 7 --model {model} --max-new-tokens 1 --prompt-file {prompt}".split())
    assert "kept tokens by layer 7, 7 " in capsys.readouterr().err


def test_what_the_prompt_forced_is_said(model, tmp_path, capsys):
    short = tmp_path / "short.py"
    short.write_text("x = 1\n")
    main(f"generate --method snapkv --budget 0.5 --model {model} --max-new-tokens 1 --prompt-file {short}".split())
    assert re.search("clamped +window", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--method snapvk --budget 0.5", "unknown method 'snapvk'; did you mean 'snapkv'?"),
        ("--method snapkv --budget 1.5", "budget=1.5: a fraction in (0, 1] or a whole number of tokens >= 1"),
        ("--method snapkv --budget 0.5 --model minilm-none", "no shipped model 'minilm-none'"),
        ("--method snapkv --budget 0.5 --prompt-file nowhere.py", "nowhere.py"),
    ],
)
def test_errors_are_one_line(arguments, message, prompt, model):
    with pytest.raises(SystemExit, match=re.escape(message)) as error:
        main(["generate", "--prompt-file", prompt, "--model", model, *arguments.split()])
    assert str(error.value).startswith("kvlib: ") and "\n" not in str(error.value)


def test_the_demonstration_loses_and_finds_the_number():
    """As a reader runs it, on the shipped model; the story it tells has to be true."""
    run = subprocess.run([sys.executable, "-m", "kvlib"], cwd=ROOT, capture_output=True, text=True, check=True)
    row = re.compile(r"^(\w.*?) +(\d+)% +([\d.]+) MiB +'(.*)' +(found|lost)$", re.MULTILINE)
    rows = {
        name: (float(mebibytes), answer, verdict) for name, _, mebibytes, answer, verdict in row.findall(run.stdout)
    }
    assert {name: verdict for name, (_, _, verdict) in rows.items()} == {
        "full": "found",
        "streaming_llm": "lost",
        "snapkv (kernel 7)": "lost",
        "snapkv (kernel 15)": "found",
    }
    full, answer, _ = rows["full"]
    assert rows["snapkv (kernel 7)"][1][:4] == answer[:4]  # the last digit is out of reach
    assert all(mebibytes < 0.21 * full for name, (mebibytes, *_) in rows.items() if name != "full")
