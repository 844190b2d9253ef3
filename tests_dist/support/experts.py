"""A tiny mixture of experts, whose tokens go to the ranks that have their expert and back."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dengine import distributed
from dengine.dtensor import is_dtensor

__all__ = ["NUM_EXPERTS", "Experts", "MoE", "Net", "StackedExperts"]

NUM_EXPERTS, WIDTH = 4, 6


class Exchange(torch.autograd.Function):
    """`all_to_all_single` with the numbers of rows that go to each rank and come from it; gradients go back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        result = rows.new_empty(sum(received), *rows.shape[1:])
        dist.all_to_all_single(result, rows.contiguous(), received, sent, group=group)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return exchange(gradients[0], ctx.received, ctx.sent, ctx.group), None, None, None


exchange: Any = Exchange.apply


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 6)
        self.down = nn.Linear(6, WIDTH)

    def forward(self, tokens: Tensor) -> Any:
        return self.down(self.up(tokens).tanh())


class Exchanging(nn.Module):
    """What takes tokens of all ranks of `ep`, and gives back what this rank's experts make of them."""

    size: int
    group: dist.ProcessGroup | None

    def forward(self, tokens: Tensor, counts: Tensor) -> Any:
        """Shapes: tokens (N, W), sorted by expert; counts (experts,), how many each gets; result (N, W)."""
        if self.group is None:
            return self.run(tokens, [counts.tolist()])
        theirs = torch.empty_like(counts)
        dist.all_to_all_single(theirs, counts, group=self.group)
        from_ranks = theirs.view(self.size, -1).tolist()
        sent, received = counts.view(self.size, -1).sum(1).tolist(), [sum(each) for each in from_ranks]
        result = self.run(exchange(tokens, sent, received, self.group), from_ranks)
        return exchange(result, received, sent, self.group)

    def run(self, tokens: Tensor, from_ranks: Sequence[Sequence[int]]) -> Tensor:
        """Each expert of this rank once, with all its tokens: with none as well, so that it has a gradient."""
        pieces = torch.split(tokens, [count for counts in from_ranks for count in counts])
        results: list[Tensor] = [torch.empty(0)] * len(pieces)
        calls = self.calls()
        for place, call in enumerate(calls):
            mine = pieces[place :: len(calls)]
            results[place :: len(calls)] = torch.split(call(torch.cat(mine)), [len(piece) for piece in mine])
        return torch.cat(results)

    def calls(self) -> list[Callable[[Tensor], Tensor]]:
        """The experts of this rank."""
        raise NotImplementedError


class Experts(Exchanging, nn.ModuleDict):
    """Those of this rank, by their numbers among all, so that names and first weights are the same on every mesh."""

    def __init__(self, rank: int, size: int, group: dist.ProcessGroup | None) -> None:
        each = NUM_EXPERTS // size
        super().__init__({str(number): Expert() for number in range(rank * each, (rank + 1) * each)})
        self.size, self.group = size, group

    def calls(self) -> list[Callable[[Tensor], Tensor]]:
        return list(self.values())


class StackedExperts(Exchanging):
    """All in one parameter, of which a plan gives each rank its part, as a DTensor over `ep`."""

    def __init__(self, rank: int, size: int, group: dist.ProcessGroup | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(NUM_EXPERTS, WIDTH, WIDTH))
        self.size, self.group = size, group
        self.reset_parameters()

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.weight.copy_(torch.randn(NUM_EXPERTS, WIDTH, WIDTH))

    def calls(self) -> list[Callable[[Tensor], Tensor]]:
        weights: Any = self.weight.to_local() if is_dtensor(self.weight) else self.weight
        return [partial(_bent, weight) for weight in weights]


def _bent(weight: Tensor, tokens: Tensor) -> Tensor:
    return (tokens @ weight).tanh()


class MoE(nn.Module):
    def __init__(self, experts: Exchanging) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, NUM_EXPERTS)
        self.experts = experts
        self.least = NUM_EXPERTS * [10**6]  # tokens that each expert got in any batch of this rank

    def forward(self, values: Tensor) -> Any:
        tokens = values.flatten(0, -2)
        weights, chosen = self.router(tokens).softmax(-1).max(-1)
        order = chosen.argsort(stable=True)
        counts = chosen.bincount(minlength=NUM_EXPERTS)
        self.least = [min(each) for each in zip(self.least, counts.tolist(), strict=True)]
        result = torch.empty_like(tokens).index_copy(0, order, self.experts(tokens[order], counts))
        return values + (result * weights[:, None]).view_as(values)


class Net(nn.Module):
    """The whole model in one process; on a mesh with `ep` with the experts of this rank."""

    def __init__(self, kind: type[Experts] | type[StackedExperts] = Experts) -> None:
        super().__init__()
        here = distributed.world()
        rank, size = here.coordinates.get("ep", 0), 1 if here.mesh is None else here.mesh["ep"].size()
        group = None if here.mesh is None or size == 1 else here.mesh["ep"].get_group()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(MoE(kind(rank, size, group)) for _ in range(2))
        self.last = nn.Linear(WIDTH, 5)

    def forward(self, values: Tensor) -> Any:
        values = self.first(values).tanh()
        for layer in self.layers:
            values = layer(values)
        return self.last(values)
