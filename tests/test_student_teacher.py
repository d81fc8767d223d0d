"""Student and teacher of the U2PL family."""

from __future__ import annotations

import pytest
import torch

from common.models.deeplab import Outputs
from common.student_teacher import in_float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_half_precision_outputs_are_widened(dtype: torch.dtype) -> None:
    out = in_float32(Outputs(torch.zeros(1, dtype=dtype), torch.zeros(1, dtype=dtype), None))
    wide = dtype if dtype.itemsize > 2 else torch.float32
    assert out.feats is not None
    assert (out.logits.dtype, out.feats.dtype, out.aux) == (wide, wide, None)
