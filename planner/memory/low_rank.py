"""GaLore and APOLLO: optimizer states of gradients projected to a low rank.

Sources: galore-torch 1.0 (adamw.py, adamw8bit.py, adafactor.py, galore_projector.py), apollo-torch
1.0.3 (apollo.py, random_projector.py), transformers' trainer_optimizer.py for the arguments: rank
128, every nn.Linear with a gradient a target (`optim_target_modules="all-linear"`; without any
value Trainer refuses). The step shown is one that renews the projection, as the first and every
200th do: GaLore's decomposition is its peak. cuSOLVER's workspace for it is not in the sources.

A fp32 projection is a slice of the decomposition's factor and keeps the whole factor alive.
"""

from __future__ import annotations

from math import prod

from planner.dtypes import F32
from planner.memory.ops import Engine
from planner.memory.optimizer import Optimizer, State, bitsandbytes_states
from planner.memory.tensor import Shape, Tensor

RANK = 128


def is_target(leaf: Tensor, is_embedding: bool = False) -> bool:
    """The weight of an nn.Linear: a matrix that is no table and no norm's."""
    module = leaf.name.removesuffix(".weight").rpartition(".")[2]
    return len(leaf.shape) == 2 and not is_embedding and "norm" not in module


class ProjectedAdamW(Optimizer):
    """AdamW that is shown a target's gradient at a low rank. A subclass says what it keeps of a
    target, how its gradient is projected, and what the update becomes."""

    launches = 14

    def states(self, leaf: Tensor, is_embedding: bool = False) -> list[State]:
        if not is_target(leaf, is_embedding):
            return [State(leaf.shape, leaf.dtype)] * 2
        return self.target_states(leaf)

    def target_states(self, leaf: Tensor) -> list[State]:
        """The projection, then what AdamW keeps at the low rank."""
        raise NotImplementedError(self.name)

    def project(self, t: Engine, leaf: Tensor) -> Tensor:
        """The gradient at the low rank."""
        raise NotImplementedError(self.name)

    def full_update(self, t: Engine, leaf: Tensor) -> Tensor:
        """The update in the target's own shape."""
        raise NotImplementedError(self.name)

    def step(self, t: Engine, leaves: list[Tensor]) -> None:
        grad: Tensor | None = None
        root: Tensor | None = None
        update: Tensor | None = None
        with t.recorder.scope("optimizer"):
            for leaf in leaves:
                grad = leaf.grad
                low: Shape = leaf.shape
                if is_target(leaf):
                    grad = self.project(t, leaf)
                    low = grad.shape
                root = t.new(low, leaf.dtype, "sqrt")
                update = t.new(low, leaf.dtype, "div")
                if is_target(leaf):
                    update = self.full_update(t, leaf)
                t.count(14 * prod(leaf.shape) * leaf.dtype.itemsize, self.launches)
        del grad, root, update

    def leaf_step(self, t: Engine, leaf: Tensor) -> None:
        self.step(t, [leaf])
        leaf.grad = None


class GaLore(ProjectedAdamW):
    """AdamW on the projected gradient; the update is projected back."""

    def target_states(self, leaf: Tensor) -> list[State]:
        return [self._projection(leaf), *self._moments(leaf)]

    def _moments(self, leaf: Tensor) -> list[State]:
        return [State(low_shape(leaf), leaf.dtype)] * 2

    def _projection(self, leaf: Tensor) -> State:
        """ "std": the rows of Vh for a tall gradient, else the columns of U."""
        rows, columns = leaf.shape
        least = min(rows, columns)
        rank = least if leaf.dtype is F32 else min(RANK, least)
        return State((rank, columns) if rows >= columns else (rows, rank), leaf.dtype)

    def project(self, t: Engine, leaf: Tensor) -> Tensor:
        decompose(t, leaf)
        return t.new(low_shape(leaf), leaf.dtype, "mm (projected)")

    def full_update(self, t: Engine, leaf: Tensor) -> Tensor:
        return project_back(t, leaf)


class GaLore8bit(GaLore):
    """The moments as bitsandbytes keeps them; the weight is set aside and lent the low rank."""

    replaces_gradients = True

    def states(self, leaf: Tensor, is_embedding: bool = False) -> list[State]:
        if not is_target(leaf, is_embedding):
            return bitsandbytes_states("adamw_8bit", leaf.shape)
        return super().states(leaf, is_embedding)

    def _moments(self, leaf: Tensor) -> list[State]:
        return bitsandbytes_states("adamw_8bit", low_shape(leaf))

    def step(self, t: Engine, leaves: list[Tensor]) -> None:
        with t.recorder.scope("optimizer"):
            for leaf in leaves:
                if is_target(leaf):
                    self._target_step(t, leaf)
                t.count(14 * prod(leaf.shape) * leaf.dtype.itemsize, 14)

    def _target_step(self, t: Engine, leaf: Tensor) -> None:
        decompose(t, leaf)
        grad = t.new(low_shape(leaf), leaf.dtype, "mm (projected)")
        saved = t.new(leaf.shape, leaf.dtype, "clone (weight)")
        lent = t.new(low_shape(leaf), leaf.dtype, "clone (projected)")
        del saved  # the old weight goes when the low rank takes its place
        leaf.grad = grad
        del grad
        update = project_back(t, leaf)
        del lent, update


