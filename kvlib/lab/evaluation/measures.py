"""What a study measures: modules whose `evaluate` makes rows of a result table."""

from kvlib.lab.evaluation import evaluate, sinks

MEASURES = {"answers": evaluate, "sinks": sinks}
