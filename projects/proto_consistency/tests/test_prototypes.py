"""The vectorized movement of the prototypes against the loop over classes and prototypes, and its edges."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from projects.proto_consistency.prototypes import apply_sums, effective_number, group_sums
from projects.proto_consistency.tests.toys import moved
from tests.runs import launch_script

K, P, D, N = 4, 3, 5, 60


def inputs(seed: int = 0, n: int = N) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    old = torch.randn(K * P, D, generator=draw, dtype=torch.float64)
    feats = torch.randn(n, D, generator=draw, dtype=torch.float64) * 4
    match = torch.randint(P, (n, K), generator=draw)
    target = torch.randint(K, (n,), generator=draw)
    target[torch.rand(n, generator=draw) < 0.2] = 255
    return old, feats, match, target, torch.rand(n, generator=draw) < 0.7


def by_loops(
    old: Tensor, feats: Tensor, match: Tensor, target: Tensor, cond: Tensor, momentum: float
) -> Tensor:
    """The statements of the original, one class and one prototype after the other."""
    new, valid = old.clone(), target != 255
    feats, match, target, cond = feats[valid], match[valid], target[valid], cond[valid]
    own = torch.tensor([int(match[i, target[i]]) for i in range(len(target))])
    if cond.any():
        feats, target, own = feats[cond], target[cond], own[cond]
        for c in target.unique().tolist():
            for k in range(P):
                members = feats[(target == c) & (own == k)]
                if len(members):
                    new[c * P + k] = momentum * new[c * P + k] + (1 - momentum) * members.mean(dim=0)
    return new


@pytest.mark.parametrize("momentum", [0.99, 0.0, 1.0])
def test_update_is_that_of_the_loops(momentum: float) -> None:
    for seed in range(4):
        case = inputs(seed)
        assert torch.allclose(moved(*case, momentum), by_loops(*case, momentum), atol=1e-12)


def test_inputs_are_left_alone() -> None:
    case = inputs()
    before = [x.clone() for x in case]
    assert not torch.equal(moved(*case, 0.9), case[0])
    assert all(torch.equal(a, b) for a, b in zip(case, before, strict=True))


def test_absent_class_keeps_its_bits() -> None:
    old, feats, match, target, cond = inputs()
    target[target == 2] = 1
    new = moved(old, feats, match, target, cond, 0.9)
    assert torch.equal(new[2 * P : 3 * P], old[2 * P : 3 * P])
    assert not torch.equal(new[P : 2 * P], old[P : 2 * P])


@pytest.mark.parametrize("what", ["nothing confident", "all ignored", "no pixel"])
def test_nothing_to_learn_from_changes_no_bit(what: str) -> None:
    old, feats, match, target, cond = inputs(n=0 if what == "no pixel" else N)
    if what == "nothing confident":
        cond = torch.zeros_like(cond)
    elif what == "all ignored":
        target = torch.full_like(target, 255)
    assert torch.equal(moved(old, feats, match, target, cond, 0.9), old)


def test_one_pixel_moves_one_prototype() -> None:
    old, feats, match, *_ = inputs(n=1)
    target, cond = torch.tensor([3]), torch.tensor([True])
    new = moved(old, feats, match, target, cond, 0.75)
    row = 3 * P + int(match[0, 3])
    assert torch.allclose(new[row], 0.75 * old[row] + 0.25 * feats[0])
    rest = torch.arange(K * P) != row
    assert torch.equal(new[rest], old[rest])


def test_broken_features_that_do_not_count_do_no_harm() -> None:
    old, feats, match, target, cond = inputs()
    expected = moved(old, feats, match, target, cond, 0.9)
    feats[target == 255] = torch.nan
    feats[~cond] = torch.inf
    assert torch.equal(moved(old, feats, match, target, cond, 0.9), expected)


def test_broken_features_that_count_leave_no_trace() -> None:
    old, feats, match, target, cond = inputs()
    target[0], cond[0] = 1, True
    feats[0] = torch.nan
    new = moved(old, feats, match, target, cond, 0.9)
    row = P + int(match[0, 1])
    assert torch.equal(new[row], old[row])
    assert new.isfinite().all()
    assert not torch.equal(new, old)


def test_sums_add_up_over_parts_of_a_batch() -> None:
    old, feats, match, target, cond = inputs()
    parts = [
        group_sums(*(x[half] for x in (feats, match, target, cond)), P)
        for half in (slice(0, 25), slice(25, N))
    ]
    sums, counts = (torch.stack(x).sum(dim=0) for x in zip(*parts, strict=True))
    assert counts.sum() == ((target != 255) & cond).sum()
    assert torch.allclose(apply_sums(old, sums, counts, 0.9), moved(old, feats, match, target, cond, 0.9))


def test_no_gradient_is_recorded() -> None:
    old, feats, match, target, cond = inputs()
    assert not moved(old, feats.requires_grad_(True), match, target, cond, 0.9).requires_grad


def test_float32_features_of_many_pixels_keep_their_digits() -> None:
    old, feats, match, target, cond = inputs(n=8192)
    exact = moved(old, feats, match, target, cond, 0.5)
    found = moved(old.float(), feats.float(), match, target, cond, 0.5)
    assert (found - exact).abs().max() < 1e-5


def test_effective_number_counts_prototypes_in_use() -> None:
    counts = torch.tensor([[5, 5, 5], [9, 0, 0], [0, 0, 0], [8, 8, 0]])
    assert torch.allclose(effective_number(counts), torch.tensor([3.0, 1.0, 0.0, 2.0]))


def test_two_processes_that_gather_are_one(tmp_path) -> None:
    """And two that do not go their own ways."""
    script = """
        import sys
        import torch
        from common.distributed import all_gather_padded
        from tools.processes import start, stop
        from common.errors import run_main
        from projects.proto_consistency.tests.toys import moved
        from projects.proto_consistency.tests.test_prototypes import inputs

        def main(argv):
            dist = start("cpu")
            old, *rest = inputs(5)
            half = slice(0, 37) if dist.rank == 0 else slice(37, None)  # unequal shares
            mine = [x[half] for x in rest]
            pooled, own = moved(old, *mine, 0.9, dist), moved(old, *mine, 0.9)
            assert torch.allclose(pooled, moved(old, *rest, 0.9), atol=1e-12)
            everywhere = all_gather_padded(torch.stack((pooled, own)), dist)
            assert torch.equal(everywhere[0, 0], everywhere[1, 0])
            assert not torch.allclose(everywhere[0, 1], everywhere[1, 1])
            sys.stdout.write(f"agreed on rank {dist.rank}" + chr(10))
            stop()

        if __name__ == "__main__":
            run_main(main)
    """
    found = launch_script(tmp_path, script)
    assert "agreed on rank 0" in found
    assert "agreed on rank 1" in found
