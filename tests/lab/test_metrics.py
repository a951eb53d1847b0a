"""LongBench's metrics give what its own script gave (`parity/longbench_metrics`), quirk by quirk."""

import json
import math
import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvlib.lab.evaluation import metrics
from kvlib.lab.evaluation.metrics import (
    classification,
    code_similarity,
    count,
    is_decided,
    qa_f1,
    retrieval,
    rouge_l,
    score,
)

CASES = json.loads((Path(__file__).parents[1] / "parity" / "longbench_metrics" / "cases.json").read_text())["cases"]
METRICS = {
    "qa_f1": qa_f1,
    "rouge": rouge_l,
    "classification": classification,
    "retrieval": retrieval,
    "count": count,
    "code_sim": code_similarity,
}
RECORDED = [pytest.param(name, case, id=f"{name}-{i}") for name, cases in CASES.items() for i, case in enumerate(cases)]

# Words, marks, digits and white space that some metric treats in a way of its own.
PIECES = [*"ab1²７.,'’`#/\n \t\u00a0", "the ", "A ", "cat ", "Paragraph ", "12", "//"]
TEXT = st.lists(st.sampled_from(PIECES)).map("".join)
WORDS = st.lists(st.sampled_from(["cat", "dog", "sun", "hat", "ink"]), min_size=1).map(" ".join)
DISTINCT = st.lists(st.integers(0, 9).map(str), unique=True, min_size=1).map(" ".join)
NAMES = ["Food", "Fast food", "Animal", "Date"]


def judged(name: str, prediction: str, answer: str) -> float:
    """Score of two texts that need not be of the form that the metric's data sets have."""
    if name == "classification":
        return classification(prediction, answer, [*NAMES, answer])
    return METRICS[name](prediction, f"Paragraph 1 {answer}" if name == "retrieval" else answer)


# The record


@pytest.mark.parametrize("name, case", RECORDED)
def test_recorded_scores(name, case):
    options = {"classes": list(case["classes"])} if name == "classification" else {}
    value = METRICS[name](case["prediction"], case["reference"], **options)
    assert value == case["score"]
    assert type(value) is float


def test_the_record_is_complete():
    sizes = {"qa_f1": 60, "rouge": 61, "classification": 58, "retrieval": 60, "count": 60, "code_sim": 61}
    assert {name: len(cases) for name, cases in CASES.items()} == sizes


def test_recorded_traces():
    """Of several longest subsequences rouge finds a certain one, on a way of a certain length."""
    for case in CASES["rouge"]:
        steps = [
            metrics.common_subsequence(reference, sentence)[1]
            for reference in metrics.sentences(case["reference"])
            for sentence in metrics.sentences(case["prediction"])
        ]
        assert max(steps, default=0) == case["lcs_trace_steps"]


def test_recorded_scores_without_the_limit():
    lifted = [case for case in CASES["rouge"] if "rouge_without_recursion_limit" in case]
    assert len(lifted) == 1
    for case in CASES["rouge"]:
        expected = case.get("rouge_without_recursion_limit", case["score"])
        assert rouge_l(case["prediction"], case["reference"], longest_trace=math.inf) == expected


def test_another_backend_of_fuzzywuzzy_differs():
    """As `code_similarity` says: the longest common subsequence of characters gives python-Levenshtein's scores."""
    differences = []
    for case in CASES["code_sim"]:
        differences.append(abs(case["score"] - case["score_levenshtein_backend"]))
        lines = case["prediction"].lstrip("\n").split("\n")
        line = next((line for line in lines if not set("`#") & set(line) and "//" not in line), "")
        if line and case["reference"]:
            shared = len(metrics.common_subsequence(list(case["reference"]), list(line))[0])
            ratio = 2 * shared / (len(line) + len(case["reference"]))
            assert round(100 * ratio) / 100 == case["score_levenshtein_backend"]
    assert sum(difference > 0 for difference in differences) == 8
    assert max(differences) == pytest.approx(0.19)


# What holds for any texts


@pytest.mark.parametrize("name", METRICS)
@given(prediction=TEXT, answer=TEXT)
def test_range(name, prediction, answer):
    value = judged(name, prediction, answer)
    assert type(value) is float
    assert 0 <= value <= 1


