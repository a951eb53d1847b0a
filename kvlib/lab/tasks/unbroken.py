"""Lines of held-out code behind prompts that end where hardly any tokenizer joins anything: where a line does.

Where a prompt ends with a newline (`kvlib.lab.tasks.completions`), it ends with a token that tokenizers which join
newlines and indentation would not choose. Models that read lines one by one know this token well, the same models
without anchors do not, and comparing them would compare tokenisation. Here the same lines are asked for, the prompt
ends with the last character before them that is no whitespace, and the whitespace between is the model's to write.

Tokenizers that join newlines to what stands before them (as in ")\\n") are refused with a ValueError.
"""

from kvlib.lab.tasks.code import heldout_files, tail
from kvlib.lab.tasks.completions import choose, continued, cut, end_of_answer, fitting, others
from kvlib.lab.tasks.prompt import boundary
from kvlib.lab.tasks.real_code import family

GROUP = "unbroken"
SHOWN = 80  # characters behind the end of an answer, to see whether a token would span it


@family(GROUP, metric="similarity")
def next_line_unbroken(seed: int, tokens: int, *, room: int, tokenizer, count) -> tuple[str, str]:
    """The line of `next_line`, behind a prompt without the newline, which the model writes and nobody judges."""
    before, answer = cut(choose(fitting(tokens, tokenizer), seed))
    written = before[len(before.rstrip()) :] + answer
    text = tail(before.rstrip(), room - others(written, tokenizer, count), count)
    boundary(text, written, (0,), tokenizer)  # the metric passes over newlines, so that the answer is the line alone
    return text, answer


@family(GROUP, metric="bits")
def code_bits_unbroken(seed: int, tokens: int, *, room: int, tokenizer, count) -> tuple[str, str]:
    """The lines of `code_bits` and the whitespace before them, in bits per character; what follows them is not fed."""
    line = choose(continued(tokens, tokenizer), seed)
    before, whole = cut(line)[0].rstrip(), heldout_files()[line.file]["text"]
    answer = whole[len(before) : end_of_answer(line, tokenizer)].rstrip()
    end = len(before + answer)
    boundary(answer, whole[end : end + SHOWN], (0,), tokenizer)
    return boundary(tail(before, room - others(answer, tokenizer, count), count), answer, (0,), tokenizer)
