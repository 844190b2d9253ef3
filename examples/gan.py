"""Learn to draw handwritten digits: a generator and a critic, each with an engine of its own, one step each in turn.

    python examples/gan.py epochs=20 critic_lr=1e-4
    torchrun --standalone --nproc-per-node=2 examples/gan.py

gan.toml has the configuration, _config.py checks it, and _data.py reads scikit-learn's digits.
"""

from pathlib import Path

import torch
from _config import read_arguments, start
from _data import load_digits
from matplotlib.image import imsave
from torch import nn
from torch.nn.functional import pad, softplus
from torch.utils.data import DataLoader, TensorDataset

from dengine import Engine, Events, distributed
from dengine.config import Conf
from dengine.handlers import EMA, Checkpoint, ProgressBar, TerminateOnNan
from dengine.metrics import Average, Metric
from dengine.tracking import Track

say = distributed.rank_zero_only(print)


def new_generator(num_noise: int, width: int = 128) -> nn.Module:
    """From noise (N, num_noise) to images (N, 1, 8, 8), from -1 to 1."""
    body = [nn.Linear(num_noise, width), nn.BatchNorm1d(width), nn.ReLU()]
    body += [nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU()]
    return nn.Sequential(*body, nn.Linear(width, 64), nn.Tanh(), nn.Unflatten(1, (1, 8, 8)))


def new_critic(width: int = 128, dropout: float = 0.3) -> nn.Module:
    """From images (N, 1, 8, 8) to scores (N, 1): high for what looks real."""
    body = [nn.Flatten(), nn.Linear(64, width), nn.LeakyReLU(0.2), nn.Dropout(dropout)]
    body += [nn.Linear(width, width), nn.LeakyReLU(0.2), nn.Dropout(dropout)]
    return nn.Sequential(*body, nn.Linear(width, 1))


class PixelDistance(Metric):
    """Fréchet distance of the pixels of images to those of `real`, as if both were normal: FID without a network."""

    total: torch.Tensor
    products: torch.Tensor
    count: int

    def __init__(self, real: torch.Tensor) -> None:
        super().__init__(output_transform=lambda images: images)
        pixels = real.flatten(1).double().cpu()
        self._mean, self._covariance = pixels.mean(0), pixels.T.cov(correction=0)
        self.add_state("total", torch.zeros(64, dtype=torch.float64))  # sums, so that it is exact over all ranks
        self.add_state("products", torch.zeros(64, 64, dtype=torch.float64))
        self.add_state("count", 0)

    def update(self, images: torch.Tensor) -> None:
        pixels = images.detach().flatten(1).double().cpu()  # once an epoch: waiting for the device costs little here
        self.total, self.products = self.total + pixels.sum(0), self.products + pixels.T @ pixels
        self.count += len(pixels)

    def compute(self) -> float:
        mean = self.total / self.count
        covariance = self.products / self.count - mean.outer(mean)
        common = torch.linalg.eigvals(covariance @ self._covariance).real.clamp(min=0).sqrt().sum()
        return float((mean - self._mean).square().sum() + (covariance + self._covariance).trace() - 2 * common)


