"""`python -m kvlib`: a one-minute demonstration, the list of methods, and generation from a file."""

import argparse
import sys
import time
from pathlib import Path

import torch
from transformers.utils import logging

import kvlib


def main(arguments: list[str] | None = None) -> None:
    """Run one of the three commands; errors a user can mend are printed in one line."""
    parser = argparse.ArgumentParser(prog="python -m kvlib", description=__doc__)
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("demo", help="a needle found, lost and found again (the default)")
    commands.add_parser("list", help="the registered methods")
    generate = commands.add_parser("generate", help="continue a prompt with a compressed cache")
    generate.add_argument("--method", required=True, help="a name from `list`")
    generate.add_argument(
        "--budget", type=number, required=True, help="fraction in (0, 1], e.g. 0.3, or tokens, e.g. 256"
    )
    generate.add_argument("--prompt-file", type=Path, required=True)
    generate.add_argument("--model", default="minilm", help="a shipped model, a hub id or a path (default: minilm)")
    generate.add_argument("--max-new-tokens", type=int, default=64)
    options = parser.parse_args(arguments)
    logging.disable_progress_bar()  # loading takes no time worth a bar
    try:
        if options.command == "list":
            list_methods()
        elif options.command == "generate":
            generate_text(options)
        else:
            demonstrate()
    except (ValueError, OSError) as error:
        sys.exit(f"kvlib: {error}")


def number(text: str) -> float | int:
    """A budget as written: "256" is tokens, "0.3" and "1.0" are fractions."""
    return int(text) if text.isdigit() else float(text)


def list_methods() -> None:
    """Name and first line of every method."""
    for name, cls in sorted(kvlib.METHODS.items()):
        print(f"{name:14} {cls.__doc__.splitlines()[0]}")


def demonstrate() -> None:
    """The same question with the full cache and under three ways of keeping a fifth of it."""
    from kvlib.lab.tasks import correct, sample

    model, tokenizer = kvlib.load()
    task = sample("needle", 1024, seed=1, tokenizer=tokenizer, depth=0.4)
    inputs = tokenizer(task.prompt, return_tensors="pt")
    print(
        f"minilm reads {task.length} tokens of Python. At 40 % of them stands {task.prompt.rsplit(maxsplit=2)[1]} = ",
        end="",
    )
    print(f"{task.answer}, at the end the question what it is.\n")
    print(f"{'method':25} {'kept':>4} {'stored':>10}   answer")
    for name, arguments in [
        ("full", {}),
        ("streaming_llm", {"budget": 0.2}),
        ("snapkv", {"budget": 0.2}),
        ("snapkv", {"budget": 0.2, "kernel": 15}),
    ]:
        method = kvlib.method(name, **arguments)
        with method(model) as run:
            text = complete(model, tokenizer, inputs, len(tokenizer(task.answer, add_special_tokens=False).input_ids))
        label = name + (f" (kernel {method.kernel})" if name == "snapkv" else "")
        verdict = "found" if correct(task, text) else "lost"
        print(f"{label:25} {method.budget:4.0%} {run.stored_bytes() / 2**20:6.2f} MiB   {text!r:9} {verdict}")
    print(
        "\nIn SnapKV a token that the question looks at saves its neighbours, 3 on each side with the usual kernel 7."
    )
    print("An answer is five one-digit tokens: kernel 15 saves them all, at the same number of stored bytes.")


def generate_text(options) -> None:
    """Continue the file's text and report what was kept."""
    method = kvlib.method(options.method, budget=options.budget)
    prompt = options.prompt_file.read_text(encoding="utf-8")
    model, tokenizer = kvlib.load(options.model)
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    with method(model) as run:
        start = time.perf_counter()
        text = complete(model, tokenizer, inputs, options.max_new_tokens)
        seconds = time.perf_counter() - start
    print(text)
    layers = range(len(run.cache.layers))
    kept = ", ".join(f"{(run.kept(layer) >= 0).sum((0, 2)).float().mean():.0f}" for layer in layers)
    print(f"\nprompt tokens        {inputs.input_ids.shape[1]}", file=sys.stderr)
    print(f"kept tokens by layer {kept} (mean over KV heads, generated ones included)", file=sys.stderr)
    print(f"stored               {run.stored_bytes():,} of {run.full_bytes():,} bytes", file=sys.stderr)
    if run.clamped:
        print(
            f"clamped              {', '.join(run.clamped)}: the prompt is too short for the method's settings",
            file=sys.stderr,
        )
    print(f"time                 {seconds:.2f} s", file=sys.stderr)


@torch.no_grad()
def complete(model, tokenizer, inputs, tokens: int) -> str:
    """The greedy continuation as text."""
    out = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    return tokenizer.decode(out[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)


if __name__ == "__main__":
    main()
