"""How many input columns of an 8-bit linear hold an outlier, and are kept beside the 8-bit copy.

bitsandbytes' MatMul8bitLt takes every column with a value beyond 6 out of the 8-bit product and
keeps it (`A[:, outlier_cols]`). Which ones, the data decides. In trained models they are few (about
0.1 % of the features, https://arxiv.org/abs/2208.07339); with weights drawn at random, as probes
draw them, the gated product that enters `down_proj` has one in nearly every column once a batch
holds some thousand tokens: the most that a run can keep, short of weights that are stranger still.
"""

from __future__ import annotations

from functools import lru_cache
from math import erfc, exp, pi, sqrt
from typing import Any

THRESHOLD = 6.0  # BitsAndBytesConfig.llm_int8_threshold
_DEVIATION = 0.02  # transformers' default initializer_range, and the probes' weights
_POINTS = 400


def outlier_columns(path: str, in_features: int, out_features: int, rows: Any) -> Any:
    """Expected columns with an outlier among `rows` tokens, for random weights: an int, or an
    array like `rows`. path: of the linear; only what follows a gated product has any.

    The norm before the MLP leaves unit variance, so gate and up of hidden size D are normal with
    deviation 0.02 sqrt(D), and tokens are taken as independent (correlated ones have fewer).
    """
    if not path.endswith("down_proj"):
        return 0
    chance = _chance(_DEVIATION * sqrt(out_features))
    expected = in_features * (1 - (1 - chance) ** rows) + 0.5
    return int(expected) if isinstance(expected, float) else expected.astype("int64")


@lru_cache(maxsize=16)
def _chance(deviation: float) -> float:
    """P(|silu(g) u| > 6) for normal g and u of this deviation."""
    step = 16 / _POINTS
    total = 0.0
    for index in range(_POINTS + 1):
        z = -8 + index * step
        g = z * deviation
        gate = abs(g / (1 + exp(-g)))
        if gate:
            total += exp(-z * z / 2) * erfc(THRESHOLD / (gate * deviation * sqrt(2)))
    return total * step / sqrt(2 * pi)
