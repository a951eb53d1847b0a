"""Names, numbers and made-up words; those of one call are distinct."""

import random

from kvlib.lab.tasks.words import ADJECTIVES, NOUNS

PEOPLE = """
Adelaide Agnes Alma Ambrose Anselm Arthur Astrid Beatrice Bertram Blanche Cecil Clara Clement Conrad Cornelia Cyril
Daphne Dorothy Edgar Edith Edmund Eleanor Elsa Ernest Esther Eugene Felix Flora Florence Frances Frederick Gerald
Gertrude Gilbert Greta Harold Harriet Hector Helen Henrietta Herbert Hilda Horace Hugo Ida Irene Isabel Ivan Josephine
Julian Katharine Lavinia Leonard Leopold Louisa Lucy Lydia Mabel Magnus Marcus Margaret Martha Matilda Maurice Mildred
Millicent Muriel Nathan Nora Octavia Olive Oscar Oswald Percy Philippa Ralph Reginald Rosalind Roland Rupert Sibyl
Sidney Silas Sophia Stella Theodora Theodore Ursula Victor Viola Walter Wilfred Winifred
""".split()
CITIES = """
Aleppo Antwerp Athens Baghdad Barcelona Basel Belgrade Bergen Berlin Bern Bologna Bordeaux Bremen Brno Brussels
Bucharest Budapest Cadiz Cairo Calcutta Cologne Copenhagen Cordoba Cracow Damascus Delhi Dresden Dublin Florence Genoa
Geneva Ghent Glasgow Granada Hamburg Hanover Helsinki Istanbul Kiev Kyoto Leipzig Lisbon Lyon Madrid Malaga Manila
Marseille Milan Montreal Moscow Munich Naples Nairobi Oslo Palermo Paris Porto Prague Quebec Riga Rome Rotterdam
Salzburg Seville Sofia Stockholm Tallinn Toledo Trieste Tunis Turin Utrecht Venice Verona Vienna Warsaw Zagreb Zurich
""".split()
PROFESSIONS = """
baker barber blacksmith bookbinder brewer butcher carpenter clerk cobbler cook cooper dentist doctor farmer fisherman
gardener glazier goldsmith hatter hunter judge lawyer librarian locksmith mason miller miner musician nurse painter
plumber porter potter printer sculptor shepherd singer smuggler surgeon tailor tanner teacher translator watchmaker
weaver
""".split()
GOODS = "barley butter candles cheese cloth coal cotton flour glass honey indigo iron lead linen nails oats oil paper "
GOODS = (GOODS + "pepper rice rope rum rye salt silk soap sugar tar tea timber tin tobacco wax wheat wine wool").split()
BUILDINGS = "aqueduct bridge brewery canal cathedral courthouse hospital library lighthouse market mill museum "
BUILDINGS = (BUILDINGS + "observatory opera orphanage prison railway school theatre tunnel university").split()
KINDS = {  # things that anyone would put into one class
    "animal": "bear camel cow deer dog donkey fox goat horse lion monkey mouse pig rabbit sheep tiger zebra".split(),
    "fruit": "apple apricot banana cherry grape lemon lime mango melon orange peach pear pineapple plum".split(),
    "garment": "blouse boots cap coat dress gloves hat jacket scarf shirt shoes skirt socks sweater trousers".split(),
    "tool": "axe chisel drill hammer knife pliers saw scissors screwdriver shovel spade wrench".split(),
    "instrument": "banjo cello clarinet drum flute guitar harp oboe organ piano trombone trumpet violin".split(),
    "metal": "aluminium brass bronze copper gold iron lead nickel silver steel tin zinc".split(),
}
QUOTES = """
The kettle has been singing since dawn
Nobody paints a fence in the rain
My uncle kept bees on the roof
There is sand in the sugar again
You may keep the blue umbrella
That piano was never in tune
The ferry does not wait for poets
I buried the letters under the pear tree
Three candles are enough for this room
The goats have eaten the curtains
We should have turned left at the chapel
I do not trust a man without pockets
The clock in the hall is lying
Put the oranges where the children cannot see them
She danced better with a broken shoe
The snow will cover our mistakes
Every key in this house opens the cellar
My grandmother sold hats to the bishop
The soup was better before the war
A parrot is no witness
It is too quiet for a Thursday
They moved the river in my childhood
Never lend a ladder to a cousin
The judge has gone fishing
""".strip().split("\n")
SYLLABLES = [a + b for a in "b d f g k l m n p r s t v z".split() for b in "a e i o u".split()]
GOLDEN = (5**0.5 - 1) / 2


class Draw:
    """Everything a task needs, from one random source. Depths follow from the sample's number, evenly over numbers."""

    def __init__(self, rng: random.Random, number: int, tokens: int, tokenizer):
        self.rng, self.number, self.tokens, self.tokenizer = rng, number, tokens, tokenizer

    def some(self, pool: list[str], count: int) -> list[str]:
        return self.rng.sample(pool, count)

    def depths(self, count: int) -> list[float]:
        """Depths of facts, evenly spread; those of the first fact are even over any run of sample numbers."""
        first = self.number * GOLDEN % 1
        others = [(first + i / count) % 1 for i in range(1, count)]
        return [first, *self.rng.sample(others, len(others))]

    def people(self, count: int) -> list[str]:
        return self.some(PEOPLE, count)

    def cities(self, count: int) -> list[str]:
        return self.some(CITIES, count)

    def nouns(self, count: int) -> list[str]:
        return self.some(NOUNS, count)

    def adjectives(self, count: int) -> list[str]:
        return self.some(ADJECTIVES, count)

    def numbers(self, count: int, digits: int) -> list[str]:
        return [str(number) for number in self.rng.sample(range(10 ** (digits - 1), 10**digits), count)]

    def invented(self, count: int) -> list[str]:
        """Words of three syllables that no language is known to have."""
        words: dict[str, None] = {}
        while len(words) < count:
            words["".join(self.some(SYLLABLES, 3))] = None
        return list(words)
