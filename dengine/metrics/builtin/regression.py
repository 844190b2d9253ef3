"""Errors of predicted numbers, kept as sums in float64, and variances as means and second moments."""

from abc import abstractmethod
from typing import Any

import torch

from dengine.errors import NotComputableError
from dengine.metrics.core.inputs import as_pair, shape_error
from dengine.metrics.core.metric import Metric, OutputTransform
from dengine.types import accumulator_dtype

__all__ = ["MAE", "MSE", "RMSE", "R2Score"]


class _MeanError(Metric):
    """Base class of means over all elements."""

    error_sum: torch.Tensor | float
    total: int

    def __init__(self, output_transform: OutputTransform | None = None) -> None:
        super().__init__(output_transform)
        self.add_state("error_sum", 0.0)
        self.add_state("total", 0)

    @abstractmethod
    def error(self, difference: torch.Tensor) -> torch.Tensor:
        """The error of each element, given its difference."""

    def update(self, output: object) -> None:
        prediction, target = _floats(output, type(self).__name__)
        self.error_sum = self.error_sum + self.error(prediction - target).sum()
        self.total += target.numel()

    def num_counted(self) -> int:
        return self.total

    def compute(self) -> float:
        return float(self.error_sum) / _seen(self.total)


class MSE(_MeanError):
    """The mean squared error over all elements of all ranks.

    Shapes: Python numbers, or any shape, the same for prediction and target; nothing is broadcast.
    Cost: no wait for the device; two numbers. Source: `sklearn.metrics.mean_squared_error`.

    Raises:
        ValueError: shapes that differ. NotComputableError: no sample was seen.

    Example:
        >>> metric = MSE()
        >>> metric.update((torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0])))
        >>> metric.compute()
        2.0
    """

    def error(self, difference: torch.Tensor) -> torch.Tensor:
        return difference.square()


class MAE(_MeanError):
    """The mean absolute error over all elements of all ranks. Shapes, cost and errors: see `MSE`.

    Source: `sklearn.metrics.mean_absolute_error`.

    Example:
        >>> metric = MAE()
        >>> metric.update((torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0])))
        >>> metric.compute()
        1.0
    """

    def error(self, difference: torch.Tensor) -> torch.Tensor:
        return difference.abs()


class RMSE(Metric):
    """The root of the mean squared error, over the samples of all ranks.

    Shapes: Python numbers, `(N,)`, or `(N, D, ...)`: D quantities; the result is the plain mean of their errors. For
        one root over all elements, flatten them in an `output_transform`, or take `MSE() ** 0.5`.
    Cost: no wait for the device; D + 1 numbers. Source: `sklearn.metrics.root_mean_squared_error`.

    Raises:
        ValueError: shapes that differ. NotComputableError: no sample was seen.

    Example:
        >>> metric = RMSE()
        >>> metric.update((torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0 + 8**0.5])))
        >>> round(metric.compute(), 6)
        2.0
    """

    squared_D: torch.Tensor
    num_samples: int

    def __init__(self, output_transform: OutputTransform | None = None) -> None:
        super().__init__(output_transform)
        self.add_state("squared_D", torch.zeros(0, dtype=torch.float64))
        self.add_state("num_samples", 0)

    def update(self, output: object) -> None:
        prediction_ND, target_ND = _columns(output, "RMSE", self.squared_D.shape)
        squared_D = (prediction_ND - target_ND).square().sum(0)
        self.squared_D = self.squared_D + squared_D if self.squared_D.numel() else squared_D
        self.num_samples += target_ND.shape[0]

    def compute(self) -> float:
        return float((self.squared_D / _seen(self.num_samples)).sqrt().mean())


