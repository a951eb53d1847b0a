"""What the tables of the third lesson hold: arms of AnchorCoder, and a dense model at as many bytes.

Arms are those that `data/models/arms.csv` lists; of one that is trained later the tables get rows.
"""

import pandas as pd

from kvlib.anchored import LISTED
from kvlib.anchored.arms import ARMS
from kvlib.lab import tasks
from kvlib.lab.evaluation.configuration import Configuration
from kvlib.lab.results.study import FULL, Study, with_arguments

PLANTED = (Configuration("anchorcoder", 1.0),)
AS_MANY_BYTES = (
    FULL,
    *(Configuration(method, 1.0) for method in ("streaming_llm", "h2o", "random", "snapkv")),
    *with_arguments("streaming_llm", (1.0,), sinks=0),  # a window
    *with_arguments("vatp", (1.0,), host="h2o"),
)
CODE = ("code_bits", "next_line", "cross_file_line")
LOOKED_UP = ("needle", "dict_lookup", "two_hop")
# 3 584 tokens and anchors fit into 4 096.
LENGTHS = {512: CODE, 1024: CODE, 2048: (*CODE, *LOOKED_UP, *tasks.DISTANT), 3584: CODE}
# SmolLM2's tokenizer joins newlines and indentation, for arms without anchors only: no prompt may end there.
UNBROKEN = ("code_bits_unbroken", "next_line_unbroken")
SMOLLM2_LENGTHS = {1024: UNBROKEN, 2048: (*UNBROKEN, *LOOKED_UP), 4096: UNBROKEN}
TRAINED = [name for name in pd.read_csv(LISTED)["arm"] if ARMS[name].anchors != "none"]
SAMPLES, FUNCTIONS = 200, 400
WRITTEN = {512: ("function",)}  # the longest prompt and its reference have 433 of minilm's tokens


def arms(base: str, tasks_of: dict, samples: int = SAMPLES, measure="anchored", compared=(2048,)) -> dict:
    """By length, models trained with anchors.

    Args:
        tasks_of: by length. compared: lengths at which other seeds read, too. Arms whose weights were all trained write
            functions here; the bits that code costs them are the study of `whole`.
    """
    names = [name for name in TRAINED if ARMS[name].base == base and (measure == "functions" or not ARMS[name].whole)]
    first = [name for name in names if not ARMS[name].seed]
    models = {length: dict.fromkeys(names if length in compared else first, samples) for length in tasks_of}
    return {
        length: Study(chosen, length, PLANTED, models[length], protocol="planted", measure=measure)
        for length, chosen in tasks_of.items()
    }


def whole(base: str) -> Study:
    """What text costs the arms whose weights were all trained."""
    models = dict.fromkeys((name for name in TRAINED if ARMS[name].base == base and ARMS[name].whole), SAMPLES)
    return Study(("code_bits",), 2048, PLANTED, models, protocol="planted", measure="anchored")


def dense(base: str, per: int, tasks_of: dict, samples: int = SAMPLES, measure="anchored") -> dict:
    """By length, the model trained as long without anchors, with other methods at AnchorCoder's bytes."""
    models, protocol = {f"{base}-D1": samples}, f"bytes of per={per}"
    return {
        length: Study(chosen, length, AS_MANY_BYTES, models, protocol=protocol, measure=measure)
        for length, chosen in tasks_of.items()
    }


RUN = {"tasks_of": WRITTEN, "samples": FUNCTIONS, "measure": "functions"}
ANCHORED = {
    **{f"03_arms_{length}": study for length, study in arms("minilm", LENGTHS).items()},
    "03_whole_2048": whole("minilm"),
    **{f"03_dense_per4_{length}": study for length, study in dense("minilm", 4, LENGTHS).items()},
    **{f"03_dense_per6_{n}": study for n, study in dense("minilm", 6, dict.fromkeys(LENGTHS, CODE)).items()},
    "03_functions_arms": arms("minilm", **RUN, compared=(512,))[512],
    "03_functions_dense_per4": dense("minilm", 4, **RUN)[512],
    "03_functions_dense_per6": dense("minilm", 6, **RUN)[512],
    **{f"03_real_arms_{length}": study for length, study in arms("smollm2", SMOLLM2_LENGTHS).items()},
    **{f"03_real_dense_{length}": study for length, study in dense("smollm2", 6, SMOLLM2_LENGTHS).items()},
    "03_real_functions_arms": arms("smollm2", **RUN)[512],
    "03_real_functions_dense": dense("smollm2", 6, **RUN)[512],
}