def run(cfg, world):
    torch.manual_seed(cfg.seed)
    generator = distributed.prepare_model(new_generator(cfg.num_noise))
    critic = distributed.prepare_model(new_critic())
    bare_generator, bare_critic = map(distributed.unwrap_model, (generator, critic))
    average = EMA(generator, cfg.ema_decay)  # draws better than the generator of any one step
    generator_optimizer = torch.optim.Adam(generator.parameters(), cfg.generator_lr, betas=(0.5, 0.99))
    critic_optimizer = torch.optim.Adam(critic.parameters(), cfg.critic_lr, betas=(0.5, 0.99))
    torch.manual_seed(cfg.seed + 1 + world.rank)  # from here on each rank draws noise of its own

    train_set, val_set = (TensorDataset(each.tensors[0] / 8 - 1) for each in load_digits())
    batch_size = max(2, cfg.batch_size // world.size)  # a rank's
    loader = DataLoader(train_set, batch_size=batch_size, shuffle=True, drop_last=True)
    loader = distributed.prepare_data_loader(loader, seed=cfg.seed)
    sample_loader = DataLoader(TensorDataset(torch.randn(cfg.num_samples, cfg.num_noise)), batch_size=500)
    sample_loader = distributed.prepare_data_loader(sample_loader, exact=True)

    def critic_step(engine, batch):
        real = batch[0].to(world.device)
        with torch.no_grad():  # the bare one: DDP has no part in a forward without a backward
            fake = bare_generator(torch.randn(len(real), cfg.num_noise, device=world.device))
        bare_critic.requires_grad_(True)
        critic_optimizer.zero_grad()
        of_real, of_fake = critic(torch.cat([real, fake])).chunk(2)  # one forward, for DDP's one backward
        loss = softplus(-of_real).mean() + softplus(of_fake).mean()
        loss.backward()
        critic_optimizer.step()
        return {"loss": loss.detach()}

    def generator_step(engine, noise):
        bare_critic.requires_grad_(False)  # a judge here, and so without gradients that DDP would send around
        generator_optimizer.zero_grad()
        loss = softplus(-bare_critic(generator(noise))).mean()
        loss.backward()
        generator_optimizer.step()
        return {"loss": loss.detach()}

    critic_trainer, generator_trainer = Engine(critic_step), Engine(generator_step)
    sampler = Engine(lambda engine, batch: average.model(batch[0].to(world.device)))
    sampler.add_metric(PixelDistance(val_set.tensors[0]), "distance")
    generator_trainer.on(Events.ITERATION_COMPLETED, average)
    critic_trainer.add_metric(Average(), "loss")
    critic_trainer.on(Events.ITERATION_COMPLETED, TerminateOnNan())
    ProgressBar().attach(critic_trainer, output_transform=lambda output: output)

    @critic_trainer.on(Events.ITERATION_COMPLETED)
    def train_generator(engine):
        generator_trainer.run([torch.randn(2 * batch_size, cfg.num_noise, device=world.device)])

    with Track.run(project="gan", config=Conf.to_dict(cfg), dir=str(cfg.output)) as record:
        folder = distributed.broadcast_object(record.dir)

        @critic_trainer.on(Events.EPOCH_COMPLETED(every=cfg.measure_every))
        def measure(engine):
            with distributed.evaluating(average.model):
                sampler.run(sample_loader)
            distance, epoch = sampler.state.metrics["distance"], engine.state.epoch + 1
            row = {"epoch": epoch, "val/distance": distance, "loss of critic": engine.state.metrics["loss"]}
            record.log(row | {"loss of generator": generator_trainer.state.output["loss"]}, step=engine.state.iteration)
            say(f"epoch {epoch}  distance of the pixels to real ones {distance:.4g}", flush=True)

        checkpoint = Checkpoint({"generator": generator, "critic": critic, "average": average}, folder)
        critic_trainer.on(Events.EPOCH_COMPLETED(every=cfg.measure_every), checkpoint)
        critic_trainer.run(loader, max_epochs=cfg.epochs)

        with distributed.evaluating(average.model):
            images = average.model(torch.randn(96, cfg.num_noise, device=world.device)).cpu()
        say(f"\nCheckpoint: {checkpoint.last_path}\nPicture:    {save_picture(images, folder / 'samples.png')}")


@distributed.rank_zero_only
def save_picture(images: torch.Tensor, path: Path) -> Path:
    rows = pad(images, (0, 1, 0, 1), value=-1).reshape(-1, 16, 9, 9).transpose(1, 2).reshape(-1, 16 * 9)
    imsave(path, rows.repeat_interleave(4, 0).repeat_interleave(4, 1).numpy(), cmap="gray", vmin=-1, vmax=1)
    return path


if __name__ == "__main__":
    cfg = read_arguments(Path(__file__).with_suffix(".toml"), __doc__, fractions=["ema_decay"])
    start(lambda world: run(cfg, world))