class GaLoreAdafactor(GaLore):
    """Adafactor on the projected gradient, all in fp32."""

    def states(self, leaf: Tensor, is_embedding: bool = False) -> list[State]:
        low: Shape = leaf.shape
        found = []
        if is_target(leaf, is_embedding):
            found = [self._projection(leaf)._replace(dtype=F32)]
            low = low_shape(leaf)
        if len(low) < 2:
            return [*found, State(low, F32)]
        return [*found, State(low[:-1], F32), State((*low[:-2], low[-1]), F32)]

    def _projection(self, leaf: Tensor) -> State:
        rows, columns = leaf.shape  # of an fp32 copy: the whole factor stays
        least = min(rows, columns)
        return State((least, columns) if rows >= columns else (rows, least), F32)

    def step(self, t: Engine, leaves: list[Tensor]) -> None:
        half = any(leaf.dtype is not F32 for leaf in leaves)
        grad = weight = update = None
        with t.recorder.scope("optimizer"):
            for leaf in leaves:
                grad = leaf.grad
                if half:
                    grad = t.new(leaf.shape, F32, "float (gradient)")
                low: Shape = leaf.shape
                if is_target(leaf):
                    decompose(t, leaf, copies=False)
                    low = low_shape(leaf)
                    grad = t.new(low, F32, "mm (projected)")
                weight = t.new(leaf.shape, F32, "float (weight)") if half else None
                squared = t.new(low, F32, "pow")
                update = t.new(low, F32, "add")
                del squared
                if len(low) > 1:
                    update = t.new(low, F32, "mul (approximation)")
                else:
                    update = t.new(low, F32, "rsqrt")
                if is_target(leaf):
                    update = project_back(t, leaf, F32)
                negated = t.new(leaf.shape, F32, "neg")
                del negated
                t.count(30 * prod(leaf.shape) * 4, 30)
        del grad, weight, update


class Apollo(ProjectedAdamW):
    """AdamW on a randomly projected gradient; its growth scales the gradient itself."""

    launches = 24

    def target_states(self, leaf: Tensor) -> list[State]:
        rows, columns = leaf.shape
        tall = rows >= columns
        projection = State((RANK, columns) if tall else (rows, RANK), leaf.dtype)
        low = State((rows, RANK) if tall else (RANK, columns), leaf.dtype)
        return [projection, low, low, State((), leaf.dtype)]

    def project(self, t: Engine, leaf: Tensor) -> Tensor:
        projection, low, *_ = (state.shape for state in self.target_states(leaf))
        matrix = None if leaf.dtype is F32 else t.new(leaf.shape, F32, "float (gradient)")
        drawn = t.new(projection, F32, "randn")
        divided = t.new(projection, F32, "div")
        del drawn, divided, matrix
        return t.new(low, leaf.dtype, "mm (projected)")

    def full_update(self, t: Engine, leaf: Tensor) -> Tensor:
        scaled = t.new(leaf.shape, leaf.dtype, "mul (scaled gradient)")
        limited = t.new(leaf.shape, leaf.dtype, "div (limited)")
        del scaled
        return limited


def low_shape(leaf: Tensor) -> Shape:
    """Of the projected gradient."""
    rows, columns = leaf.shape
    rank = min(RANK, rows, columns)
    return (rows, rank) if rows >= columns else (rank, columns)


def decompose(t: Engine, leaf: Tensor, copies: bool = True) -> None:
    """GaLoreProjector.get_orthogonal_matrix: an fp32 copy of a 16-bit gradient (`copies`: not where
    it is one already), LAPACK's working copy, U, S and Vh, and the half that is not kept."""
    rows, columns = leaf.shape
    least = min(rows, columns)
    rank = min(RANK, least)
    matrix = t.new(leaf.shape, F32, "float") if copies and leaf.dtype is not F32 else None
    working = t.new(leaf.shape, F32, "clone (svd)")
    factors = [t.new(shape, F32, "svd") for shape in ((rows, least), (least,), (least, columns))]
    del working
    diagonal = t.new((rank, rank), F32, "diag")
    other = t.new((rows, rank) if rows >= columns else (rank, columns), F32, "mm (unused)")
    del diagonal
    if matrix is not None:
        kept = t.new((rank, columns) if rows >= columns else (rows, rank), leaf.dtype, "to (kept)")
        del kept
    del other, factors, matrix


def project_back(t: Engine, leaf: Tensor, dtype: object = None) -> Tensor:
    """The update in full, then times the scale."""
    kind = F32 if dtype is F32 else leaf.dtype
    full = t.new(leaf.shape, kind, "mm (projected back)")
    scaled = t.new(leaf.shape, kind, "mul (scale)")
    del full
    return scaled


class GaLoreLayerwise(GaLore):
    """Stepped, and dropped, as soon as a gradient is there."""

    in_backward = True


class GaLore8bitLayerwise(GaLore8bit):
    """As GaLoreLayerwise."""

    in_backward = True


class ApolloLayerwise(Apollo):
    """As GaLoreLayerwise."""

    in_backward = True


RULES: dict[str, type[Optimizer]] = {
    "galore_adamw": GaLore,
    "galore_adamw_8bit": GaLore8bit,
    "galore_adafactor": GaLoreAdafactor,
    "galore_adamw_layerwise": GaLoreLayerwise,
    "galore_adamw_8bit_layerwise": GaLore8bitLayerwise,
    "apollo_adamw": Apollo,
    "apollo_adamw_layerwise": ApolloLayerwise,
}
