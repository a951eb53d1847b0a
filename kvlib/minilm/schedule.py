"""Steps, rows and learning rate of a training run."""

from dataclasses import dataclass

from kvlib.minilm.tokenizer import LENGTH


@dataclass(frozen=True)
class Schedule:
    """A step is `sequences` sequences of `length` tokens, whatever the number of GPUs.

    The first `short_share` of the steps cut as many tokens into sequences of `short` tokens, which must divide
    `length`: attention costs less there, and most of what retrieval needs can be learnt.
    """

    length: int = LENGTH
    sequences: int = 16
    short: int = 1024
    short_share: float = 0.6
    steps: int = round(250e6 / 65_536)
    lr: float = 2e-3
    warmup: int = 200
    decay: float = 0.4  # last share of the steps, in which the rate falls to zero
    weight_decay: float = 0.1
    clip: float = 1.0
    answer_weight: float = 4.0
    seed: int = 0

    def rate(self, step: int) -> float:
        """Learning rate of a step: linear warm-up, constant, linear decay to zero."""
        left = (self.steps - step) / max(1, round(self.decay * self.steps))
        return self.lr * min(1.0, (step + 1) / self.warmup, left)

    @property
    def short_steps(self) -> int:
        return round(self.short_share * self.steps)

    def shape(self, step: int) -> tuple[int, int]:
        """(sequences, their length) of a step."""
        if step < self.short_steps:
            return self.sequences * self.length // self.short, self.short
        return self.sequences, self.length

    def first(self, step: int) -> int:
        """Number of the first sequence of a step; sequences are counted through both phases."""
        short = min(step, self.short_steps)
        return short * self.shape(0)[0] + (step - short) * self.sequences
