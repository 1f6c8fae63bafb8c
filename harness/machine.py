"""The machine: whether a device can be used, and what the numbers were computed with."""

import contextlib
import importlib.metadata
import platform
import subprocess
import warnings
from datetime import UTC, datetime
from pathlib import Path

import torch

from harness.cli import first_line


def check_device(device: str) -> None:
    """ValueError unless PyTorch can compute there."""
    try:
        with warnings.catch_warnings(action="ignore"):
            torch.zeros(1, device=device).item()
    except Exception as error:  # what a missing back end raises is its own affair
        raise ValueError(f"--device {device}: {first_line(error)}") from error


def surroundings(device: str) -> dict:
    """What numbers may depend on beside the flags, and when: "commit" (None without git), "device"
    (its name), "threads", "versions" (None for what is not installed), "started"."""
    commit = ""
    with contextlib.suppress(OSError):  # no git on this machine
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    on_gpu = device.startswith("cuda")
    name = torch.cuda.get_device_name(device) if on_gpu else platform.processor()
    versions = {"python": platform.python_version()}
    for package in ("torch", "transformers", "numpy", "math-verify"):
        versions[package] = None
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {"commit": commit or None, "device": name or platform.machine(),
            "threads": torch.get_num_threads(), "versions": versions,
            "started": datetime.now(UTC).isoformat(timespec="seconds")}  # fmt: skip