@given(WORDS)
def test_identical_texts_score_one(text):
    assert qa_f1(text, text) == 1
    assert rouge_l(text, text) == 1 - 5e-9
    assert code_similarity(text, text) == 1


@pytest.mark.parametrize("name", NAMES)
def test_the_class_alone_scores_one(name):
    assert classification(name, name, NAMES) == 1


@given(st.integers(0, 10**6))
def test_the_number_alone_scores_one(number):
    assert count(str(number), str(number)) == 1
    assert retrieval(f"Paragraph {number}", f"Paragraph {number}") == 1


@given(TEXT, TEXT)
def test_f1_is_symmetric(first, second):
    assert qa_f1(first, second) == qa_f1(second, first)


@given(DISTINCT, DISTINCT)
def test_rouge_is_symmetric_for_single_sentences_of_distinct_words(first, second):
    """Otherwise another one of several longest subsequences may be found."""
    assert rouge_l(first, second) == rouge_l(second, first)


@given(DISTINCT, DISTINCT)
def test_rouge_of_distinct_words_is_f1_over_the_longest_subsequence(first, second):
    said, wanted = first.split(), second.split()
    ends = {}  # place of the last word -> longest common subsequence that ends there
    for word in said:
        if word in wanted:
            place = wanted.index(word)
            ends[place] = 1 + max((length for end, length in ends.items() if end < place), default=0)
    expected = 2 * max(ends.values(), default=0) / (len(said) + len(wanted))
    assert rouge_l(first, second) == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("dataset", metrics.METRICS)
@given(prediction=TEXT, answers=st.lists(TEXT, min_size=1, max_size=4), data=st.data())
def test_the_best_answer_counts_in_any_order(dataset, prediction, answers, data):
    if dataset == "passage_retrieval_en":
        answers = [f"Paragraph {place}" for place in range(len(answers))]
    classes = [*NAMES, *answers]
    value = score(dataset, prediction, answers, classes)
    assert value == max(score(dataset, prediction, [answer], classes) for answer in answers)
    assert value == score(dataset, prediction, data.draw(st.permutations(answers)), classes)


# Quirks of qa_f1


@pytest.mark.parametrize("articles", ["a cat", "an cat", "the cat", "cat the a", "The cat A"])
def test_articles_are_dropped(articles):
    assert qa_f1(articles, "cat") == 1


def test_articles_are_whole_words():
    assert qa_f1("theatre another", "theatre another") == 1
    assert qa_f1("theatre", "atre") == 0
    assert metrics.words("cat’a’dog") == ["cat’", "’dog"]  # also where no blank surrounds them


def test_articles_alone_score_nothing():
    assert qa_f1("a", "a") == qa_f1("the", "the") == qa_f1("...", "...") == qa_f1("", "") == 0


def test_punctuation_is_dropped_before_articles():
    assert metrics.words("t.h.e cat") == ["cat"]
    assert metrics.words("a-cat") == ["acat"]


def test_only_ascii_punctuation_is_dropped():
    assert metrics.words(string.punctuation) == []
    assert metrics.words("“cat” — dog。") == ["“cat”", "—", "dog。"]


def test_words_count_as_often_as_they_occur():
    assert qa_f1("cat cat", "cat") == pytest.approx(2 / 3)
    assert qa_f1("cat cat dog", "cat cat cat") == pytest.approx(2 / 3)


def test_any_white_space_separates_words():
    assert metrics.words("cat\u00a0dog\u3000sun\nhat") == ["cat", "dog", "sun", "hat"]


# Quirks of rouge


@pytest.mark.parametrize("empty", ["", ".", "..."])
def test_a_text_without_sentences_scores_nothing(empty):
    assert rouge_l(empty, "cat") == rouge_l("cat", empty) == rouge_l(empty, empty) == 0


def test_a_blank_is_one_empty_word():
    assert metrics.sentences(" ") == metrics.sentences("\n") == [[""]]
    assert rouge_l(" ", "\t") == 1 - 5e-9


def test_repeated_words_count_once():
    assert rouge_l("cat cat cat", "cat") == rouge_l("cat", "cat cat") == 1 - 5e-9


def test_only_the_order_within_sentences_counts():
    assert rouge_l("one two three", "three two one") == pytest.approx(1 / 3)
    assert rouge_l("one two. three four.", "three four. one two.") == 1 - 5e-9


