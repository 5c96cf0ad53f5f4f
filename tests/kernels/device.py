"""Where kernels are tested: on the GPU where there is one, else in the interpreter."""

from __future__ import annotations

import torch

from msi.device.cuda import why_unavailable

DEVICE = torch.device("cpu" if why_unavailable() is not None else "cuda")
EXACT = 1e-5
TOLERANCES = {torch.float32: EXACT, torch.float16: 2e-3, torch.bfloat16: 2e-2}  # the interpreter rounds bfloat16 down
