"""Metrics on a mesh of ranks: every sample counts once, and all ranks have the value of the parent's own count."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torchmetrics
from ranks import run_ranks
from torch.nn.functional import cross_entropy

from dengine import Engine, distributed
from dengine.handlers import ThroughputMonitor
from dengine.metrics import Accuracy, Average, EpochMetric, F1Score, Loss, Metric, RunningAverage, Throughput

NUM_SAMPLES, NUM_CLASSES, NUM_TOKENS, BATCH = 10, 3, 4, 2
MESHES: list[dict[str, int]] = [
    {"dp": 2, "tp": 2},
    {"tp": 2, "dp": 2},
    {"pp": 2, "dp": 2},
    {"dp": 2, "cp": 2},
    {"cp": 2, "dp_shard": 2},
    {"pp": 2, "cp": 2},
    {"dp_replicate": 2, "dp_shard": 2},
]


class Ops(Metric):
    """A state of each kind of reduction but "cat", of positive and negative numbers; its defaults are in the way."""

    lowest: Any
    highest: Any
    most: Any
    mean: Any
    rows: Any
    float_rows: Any
    samples: Any
    total: Any

    def __init__(self) -> None:
        super().__init__()
        self.add_state("lowest", 5.0, reduce="min")
        self.add_state("highest", -5.0, reduce="max")
        self.add_state("most", 0, reduce="max")
        self.add_state("mean", 0.0, reduce="mean")
        self.add_state("rows", 0, reduce="gather")
        self.add_state("float_rows", 7.0, reduce="gather")
        self.add_state("samples", 0, reduce="samples")
        self.add_state("total", 1, reduce="sum")

    def update(self, output: Any) -> None:
        prediction, target = output
        self.lowest = min(self.lowest, prediction.min().item() + 1)
        self.highest = max(self.highest, prediction.max().item() - 2)
        self.most = max(self.most, int(target.sum()))
        self.mean = float(len(target))
        self.rows += target.numel()
        self.float_rows = self.float_rows + 0.5
        self.samples += len(target)
        self.total += target.numel()

    def compute(self) -> Any:
        return {name: torch.as_tensor(getattr(self, name)).tolist() for name in self.states}


class Undeclared(Metric):
    """Computed on each rank, and averaged by its updates."""

    value = 0.0

    def update(self, output: Any) -> None:
        self.value = float(output[1].sum())

    def compute(self) -> float:
        return self.value


def metrics() -> dict[str, Any]:
    return {
        "accuracy": Accuracy(),
        "f1": F1Score(num_classes=NUM_CLASSES, average=None),
        "loss": Loss(cross_entropy),
        "mean": Average(lambda output: output[0].double().mean((1, 2))),
        "sorted": EpochMetric(lambda predictions, targets: targets.flatten().sort().values),
        "ops": Ops(),
        "undeclared": Undeclared(lambda output: output),
        "running": RunningAverage(output_transform=lambda output: output[1].double().mean()),
        "torchmetrics": torchmetrics.classification.MulticlassF1Score(NUM_CLASSES),
        "torchmetrics_mean": torchmetrics.MeanMetric(),
    }


def transforms() -> dict[str, Any]:
    return {"torchmetrics_mean": lambda output: (output[0].mean(), 2.0)}


def samples() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(NUM_SAMPLES, NUM_CLASSES, NUM_TOKENS, generator=generator)
    return scores, torch.randint(0, NUM_CLASSES, (NUM_SAMPLES, NUM_TOKENS), generator=generator)


def batches(data_rank: int, data_size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Every `data_size`-th sample."""
    parts = (part[data_rank::data_size].split(BATCH) for part in samples())
    return list(zip(*parts, strict=True))


