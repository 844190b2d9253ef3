"""Train a small GPT, byte by byte, on the docstrings of Python's standard library.

    python examples/language_model.py epochs=2 model.width=64
    torchrun --standalone --nproc-per-node=2 examples/language_model.py
    torchrun --standalone --nproc-per-node=4 examples/language_model.py --mesh dp_shard=2,tp=2

language_model.sdn has the configuration, and _config.py checks it. Interrupted or preempted, it goes on where
it was when it is run again; with more epochs than before, at the lowest of the learning rates that it had come to.
"""

import ast
import sysconfig
from pathlib import Path
from typing import Any

import torch
from _config import PREEMPTED, folders, mesh_sizes, read_arguments, refuse, start
from torch import Tensor, nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from dengine import Engine, Events, distributed
from dengine.config import Conf
from dengine.data import pack_sequences
from dengine.engine import Absent
from dengine.handlers import Checkpoint, LRScheduler, ParamGroupLogger, Preemption, ProgressBar, TrackingHandler
from dengine.metrics import Perplexity, Throughput
from dengine.tracking import Track

END, PADDING = 0, 256  # the byte that ends a text, and what fills it up to its length and is never scored
# Over the ranks of `tp`: the wide middle of each layer, two thirds of its weights.
PLAN = {"layers.layers.*.linear1": ColwiseParallel(), "layers.layers.*.linear2": RowwiseParallel()}
say = distributed.rank_zero_only(print)


def docstrings(length: int, max_texts: int) -> Tensor:
    """What the standard library says of itself, (N, length + 1): bytes, END, PADDING; the same on all ranks."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    nodes = [node for path in paths for node in ast.walk(ast.parse(path.read_bytes()))]
    documented = (node for node in nodes if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef))
    texts = {(ast.get_docstring(node) or "").encode()[:length] for node in documented}
    tokens = torch.full((len(texts), length + 1), PADDING)
    for row, text in zip(tokens, sorted(texts), strict=True):
        row[: len(text) + 1] = torch.tensor([*text, END])
    return tokens[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0))][:max_texts]


class GPT(nn.Module):
    """From tokens (N, T) to scores (N, T, 257) of the ones that follow."""

    def __init__(self, length: int, width: int, num_heads: int, num_layers: int, dropout: float) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(257, width), nn.Embedding(length, width)
        layer = nn.TransformerEncoderLayer(width, num_heads, 4 * width, dropout, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, num_layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, 257)

    def forward(self, tokens: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1], tokens.device)
        x = self.tokens(tokens) + self.places.weight[: tokens.shape[1]]
        return self.head(self.layers(x, mask, is_causal=True))


def loss_and_count(model: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The total loss of a batch of texts, in nats, and how many tokens it is the sum of."""
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    loss = cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), ignore_index=PADDING, reduction="sum")
    return loss, (targets != PADDING).sum()


@torch.no_grad()
def continued(model: nn.Module, text: bytes, length: int, device: torch.device) -> str:
    torch.manual_seed(0)  # only all ranks together can call a sharded model: they draw the same
    while len(text) < length and text[-1] != END:
        scores = model(torch.tensor([[*text]], device=device))[0, -1, :PADDING]
        text += bytes(torch.multinomial((scores / 0.7).softmax(0), 1).tolist())
    return text.decode(errors="replace")


