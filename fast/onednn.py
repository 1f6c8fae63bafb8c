"""Products with large float32 matrices on x86 by oneDNN, which is faster than PyTorch's own choice
there, MKL, for four rows and more.  The entry is private; without it, `F.linear` is called."""

import platform

import torch
import torch.nn.functional as F

LARGE = 2**19  # entries of a matrix; below, oneDNN's preparations take longer than it saves
FEW = 3  # rows that MKL multiplies faster
AVAILABLE = (
    platform.machine() in ("x86_64", "AMD64")
    and torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)


def linear(x_SD, weight_ND, bias_N=None):
    """x @ weight.T + bias."""
    plain = weight_ND.device.type == "cpu" and weight_ND.dtype == torch.float32
    if AVAILABLE and plain and weight_ND.numel() >= LARGE and len(x_SD) > FEW:
        return torch.ops.mkldnn._linear_pointwise(x_SD, weight_ND, bias_N, "none", [], "")
    return F.linear(x_SD, weight_ND, bias_N)
