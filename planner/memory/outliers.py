"""How many input columns of an 8-bit linear hold an outlier, and are kept beside the 8-bit copy.

bitsandbytes' MatMul8bitLt takes every column with a value beyond 6 out of the 8-bit product and
keeps it (`A[:, outlier_cols]`). Which ones, the data decides. In trained models they are few (about
0.1 % of the features, https://arxiv.org/abs/2208.07339); with weights drawn at random, as probes
draw them, the gated product that enters `down_proj` has one in nearly every column once a batch
holds some thousand tokens: the most that a run can keep, short of weights that are stranger still.

Their number follows from the distribution of a random network, in which every hidden feature is
normal: how often the product of gate and up passes 6, and how alike the tokens of a sample are
(averaging attention makes them so), since like tokens have their outliers in the same columns.
"""

# Annotations stay objects here: named tuples would compile each string at import.
from collections.abc import Sequence
from functools import lru_cache
from math import erfc, exp, pi, sqrt
from typing import Any, NamedTuple

THRESHOLD = 6.0  # BitsAndBytesConfig.llm_int8_threshold
_DEVIATION = 0.02  # transformers' default initializer_range, and the probes' weights
_STEP = 0.5  # of the trapezoid rule over a normal variable: exact for what is smooth
_NODES = [(index * _STEP, _STEP * exp(-((index * _STEP) ** 2) / 2) / sqrt(2 * pi))
          for index in range(-9, 10)]  # fmt: skip
_PLACES = 12  # positions of a sample at which likeness is followed
_CURVE = 16  # points of the curve of a layer's likeness


class OutlierModel(NamedTuple):
    """A decoder's numbers: hidden features D, features of all query heads together, layers, whether
    queries and keys are normed; gelu: the gate's activation, else silu; scaled_embedding: by
    sqrt(D); sandwich: what attention and the MLP give is normed before it is added."""

    hidden: int
    query_features: int
    layers: int
    qk_norm: bool
    gelu: bool = False
    scaled_embedding: bool = False
    sandwich: bool = False

    def columns(
        self, path: str, in_features: int, out_features: int, batch: Any, length: Any
    ) -> Any:
        """Expected columns with an outlier, of a layer at the mean, in the input (batch, length,
        in_features) of the linear at `path`; only what follows a gated product has any. An int, or
        an array like batch and length."""
        if not path.endswith("down_proj"):
            return 0
        own = self
        if out_features != self.hidden:  # a vision tower's
            own = OutlierModel(out_features, out_features, self.layers, self.qk_norm)
        if isinstance(batch, int) and isinstance(length, int):
            return _columns(own, in_features, batch, length)
        import numpy as np  # sizes of many runs at once

        pairs = np.broadcast_arrays(batch, length)
        found = [
            _columns(own, in_features, int(b), int(n))
            for b, n in zip(pairs[0].ravel(), pairs[1].ravel(), strict=True)
        ]
        return np.array(found, dtype="int64").reshape(pairs[0].shape)


def outlier_model(spec: Any, text: Any) -> OutlierModel | None:
    """Of a run spec and its model's decoder geometry; None where a run keeps no such columns."""
    if spec.quantization != "int8" or spec.int8_outliers == "few":
        return None
    queries = text.num_attention_heads * text.head_dim
    return OutlierModel(
        text.hidden_size, queries, text.num_hidden_layers, text.qk_norm != "none",
        "gelu" in text.hidden_act, text.embedding_scale, text.sandwich_norms,
    )  # fmt: skip


@lru_cache(maxsize=4096)
def _columns(model: OutlierModel, in_features: int, batch: int, length: int) -> int:
    """Columns by layer, averaged: the first two layers apart, the rest at their mean likeness."""
    deviation = _DEVIATION * sqrt(model.hidden)
    alike = _likeness(model, in_features, length)
    groups = [(alike[0], 1)]
    if len(alike) > 1:
        groups.append((alike[1], 1))
    if len(alike) > 2:
        groups.append((sum(alike[2:]) / len(alike[2:]), len(alike) - 2))
    total = 0.0
    for likeness, layers in groups:
        total += layers * (1 - _clear(model.gelu, round(likeness, 3), deviation, length) ** batch)
    return int(in_features * total / len(alike) + 0.5)


@lru_cache(maxsize=1024)
def _clear(gelu: bool, likeness: float, deviation: float, tokens: int) -> float:
    """P(no token of a sample has |act(g) u| > 6 in a column). Tokens share a part of g and u
    (`likeness` is the correlation), and are independent given it."""
    shared, own = sqrt(likeness), sqrt(1 - likeness)
    own = max(own, 1e-6)
    activation = _gelu if gelu else _silu
    clear = 0.0
    for gate_part, gate_weight in _NODES:
        gates = []
        for z, weight in _NODES:
            g = deviation * (shared * gate_part + own * z)
            gate = abs(activation(g))
            if gate * deviation * 12 > THRESHOLD:  # else beyond 12 deviations
                gates.append((THRESHOLD / (gate * deviation), weight))
        for up_part, up_weight in _NODES:
            mean = shared * up_part
            chance = sum(
                weight * (_above((limit - mean) / own) + _above((limit + mean) / own))
                for limit, weight in gates
            )
            clear += gate_weight * up_weight * (1 - min(chance, 1.0)) ** tokens
    return min(clear, 1.0)