def run(cfg, world):
    torch.manual_seed(cfg.seed)
    torch.backends.mha.set_fastpath_enabled(world.mesh is None)  # it takes no weights that are laid out
    model = GPT(cfg.length, **cfg.model)
    model = distributed.prepare_model(model, tensor_parallel=PLAN if "tp" in world.coordinates else None)
    bare_model = distributed.unwrap_model(model)
    optimizer = torch.optim.AdamW(model.parameters(), cfg.lr, betas=(0.9, 0.95))
    texts = docstrings(cfg.length, cfg.max_texts)
    held_out, rest = texts.tensor_split([len(texts) // 10])
    batch_size = max(1, cfg.batch_size // world.data_size)
    loader: DataLoader[Any]
    if cfg.packed:  # no padding: texts one after the other, cut to the length
        documents = [row[row != PADDING] for row in rest]
        packed = pack_sequences(documents, cfg.length + 1, shuffle=True, seed=cfg.seed)
        loader, num_samples = DataLoader(packed, batch_size, drop_last=True), sum(map(len, documents)) // packed.length
    else:
        loader, num_samples = DataLoader(TensorDataset(rest), batch_size, shuffle=True, drop_last=True), len(rest)
    loader = distributed.prepare_data_loader(loader, seed=cfg.seed)
    val_loader = distributed.prepare_data_loader(DataLoader(TensorDataset(held_out), batch_size=64), exact=True)

    def train_step(engine, batch):
        loss, count = loss_and_count(model, (batch if cfg.packed else batch[0]).to(world.device))
        # The mean over the tokens of all ranks: a gradient is the mean of the ranks' ones, and texts differ in length.
        mean = loss / distributed.all_reduce(count, "sum") * world.size
        optimizer.zero_grad()
        mean.backward()
        distributed.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.detach() / count, count

    @torch.no_grad()
    def val_step(engine, batch):
        if isinstance(batch, Absent):  # other ranks have one more batch, and a sharded model needs all of them
            batch = batch.spare
        loss, count = loss_and_count(bare_model, batch[0].to(world.device))
        return loss / count, count

    trainer, evaluator = Engine(train_step), Engine(val_step, joined=True)
    trainer.add_metrics({"train/perplexity": Perplexity(), "tokens_per_s": Throughput(lambda output: output[1])})
    evaluator.add_metric(Perplexity(), "val/perplexity")
    ProgressBar().attach(trainer, output_transform=lambda output: {"loss": output[0]})

    num_steps, rates = cfg.epochs * (num_samples // (batch_size * world.data_size)), torch.optim.lr_scheduler
    warm_up = rates.LinearLR(optimizer, start_factor=0.01, total_iters=cfg.warm_up)  # then half a wave of the cosine
    cosine = rates.CosineAnnealingLR(optimizer, T_max=max(1, num_steps - cfg.warm_up), eta_min=cfg.lr / 20)
    schedule = LRScheduler(rates.SequentialLR(optimizer, [warm_up, cosine], milestones=[cfg.warm_up]))
    trainer.on(Events.ITERATION_COMPLETED, schedule)

    output, folder = str(cfg.output), Path(str(cfg.output), "language_model")
    objects = {"model": model, "optimizer": optimizer, "schedule": schedule, "trainer": trainer}
    checkpoint = Checkpoint(objects, folder, asynchronous=True)
    *fast, _ = places = folders(cfg, folder)
    for each in fast:
        in_memory = Checkpoint(objects, each, asynchronous=True, placement="node")
        trainer.on(Events.ITERATION_COMPLETED(every=20), in_memory)
    trainer.state.run_id = None
    trainer.state.persist("run_id")
    if path := Checkpoint.resume(places, objects):
        say(f"Going on from {path}")
        cosine.T_max = max(1, num_steps - warm_up.total_iters)  # the saved one would let the rate rise again
    with Track.run("language_model", config=Conf.to_dict(cfg), dir=output, resume=trainer.state.run_id) as record:
        trainer.state.run_id = distributed.broadcast_object(record.id)
        every_ten, every_epoch = Events.ITERATION_COMPLETED(every=10), Events.EPOCH_COMPLETED
        trainer.on(every_ten, TrackingHandler(record, output_transform=lambda output: {"train/loss": output[0]}))
        trainer.on(every_ten, ParamGroupLogger(optimizer, record))
        trainer.on(every_epoch, TrackingHandler(record, "all"))
        evaluator.on(every_epoch, TrackingHandler(record, "all", None, lambda engine, event: trainer.state.iteration))

        @trainer.on(every_epoch)
        def validate(engine=None):
            with distributed.evaluating(model):
                evaluator.run(val_loader)
            say(f"perplexity {evaluator.state.metrics['val/perplexity']:.4g}", flush=True)

        # The last step is saved once, with the end of its epoch.
        trainer.on(Events.ITERATION_COMPLETED(every=cfg.save_every, before=num_steps) | Events.COMPLETED, checkpoint)
        Preemption(checkpoint).attach(trainer)
        trainer.run(loader, max_epochs=cfg.epochs)
        if not (evaluator.state.metrics or trainer.state.preempted):
            validate()  # nothing was left to do
    if trainer.state.preempted:
        raise SystemExit(PREEMPTED)  # run me again
    say(f"\nPerplexity of a byte of {len(held_out)} texts held out: {evaluator.state.metrics['val/perplexity']}")
    say(f"Checkpoint: {checkpoint.last_path or path}\nNumbers:    {record.dir / 'metrics.jsonl'}")
    say(f"Sample:     {continued(bare_model.eval(), b'Return the ', cfg.length, world.device)!r}")


if __name__ == "__main__":
    cfg = read_arguments(Path(__file__).with_suffix(".sdn"), __doc__, fractions=["model.dropout"])
    if cfg.model.width % cfg.model.num_heads:
        refuse(f"model.width={cfg.model.width} does not divide into model.num_heads={cfg.model.num_heads}")
    start(lambda world: run(cfg, world), mesh_sizes(cfg.mesh))
