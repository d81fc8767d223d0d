"""Networks on their device and in several processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from common.distributed import Dist
from common.models.placing import placed, unsynchronized, wrapped
from tests.runs import launch_script

SEVERAL = Dist(world_size=2)


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("synchronize", [True, False])
def test_placed(synchronize: bool, channels_last: bool) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    weight = network[0].weight.clone()
    network = placed(network, Dist(), synchronize=synchronize, channels_last=channels_last)
    assert isinstance(network[1], nn.SyncBatchNorm) is synchronize
    assert network[0].weight.is_contiguous(memory_format=torch.channels_last) is channels_last
    assert torch.equal(network[0].weight, weight)


def test_one_process_is_not_wrapped() -> None:
    network = nn.Linear(2, 2)
    assert wrapped(network, Dist(), compiled=False) is network


def test_statistics_are_local_in_several_processes_that_do_not_synchronize() -> None:
    networks = [nn.Linear(1, 1), nn.Linear(1, 1)]
    assert unsynchronized(networks, SEVERAL, synchronize=False) == tuple(networks)
    assert unsynchronized(networks, SEVERAL, synchronize=True) == ()
    assert unsynchronized(networks, Dist(), synchronize=False) == ()


TWO_PROCESSES = """
    import gc
    import sys

    import torch
    from torch import nn

    from tools.processes import start, stop
    from common.errors import run_main
    from common.models.placing import share_statistics, wrapped

    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle, self.norm = nn.Linear(2, 1), nn.Linear(2, 1), nn.BatchNorm1d(2)

        def forward(self, x):
            return self.used(self.norm(x))

    def main(argv):
        dist = start("cpu")
        torch.manual_seed(0)
        network = Half()
        network.norm.running_mean.fill_(dist.rank)
        model = wrapped(network, dist, compiled=False, idle=list(network.idle.parameters()))
        assert network.norm.running_mean.tolist() == [dist.rank] * 2
        x = torch.randn(2, 4, 2, generator=torch.Generator().manual_seed(1))
        for _ in range(2):  # a parameter that is waited for would stop the second one
            model(x[dist.rank]).sum().backward()
        assert network.norm.running_mean.tolist() != [0, 0]
        share_statistics([network], dist)
        sys.stdout.write(f"{[*network.used.weight.grad.flatten().tolist(), *network.norm.running_mean.tolist()]}\\n")
        sys.stdout.flush()
        del model  # before the group that its threads belong to
        gc.collect()
        stop()

    if __name__ == "__main__":
        run_main(main)
"""


@pytest.mark.slow
def test_gradients_are_averaged_and_statistics_are_the_first_processes(tmp_path: Path) -> None:
    one, two = [line for line in launch_script(tmp_path, TWO_PROCESSES).splitlines() if line.startswith("[")]
    assert one == two
