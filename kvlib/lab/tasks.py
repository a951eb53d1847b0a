"""Retrieval tasks in the form of code, with short answers that can be checked exactly.

A task states facts (assignments, dictionary entries, functions) among lines of real source code and asks for one of
them at the end: `assert blue_river == ` wants `48213`. Everything is drawn from a seed. Training and test samples share
no name, no value and no filler text, so a right answer was read from the prompt.

Scoring: generate until a newline; the answer is right when that line starts with it and it ends there (`correct`).
"""

import difflib
import json
import random
import re
import zlib
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, product

from kvlib.paths import DATA, ROOT

SHORTEST = 128  # tokens; below it there is no room for filler
MOST = 512  # facts, however long the prompt

ADJECTIVES = """
amber ancient autumn azure bitter blazing blue bold brave bright brisk bronze calm candid careful cheerful chilly clever
cobalt copper coral cosmic cozy crimson crisp curious daring dusky dusty eager early earnest ebony elder emerald fabled
faint fancy fearless fierce floral foggy fragrant frosty frozen gentle gilded giddy glossy golden graceful grand grassy
hasty hazel hidden hollow humble icy idle indigo ivory jade jolly keen lavish leafy lively lofty lonely lucky lunar
magenta maroon mellow merry mighty misty modest mossy muddy narrow nimble noble olive opal pale patient placid plucky
polar proud purple quaint quiet rapid restless rosy royal ruby rugged rustic sandy scarlet serene shady shiny silent
silver sleepy sly smoky snowy solar sonic spicy stormy sturdy sunny swift tangy teal tender tidy timid turquoise velvet
violet vivid wandering warm weary wild windy wintry witty wooden yellow zesty
""".split()
NOUNS = """
acorn anchovy antler apricot badger bamboo banjo barley beacon beaver birch bison blossom boulder bramble breeze brook
buffalo butterfly cactus camel canyon cavern cedar cherry chestnut cinder cliff clover comet condor cottage cougar
coyote crane cricket crystal cypress dahlia daisy desert dolphin dragonfly dune eagle elephant elm ember falcon feather
fern ferret fjord flamingo forest fox gazelle geyser ginger glacier goose granite grove hamster harbor hawk hazelnut
heron hickory hollyhock horizon hornet iceberg iguana island jackal jaguar jasmine juniper kangaroo kettle kiwi lagoon
lantern lark lemon leopard lily lizard llama lobster lotus lynx magnolia mango maple marble marsh meadow melon meteor
mole moose mountain mulberry nectar nettle oak oasis ocelot orchard orchid osprey otter owl oyster panda panther papaya
peach pebble pelican penguin peony pepper pigeon pine plateau plum pond poppy prairie puffin quail quarry rabbit raccoon
raven reef ridge river robin rooster sage salmon sparrow spruce squid stork sunflower swan thicket thistle thunder tiger
toucan trout tulip tundra turnip turtle valley volcano walnut walrus waterfall willow wolf wombat woodpecker yak zebra
""".split()


@dataclass(frozen=True)
class Sample:
    """`length` is the prompt in tokens, BOS included; the prompt ends where the answer begins."""

    task: str
    prompt: str
    answer: str
    seed: int
    length: int


@dataclass(frozen=True)
class Draft:
    """What a task states and asks, before filler is added.

    facts: (depth in [0, 1], text ending in a newline); questions: (text up to the answer, answer); names: identifiers
    that filler must not contain.
    """

    facts: list[tuple[float, str]]
    questions: list[tuple[str, str]]
    names: set[str]


@lru_cache
def pools(split: str) -> tuple[list[str], list[int]]:
    """Names and values of a split: a quarter of all, by their checksum, is for tests."""

    def belongs(text: str) -> bool:
        return (zlib.crc32(text.encode()) % 4 == 0) == (split == "test")

    names = [f"{adjective}_{noun}" for adjective, noun in product(ADJECTIVES, NOUNS)]
    return [n for n in names if belongs(n)], [v for v in range(10_000, 100_000) if belongs(str(v))]


class Draw:
    """Distinct names and values of one split, drawn with one random source."""

    def __init__(self, rng: random.Random, split: str):
        if split not in ("train", "test"):
            raise ValueError(f"split={split!r}: 'train' or 'test'")
        self.rng = rng
        self.name_pool, self.value_pool = pools(split)

    def names(self, count: int) -> list[str]:
        return self.rng.sample(self.name_pool, count)

    def values(self, count: int) -> list[int]:
        return self.rng.sample(self.value_pool, count)


