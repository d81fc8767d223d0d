"""Student and teacher of the U2PL family."""

from __future__ import annotations

import pytest
import torch

from common.mean_teacher.networks import in_float32
from common.models.deeplab import Outputs


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_half_precision_outputs_are_widened(dtype: torch.dtype) -> None:
    out = in_float32(Outputs(torch.zeros(1, dtype=dtype), torch.zeros(1, dtype=dtype), None))
    wide = dtype if dtype.itemsize > 2 else torch.float32
    assert out.feats is not None
    assert (out.logits.dtype, out.feats.dtype, out.aux) == (wide, wide, None)