def _above(z: float) -> float:
    return erfc(z / sqrt(2)) / 2


def _silu(x: float) -> float:
    return x / (1 + exp(-x)) if x > -700 else 0.0


def _gelu(x: float) -> float:
    return x * _above(-x)


@lru_cache(maxsize=256)
def _likeness(model: OutlierModel, width: int, length: int) -> tuple[float, ...]:
    """Mean correlation of two tokens of a sample at the MLP of each layer: 0 where all are drawn
    apart, grown by attention, which averages over earlier tokens, and shrunk by the MLP.

    Own variances and covariances of the residual stream are followed at a few places of the
    sample. A random query weighs earlier tokens by exp of a normal score of variance v, as an
    average over t / exp(v) of them does.
    """
    variance = _DEVIATION**2 * model.hidden  # of a linear's output, its input normed
    value = variance * _DEVIATION**2 * model.query_features  # through v_proj and o_proj
    curve = _gate_curve(model.gelu, sqrt(variance))
    mlp = _DEVIATION**2 * width * variance
    embedding = _DEVIATION**2 * (model.hidden if model.scaled_embedding else 1)
    places = [(index + 0.5) / _PLACES * length for index in range(_PLACES)]
    own = [embedding] * _PLACES
    common = [[0.0] * _PLACES for _ in places]
    found = []
    for _ in range(model.layers):
        alike = _normed(own, common)
        means = _prefix_means(alike)
        spread = (1.0 if model.qk_norm else variance**2) * (1 - means[-1][-1])
        attended = [
            value * (means[i][i] + (1 - means[i][i]) * min(1.0, exp(spread) / place))
            for i, place in enumerate(places)
        ]
        shared = [
            [value * (mean + (1 - mean) / max(place, other))
             for mean, other in zip(row, places, strict=True)]
            for row, place in zip(means, places, strict=True)
        ]  # fmt: skip
        _add(own, common, attended, shared, model.sandwich)
        alike = _normed(own, common)
        found.append(sum(map(sum, alike)) / _PLACES**2)
        given = [[mlp * _at(curve, c) * c for c in row] for row in alike]
        _add(own, common, [mlp * curve[-1]] * _PLACES, given, model.sandwich)
    return tuple(found)


def _add(
    own: list[float], common: list[list[float]],
    more: list[float], shared: list[list[float]], normed: bool,
) -> None:  # fmt: skip
    """Add a branch's variances and covariances to the stream's, in place; normed: to variance 1."""
    if normed:
        more, shared = [1.0] * len(more), _normed(more, shared)
    for i, row in enumerate(shared):
        own[i] += more[i]
        for j, covariance in enumerate(row):
            common[i][j] += covariance


def _normed(own: Sequence[float], common: Sequence[Sequence[float]]) -> list[list[float]]:
    """Correlations from variances and covariances."""
    return [
        [min(1.0, value / sqrt(a * b)) for value, b in zip(row, own, strict=True)]
        for row, a in zip(common, own, strict=True)
    ]


def _prefix_means(square: Sequence[Sequence[float]]) -> list[list[float]]:
    """Mean of square[:i + 1][:j + 1] at each (i, j)."""
    above = [0.0] * len(square)
    found = []
    for i, row in enumerate(square):
        along, sums = 0.0, []
        for j, value in enumerate(row):
            along += value
            above[j] += along
            sums.append(above[j] / ((i + 1) * (j + 1)))
        found.append(sums)
    return found


@lru_cache(maxsize=64)
def _gate_curve(gelu: bool, deviation: float) -> tuple[float, ...]:
    """E[act(g) act(g')] for normal g and g' of correlation 0 to 1."""
    activation, found = _gelu if gelu else _silu, []
    for index in range(_CURVE + 1):
        likeness = index / _CURVE
        shared, own = sqrt(likeness), sqrt(1 - likeness)
        found.append(
            sum(
                weight
                * sum(w * activation(deviation * (shared * part + own * z)) for z, w in _NODES) ** 2
                for part, weight in _NODES
            )
        )
    return tuple(found)


def _at(curve: Sequence[float], likeness: float) -> float:
    place = min(max(likeness, 0.0), 1.0) * _CURVE
    left = min(int(place), _CURVE - 1)
    return curve[left] + (curve[left + 1] - curve[left]) * (place - left)