class R2Score(Metric):
    """The share of the targets' variance that is predicted, over the samples of all ranks.

    Shapes: Python numbers, `(N,)`, or `(N, D, ...)`: D quantities; the result is the plain mean of their scores.
    Returns: 1.0 at best. As in scikit-learn: if all targets are equal, 1.0 if all predictions are right, else 0.0; for
        a single sample, nan.
    Cost: no wait for the device; 3 D + 1 numbers a rank. Count, mean and second moment are merged over batches and
        ranks (Chan, Golub, LeVeque 1979), so that an offset of the targets costs no digits.
    Source: `sklearn.metrics.r2_score`.

    Raises:
        ValueError: shapes that differ. NotComputableError: no sample was seen.

    Example:
        >>> metric = R2Score()
        >>> metric.update((torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 2.0, 4.0])))
        >>> round(metric.compute(), 6)
        0.785714
    """

    moments_3D: torch.Tensor  # mean, sum of squared deviations from it, sum of squared errors
    num_samples: Any  # int; (ranks,) once reduced

    def __init__(self, output_transform: OutputTransform | None = None) -> None:
        super().__init__(output_transform)
        self.add_state("moments_3D", torch.zeros(3, 0, dtype=torch.float64), reduce="gather")
        self.add_state("num_samples", 0, reduce="gather")

    def update(self, output: object) -> None:
        prediction_ND, target_ND = _columns(output, "R2Score", self.moments_3D.shape[1:])
        num_samples = target_ND.shape[0]
        if not num_samples:
            return
        mean_D = target_ND.mean(0)
        deviations_D = (target_ND - mean_D).square().sum(0)
        errors_D = (target_ND - prediction_ND).square().sum(0)
        moments_3D = torch.stack([mean_D, deviations_D, errors_D])
        self.moments_3D = _merged(self.moments_3D, self.num_samples, moments_3D, num_samples)
        self.num_samples += num_samples

    def compute(self) -> float:
        counts_R = torch.as_tensor(self.num_samples).reshape(-1).tolist()
        num_samples = 0
        moments_3D = self.moments_3D[..., :0]
        for count, rank_3D in zip(counts_R, self.moments_3D.reshape(len(counts_R), 3, -1), strict=True):
            if count:
                moments_3D = _merged(moments_3D, num_samples, rank_3D, count)
                num_samples += count
        if _seen(num_samples) < 2:
            return float("nan")
        mean_D, deviations_D, errors_D = moments_3D
        # The variance that rounding alone gives if all targets are equal.
        noise_D = num_samples * (8 * torch.finfo(mean_D.dtype).eps * mean_D.abs()).square()
        is_constant_D = deviations_D <= noise_D
        score_D = 1 - errors_D / torch.where(is_constant_D, 1.0, deviations_D)
        constant_score_D = (errors_D <= noise_D).to(score_D.dtype)
        return float(torch.where(is_constant_D, constant_score_D, score_D).mean())


def _merged(first_3D: torch.Tensor, num_first: int, second_3D: torch.Tensor, num_second: int) -> torch.Tensor:
    """The moments of both sets of samples together. Source: Chan, Golub, LeVeque 1979, eq. 2.1."""
    if not num_first:
        return second_3D
    share = num_second / (num_first + num_second)
    mean_D, deviations_D, errors_D = first_3D
    step_D = second_3D[0] - mean_D
    return torch.stack(
        [
            mean_D + step_D * share,
            deviations_D + second_3D[1] + step_D.square() * (num_first * share),
            errors_D + second_3D[2],
        ]
    )


def _seen(count: Any) -> int:
    number = int(count)
    if not number:
        raise NotComputableError("no sample was seen on any rank")
    return number


def _floats(output: object, metric: str) -> tuple[torch.Tensor, torch.Tensor]:
    prediction, target = as_pair(output, metric)
    if prediction.shape != target.shape:
        raise shape_error(metric, prediction, target, "the same shape for both")
    dtype = accumulator_dtype(target.device)
    return prediction.to(dtype), target.to(dtype)


def _columns(output: object, metric: str, before: torch.Size) -> tuple[torch.Tensor, torch.Tensor]:
    """Prediction and target as (N, D). The positions of further dimensions are samples."""
    prediction, target = _floats(output, metric)
    num_columns = 1 if target.ndim == 1 else target.shape[1]
    if before.numel() not in (0, num_columns):
        raise ValueError(
            f"{metric} got predictions and targets of shape {tuple(target.shape)}: {num_columns} quantities "
            f"(dimension 1), but {before.numel()} before."
        )
    if target.ndim < 3:
        return prediction.reshape(-1, num_columns), target.reshape(-1, num_columns)
    return prediction.movedim(1, -1).reshape(-1, num_columns), target.movedim(1, -1).reshape(-1, num_columns)
