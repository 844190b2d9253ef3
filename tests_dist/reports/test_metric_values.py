"""Over real ranks: counts of any dtype, weighted and masked losses, ignored labels, and scores that are nan."""

import math
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch.nn import CrossEntropyLoss

from dengine import Engine
from dengine.metrics import Accuracy, Average, ConfusionMatrix, DistributedMetric, F1Score, Loss, Perplexity

SHARDS = ((0, 13), (13, 14))  # of 14 samples: the second of two ranks has one


def data() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (14, 4), generator=generator)
    labels[torch.rand(14, 4, generator=generator) < 0.4] = -100
    many = torch.randint(-1, 2, (14, 3), generator=generator)
    soft = torch.randn(14, 3, generator=generator).softmax(1)
    return {"logits": torch.randn(14, 3, 4, generator=generator), "labels": labels, "many": many, "soft": soft}


def metrics() -> dict[str, Any]:
    def pair(prediction: str, target: str) -> Any:
        return lambda output: (output[prediction], output[target])

    def masked(output: Any) -> Any:
        mask = (output["labels"] != -100).to(torch.bfloat16)
        return 2.0 * torch.ones_like(mask), mask

    def answers(output: Any) -> Any:
        return output["logits"][:, :, 0].sigmoid(), output["many"]

    def likeliest(output: Any) -> Any:
        return output["logits"][:, :, 0], output["soft"]

    classes = pair("logits", "labels")
    return {
        "loss": Loss(CrossEntropyLoss(torch.tensor([0.1, 1.0, 5.0])), classes),
        "ppl": Perplexity(classes),
        "masked": Average(masked),
        "of_ranks": DistributedMetric(Average(masked)),
        "acc": Accuracy(ignore_index=-100, output_transform=classes),
        "f1": F1Score(ignore_index=-100, output_transform=classes),
        "matrix": ConfusionMatrix("multilabel", ignore_index=-1, output_transform=answers),
        "samples": F1Score("multilabel", average="samples", ignore_index=-1, output_transform=answers),
        "soft": Accuracy(output_transform=likeliest),
    }


def values_of_a_shard(rank: int, size: int) -> dict[str, Any]:
    start, stop = (0, 14) if size == 1 else SHARDS[rank]
    engine = Engine(lambda engine, batch: batch)
    engine.add_metrics(metrics())
    batches = [{name: part[at : at + 3] for name, part in data().items()} for at in range(start, stop, 3)]
    batches = [{name: part[: stop - start - 3 * i] for name, part in each.items()} for i, each in enumerate(batches)]
    found = engine.run(batches).metrics
    return {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in found.items()}


def test_uneven_ranks_give_the_values_of_one_process_over_all_samples() -> None:
    (expected,) = run_ranks(values_of_a_shard, 1)
    logits, labels = data()["logits"], data()["labels"]
    whole = float(torch.nn.functional.cross_entropy(logits, labels, torch.tensor([0.1, 1.0, 5.0])))
    assert expected["loss"] == pytest.approx(whole, rel=1e-6)
    assert expected["ppl"] == pytest.approx(math.exp(torch.nn.functional.cross_entropy(logits, labels)), rel=1e-6)
    assert expected["masked"] == expected["of_ranks"] == 2.0
    for found in run_ranks(values_of_a_shard, 2):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-6, atol=0, msg=name)  # the losses are of 32 bits


def a_nan_on_the_last_rank(rank: int, size: int) -> None:
    engine = Engine(lambda engine, batch: batch)
    engine.add_metric(Accuracy(), "acc")
    engine.run([(torch.full((3, 3), torch.nan if rank == size - 1 else 0.5), torch.arange(3))])


def test_a_score_that_is_nan_on_one_rank_is_the_same_error_on_all() -> None:
    for outcome in run_ranks(a_nan_on_the_last_rank, 2, expect_failures=True):
        assert "scores that are nan" in str(outcome)
