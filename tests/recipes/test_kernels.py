"""The Triton kernels against the same arithmetic in torch, run by Triton's interpreter: no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

CHECK = """
import json, torch
from recipes.kernel_check import kernel_errors
print(json.dumps(kernel_errors(torch.device("cpu"), torch.float32, rows=70, width=384)))
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="no Triton for this machine")
def test_kernels_do_what_torch_does() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(
        [sys.executable, "-c", CHECK], env=environment, capture_output=True, text=True, check=True
    )
    errors = json.loads(run.stdout.splitlines()[-1])
    assert len(errors) == 10
    assert max(errors.values()) < 2e-6
