"""Several arms at a time, spread over the GPUs of a machine."""

import multiprocessing
import sys

import torch

from kvlib.anchored.train import train


def one(name: str, gpu: int, minutes: float, workers: int) -> None:
    torch.set_float32_matmul_precision("high")
    torch.cuda.set_device(gpu)
    if not train(name, minutes, workers):
        sys.exit(3)


def train_all(names: list[str], minutes: float, side_by_side: int, workers: int) -> bool:
    """Train arms, so many at a time on each GPU; whether all of them are done."""
    gpus, context = torch.cuda.device_count(), multiprocessing.get_context("spawn")
    places = [(gpu, turn) for turn in range(side_by_side) for gpu in range(gpus)]
    queues = [names[i :: len(places)] for i in range(len(places))]
    processes = [context.Process(target=queue, args=(q, g, minutes, workers)) for q, (g, _) in zip(queues, places) if q]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return not any(process.exitcode for process in processes)


def queue(names: list[str], gpu: int, minutes: float, workers: int) -> None:
    for name in names:
        one(name, gpu, minutes, workers)
