"""The class queues against Python lists, alone and fed by two processes."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import Tensor

from common.errors import UserError
from common.mean_teacher.queues import ClassQueues

ROOT = Path(__file__).resolve().parents[3]


class Lists:
    """What the queues mean: one list per class that keeps its last rows."""

    def __init__(self, sizes: list[int]) -> None:
        self.sizes, self.rows = sizes, [[] for _ in sizes]

    def push(self, classes: Tensor, keys: Tensor) -> list[int]:
        counts = [0] * len(self.sizes)
        for k, key in zip(classes.tolist(), keys, strict=True):
            if k >= 0:
                self.rows[k].append(key)
                counts[k] += 1
        self.rows = [rows[-size:] for rows, size in zip(self.rows, self.sizes, strict=True)]
        return counts


def assert_equal(queues: ClassQueues, lists: Lists) -> None:
    assert queues.lengths.tolist() == [len(rows) for rows in lists.rows]
    for k, rows in enumerate(lists.rows):
        expected = torch.stack(rows) if rows else queues.rows.new_zeros(0, queues.rows.shape[1])
        assert torch.equal(queues.contents(k), expected)


@pytest.mark.parametrize("sizes", [[1], [5], [7, 3, 1, 4], [2] * 6])
@pytest.mark.parametrize("seed", range(3))
def test_long_random_sequences(sizes, seed):
    """Interleaved classes, padding anywhere, pushes of nothing and of far more than fits."""
    generator = torch.Generator().manual_seed(seed)
    queues, lists = ClassQueues(sizes, 3), Lists(sizes)
    total, number = [0] * len(sizes), 0.0
    for _ in range(120):
        count = int(torch.randint(0, 30, (), generator=generator))
        classes = torch.randint(-1, len(sizes), (count,), generator=generator)
        if count % 3 == 0:
            classes = classes.sort().values  # as `collect_negatives` orders them
        keys = torch.arange(number, number + count)[:, None].repeat(1, 3)
        number += count
        found = queues.push(classes, keys)
        counts = lists.push(classes, keys)
        assert found.tolist() == counts
        total = [a + b for a, b in zip(total, counts, strict=True)]
        assert queues.written.tolist() == total
        assert_equal(queues, lists)


@pytest.mark.parametrize("before", [0, 2, 3, 4])
@pytest.mark.parametrize("count", [2, 3, 4, 7, 12])
def test_a_push_around_the_capacity(before, count):
    queues, lists = ClassQueues([3], 1), Lists([3])
    for part in (torch.arange(before), torch.arange(100, 100 + count)):
        keys = part.float()[:, None]
        queues.push(torch.zeros(len(part), dtype=torch.long), keys)
        lists.push(torch.zeros(len(part), dtype=torch.long), keys)
        assert_equal(queues, lists)


def test_padding_alone_changes_nothing():
    queues = ClassQueues([2, 2], 2)
    queues.push(torch.tensor([1]), torch.ones(1, 2))
    counts = queues.push(torch.full((5,), -1), torch.full((5, 2), torch.nan))
    assert counts.tolist() == [0, 0]
    assert queues.contents(0).shape == (0, 2)
    assert torch.equal(queues.contents(1), torch.ones(1, 2))


def test_slots_count_from_the_oldest():
    queues = ClassQueues([3, 4], 1)
    queues.push(torch.zeros(5, dtype=torch.long), torch.arange(5.0)[:, None])
    queues.push(torch.ones(2, dtype=torch.long), torch.tensor([[10.0], [11.0]]))
    index = torch.tensor([[0, 2], [1, 1]])
    assert queues.rows[queues.slots(0, index)].squeeze(-1).tolist() == [[2.0, 4.0], [3.0, 3.0]]
    # several classes at once, a row of the index each
    both = queues.slots(torch.tensor([[1], [0]]), torch.tensor([[1, 0], [2, 0]]))
    assert queues.rows[both].squeeze(-1).tolist() == [[11.0, 10.0], [4.0, 2.0]]


def test_pushes_keep_no_graph_and_no_alias():
    queues = ClassQueues([3], 2)
    keys = torch.ones(1, 2, requires_grad=True)
    queues.push(torch.tensor([0]), keys)
    with torch.no_grad():
        keys.fill_(5.0)
    assert not queues.rows.requires_grad
    assert torch.equal(queues.contents(0), torch.ones(1, 2))


def test_half_precision_keys_are_stored_as_the_buffer_is():
    queues = ClassQueues([3], 2)
    queues.push(torch.tensor([0]), torch.full((1, 2), 0.1, dtype=torch.float16))
    assert queues.contents(0).dtype == torch.float32


def test_state_round_trip_in_the_middle_of_a_wrap():
    sizes = [4, 3]
    queues, lists = ClassQueues(sizes, 2), Lists(sizes)

    def push(target, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        classes = torch.randint(-1, 2, (5,), generator=generator)
        target.push(classes, torch.randn(5, 2, generator=generator))

    for seed in range(5):
        push(queues, seed)
        push(lists, seed)
    state = {key: value.clone() for key, value in queues.state_dict().items()}
    assert set(state) == {"rows", "written"}
    other = ClassQueues(sizes, 2)
    other.load_state_dict(state)
    assert_equal(other, lists)
    for seed in range(5, 9):
        push(other, seed)
        push(lists, seed)
    assert_equal(other, lists)


def test_another_capacity_is_not_loaded_silently():
    from common.run.checkpoint import load_weights

    state = ClassQueues([4, 3], 2).state_dict()
    for other in (ClassQueues([4, 4], 2), ClassQueues([4, 3], 5), ClassQueues([4, 2, 1], 2)):
        with pytest.raises(UserError, match="do not fit"):
            load_weights(other, state, "run.resume=last.pt")


# --- two processes ---------------------------------------------------------------------------------------------

SCRIPT = """
    import dataclasses
    import sys

    import torch
    from common.config import DataConfig, OptimConfig
    from common.distributed import all_gather_padded
    from tools.processes import start, stop
    from common.errors import run_main
    from projects.u2pl.config import Config, MethodConfig, QuirkConfig
    from projects.u2pl.contrast import contrast_inputs
    from projects.u2pl.losses import EntropySplit
    from projects.u2pl.memory import Memory
    from projects.u2pl.tests.golden_adapters import negatives

    def inputs_of(rank, step, cfg):
        g = torch.Generator().manual_seed(10 * step + rank)
        y_l = torch.randint(0, 5, (2, 8, 8), generator=g)
        y_u = torch.randint(0, 5, (3, 8, 8), generator=g)
        if rank == 0 and step == 1:
            y_u[:] = 255  # one process has nothing to bring
        feats = torch.randn(5, 4, 4, 4, generator=g)
        logits = torch.randn(5, 5, 4, 4, generator=g)
        high = torch.rand(3, 8, 8, generator=g) < 0.6
        if step == 3:
            high[:] = True  # as many negatives as there can be: the fixed bound must hold them
        split = EntropySplit(y_u, high, high & (y_u != 255))
        return contrast_inputs(feats, feats + 1, logits, y_l, y_u, split, cfg)

    def main(argv):
        dist = start("cpu")
        for first, own in ((True, True), (False, True), (False, False), (True, False)):
            cfg = Config(
                data=DataConfig(dataset="shapes", split="none"),
                optim=OptimConfig(lr=1.0, epochs=2, batch_size=4),
                method=MethodConfig(low_rank=0, queue_size=9, queue_size_first=14, num_queries=4, num_negatives=2),
                quirks=QuirkConfig(onehot_first_image=first, own_label_negatives=own),
            )
            memory, lists = Memory(cfg, 5, 4), [[] for _ in range(5)]
            for step in range(4):
                counts = memory.collect(inputs_of(dist.rank, step, cfg), 3, dist)
                brought = [0] * 5
                for rank in range(2):  # rank by rank, each in the order class, image, row, column
                    inputs = inputs_of(rank, step, cfg)
                    mine = negatives(inputs, cfg, 5, exact=True)
                    for k, key in zip(mine[0].tolist(), mine[1]):
                        lists[k].append(key)
                        brought[k] += 1
                assert counts.tolist() == brought, (counts, brought)
                assert step == 1 or sum(brought) > 0
                lists = [rows[-(14 if k == 0 else 9):] for k, rows in enumerate(lists)]
                for k, rows in enumerate(lists):
                    expected = torch.stack(rows) if rows else torch.zeros(0, 4)
                    assert torch.equal(memory.queues.contents(k), expected), (first, own, step, k)
            everywhere = all_gather_padded(memory.queues.rows[:-1], dist)
            assert torch.equal(everywhere[0], everywhere[1])
        sys.stdout.write(f"queues agree on rank {dist.rank}" + chr(10))  # one write: two processes share the pipe
        sys.stdout.flush()
        stop()

    if __name__ == "__main__":
        run_main(main)
"""


def run_on_two_processes(folder: Path, script: str, *arguments: str) -> str:
    """Output of a module with `main(argv)` that two gloo processes run."""
    (folder / "two_ranks.py").write_text(textwrap.dedent(script), encoding="utf-8")
    env = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(folder))), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "tools.launch",
        "--processes",
        "2",
        "--port",
        "0",
        "two_ranks",
        "--",
        *arguments,
    ]
    done = subprocess.run(
        command,
        env=env | {"SSS_DEVICE": "cpu"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_two_processes_fill_equal_queues_in_rank_order(tmp_path):
    out = run_on_two_processes(tmp_path, SCRIPT)
    assert sorted(out.split("\n"))[-2:] == ["queues agree on rank 0", "queues agree on rank 1"]
