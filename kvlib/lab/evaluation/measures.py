"""What a study measures: modules whose `evaluate` makes rows of a result table; protocols and columns of each."""

from kvlib.lab.evaluation import (
    anchored,
    arms,
    drift,
    evaluate,
    functions,
    recall,
    running,
    sinks,
    sixteen_bits,
    stepwise,
)
from kvlib.lab.evaluation.benchmarks import answering

MEASURES = {
    "answers": evaluate,
    "sinks": sinks,
    "stepwise": stepwise,
    "drift": drift,
    "recall": recall,
    "running": running,
    "anchored": anchored,
    "functions": functions,
    "sixteen bits": sixteen_bits,
    "benchmarks": answering,
}
PROTOCOLS = {
    "answers": evaluate.PROTOCOLS,
    "sinks": evaluate.PROTOCOLS,
    "stepwise": stepwise.PROTOCOLS,
    "drift": tuple(drift.PROTOCOLS),
    "recall": recall.PROTOCOLS,
    "running": tuple(running.PROTOCOLS),
    "anchored": arms.PROTOCOLS,
    "functions": arms.PROTOCOLS,
    "sixteen bits": sixteen_bits.PROTOCOLS,
    "benchmarks": answering.PROTOCOLS,
}
EXTRA = {
    "anchored": anchored.EXTRA,
    "functions": functions.EXTRA,
    "benchmarks": answering.EXTRA,
}  # columns of their own
