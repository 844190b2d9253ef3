"""What the seed's complete example takes for granted: a model and data loaders, for any ranks and device."""

from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dengine import distributed

__all__ = ["ResNet50", "create_dataloader", "images_and_labels"]

_NUM_VAL = 301  # odd: the shards of two ranks differ in length


def ResNet50(num_classes: int) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, num_classes))
    return distributed.prepare_model(net)


def create_dataloader(cfg: Any, split: str) -> DataLoader[Any]:
    device = distributed.world().device
    data = TensorDataset(*(part.to(device) for part in images_and_labels(split)))
    loader = DataLoader(data, batch_size=cfg.batch_size, shuffle=split == "train")
    return distributed.prepare_data_loader(loader, exact=split == "val")


def images_and_labels(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
    labels = torch.from_numpy(digits.target).long()
    part = slice(_NUM_VAL) if split == "val" else slice(_NUM_VAL, None)
    return images[part], labels[part]
