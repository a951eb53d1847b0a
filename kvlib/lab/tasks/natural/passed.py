"""The families in natural language that passed the pilot (data/pilot): what result tables are made of."""

PASSED = (
    "all_numbers", "cargoes", "constant", "number", "number_of_four", "numbers_of_four", "pass_key", "profession",
    "quantity", "recall", "register", "repeated_line", "returned", "saying", "secret_word", "year",
)  # fmt: skip
