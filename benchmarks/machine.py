"""Where a benchmark runs: flags of the machine, the line that describes it, what it may round."""

import argparse
import platform
import warnings

import torch
import transformers


def add_flags(parser: argparse.ArgumentParser) -> None:
    """--device, --dtype, --threads."""
    add = parser.add_argument
    add("--device", default="cpu", choices=["cpu", "cuda"])
    add("--dtype", default="float32", choices=["float32", "bfloat16"], help="of matrix products")
    add("--threads", type=int, default=1, help="0: PyTorch's choice (default %(default)s)")


def use_threads(count: int) -> None:
    """Let PyTorch use so many threads; 0: as many as it chose."""
    torch.set_num_threads(count or torch.get_num_threads())


def describe(device: str, threads: int, *more: str) -> str:
    """Processor and threads, `more`, versions of the libraries."""
    where = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return ", ".join([where, f"{threads} thread(s)", *more, versions])


def tolerance(dtype: str) -> float:
    """By how much two ways of computing the same may differ."""
    return 1e-4 if dtype == "float32" else 0.05


def quiet() -> None:
    """No messages of the libraries between the tables."""
    warnings.simplefilter("ignore", FutureWarning)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
