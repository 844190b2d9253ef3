"""The images of examples/digits.py, as they are on disk: pixels in uint8 of shape (N, C, H, W), labels in int64."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import TensorDataset

__all__ = ["load_cifar10", "load_digits", "load_images"]

_CIFAR10_SHAPE = (3, 32, 32)
_RECORD_BYTES = 1 + 3 * 32 * 32  # a label, then the pixels


def load_images(name: str, folder: str | None) -> tuple[TensorDataset, TensorDataset]:
    """What to train on and what is held out, of "digits", or of "cifar10" in `folder`; else the script is ended."""
    if name not in ("digits", "cifar10") or (name == "cifar10") != (folder is not None):
        raise SystemExit(f"error: data={name} with data_dir={folder}: it is digits, or cifar10 with the data_dir of it")
    try:
        return load_digits() if folder is None else load_cifar10(Path(folder))
    except (ValueError, ModuleNotFoundError) as error:
        raise SystemExit(f"error: {error}") from None


def load_digits() -> tuple[TensorDataset, TensorDataset]:
    """1797 scans of handwritten digits, 8x8, that come with scikit-learn: four fifths to train on, one held out."""
    try:
        from sklearn import datasets
    except ModuleNotFoundError as error:
        if error.name != "sklearn":
            raise
        raise ModuleNotFoundError("the digits come with scikit-learn: pip install scikit-learn") from None
    digits = datasets.load_digits()
    images = torch.from_numpy(digits.images).to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(digits.target).long()
    # A seed of its own, so that all ranks and all runs hold out the same ones.
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    held_out, rest = order.tensor_split([len(labels) // 5])
    return TensorDataset(images[rest], labels[rest]), TensorDataset(images[held_out], labels[held_out])


def load_cifar10(folder: Path) -> tuple[TensorDataset, TensorDataset]:
    """CIFAR-10's training and test batches from its binary (`*.bin`) or its python version, unpacked in `folder`.

    Raises:
        ValueError: a batch is missing, or is none; it names the file.
    """
    for place in (folder, folder / "cifar-10-batches-bin", folder / "cifar-10-batches-py"):
        if (place / "test_batch.bin").is_file():
            return _batches(place, ".bin", _read_binary)
        if (place / "test_batch").is_file():
            return _batches(place, "", _read_python)
    raise ValueError(
        f"{folder} holds no CIFAR-10: neither test_batch.bin (binary version) nor test_batch (python version) is "
        "there. Unpack https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz, and pass the folder it makes."
    )


def _batches(
    folder: Path, suffix: str, read: Callable[[Path], tuple[np.ndarray, np.ndarray]]
) -> tuple[TensorDataset, TensorDataset]:
    train = [_checked(folder / f"data_batch_{number}{suffix}", read) for number in range(1, 6)]
    images, labels = (np.concatenate(parts) for parts in zip(*train, strict=True))
    return _data_set(images, labels), _data_set(*_checked(folder / f"test_batch{suffix}", read))


def _checked(path: Path, read: Callable[[Path], tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    try:
        images, labels = read(path)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: CIFAR-10 has data_batch_1 to data_batch_5 and test_batch.") from None
    except Exception as error:  # of a broken pickle almost any
        raise ValueError(f"{path} is no batch of CIFAR-10: {error}") from error
    if images.dtype != np.uint8 or images.shape != (len(labels), _RECORD_BYTES - 1) or not len(labels):
        raise ValueError(
            f"{path} is no batch of CIFAR-10: for {len(labels)} labels it has pixels of shape {images.shape} and type "
            f"{images.dtype}, but {_RECORD_BYTES - 1} bytes for each are needed."
        )
    if labels.min() < 0 or labels.max() > 9:
        raise ValueError(f"{path} is no batch of CIFAR-10: its labels go from {labels.min()} to {labels.max()}.")
    return images, labels


def _data_set(images: np.ndarray, labels: np.ndarray) -> TensorDataset:
    return TensorDataset(torch.from_numpy(images).reshape(-1, *_CIFAR10_SHAPE), torch.from_numpy(labels))


def _read_binary(path: Path) -> tuple[np.ndarray, np.ndarray]:
    content = np.fromfile(path, dtype=np.uint8)
    if content.size % _RECORD_BYTES:
        raise ValueError(f"its {content.size} bytes are not a multiple of {_RECORD_BYTES}, the size of a record.")
    records = content.reshape(-1, _RECORD_BYTES)
    return records[:, 1:], records[:, 0].astype(np.int64)


def _read_python(path: Path) -> tuple[np.ndarray, np.ndarray]:
    with path.open("rb") as file:
        batch = _ArraysOnly(file, encoding="bytes").load()
    # Written by Python 2, the keys are bytes; written anew by Python 3, strings.
    batch = {key.decode() if isinstance(key, bytes) else key: value for key, value in batch.items()}
    return np.asarray(batch["data"]), np.asarray(batch["labels"], dtype=np.int64).reshape(-1)


class _ArraysOnly(pickle.Unpickler):
    """Builds numbers, strings, lists, dicts and numpy arrays. A pickle that names anything else could run any code."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module.replace("numpy._core", "numpy.core"), name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which a batch has no need of.") from None


_ALLOWED = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    # How Python 3 writes the bytes of an array in the old protocols.
    ("_codecs", "encode"): lambda text, encoding: text.encode("latin1"),
}
