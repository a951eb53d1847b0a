"""Names and values: two words joined, five digits. A quarter of all, by their checksum, is for tests only."""

import random
import zlib
from functools import lru_cache
from itertools import product

SPLITS = ("train", "test")

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


def belongs(text: str, split: str) -> bool:
    """Whether `text` (a name, a value, a pattern) is for this split."""
    return (zlib.crc32(text.encode()) % 4 == 0) == (split == "test")


@lru_cache
def pools(split: str) -> tuple[list[str], list[int]]:
    """All names and all values of a split."""
    names = [f"{adjective}_{noun}" for adjective, noun in product(ADJECTIVES, NOUNS)]
    return [n for n in names if belongs(n, split)], [v for v in range(10_000, 100_000) if belongs(str(v), split)]


@lru_cache
def nouns_of(split: str) -> dict[str, list[str]]:
    """The nouns that form a name of this split, by adjective."""
    nouns = {adjective: [] for adjective in ADJECTIVES}
    for name in pools(split)[0]:
        adjective, noun = name.split("_")
        nouns[adjective].append(noun)
    return nouns


class Draw:
    """Names, values and patterns of one split, drawn with one random source; those of a call are distinct."""

    def __init__(self, rng: random.Random, split: str):
        if split not in SPLITS:
            raise ValueError(f"split={split!r}: 'train' or 'test'")
        self.rng, self.split = rng, split
        self.name_pool, self.value_pool = pools(split)

    def names(self, count: int) -> list[str]:
        return self.rng.sample(self.name_pool, count)

    def values(self, count: int) -> list[int]:
        return self.rng.sample(self.value_pool, count)

    def depth(self) -> float:
        """Where a fact stands, evenly; in training one in ten at an end, or those lines would hardly occur."""
        beyond = 0.05 if self.split == "train" else 0
        return min(1.0, max(0.0, self.rng.uniform(-beyond, 1 + beyond)))

    def pattern(self, patterns: list):
        """One of `patterns`; the other split never sees it."""
        return self.rng.choice([p for p in patterns if belongs(str(p), self.split)])