def dict_lookup(draw: Draw, tokens: int) -> Draft:
    """One long dictionary; asked for the value of a key."""
    count = min(MOST, tokens // 32)
    table, *keys = draw.names(count + 1)
    table, pairs = table.upper(), list(zip(keys, draw.values(count)))
    entries = "".join(f'    "{key}": {value},\n' for key, value in pairs)
    questions = [(f'assert {table}["{key}"] == ', str(value)) for key, value in pairs]
    return Draft([(draw.rng.random(), f"{table} = {{\n{entries}}}\n")], questions, {table.lower(), *keys})


def needle(draw: Draw, tokens: int, depth: float | None = None) -> Draft:
    """One constant hidden in source code at `depth` (0 = first line, 1 = last), random when not given."""
    if depth is not None and not 0 <= depth <= 1:
        raise ValueError(f"depth={depth}: between 0 and 1")
    (name,), (value,) = draw.names(1), draw.values(1)
    depth = draw.rng.random() if depth is None else depth
    return Draft([(depth, f"{name.upper()} = {value}\n")], [(f"assert {name.upper()} == ", str(value))], {name})


def function_lookup(draw: Draw, tokens: int) -> Draft:
    """Functions scattered in source code, each returning a number; asked for what one of them returns."""
    count = min(MOST, max(2, tokens // 64))
    pairs = list(zip(draw.names(count), draw.values(count)))
    facts = [(draw.rng.random(), f"\n\ndef {name}():\n    return {value}\n\n\n") for name, value in pairs]
    return Draft(facts, [(f"assert {name}() == ", str(value)) for name, value in pairs], {name for name, _ in pairs})


def two_hop(draw: Draw, tokens: int) -> Draft:
    """Variables bound to numbers, later other variables bound to those; asked for the value of the second kind."""
    count = min(MOST, max(2, tokens // 128))
    names, values = draw.names(2 * count), draw.values(count)
    facts, questions = [], []
    for first, second, value in zip(names[:count], names[count:], values):
        early, late = sorted((draw.rng.random(), draw.rng.random()))
        facts += [(early, f"{first} = {value}\n"), (late, f"{second} = {first}\n")]
        questions.append((f"assert {second} == ", str(value)))
    return Draft(facts, questions, set(names))


TASKS: dict[str, Callable[..., Draft]] = {
    "dict_lookup": dict_lookup,
    "needle": needle,
    "function_lookup": function_lookup,
    "two_hop": two_hop,
}


class Filler:
    """Runs of consecutive lines of a text."""

    def __init__(self, text: str):
        self.text = text

    def lines(self, rng: random.Random, tokens: int) -> list[str]:
        """Lines, without their newlines, that certainly hold `tokens` tokens; past the end the text starts again."""
        size = 6 * tokens + 2000  # code has three to four characters a token; the margin covers the cut line
        start = rng.randrange(len(self.text))
        chunk = self.text[start : start + size]
        while len(chunk) < size:
            chunk += "\n" + self.text[: size - len(chunk)]
        return chunk.split("\n")[1:-1]  # the first and the last line are cut


@lru_cache
def filler(split: str) -> Filler:
    """The shipped held-out code for tests; for training the corpus, which must have been built."""
    path = DATA / "heldout" / "code.jsonl" if split == "test" else ROOT / "build/minilm/corpus/train-code.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{path.relative_to(ROOT)} is missing; make it with: python -m kvlib.minilm corpus")
    with path.open() as file:
        return Filler("\n".join(json.loads(line)["text"] for line in file))


def draft(task: str, tokens: int, draw: Draw, **options) -> Draft:
    """What `task` states and asks in a prompt of about `tokens` tokens, questions in random order."""
    if task not in TASKS:
        near = difflib.get_close_matches(task, TASKS, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(TASKS)}"
        raise ValueError(f"unknown task {task!r}; {hint}")
    if tokens < SHORTEST:
        raise ValueError(f"tokens={tokens}: at least {SHORTEST}")
    drawn = TASKS[task](draw, tokens, **options)
    draw.rng.shuffle(drawn.questions)
    return drawn


def compose(drawn: Draft, room: int, rng: random.Random, text, count: Callable[[list[str]], list[int]]) -> str:
    """The facts among lines of `text` (a `Filler`), at most `room` tokens by `count` (text by text)."""
    facts = sorted(drawn.facts)
    left = room - sum(count([fact for _, fact in facts]))
    if left < 0:
        raise ValueError(f"too few tokens: the facts alone need {-left} more")
    candidates = [line + "\n" for line in text.lines(rng, left)]
    lines, sizes = [], []
    for line, size in zip(candidates, count(candidates)):
        if size <= left and drawn.names.isdisjoint(re.findall(r"\w+", line.lower())):
            lines.append(line)
            sizes.append(size)
            left -= size
    starts = list(accumulate(sizes, initial=0))
    for depth, fact in reversed(facts):  # from the end, so that earlier places stay valid
        lines.insert(bisect_left(starts, depth * starts[-1]), fact)
    return "".join(lines)


def sample(task: str, tokens: int, seed: int, *, tokenizer, split: str = "test", text: Filler | None = None, **options):
    """Draw one `Sample` whose prompt has at most `tokens` tokens and at most 2 % (and 8 tokens) fewer.

    options go to the task (`depth` of a needle). `text` replaces the split's own filler.
    Raises ValueError for an unknown task, a prompt too short, an option out of range.
    """
    text = text or filler(split)

    def count(texts: list[str]) -> list[int]:
        return [len(ids) for ids in tokenizer(texts, add_special_tokens=False).input_ids]

    room = tokens
    for _ in range(8):  # tokenizers that merge across lines need a second try, ours does not
        rng = random.Random(f"{task} {tokens} {seed} {split}")
        drawn = draft(task, tokens, Draw(rng, split), **options)
        question, answer = drawn.questions[0]
        if room == tokens:
            room -= len(tokenizer(question).input_ids)
        prompt = compose(drawn, room, rng, text, count) + question
        length = len(tokenizer(prompt).input_ids)
        if 0 <= tokens - length <= 8 + tokens // 50:
            return Sample(task, prompt, answer, seed, length)
        room += tokens - length
    raise ValueError(f"no prompt of {tokens} tokens could be made for {task!r} with this tokenizer and filler")


def correct(sample: Sample, generated: str) -> bool:
    """Whether the first generated line starts with the answer and the answer ends there (48213, not 482130)."""
    line = generated.split("\n", 1)[0]
    return re.match(re.escape(sample.answer) + r"(?!\w)", line) is not None
