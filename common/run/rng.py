"""Seeds and kernels of a process, and random states as plain tensors and numbers, as checkpoints hold them."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.config import RunConfig
from common.distributed import Dist, gather_objects
from common.errors import UserError


def configure(run: RunConfig) -> None:
    """Seed the global generators alike on every rank and choose kernels as `run` asks (TF32, as the authors ran)."""
    random.seed(run.seed)
    np.random.seed(run.seed)  # noqa: NPY002 (libraries draw from the global generator)
    torch.manual_seed(run.seed)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = not run.deterministic
    if run.deterministic:
        torch.use_deterministic_algorithms(True, warn_only=True)


def capture_rng(dist: Dist) -> list[dict[str, Tensor]]:
    """Random states of every rank, in the order of ranks, as plain tensors; a collective, called by all ranks.

    Covers Python's `random`, NumPy's global generator, torch's CPU generator and, on a GPU, its generator.
    """
    _, words, gauss = random.getstate()
    numpy_state = np.random.get_state(legacy=True)  # noqa: NPY002 -- libraries draw from the global generator
    assert isinstance(numpy_state, tuple)
    state = {
        "python": torch.tensor(words, dtype=torch.int64),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.from_numpy(numpy_state[1].astype(np.int64)),
        "numpy_position": torch.tensor(numpy_state[2:4], dtype=torch.int64),
        "numpy_gauss": torch.tensor(numpy_state[4], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if dist.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(dist.device)
    return gather_objects(state, dist)


def restore_rng(states: Sequence[Mapping[str, Tensor]], dist: Dist) -> None:
    """Put this rank's random states, as returned by `capture_rng`, back.

    A state taken on a CPU and restored on a GPU leaves the GPU's generator alone (and the other way round).

    Raises:
        UserError: the checkpoint was written by another number of processes.
    """
    if len(states) != dist.world_size:
        raise UserError(
            f"checkpoint: written by {len(states)} process(es), this run has {dist.world_size}; resume with "
            f"{len(states)}, or set run.init to it and begin a new run from its weights"
        )
    state = states[dist.rank]
    gauss = state["python_gauss"].tolist()
    random.setstate((3, tuple(state["python"].tolist()), gauss[0] if gauss else None))
    position, has_gauss = state["numpy_position"].tolist()
    words = state["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", words, position, has_gauss, state["numpy_gauss"].item()))  # noqa: NPY002
    torch.set_rng_state(state["torch"].cpu())
    if dist.device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), dist.device)


class NumpyStream:
    """A NumPy stream of uniform numbers and integers; a pending normal variate would be lost."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.RandomState(seed)

    def state_dict(self) -> dict[str, Any]:
        """All streams as plain tensors and numbers."""
        state = self.rng.get_state(legacy=False)["state"]
        return {
            "numpy_keys": torch.from_numpy(state["key"].astype(np.int64)),
            "numpy_position": int(state["pos"]),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken."""
        keys = torch.as_tensor(state["numpy_keys"]).numpy().astype(np.uint32)
        self.rng.set_state(("MT19937", keys, int(state["numpy_position"]), 0, 0.0))


class Streams(NumpyStream):
    """A NumPy stream, and a generator of the device with a seed of its own."""

    def __init__(self, seed: int, device_seed: int, device: torch.device) -> None:
        super().__init__(seed)
        self.generator = torch.Generator(device=device)
        self.generator.manual_seed(device_seed)

    def state_dict(self) -> dict[str, Any]:
        """All streams as plain tensors and numbers."""
        return {**super().state_dict(), "torch": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken."""
        super().load_state_dict(state)
        self.generator.set_state(torch.as_tensor(state["torch"], dtype=torch.uint8))