def test_every_full_stop_ends_a_sentence():
    assert metrics.sentences("v1.2 is out. ") == [["v1"], ["2", "is", "out"], [""]]


def test_case_and_punctuation_count():
    assert rouge_l("Cat", "cat") == rouge_l("cat,", "cat") == 0


def test_the_subsequence_is_the_one_that_rouge_finds():
    """Tracing prefers to leave out the prediction's word, unless that makes the subsequence shorter."""
    assert metrics.common_subsequence(["a", "b"], ["b", "a"]) == (["b"], 2)
    assert metrics.common_subsequence(["b", "a"], ["b", "b"])[0] == ["b"]
    assert rouge_l("b a. b c", "a b") == pytest.approx(2 / 5)  # both sentences find b; finding a once would give 4/5


def test_a_longer_trace_scores_nothing():
    """As in the official script, where the package's recursion ends with an error."""
    assert metrics.LONGEST_TRACE == 990
    text = " ".join(map(str, range(990)))
    assert rouge_l(text, text) == 1 - 5e-9
    assert rouge_l(f"{text} end", f"{text} end") == 0
    assert rouge_l(f"{text} end", f"{text} end", longest_trace=math.inf) == 1 - 5e-9
    assert rouge_l(f"{text}. end", f"{text}. end") == 1 - 5e-9  # a full stop makes it shorter traces


def test_one_long_trace_spoils_the_other_sentences():
    long = " ".join(map(str, range(20)))
    assert rouge_l(f"cat. {long}", f"cat. {long}", longest_trace=19) == 0
    assert rouge_l(f"cat. {long}", f"cat. {long}", longest_trace=20) == 1 - 5e-9


# Quirks of classification


def test_parts_of_the_right_class_do_not_count():
    assert classification("Fast food", "Fast food", ["food", "Fast food"]) == 1


def test_larger_classes_count():
    assert classification("Fast food", "food", ["food", "Fast food"]) == 0.5


def test_the_class_behind_a_dropped_one_is_passed_over():
    assert classification("ABCD", "ABCD", ["A", "AB", "ABC", "ABCD"]) == 0.5  # AB stays
    assert classification("ABCD", "ABCD", ["A", "ABCD", "ABC"]) == 1
    assert classification("ABCD", "ABCD", ["ABCD", "A", "AB"]) == 0.5


def test_equal_and_empty_names_are_dropped_like_others():
    assert classification("AB", "AB", ["AB", "A", "A", "A"]) == 0.5  # the second one is passed over
    assert classification("AB", "AB", ["", "AB"]) == 1  # every text contains the empty name


def test_wrong_and_missing_classes_score_nothing():
    assert classification("Date", "Food", NAMES) == classification("food", "Food", NAMES) == 0
    assert classification("Planet", "Planet", NAMES) == 0


def test_the_classes_stay_as_they_are():
    classes = ["A", "AB", "ABC"]
    classification("ABC", "ABC", classes)
    assert classes == ["A", "AB", "ABC"]


# Quirks of retrieval and count


def test_every_number_counts():
    assert retrieval("Paragraph 3, not 13 or 3", "Paragraph 3") == pytest.approx(2 / 3)
    assert count("7.0", "7") == 0.5
    assert count("17", "7") == 0


def test_numbers_are_compared_as_text():
    assert count("07", "7") == 0
    assert count("７ 7", "7") == 0.5  # full-width digits are digits
    assert count("² VII 7", "7") == 1  # these are not
    assert count("7", 7) == 1


def test_no_number_scores_nothing():
    assert count("seven", "7") == retrieval("Paragraph", "Paragraph 7") == 0


def test_the_first_label_of_the_answer_counts():
    assert retrieval("4", "2 pages, Paragraph 4 or Paragraph 5") == 1
    with pytest.raises(ValueError, match="answer='paragraph 4'"):
        retrieval("4", "paragraph 4")


CODE = st.text("\n\n\n#`/ abx=", max_size=24)


@given(CODE, CODE, CODE)
def test_a_decided_score_stays(prediction, rest, answer):
    """And one that is not can change with what follows."""
    if is_decided(prediction):
        assert code_similarity(prediction + rest, answer) == code_similarity(prediction, answer)
    else:
        changed = (code_similarity(prediction + end, "yz") for end in ("yz", "\nyz"))
        assert max(changed) > code_similarity(prediction, "yz")


