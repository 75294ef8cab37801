"""GPTQ (Frantar et al., 2023): round one column after the other, and let the columns that follow make up for the
error."""

from __future__ import annotations

import torch
from torch import Tensor

from .scheme import Quantized, Scheme, dequantize, encode, find_scales

DAMPING = 0.01  # of the mean of the diagonal


def gptq(matrix: Tensor, second_moment: Tensor, scheme: Scheme, scale_dtype: torch.dtype = torch.float32) -> Quantized:
    """Codes with which the outputs change little for inputs like those of the calibration: the sum of the squared
    differences is minimized approximately.

    Columns with large inputs come first ("act-order"), since most columns can still make up for their errors. The
    groups remain those of neighboring columns, with scales from the matrix as it is given ("static groups").

    matrix: [rows, columns]; second_moment: [columns, columns], the mean of x · xᵀ over inputs x.
    """
    matrix, num_columns = matrix.float().clone(), matrix.shape[1]
    scale, zero = find_scales(scheme.split(matrix), scheme, scale_dtype)
    order = second_moment.diagonal().argsort(descending=True)
    matrix, upper = matrix[:, order], inverse_factor(second_moment[order][:, order])
    groups = order // (num_columns // scale.shape[1])
    codes = torch.empty_like(matrix, dtype=torch.int8)
    column_scheme = Scheme(scheme.kind, scheme.bits, is_symmetric=scheme.is_symmetric)
    for column in range(num_columns):
        group = groups[column]
        column_zero = None if zero is None else zero[:, group : group + 1]
        quantized = encode(matrix[:, column : column + 1], scale[:, group : group + 1], column_zero, column_scheme)
        codes[:, column] = quantized.codes[:, 0]
        spread_error(matrix, column, dequantize(quantized, column_scheme)[:, 0], upper)
    return Quantized(torch.empty_like(codes).index_copy_(1, order, codes), scale, zero)


def inverse_factor(second_moment: Tensor) -> Tensor:
    """The upper triangular U with Uᵀ · U = H⁻¹, where H is the second moment, damped so that it has an inverse."""
    damped = second_moment.double().clone()
    mean = damped.diagonal().mean()
    damped.diagonal().add_(DAMPING * mean if mean > 0 else 1.0)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True).float()


def spread_error(matrix: Tensor, column: int, rounded: Tensor, upper: Tensor) -> None:
    """Change the columns after this one so that the outputs stay as they were, as far as possible.

    matrix: [rows, columns], changed in place. rounded: [rows], what this column has become. upper: see
    inverse_factor(); its row `column` says how much a step of this column must move each of the others.
    """
    error = (matrix[:, column] - rounded) / upper[column, column]
    matrix[:, column + 1 :] -= torch.outer(error, upper[column, column + 1 :])


def output_error(matrix: Tensor, rounded: Tensor, second_moment: Tensor) -> Tensor:
    """The mean squared difference between the outputs of two matrices, summed over the outputs, for inputs with this
    second moment."""
    difference = matrix - rounded
    return ((difference @ second_moment) * difference).sum()
