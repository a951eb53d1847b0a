"""Real data sets: HumanEval(+), MBPP(+), wikitext-2, books, LongBench with LongBench-E, and LongBench v2.

`load("humaneval")` reads the files of the folder that the environment variable `KVLIB_DATA` names, and compares each
with its sha256. Without `KVLIB_DATA` it asks the hub, for one commit of one repository. Nothing of these sets belongs
to this project, so none of their text is ever committed.

What a row holds, under the names of the publishers:

- humaneval: task_id, prompt, canonical_solution, test, entry_point (164 problems, split "test");
- humaneval+, mbpp+ (378 problems): the same without test, and base_input, plus_input (lists of lists of arguments),
  atol;
- mbpp: task_id (a number), text, code, test_list, test_setup_code, challenge_test_list (974 problems; "test" are the
  500 that are reported, beside "train", "validation" and "prompt");
- wikitext-2 (one row a split: "test", "validation", "train"), moby-dick (one row), pg19 (100 books): title, text;
- longbench/<task> and longbench/<task>_e: id, dataset, language, input, context, answers, all_classes, length (words);
- longbench-v2: id, domain, sub_domain, difficulty, length ("short", ...), question, choice_A to choice_D, answer (a
  letter), context.
"""

from kvlib.lab.evaluation.benchmarks.loading import load

__all__ = ["load"]
