"""Seeds and numerical settings of a process; part of the last digits, so every script takes them from here."""

from __future__ import annotations

import random

import numpy as np
import torch

from common.config import RunConfig


def configure(run: RunConfig) -> None:
    """Seed the global generators alike on every rank and choose kernels as `run` asks (TF32, as the authors ran)."""
    random.seed(run.seed)
    np.random.seed(run.seed)  # noqa: NPY002 (libraries draw from the global generator)
    torch.manual_seed(run.seed)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = not run.deterministic
    if run.deterministic:
        torch.use_deterministic_algorithms(True, warn_only=True)