@given(st.text("ab =\n", max_size=99), st.text("ab =", min_size=1, max_size=99), st.integers(0, 98), st.data())
def test_below_100_characters_only_the_answer_itself_scores_1(prediction, answer, at, data):
    near = answer[:at] + data.draw(st.sampled_from(["", "a", "x"])) + answer[at + data.draw(st.integers(0, 1)) :]
    for said in (prediction, near):
        assert (code_similarity(said, answer) == 1) == (said.lstrip("\n").split("\n")[0] == answer)


# Quirks of code_similarity


@pytest.mark.parametrize("line", ["```python", "# why", "x = 1  # why", "// why", "x = y // 2", "u = 'http://h'", "`"])
def test_lines_with_marks_are_passed_over(line):
    assert code_similarity(f"{line}\nreturn x", "return x") == 1
    assert code_similarity(line, line) == 0


def test_a_single_slash_is_no_mark():
    assert code_similarity("x = y / 2\nreturn x", "x = y / 2") == 1


def test_newlines_before_code_are_dropped_and_blanks_are_not():
    assert code_similarity("\n\nreturn x\nreturn y", "return x") == 1
    assert code_similarity("  \nreturn x", "return x") < 0.3
    assert code_similarity("  return x", "return x") == 0.89


def test_nothing_is_right_only_for_nothing():
    assert code_similarity("", "") == code_similarity("\n# why", "") == 1
    assert code_similarity("", "x") == code_similarity("x", "") == 0


def test_percents_are_whole():
    assert code_similarity("abc", "abd") == 0.67
    assert code_similarity("x" * 8 + "abcdefgh", "x" * 8) == 0.67


def test_matching_blocks_are_greedy():
    """So the texts cannot be exchanged, although the longest common subsequence is the same."""
    assert code_similarity("tide", "diet") == 0.25
    assert code_similarity("diet", "tide") == 0.5


def test_frequent_characters_of_long_answers_begin_no_block():
    assert code_similarity("xy" * 50, "yx" * 99) == 0.67
    assert code_similarity("xy" * 50, "yx" * 100) == 0


# Data sets

OFFICIAL = {
    qa_f1: ["narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique", "triviaqa"],
    rouge_l: ["gov_report", "qmsum", "multi_news", "samsum"],
    classification: ["trec", "lsht"],
    retrieval: ["passage_retrieval_en"],
    count: ["passage_count"],
    code_similarity: ["lcc", "repobench-p"],
}


def test_every_data_set_has_its_metric():
    assert {name: metric for metric, names in OFFICIAL.items() for name in names} == metrics.METRICS


ANSWERED = {  # an answer of the data set's form, and a prediction that is better without its second line
    qa_f1: ("cat", "cat\nQuestion: dog"),
    rouge_l: ("cat sun", "cat sun\nhat ink"),
    classification: ("Food", "Food\nDate"),
    retrieval: ("Paragraph 3", "Paragraph 3\nParagraph 4"),
    count: ("3", "3\n4"),
}


@pytest.mark.parametrize("dataset", [name for name in metrics.METRICS if name not in OFFICIAL[code_similarity]])
def test_only_few_shot_answers_are_cut_to_their_first_line(dataset):
    answer, prediction = ANSWERED[metrics.METRICS[dataset]]
    value = score(dataset, f"\n\n{prediction}", [answer], NAMES)
    if dataset in ("trec", "triviaqa", "samsum", "lsht"):
        assert value == pytest.approx(1)
    else:
        assert value < 0.9


def test_only_newlines_are_dropped_before_the_first_line():
    assert score("triviaqa", " \ncat", ["cat"]) == 0
    assert score("triviaqa", "cat\r\ndog", ["cat"]) == 1


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="dataset='dureader'.*narrativeqa, qasper"):
        score("dureader", "cat", ["cat"])
    with pytest.raises(ValueError, match="answers='cat'"):
        score("qasper", "cat", "cat")
    with pytest.raises(ValueError, match=r"answers=\[\]"):
        score("qasper", "cat", [])
    for classes in (None, []):
        with pytest.raises(ValueError, match="trec needs the names of its classes"):
            score("trec", "cat", ["cat"], classes)
