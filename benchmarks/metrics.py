"""What metrics cost: an update, and the end of an epoch over 1, 2 and 4 ranks, next to torchmetrics and PyTorch-Ignite.

At the end of an epoch, the values of 1, 8 and 32 metrics (accuracy, precision, recall, F1, ...) over real Gloo
processes are measured with their collectives counted, and beside them the floor: one bare all-reduce of the bytes that
dengine sends. Contestants take turns within one run, so that all of them meet the same machine; medians count.

    python benchmarks/metrics.py [--rounds R] [--ranks 1 2 4]
"""

import argparse
import platform
import socket
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from dengine import distributed
from dengine.metrics import Accuracy, F1Score, Loss, Precision, Recall, TopKAccuracy
from dengine.metrics.collection.metric_set import MetricSet

NUM_CLASSES = 10
COUNTS = (1, 8, 32)
COLLECTIVES = ("all_reduce", "all_gather", "all_gather_object", "all_gather_into_tensor", "broadcast", "barrier")


def batch(num_samples: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(num_samples, NUM_CLASSES), torch.randint(0, NUM_CLASSES, (num_samples,))


def in_turn(kinds: list[Callable[[], Any]], count: int) -> list[Any]:
    return [kinds[index % len(kinds)]() for index in range(count)]


# -- contestants: each gives (update, the end of an epoch) -------------------------------------------------------


def dengine_metrics(count: int) -> tuple[Callable[[Any], None], Callable[[], Any]]:
    kinds: list[Callable[[], Any]] = [
        Accuracy,
        lambda: Precision(num_classes=NUM_CLASSES, average="macro"),
        lambda: Recall(num_classes=NUM_CLASSES, average="macro"),
        lambda: F1Score(num_classes=NUM_CLASSES, average="macro"),
        lambda: TopKAccuracy(k=5),
        lambda: F1Score(num_classes=NUM_CLASSES, average="weighted"),
        lambda: Loss(torch.nn.CrossEntropyLoss()),
        lambda: Precision(num_classes=NUM_CLASSES, average="micro"),
    ]
    together = MetricSet()
    together.add_all({f"m{index}": metric for index, metric in enumerate(in_turn(kinds, count))})
    together.agree()
    return together.update, lambda: together.compute(distributed=True)


def dengine_reduction(count: int) -> tuple[Callable[[Any], None], Callable[[], Any]]:
    """The reduction alone, without the values being computed from what it gives."""
    update, compute = dengine_metrics(count)
    together = compute.__closure__[0].cell_contents
    return update, lambda: together._reduced(distributed.world())


def torchmetrics_metrics(count: int) -> tuple[Callable[[Any], None], Callable[[], Any]]:
    import torchmetrics
    from torchmetrics import classification

    kinds: list[Callable[[], Any]] = [
        lambda: classification.MulticlassAccuracy(NUM_CLASSES, average="micro"),
        lambda: classification.MulticlassPrecision(NUM_CLASSES),
        lambda: classification.MulticlassRecall(NUM_CLASSES),
        lambda: classification.MulticlassF1Score(NUM_CLASSES),
        lambda: classification.MulticlassAccuracy(NUM_CLASSES, top_k=5, average="micro"),
        lambda: classification.MulticlassF1Score(NUM_CLASSES, average="weighted"),
        lambda: torchmetrics.MeanMetric(),
        lambda: classification.MulticlassPrecision(NUM_CLASSES, average="micro"),
    ]
    metrics = in_turn(kinds, count)
    loss = torch.nn.CrossEntropyLoss()

    def update(pair: Any) -> None:
        for metric in metrics:
            if isinstance(metric, torchmetrics.MeanMetric):
                metric.update(loss(*pair), len(pair[0]))
            else:
                metric.update(*pair)

    def compute() -> list[Any]:
        values = []
        for metric in metrics:
            metric._computed = None  # its cache would answer for all rounds but the first
            values.append(metric.compute().tolist())
        return values

    return update, compute


def ignite_metrics(count: int) -> tuple[Callable[[Any], None], Callable[[], Any]]:
    from ignite import metrics as ignite

    kinds: list[Callable[[], Any]] = [
        ignite.Accuracy,
        lambda: ignite.Precision(average="macro"),
        lambda: ignite.Recall(average="macro"),
        lambda: ignite.Fbeta(1.0),
        lambda: ignite.TopKCategoricalAccuracy(k=5),
        lambda: ignite.Precision(average="weighted"),
        lambda: ignite.Loss(torch.nn.CrossEntropyLoss()),
        lambda: ignite.Precision(average="micro"),
    ]
    metrics = in_turn(kinds, count)
    # Fbeta is arithmetic over a precision and a recall of its own, which are what has to be updated.
    updated: list[Any] = []
    for metric in metrics:
        updated += [part for part in _ignite_leaves(metric) if part not in updated]

    def update(pair: Any) -> None:
        for metric in updated:
            metric.update(pair)

    def compute() -> list[Any]:
        for metric in updated:
            metric._result = None
        return [metric.compute() for metric in metrics]

    return update, compute


def _ignite_leaves(metric: Any) -> list[Any]:
    if type(metric).__name__ != "MetricsLambda":
        return [metric]
    return [leaf for argument in metric.args if hasattr(argument, "compute") for leaf in _ignite_leaves(argument)]


CONTESTANTS = {
    "dengine": dengine_metrics,
    "reduction alone": dengine_reduction,
    "torchmetrics": torchmetrics_metrics,
    "ignite": ignite_metrics,
}


# -- measuring ---------------------------------------------------------------------------------------------------


def counted(function: Callable[[], Any]) -> tuple[int, int]:
    """Collectives of one call, and the elements of its first all-reduce."""
    calls: list[int] = []
    real = {name: getattr(dist, name) for name in COLLECTIVES}
    for name, collective in real.items():

        def called(*args: Any, collective: Any = collective, **options: Any) -> Any:
            calls.append(args[0].numel() if args and isinstance(args[0], torch.Tensor) else 0)
            return collective(*args, **options)

        setattr(dist, name, called)
        setattr(dist.distributed_c10d, name, called)
    try:
        function()
    finally:
        for name, collective in real.items():
            setattr(dist, name, collective)
            setattr(dist.distributed_c10d, name, collective)
    return len(calls), calls[0] if calls else 0


def seconds(function: Callable[[], Any]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def epoch_ends(rank: int, size: int, port: int, rounds: int, names: list[str]) -> None:
    import os

    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)
    with distributed.process_group():
        rows: dict[tuple[int, str], Callable[[], Any]] = {}
        collectives: dict[tuple[int, str], int] = {}
        for count in COUNTS:
            for name in names:
                update, compute = CONTESTANTS[name](count)
                update(batch())
                compute()
                rows[count, name] = compute
                collectives[count, name], elements = counted(compute)
                if name == "dengine":
                    floor = torch.zeros(max(elements, 1), dtype=torch.float64)
                    rows[count, "bare all-reduce"] = lambda floor=floor: dist.all_reduce(floor)
                    collectives[count, "bare all-reduce"] = 1
        taken: dict[tuple[int, str], list[float]] = {key: [] for key in rows}
        for _ in range(rounds):
            for key, function in rows.items():
                distributed.barrier("round")
                taken[key].append(seconds(function))
        if rank == 0:
            show(size, taken, collectives)


def show(size: int, taken: dict[tuple[int, str], list[float]], collectives: dict[tuple[int, str], int]) -> None:
    print(f"\nend of an epoch, {size} rank{'s' * (size > 1)}")
    print(f"{'metrics':>8}  {'':16} {'collectives':>11} {'median us':>10} {'x floor':>8} {'x dengine':>10}")
    median_us = {key: statistics.median(values) * 1e6 for key, values in taken.items()}
    for (count, name), us in sorted(median_us.items(), key=lambda item: (item[0][0], item[1])):
        floor, own = median_us[count, "bare all-reduce"], median_us[count, "dengine"]
        print(f"{count:8}  {name:16} {collectives[count, name]:11} {us:10.0f} {us / floor:8.2f} {us / own:10.2f}")
    for name in ("dengine", "reduction alone"):
        print(f"{name}: 32 metrics cost {median_us[32, name] / median_us[8, name]:.2f} x 8 metrics")


def updates(rounds: int, names: list[str]) -> None:
    print(f"\none update with ({64}, {NUM_CLASSES}) scores")
    print(f"{'metrics':>8}  {'':16} {'median us':>10} {'x dengine':>10}")
    pair = batch()
    for count in COUNTS:
        runs = {name: CONTESTANTS[name](count)[0] for name in names}
        taken: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(rounds):
            for name, update in runs.items():
                taken[name].append(seconds(lambda update=update: update(pair)))
        own = statistics.median(taken["dengine"])
        for name, values in taken.items():
            median = statistics.median(values)
            print(f"{count:8}  {name:16} {median * 1e6:10.1f} {median / own:10.2f}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    options = parser.parse_args()
    names = ["dengine", "reduction alone", *(name for name in ("torchmetrics", "ignite") if find_spec(name))]
    print(f"Python {platform.python_version()}, torch {torch.__version__}, {multiprocessing.cpu_count()} cores, Gloo")
    torch.set_num_threads(1)
    updates(options.rounds, [name for name in names if name != "reduction alone"])
    for size in options.ranks:
        arguments = (size, free_port(), options.rounds, names)
        multiprocessing.start_processes(epoch_ends, args=arguments, nprocs=size, start_method="spawn")


if __name__ == "__main__":
    main()
