"""Matrices in oneDNN's blocked layout: rearranged once, when the model is loaded, for a CPU's matrix multiplication."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .kernels.autotune import Tuner
from .model import DecoderModel
from .weight import Weight

MEASURED_ROWS = (1, 32)  # tokens of a step: a single decode, and a batch of them
LARGE_STEP = 512  # tokens: a prompt
MIN_GAIN = 1.1  # a packed matrix that is hardly faster is not worth its memory
MAX_COPIES = 1 << 30  # bytes, for a model: of matrices that the megakernel reads as they are


class PackedMatrix:
    """A matrix in oneDNN's blocked layout: blocks that fit the CPU's vector registers, or its matrix unit (AMX) for
    bfloat16.

    torch's own F.linear rearranges the matrix again in each call, or reads it in an order that is not the best. The two
    operators that are called here are private: torch.compile uses them, and a later torch may change them.
    matrix: [out_features, in_features].
    """

    def __init__(self, matrix: Tensor) -> None:
        self.shape, self.nbytes = matrix.shape, matrix.nbytes
        self.packed = torch.ops.mkldnn._reorder_linear_weight(matrix, max(MEASURED_ROWS))

    def product(self, rows: Tensor, bias: Tensor | None = None) -> Tensor:
        """rows: […, in_features]. Returns […, out_features]."""
        if not rows.numel():
            return rows.new_empty(*rows.shape[:-1], self.shape[0])
        output: Tensor = torch.ops.mkldnn._linear_pointwise(rows, self.packed, bias, "none", [], "")
        return output


def pack_matrices(model: DecoderModel, tuner: Tuner | None = None) -> int:
    """Pack the matrices of a model on a CPU for which that is faster, by a measurement for each shape. Matrices of
    codes and those of experts stay as they are. Returns how many were packed."""
    tuner, num_packed = tuner or Tuner(), 0
    for weight in plain_weights(model):
        if is_faster(weight.data, MEASURED_ROWS, tuner):
            weight.packed = PackedMatrix(weight.data)
            weight.data = nn.Parameter(weight.data.new_empty(0), requires_grad=False)
            num_packed += 1
    head = model.output_embedding
    if head is not None and head.packed is None and is_faster(head.weight, MEASURED_ROWS, tuner):
        head.packed = PackedMatrix(head.weight)  # lookups still need the matrix itself
        num_packed += 1
    return num_packed


def pack_copies(model: DecoderModel, max_tokens: int, tuner: Tuner | None = None) -> int:
    """The same for a model with a megakernel, which computes steps of up to max_tokens from the matrices as they are.
    Larger steps use packed copies, unless these would take more than MAX_COPIES."""
    tuner, num_rows = tuner or Tuner(), (4 * max_tokens, LARGE_STEP)
    weights = [weight for weight in plain_weights(model) if is_faster(weight.data, num_rows, tuner)]
    if sum(weight.data.nbytes for weight in weights) > MAX_COPIES:
        return 0
    for weight in weights:
        weight.packed = PackedMatrix(weight.data)
    return len(weights)


def plain_weights(model: DecoderModel) -> list[Weight]:
    """Matrices of layers, in floating point; none if some layers' weights come to the device only when they are needed:
    their memory has those of other layers now."""
    if model.fetcher is not None:
        return []
    weights = [module for module in model.modules() if type(module) is Weight]
    return [each for each in weights if len(each.shape) == 2 and each.packed is None and not each.data.is_meta]


def is_faster(matrix: Tensor, nums_rows: Sequence[int], tuner: Tuner) -> bool:
    """Whether the packed matrix is faster for one of these numbers of rows, and slower for none."""
    times = [measure(matrix, num_rows, tuner) for num_rows in nums_rows]
    gains = [time["plain"] / time["packed"] for time in times if len(time) == 2]
    return len(gains) == len(nums_rows) and min(gains) >= 1 and max(gains) >= MIN_GAIN


def measure(matrix: Tensor, num_rows: int, tuner: Tuner) -> dict[str, float]:
    """Seconds for a product, plain and packed; for packed only where this torch can pack."""
    name = f"linear {num_rows} rows {tuple(matrix.shape)} {matrix.dtype} {torch.get_num_threads()} threads"

    def make_case() -> Callable[[str], object]:
        rows = torch.randn(num_rows, matrix.shape[1]).to(matrix.dtype)
        packed = PackedMatrix(matrix)
        return lambda which: F.linear(rows, matrix) if which == "plain" else packed.product(rows)

    try:
        return tuner.measure(name, {"plain": "plain", "packed": "packed"}, make_case, matrix.device)
    except (RuntimeError, NotImplementedError, AttributeError):  # a torch without oneDNN
        return {}