def own_tokens(batch: tuple[torch.Tensor, ...], cp: int, num_cp: int) -> tuple[torch.Tensor, ...]:
    """The tokens of a place along `cp`."""
    return tuple(part[..., cp * NUM_TOKENS // num_cp : (cp + 1) * NUM_TOKENS // num_cp] for part in batch)


def add(engine: Engine) -> None:
    for name, metric in metrics().items():
        engine.add_metric(name=name, metric=metric, output_transform=transforms().get(name))


def values_on(rank: int, size: int, mesh: dict[str, int] | None, parts: tuple[int, int]) -> dict[str, Any]:
    with distributed.process_group(mesh=mesh) as world:
        data = batches(world.data_rank, parts[0])
        cp, has_output = world.coordinates.get("cp", 0), world.coordinates.get("pp", 1) == 1
        engine = Engine(lambda engine, batch: own_tokens(batch, cp, parts[1]) if has_output else None)
        add(engine)
        engine.run(data, max_epochs=1)
        one_epoch, two_epochs = CountCollectives(), CountCollectives()
        with one_epoch:
            engine.run(data, max_epochs=2)
        with two_epochs:
            engine.run(data, max_epochs=4)
        of_an_epoch = {name: two_epochs.counts[name] - one_epoch.counts[name] for name in one_epoch.counts}
        return {"values": plain(engine.state.metrics), "collectives": of_an_epoch}


class CountCollectives:
    """Counts the calls of torch's collectives while it is entered."""

    names = ("all_reduce", "all_gather", "all_gather_object", "broadcast")

    def __init__(self) -> None:
        self.counts = dict.fromkeys(self.names, 0)

    def __enter__(self) -> None:
        self.own = {name: getattr(dist, name) for name in self.names}
        for name in self.names:
            setattr(dist, name, self._counted(name))

    def __exit__(self, *_: object) -> None:
        for name, function in self.own.items():
            setattr(dist, name, function)

    def _counted(self, name: str) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.counts[name] += 1
            return self.own[name](*args, **kwargs)

        return counted


def plain(values: Any) -> dict[str, Any]:
    return {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in values.items()}


def sizes_of(mesh: dict[str, int]) -> tuple[int, int]:
    num_data = 1
    for name, size in mesh.items():
        num_data *= size if name.startswith("dp") else 1
    return num_data, mesh.get("cp", 1)


def expected(num_data: int, num_cp: int, *, cp_first: bool) -> dict[str, Any]:
    """Of what each rank that counts has seen, in the order of ranks: by hand, or by one metric given all of it."""
    places = [(data, cp) for data in range(num_data) for cp in range(num_cp)]
    if cp_first:
        places.sort(key=lambda place: place[1])
    seen = [[own_tokens(batch, cp, num_cp) for batch in batches(data, num_data)] for data, cp in places]
    alone = Engine(lambda engine, batch: batch, distributed=False)
    for name, metric in metrics().items():
        if name not in ("ops", "undeclared", "running"):
            alone.add_metric(name=name, metric=metric, output_transform=transforms().get(name))
    alone.run([output for of_rank in seen for output in of_rank])
    scores, labels = samples()
    running, last = [], []
    for of_rank in seen:
        average = of_rank[0][1].double().mean()
        for _, target in of_rank[1:]:
            average = 0.98 * average + 0.02 * target.double().mean()
        running.append(average.item())
        last.append(float(of_rank[-1][1].sum()))
    num_updates = [len(of_rank) for of_rank in seen]
    by_updates = sum(value * count for value, count in zip(last, num_updates, strict=True)) / sum(num_updates)
    return {
        **{name: pytest.approx(value, rel=1e-6) for name, value in plain(alone.state.metrics).items()},
        "running": pytest.approx(sum(running) / len(running)),
        "undeclared": pytest.approx(by_updates),
        "ops/lowest": pytest.approx(min(5.0, scores.min().item() + 1)),
        "ops/highest": pytest.approx(scores.max().item() - 2),
        "ops/most": max(int(target.sum()) for of_rank in seen for _, target in of_rank),
        "ops/mean": pytest.approx(sum(float(len(of_rank[-1][1])) for of_rank in seen) / len(seen)),
        "ops/rows": [sum(target.numel() for _, target in of_rank) for of_rank in seen],
        "ops/float_rows": [7.0 + 0.5 * count for count in num_updates],
        "ops/samples": NUM_SAMPLES,
        "ops/total": len(seen) + labels.numel(),
    }


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_every_rank_has_the_values_of_all_samples_each_counted_once(mesh: dict[str, int]) -> None:
    num_data, num_cp = sizes_of(mesh)
    found = run_ranks(values_on, 4, mesh, (num_data, num_cp), init=False)
    wanted = expected(num_data, num_cp, cp_first=next(iter(mesh)) == "cp")
    for rank, outcome in enumerate(found):
        values = outcome["values"]
        assert values.keys() == wanted.keys()
        for name, value in wanted.items():
            assert values[name] == value, f"{name} on rank {rank}"


def alone_on(rank: int, size: int, mesh: dict[str, int], num_samples: int) -> dict[str, Any]:
    with distributed.process_group(mesh=mesh) as world:
        cp, num_cp = world.coordinates.get("cp", 0), mesh.get("cp", 1)
        chosen = range(world.data_rank, num_samples, world.data_size)
        data = [tuple(part[index : index + 1] for part in samples()) for index in chosen]
        engine = Engine(lambda engine, batch: own_tokens(batch, cp, num_cp) if world.has_last_stage else None)
        add_few(engine)
        return plain(engine.run(data).metrics)


def add_few(engine: Engine) -> None:
    engine.add_metrics({"accuracy": Accuracy(), "loss": Loss(cross_entropy)})
    engine.add_metric(torchmetrics.classification.MulticlassAUROC(NUM_CLASSES), "auroc", output_transform=by_token)
    engine.add_metric(torchmetrics.aggregation.MaxMetric(), "largest", output_transform=lambda output: (output[0],))


def by_token(output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    return output[0].movedim(1, -1).flatten(0, 1).softmax(-1), output[1].flatten()


@pytest.mark.parametrize("mesh", [{"dp": 2, "tp": 2}, {"dp": 2, "cp": 2}, {"pp": 2, "dp": 2}], ids=str)
def test_a_part_of_the_data_may_have_no_batch(mesh: dict[str, int]) -> None:
    alone = Engine(lambda engine, batch: batch, distributed=False)
    add_few(alone)
    wanted = plain(alone.run([tuple(part[:1] for part in samples())]).metrics)
    for found in run_ranks(alone_on, 4, mesh, 1, init=False):
        assert found == pytest.approx(wanted, rel=1e-6)


def test_a_mesh_costs_not_one_collective_more() -> None:
    plain_ranks = run_ranks(values_on, 4, None, (4, 1), init=False)
    on_mesh = run_ranks(values_on, 4, {"dp": 2, "cp": 2}, (2, 2), init=False)
    assert on_mesh[0]["collectives"] == plain_ranks[0]["collectives"]


# -- samples and tokens a second -----------------------------------------------------------------------------------


def speeds_on(rank: int, size: int, mesh: dict[str, int], pooled_on: int | None) -> dict[str, Any]:
    with distributed.process_group(mesh=mesh) as world:
        cp = world.coordinates.get("cp", 0)
        num_cp = mesh.get("cp", 1)
        has_output = world.has_last_stage and pooled_on in (None, cp)
        engine = Engine(lambda engine, batch: own_tokens(batch, cp, num_cp) if has_output else None)
        throughput, tokens = Seconds(), Seconds(lambda output: output[1].numel())
        engine.add_metric(throughput, "samples")
        engine.add_metric(tokens, "tokens")
        monitor = ThroughputMonitor(num_tokens=lambda engine: engine.state.batch[1].numel() // num_cp, print_line=False)
        monitor.attach(engine)
        engine.run(batches(world.data_rank, world.data_size))
        rates = engine.state.metrics
        return {**plain(rates), "ratio": rates["tokens_per_s"] / rates["samples_per_s"]}


class Seconds(Throughput):
    """As if every rank had taken two seconds."""

    def flush(self) -> None:
        self.elapsed_s = 2.0


@pytest.mark.parametrize("mesh", [*MESHES[:1], *MESHES[2:6]], ids=str)
def test_a_sample_counts_once_in_a_throughput_and_each_token_too(mesh: dict[str, int]) -> None:
    for found in run_ranks(speeds_on, 4, mesh, None, init=False):
        assert found["samples"] == NUM_SAMPLES / 2.0
        assert found["tokens"] == NUM_SAMPLES * NUM_TOKENS / 2.0
        assert found["ratio"] == pytest.approx(NUM_TOKENS)


@pytest.mark.parametrize("pooled_on", [0, 1])
def test_a_sample_counts_once_whichever_rank_of_cp_has_the_pooled_output(pooled_on: int) -> None:
    for found in run_ranks(speeds_on, 4, {"dp": 2, "cp": 2}, pooled_on, init=False):
        assert found["samples"] == NUM_SAMPLES / 2.0
        assert found["ratio"] == pytest.approx(NUM_TOKENS)


# -- what stays an error -------------------------------------------------------------------------------------------


def none_on(rank: int, size: int, mesh: dict[str, int]) -> str:
    with distributed.process_group(mesh=mesh):
        engine = Engine(lambda engine, batch: None)
        engine.add_metric(Accuracy(), "accuracy")
        try:
            engine.run([1])
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "no error"


def test_none_is_no_output_without_pp_or_cp() -> None:
    for found in run_ranks(none_on, 2, {"dp": 1, "tp": 2}, init=False):
        assert "takes a (prediction, target) pair" in found or "RemoteRankError" in found


def test_none_from_every_rank_is_not_computable() -> None:
    for found in run_ranks(none_on, 2, {"dp": 1, "cp": 2}, init=False):
        assert found.startswith("NotComputableError: Metric 'accuracy' cannot be computed")
