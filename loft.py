"""LOFT: low-rank orthogonal fine-tuning.

A frozen weight W0 (out × in) is adapted by a rotation that moves a small subspace of it:

    W = W0 R,    R = I + P (T − I) Pᵀ,    PᵀP = I_r,   TᵀT = I_r          side="input"
    W = R W0,    the same R, with P (out × r)                             side="output"

The **support** P says where to adapt, the **transform** T (r × r, learned) says how. R is
orthogonal for every P and T, is the identity off span(P), and is I at the start. On rows x nothing
of the size of a weight is ever formed:

    z = x P  (n × r),        y = base(x + z (T − I)ᵀ Pᵀ)

Known methods are choices of P and T (d: the rotated dimension, b: a block, m: stages):

    method  support P                   transform T                    parameters     below
    loft    from the new task; psoft's  any, Cayley by default         r(r−1)/2       Skew
    psoft   top singular vectors of W0  Cayley, two scaling vectors    r(r−1)/2 + 2r  Rotation
    oft     all coordinates             Cayley, block by block         d(b−1)/2       Skew
    boft    all coordinates             m butterfly stages of blocks   m d(b−1)/2     Skew
    goft    all coordinates             a tree of plane rotations      d − 1          Givens
    hra     all coordinates             k learned reflections          k d            Householder
    lora    none: W0 + B A, no rotation, for comparison                r(in + out)    LoRA

    loft.adapt(model, rank=32)               # in place: the base is frozen, rotations train
    loft.save(model, "adapter.pt")           # loft.load(model, "adapter.pt")
    loft.merge(model)                        # plain layers again

The order: maps (a skew matrix → T − I), the rotation, the layer; every transform, and the methods;
then functions of a model. The file stands alone on torch ≥ 2.6 and can be copied by itself.
`python loft.py` measures what is promised.
"""
from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import math
import os
import re
import warnings
from functools import partial
from pathlib import Path

if __name__ == "__main__":                               # torch does without it
    warnings.filterwarnings("ignore", "Failed to initialize NumPy")

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

# Makes this file a package: `from loft import selectors` is the file beside it, never Python's own.
__path__ = [str(Path(__file__).parent.absolute())]

SIDES = ("input", "output")

# --------------------------------------------------------------------------------------------------
# Maps: a skew Q (…, b, b) → T − I. The difference, not T: it is exactly 0 at Q = 0, and no digits
# cancel near the identity.

def eye(X):
    """The identity of X's last dimension, on its device and in its dtype."""
    return torch.eye(X.shape[-1], dtype=X.dtype, device=X.device)


def skew(theta, b):
    """Q = U − Uᵀ (…, b, b), U strictly upper and filled, row by row, by theta (…, b(b−1)/2)."""
    i, j = torch.triu_indices(b, b, 1, device=theta.device)
    U = theta.new_zeros(*theta.shape[:-1], b, b)
    U[..., i, j] = theta
    return U - U.mT


def cayley(Q):
    """T − I = 2 Q (I − Q)⁻¹ for T = (I + Q)(I − Q)⁻¹: all rotations without the eigenvalue −1."""
    if Q.ndim > 2 and Q.shape[-1] > 64:                  # torch's batched LU hangs there (#142815)
        return torch.stack([cayley(q) for q in Q])
    return polish(torch.linalg.solve(eye(Q) - Q, 2 * Q, left=False))


def expm(Q):
    """T − I for T = exp(Q): all rotations."""
    return polish(torch.linalg.matrix_exp(Q) - eye(Q))


def cayley_neumann(Q, terms=5):
    """T − I for T ≈ (I + Q)(I + Q + … + Q^(terms−2)) (OFTv2, arXiv 2506.19847): no solve.

    Orthogonal only up to ‖TᵀT − I‖ = O(‖Q‖^(terms−1)), for ‖Q‖ < 1. terms=2: I + 2Q.
    """
    D = Q if terms > 2 else 2 * Q
    for _ in range(terms - 2):                           # terms = 5:  2Q + 2Q² + 2Q³ + Q⁴
        D = 2 * Q + Q @ D
    return D


def polish(D):
    """Restores TᵀT = I, of which a huge Q costs digits: two Newton–Schulz T ← T (I − ½(TᵀT − I)).

    Along the orthogonal group its derivative is the identity, so autograd passes it by.
    """
    X = D.detach()
    for _ in range(2):
        E = X + X.mT + X.mT @ X                          # TᵀT − I, for X = T − I
        X = X - (E + X @ E) / 2
    return D + (X - D.detach())


MAPS = {"cayley": cayley, "expm": expm, "cayley_neumann": cayley_neumann}


# --------------------------------------------------------------------------------------------------
# The rotation and the layer. Every parameter is used inside the forward of the module that owns it:
# hooks that move weights (offloading, sharding) see nothing else.

class Adapter(nn.Module):
    """What is learned: .half() and .bfloat16() move it, and leave its precision."""

    def _apply(self, fn, recurse=True):
        def keep(t):
            new = fn(t)
            return new if new.dtype.itemsize >= 4 else t.to(new.device)
        return super()._apply(keep, recurse)


class Rotation(Adapter):
    """R = I + P (T − I) Pᵀ (d × d), as a map of rows x (…, d) to x Rᵀ.

    Args:
        d: the rotated dimension: in for side="input", out for side="output".
        support: P (d, r) with orthonormal columns, or None: all coordinates (P = I, r = d).
        transform: a name in `TRANSFORMS`; its options follow by keyword.
        scale: PSOFT's vectors α, β, zero at the start (arXiv 2505.11235): T becomes
            diag(1 + β) T diag(1 + α), no longer orthogonal. As a parameter (2, r).
        dtype: of theta and P, float32 or float64.
    ValueError: |PᵀP − I| > 1e-5, a wrong shape, an option that does not fit.
    """

    def __init__(self, d, support=None, transform="cayley", scale=False, dtype=torch.float32,
                 **options):
        super().__init__()
        one_of("transform", transform, TRANSFORMS)
        P = None if support is None else check_support(support, d).to(dtype)
        self.d, self.r = d, d if P is None else P.shape[1]
        self.config = dict(transform=transform, scale=scale, **options)
        self.register_buffer("P", P)
        self.transform = TRANSFORMS[transform](self.r, **options).to(dtype)
        self.scale = nn.Parameter(torch.zeros(2, self.r, dtype=dtype)) if scale else None
        self.orthogonal = self.transform.orthogonal and not scale        # by construction

    def forward(self, x, bias=None):
        """x Rᵀ = x + x P (T − I)ᵀ Pᵀ; around a bias b (d,), (x − b) Rᵀ + b. Autograd keeps x P,
        and x where P is I."""
        u = x if bias is None else x - bias.to(x.dtype)
        if self.P is None:
            return x + self.in_support(u)
        P = self.P.to(x.dtype)
        return x + self.in_support(u @ P) @ P.mT         # (…, d) → (…, r) → (…, d)

    def in_support(self, z):
        """z (T − I)ᵀ for z (…, r), scaling vectors included."""
        if self.scale is None:
            return self.transform(z)
        a, b = self.scale.to(z.dtype)
        h = self.transform(z + z * a)                    # z diag(1 + α) Tᵀ diag(1 + β) − z
        return h + h * b + z * (a + b + a * b)

    def difference(self):
        """T − I (r, r), scaling vectors included."""
        rows = eye(self.transform.theta.new_empty(self.r))
        with torch.autocast(rows.device.type, enabled=False):
            return self.in_support(rows).mT

    def rotate(self, W, side):
        """W R (side="input") or R W ("output") of a weight (out, in), in theta's dtype."""
        W = W.to(self.transform.theta.dtype)
        with torch.autocast(W.device.type, enabled=False):
            if side == "output":
                return self(W.mT).mT                     # (Wᵀ Rᵀ)ᵀ
            D, P = self.difference(), self.P
            return W + (W @ D if P is None else (W @ P) @ D @ P.mT)


class LOFTLinear(nn.Module):
    """A frozen linear layer, rotated: y = base(x Rᵀ), or on the output side (base(x) − b) Rᵀ + b.

    `base` is any module that is affine in its rows and has in_features and out_features, or is
    transformers' Conv1D; quantised ones are rotated on their activations. `weight` reads as the
    merged layer's, for code that never calls forward. magnitude=True also learns output scales.
    """

    enabled = True                                       # False: the base alone
    fused = False                                        # True: kernels.py put its fast twin here

    def __init__(self, base, rotation, side="input", method="loft", magnitude=False):
        super().__init__()
        self.in_features, self.out_features = shape(base)
        self.base, self.rotation, self.side, self.method = base, rotation, side, method
        self.magnitude = Magnitude(rotation, self.out_features) if magnitude else None

    def forward(self, input):
        if not self.enabled:
            if input.requires_grad:      # what is saved of this 1 tells a checkpoint that would
                input = input * input.new_ones(())       # recompute it switched on
            return self.base(input)
        y = self.rotated(input)
        return y if self.magnitude is None else self.magnitude(y, self.bias)

    def rotated(self, x):
        if self.side == "input":
            return self.base(self.rotation(x))           # (x Rᵀ) W0ᵀ + b
        return self.rotation(self.base(x), self.bias)    # (x W0ᵀ) Rᵀ + b

    @property
    def weight(self):
        """The rotated weight, differentiable; W0, if quantised or off."""
        if not (self.enabled and floating(self.base)):
            return self.base.weight
        if torch.compiler.is_compiling():
            return self.compute_weight()
        W0 = self.base.weight                            # meta: no values but the computed ones
        W = torch.empty(W0.shape, dtype=W0.dtype, device="meta").as_subclass(RotatedWeight)
        W.layer = self
        return W

    def compute_weight(self):
        """W0 R or R W0, with magnitudes, in W0's dtype and layout."""
        W = self.rotation.rotate(matrix(self.base), self.side)
        if self.magnitude is not None:
            W = W + self.magnitude.m[:, None] * W                        # diag(1 + m) W
        return (W.mT if hasattr(self, "nf") else W).to(self.base.weight.dtype)

    bias = property(lambda self: getattr(self.base, "bias", None))
    nf = property(lambda self: self.base.nf)             # marks Conv1D, whose weight is transposed

    @property
    def settings(self):
        """All that `wrap` needs to build this layer again, but P."""
        return dict(self.rotation.config, method=self.method, side=self.side,
                    magnitude=self.magnitude is not None)


class RotatedWeight(torch.Tensor):
    """`LOFTLinear.weight`: computed where it is used, and not where its dtype is asked for.

    nn.TransformerEncoder and transformers' T5 read weights of layers at every call.
    """

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function in OF_W0:
            return function(args[0].layer.base.weight)
        args, kwargs = tree_map_only(cls, lambda w: w.layer.compute_weight(), (args, kwargs or {}))
        return function(*args, **kwargs)


OF_W0 = [getattr(torch.Tensor, name).__get__ for name in ("dtype", "device", "shape")]


# --------------------------------------------------------------------------------------------------
# Every transform, magnitude, LoRA; and the methods

class Transform(nn.Module):
    """An orthogonal T (r × r), as a map of rows z (…, r) to z (T − I)ᵀ; I at the start.

    A subclass has `compute`, theta → the small tensors that T is made of, and `act`, which passes
    rows through them. They are computed in float64 (float32 on MPS), whatever the rows' dtype.
    `compute` takes further leading dimensions too: kernels.py stacks the layers of a model there.
    """

    orthogonal = True

    def __init__(self, theta):
        super().__init__()
        self.theta = nn.Parameter(theta)

    def forward(self, z):
        with torch.autocast(z.device.type, enabled=False):
            parts = self.compute(wide(self.theta))
        return self.act(z, *(t.to(z.dtype) for t in parts))


class Skew(Transform):
    """T = T_1 … T_m of blocks b × b, each the map of a skew matrix.

    One block of size r: `cayley`, `expm`, `cayley_neumann`. One stage of r/b blocks: `block` (OFT,
    arXiv 2306.07280, eq. 2). m stages, of which stage s joins half-blocks that lie 2^s half-blocks
    apart: `butterfly` (BOFT, arXiv 2311.06243, eq. 4).
    Options: block_size b, of which b·2^(m−1) divides r (default: the largest, up to `most`);
    stages m; map, a name in `MAPS`; terms of the series; bound of each ‖Q‖_F (COFT's ε, OFTv2's
    norm bound); share one Q between a stage's blocks. theta: (m, r/b or 1, b(b−1)/2), zero.
    """

    def __init__(self, r, /, block_size=None, stages=1, map="cayley", terms=5, bound=None,
                 share=False, most=None):
        halves = 2 ** (stages - 1)
        b = block_size or max(1, math.gcd(r, (most or r) * halves) // halves)
        one_of("map", map, MAPS)
        require(r % (b * halves) == 0 and (b % 2 == 0 or stages == 1), f"block_size={b}, stages="
                f"{stages}: b·2^(m−1) has to divide {r}, b to be even for m > 1")
        require(terms >= 2 and (bound is None or bound > 0), f"terms={terms} must be 2 (I + 2Q) or "
                f"more, bound={bound} positive or None")
        super().__init__(torch.zeros(stages, 1 if share else r // b, b * (b - 1) // 2))
        self.b, self.bound, self.orthogonal = b, bound, map != "cayley_neumann"
        self.map = MAPS[map] if self.orthogonal else partial(cayley_neumann, terms=terms)

    def compute(self, theta):
        Q = skew(theta, self.b)                          # (…, m, r/b or 1, b, b)
        if self.bound:                                   # Q ← Q min(1, bound / ‖Q‖_F)
            square = Q.square().sum((-2, -1), keepdim=True).clamp(min=self.bound ** 2)
            Q = Q * (self.bound * square.rsqrt())        # smooth at Q = 0, which a norm is not
        return self.map(Q),

    def act(self, z, D):
        y = z
        for s in range(len(D) - 1, 0, -1):               # z Tᵀ = z T_mᵀ … T_1ᵀ
            h = y.unflatten(-1, (-1, 2, 2 ** s, self.b // 2)).transpose(-3, -2)
            h = self.by_blocks(h.flatten(-4), D[s])      # a block's two halves, side by side
            h = h.unflatten(-1, (-1, 2 ** s, 2, self.b // 2)).transpose(-3, -2)
            y = y + h.flatten(-4)
        h = self.by_blocks(y, D[0])
        return h if y is z else h + (y - z)

    def by_blocks(self, z, D):
        """z (T_s − I)ᵀ for z (…, r) and the blocks of T_s − I, D (r/b or 1, b, b)."""
        if D.shape[-1] == z.shape[-1]:
            return z @ D[0].mT
        rows = z.unflatten(-1, (-1, D.shape[-1]))        # (…, r/b, b)
        return torch.einsum("...kb,kcb->...kc", rows, D).flatten(-2)


class Givens(Transform):
    """A tree of r − 1 plane rotations, for any r (GOFT, arXiv 2404.04316, eqs. 3 and 4).

    Stage s turns each 2^s-th coordinate with its neighbour among them: row pairs (a, b) G with
    G = [[cos θ, −sin θ], [sin θ, cos θ]]; relaxed=True (qGOFT, eq. 5): any G, which `regularizer`
    keeps near rotations. theta: the angles (r − 1, 1), or G − I (r − 1, 4); zero at the start.
    """

    def __init__(self, r, /, relaxed=False):
        super().__init__(torch.zeros(r - 1, 4 if relaxed else 1))
        self.orthogonal = not relaxed

    def compute(self, theta):
        """The entries of G − I, row by row (…, r − 1, 4), of the finest stage first."""
        if not self.orthogonal:
            return theta,
        c, s = -2 * torch.sin(theta / 2) ** 2, torch.sin(theta)          # cos θ − 1 = −2 sin²(θ/2)
        return torch.cat([c, -s, s, c], -1),

    def act(self, z, D):
        return self.tree(z, D) - z

    def tree(self, y, D):
        """Turns neighbouring pairs of y (…, k), then the tree of their firsts; an odd one waits."""
        n = y.shape[-1] // 2
        if n == 0:
            return y
        a, b = y[..., :2 * n].unflatten(-1, (n, 2)).unbind(-1)
        aa, ab, ba, bb = D[:n].unbind(-1)
        first, second = a + (a * aa + b * ba), b + (a * ab + b * bb)     # (a, b) ← (a, b) G
        first = self.tree(torch.cat([first, y[..., 2 * n:]], -1), D[n:])
        pairs = torch.stack([first[..., :n], second], -1)
        return torch.cat([pairs.flatten(-2), first[..., n:]], -1)

    def regularizer(self):
        """qGOFT's Σ ⟨α, β⟩² over the columns α, β of its G."""
        aa, ab, ba, bb = self.compute(self.theta)[0].unbind(-1)
        return ((1 + aa) * ab + ba * (1 + bb)).square().sum()


class Householder(Transform):
    """T = H_1 … H_k, H_i = I − 2 v_i v_iᵀ, v_i = u_i / ‖u_i‖ (HRA, arXiv 2405.17484, eq. 2).

    In compact WY form T = I − V S⁻¹ Vᵀ, S = ½ I + the strictly upper part of VᵀV (k × k). The u
    come in equal pairs at the start, so T = I; a pair (a, b) is carried as (a, b − a), which makes
    it exact. k is even: an odd product has determinant −1. theta: u (r, k), Gaussian pairs.
    """

    def __init__(self, r, /, reflections=8):
        require(reflections > 0 and reflections % 2 == 0, f"reflections={reflections} must be even"
                " and ≥ 2: an odd product has determinant −1, and cannot start at the identity")
        super().__init__(torch.randn(r, reflections // 2).repeat_interleave(2, dim=1))

    def compute(self, u):
        """V, in pairs (…, r, k), and its S⁻¹ (…, k, k)."""
        V = nn.functional.normalize(u, dim=-2)
        V[..., 1::2] -= V[..., 0::2]                     # (a, b) → (a, b − a)
        pair = torch.arange(V.shape[-1], device=u.device) // 2
        pair = (pair[:, None] == pair).to(V.dtype)
        G = V.mT @ V                                     # S = upper G + ½ diag G + ½ [[0,1],[−1,0]]
        twice_S = G.triu() + G.triu(1) + pair.triu(1) - pair.tril(-1)
        return V, 2 * torch.linalg.inv(twice_S)

    def act(self, z, V, K):
        return -((z @ V) @ K.mT) @ V.mT

    def regularizer(self):
        """HRA's ‖VᵀV − I‖_F², V the unit u's: a large weight makes the reflections commute."""
        V = nn.functional.normalize(self.theta, dim=0)
        return (V.mT @ V - eye(V)).square().sum()


TRANSFORMS = {
    "cayley": Skew,
    "expm": partial(Skew, map="expm"),
    "cayley_neumann": partial(Skew, map="cayley_neumann", bound=0.9),
    "block": partial(Skew, most=32),
    "butterfly": partial(Skew, stages=2, most=8),
    "givens": Givens,
    "householder": Householder,
}


class Magnitude(Adapter):
    """A learned scale of every output but its bias: y (1 + m); m (out,) is zero at the start."""

    def __init__(self, rotation, out):
        super().__init__()
        self.m = nn.Parameter(next(rotation.parameters()).new_zeros(out))

    def forward(self, y, bias):
        return y + (y if bias is None else y - bias.to(y.dtype)) * self.m.to(y.dtype)


class LoRA(Adapter):
    """Rows x to x Aᵀ Bᵀ: A (r, in) Gaussian, B (out, r) zero (arXiv 2106.09685, with α = r)."""

    orthogonal = False

    def __init__(self, d, out, rank=8, dtype=torch.float32):
        super().__init__()
        self.r, self.config = rank, dict(rank=rank)
        self.A = nn.Parameter(torch.randn(rank, d, dtype=dtype) / d ** 0.5)
        self.B = nn.Parameter(torch.zeros(out, rank, dtype=dtype))

    def forward(self, x):
        return (x @ self.A.to(x.dtype).mT) @ self.B.to(x.dtype).mT

    def rotate(self, W, side):
        return W.to(self.A.dtype) + self.B @ self.A


class LoRALinear(LOFTLinear):
    """y = base(x) + x Aᵀ Bᵀ."""

    def rotated(self, x):
        return self.base(x) + self.rotation(x)


METHODS = {  # what `adapt` takes where nothing else is given
    "loft": dict(support="principal", transform="cayley"),                     # arXiv 2605.11872
    "psoft": dict(support="principal", transform="cayley", scale=True),        # arXiv 2505.11235
    "oft": dict(support="all", transform="block"),                # arXiv 2306.07280, 2506.19847
    "boft": dict(support="all", transform="butterfly"),                        # arXiv 2311.06243
    "goft": dict(support="all", transform="givens"),                           # arXiv 2404.04316
    "hra": dict(support="all", transform="householder"),                       # arXiv 2405.17484
    "lora": dict(support=None),                                                # arXiv 2106.09685
}


# --------------------------------------------------------------------------------------------------
# Supports from the weight alone (selectors.py: from data)

def principal(W, r):
    """Top r right singular vectors of W (out, in) → P (in, r), float32 or wider: PSOFT's support.

    Of large weights (min(out, in) > 2048 and > 8 r) by torch.svd_lowrank with six iterations.
    Beyond min(out, in) it goes on into the null space. RuntimeError: W is not finite.
    """
    W, short = W.detach().to(at_least_float32(W)), min(W.shape)
    if short > max(2048, 8 * r):
        return torch.svd_lowrank(W, q=r + 16, niter=6)[2][:, :r].contiguous()
    return torch.linalg.svd(W, full_matrices=r > short)[2][:r].mT.contiguous()


def random(W, r):
    """A uniformly random support of W (out, in) → P (in, r), from torch's CPU generator."""
    X = torch.randn(W.shape[1], r, dtype=at_least_float32(W))
    return torch.linalg.qr(X)[0].to(W.device)


SUPPORTS = {"principal": principal, "random": random}


# --------------------------------------------------------------------------------------------------
# Functions of a model: adapt

def adapt(model, targets=None, *, method="loft", rank=None, support=None, side="input",
          magnitude=False, trainable=(), seed=0, backend="eager", **options):
    """Wraps linear layers of `model` in rotations, in place, and freezes the rest. Outputs stay.

    Args:
        targets: a regex searched in layer names, a list of names or parts of them, or a callable
            (name, module) → bool. Default: a support dict's keys, else all but output heads.
        method: a name in `METHODS`: defaults of support, transform and options.
        rank: default 32, cut to a smaller layer's dimension (with a warning if given); lora's 8.
        support: "principal", "random", "all" (coordinates), a tensor P (d, r), or {layer: P}, as
            `selectors.select` chooses it from data.
        options: transform, a name in `TRANSFORMS`, and its own (block_size, bound, …); scale.
        side: "input" (W0 R) or "output" (R W0). magnitude: also learn a scale of every output.
        trainable: what else trains, a regex or list of parameter names (a new head, say).
        seed: of random supports and reflections. backend: "eager", or "fused" (kernels.py).
    Returns the model (for a bare linear layer, its wrapper). ValueError, TypeError: name the layer,
    the value and what is valid; the model is then as it was.
    """
    one_of("method", method, METHODS)
    one_of("side", side, SIDES)
    one_of("backend", backend, ("eager", "fused"))
    require(not layers(model), "the model is adapted already: loft.merge it first")
    kernels = backend == "fused" and beside("kernels")
    config = METHODS[method] | options
    default = config.pop("support")
    support = default if support is None else support
    if method == "lora":
        config["rank"] = rank or 8
    require(rank is None or isinstance(support, str | None),
            f"rank={rank}, but a support given as tensors has its own: leave it out")
    by_layer = isinstance(support, dict)
    found = target_layers(model, support if by_layer and targets is None else targets)
    supports = support if by_layer else dict.fromkeys(found, support)
    require(found.keys() == supports.keys(), "not both a linear layer among the targets and one "
            f"with a support: {', '.join(sorted(found.keys() ^ supports.keys()))}")
    parameters = plain_parameters(model)
    keep = matches("trainable", trainable or [], parameters)

    new = {}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(seed)        # the CPU's alone
        for n, base in found.items():
            with naming(n):
                P = supports[n]
                if isinstance(P, str):
                    P = own_support(base, side, P, rank)
                new[base] = wrap(base, P, method=method, side=side, magnitude=magnitude, **config)
    small = [n for n, base in found.items() if rank and new[base].rotation.r < rank]
    if small:
        warnings.warn(f"rank={rank} exceeds the dimension, which is taken, of {', '.join(small)}")
    warn_of_frozen(parameters, keep, found)
    model.requires_grad_(False)                          # from here on nothing fails
    for n in keep:
        parameters[n].requires_grad_(True)
    model = replace(model, new)
    return kernels.fuse(model) if kernels else model


def warn_of_frozen(parameters, trained, adapted):
    """Says once what one may have meant to train: new heads, experts kept in three dimensions."""
    new = HEADS - {"lm_head"}
    left = [n for n, p in parameters.items() if (p.ndim == 3 or new & {*n.split(".")})
            and n not in trained and n.rpartition(".")[0] not in adapted]
    if left:
        part, whole = (sum(parameters[n].numel() for n in names) for names in (left, parameters))
        warnings.warn(f"frozen, and not adapted: {part:,} of {whole:,} parameters, in "
                      f"{', '.join(left)}; trainable= names what is to train")


def own_support(base, side, name, r):
    """The support called `name` of one layer, P (d, r), or None: all coordinates."""
    if name == "all":
        require(r is None, f"rank={r} means nothing to all coordinates: the transform's options "
                "(block_size, stages, reflections) set its size")
        return None
    require(name in SUPPORTS, f"support={name!r} is none of principal, random, all, a tensor, a "
            "dict of tensors; from data: P = selectors.select(model, batches, loss_fn, rank), then "
            "adapt(model, support=P)")
    r = 32 if r is None else r
    require(isinstance(r, int) and r >= 1, f"rank={r} must be an int ≥ 1")
    readable = floating(base)
    require(readable or name == "random", f"support={name!r} is of the weight, which cannot be read"
            ": give a tensor, or 'random'")
    W = matrix(base) if readable else torch.empty(1).expand(shape(base)[::-1])
    W = W if side == "input" else W.mT                   # (…, d)
    return SUPPORTS[name](W, min(r, W.shape[1]))


def wrap(base, P, *, method, side, magnitude, **config):
    """One layer, rotated: in its weight's precision (float32 at least), on its device."""
    tensors = [*base.parameters(), *base.buffers(), torch.zeros(())]
    require(not tensors[0].is_meta, "it is on the meta device: give the model its weights first")
    config["dtype"] = at_least_float32(base.weight) if floating(base) else torch.float32
    if method == "lora":
        require(P is None and side == "input", "lora has no support and no side")
        kind, adapter = LoRALinear, LoRA(*shape(base), **config)
    else:
        kind, adapter = LOFTLinear, Rotation(shape(base)[SIDES.index(side)], P, **config)
    require(next(adapter.parameters()).numel(), f"rank {adapter.r} leaves nothing to train")
    return kind(base, adapter.to(tensors[0].device), side, method, magnitude)


def check_support(P, d):
    """A copy of a valid support; otherwise a ValueError."""
    require(P.ndim == 2 and len(P) == d >= P.shape[1] > 0,
            f"the support has shape {tuple(P.shape)}, expected ({d}, r) with r ≤ {d}")
    gram = wide(P).mT @ wide(P)
    error = (gram - eye(gram)).abs().max().item()
    require(error <= 1e-5, f"the support is not orthonormal: |PᵀP − I| = {error:.1e} > 1e-5; take "
            "torch.linalg.qr(P.float())[0]")
    return P.detach().clone()


def target_layers(model, targets=None):
    """{name: linear layer} that `targets` means (see `adapt`), or a dict has as its keys; one in
    two places counts once.

    Linear is what has in_features and out_features, and Conv1D. Default: all but output heads,
    which are get_output_embeddings(), share an embedding's weight, or are called one of `HEADS`.
    ValueError: nothing matches.
    """
    linear = {n: m for n, m in modules(model).items() if shape(m)}
    if targets is None:
        heads = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        heads.add(id(getattr(model, "get_output_embeddings", lambda: None)()))
        names = [n for n, m in linear.items() if n.split(".")[-1] not in HEADS
                 and not heads & {id(m), id(getattr(m, "weight", m))}]
    elif callable(targets):
        names = [n for n, m in linear.items() if targets(n, m)]
    elif isinstance(targets, dict):
        for n in targets:
            one_of("layer", n, linear)
        names = [n for n in linear if n in targets]
    else:
        names = matches("targets", targets, linear)
    require(names, f"no layer to adapt among the linear ones, {', '.join(linear)}: name targets")
    return {n: linear[n] for n in names}


def layers(model):
    """{name in the plain model: layer} of every adapted layer."""
    return {n: m for n, m in modules(model).items() if isinstance(m, LOFTLinear)}


# --------------------------------------------------------------------------------------------------
# Functions of a model: merge, switch off, measure

@torch.no_grad()
def merge(model):
    """Folds the rotations into the weights, in place: plain layers again, still frozen.

    In float32 or wider, so merged equals adapted to rounding in the weight's dtype. A weight shared
    with another layer is left to that one. ValueError: names the layer that cannot be merged; the
    model is then as it was.
    """
    weights = rotated_weights(model)
    if any(layer.fused for layer in weights):
        beside("kernels").unfuse(model)
    for layer, W in weights.items():
        layer.base.weight = nn.Parameter(W, requires_grad=False)
    return replace(model, {layer: layer.base for layer in weights})


@contextlib.contextmanager
def merged(model):
    """`with loft.merged(model):` is as fast as the plain model; weights come back bit for bit."""
    weights = rotated_weights(model)
    with disabled(model), contextlib.ExitStack() as after:
        for layer, W in weights.items():
            after.callback(setattr, layer.base, "weight", layer.base.weight)
            layer.base.weight = nn.Parameter(W, requires_grad=False)
        yield model


@contextlib.contextmanager
def disabled(model):
    """`with loft.disabled(model):` is the model before adaptation, a reference model say; but what
    `trainable` named stays as it is.

    In every thread. A checkpoint that it began, or ended, in the middle of raises CheckpointError
    in backward; a reentrant one cannot tell: keep its backward in the same state.
    """
    with contextlib.ExitStack() as after:
        for layer in adapted(model).values():
            after.callback(setattr, layer, "enabled", layer.enabled)
            layer.enabled = False
        yield model


@torch.no_grad()
def rotated_weights(model):
    """{layer: its rotated weight}; ValueError where there is none, or it is not finite or off."""
    weights = {}
    for n, layer in adapted(model).items():
        require(layer.enabled, f"layer {n!r} is switched off: leave `disabled` or `merged` first")
        own = type(layer.base._parameters.get("weight")) is nn.Parameter
        require(own and floating(layer.base), f"layer {n!r}: no floating weight of its own to merge"
                f" into: a {type(layer.base).__name__}, quantised, in shards, or computed anew")
        weights[layer] = W = layer.compute_weight()
        require(W.isfinite().all(), f"layer {n!r}: its rotated weight is not finite")
    return weights


@torch.no_grad()
def orthogonality_error(model):
    """{layer: max |RᵀR − I| on its support, in float64}; not of lora.

    With D = T − I, Pᵀ(RᵀR − I)P = D + Dᵀ + (PD)ᵀ(PD).
    """
    errors = {}
    for n, layer in adapted(model).items():
        if layer.method != "lora":
            R = layer.rotation
            D = R.difference().double()
            PD = D if R.P is None else R.P.double() @ D
            errors[n] = (D + D.mT + PD.mT @ PD).abs().max().item()
    return errors


def regularizer(model):
    """The papers' soft orthogonality (HRA, qGOFT), summed, to add to the loss; 0 for the others."""
    return sum(m.regularizer() for m in model.modules() if hasattr(m, "regularizer"))


def check(model, batch, loss_fn):
    """{layer: what is wrong with it}; empty where all get a finite gradient and are orthogonal.

    loss_fn(model, batch) → scalar is the loss of training, as in `selectors.select`.
    """
    wrong, errors, loss, grads = {}, orthogonality_error(model), loss_fn(model, batch), ()
    learned = [p for m in layers(model).values() for p in m.parameters() if p.requires_grad]
    if learned and loss.requires_grad:
        grads = torch.autograd.grad(loss, learned, allow_unused=True)
    grads = dict(zip(learned, grads))
    for n, layer in layers(model).items():
        own = [grads.get(p) for p in layer.parameters() if p.requires_grad] or [None]
        if any(g is None for g in own):
            wrong[n] = "no gradient reaches it: bypassed, frozen, or not used for this batch"
        elif not all(g.isfinite().all() for g in own):
            wrong[n] = "its gradient is not finite"
        elif layer.rotation.orthogonal and not errors[n] <= 1e-5:
            wrong[n] = f"|RᵀR − I| = {errors[n]:.0e}"
    return wrong


# --------------------------------------------------------------------------------------------------
# Functions of a model: files

FORMAT = "loft 2"


def save(model, path):
    """Writes the adapter (P itself, theta, settings) and what else trains to `path`.

    All or nothing: written beside `path`, then moved over it; folders are made. The file is
    torch.save's, with the SHA-256 of its bytes at the end.
    """
    path, buffer = Path(path), io.BytesIO()
    torch.save(payload(model), buffer)
    data = buffer.getvalue()
    path.parent.mkdir(parents=True, exist_ok=True)
    beside_it = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    beside_it.write_bytes(data + hashlib.sha256(data).digest())
    beside_it.replace(path)


def load(model, path):
    """Puts the adapter at `path` on `model`, or into the one that it has, which must agree.

    No code in the file is run. ValueError, before the model is touched: names the layer, shape or
    setting that differs, or says that the file is no adapter, or damaged.
    """
    data = Path(path).read_bytes()
    require(hashlib.sha256(data[:-32]).digest() == data[-32:],
            f"{path} is damaged, or no LOFT adapter")
    found = torch.load(io.BytesIO(data[:-32]), map_location="cpu", weights_only=True)
    require(found["format"] == FORMAT, f"{path} is of format {found['format']!r}, not {FORMAT!r}")
    return attach(model, found)


def payload(model):
    """What `save` writes: settings of the layers, and tensors by their names in the plain model."""
    found = adapted(model)
    trained = {n: p for n, p in plain_parameters(model).items() if p.requires_grad}
    state = {n: t.detach().cpu() for n, t in (trained | adapter_state(found)).items()}
    return dict(format=FORMAT, layers={n: m.settings for n, m in found.items()}, state=state)


def attach(model, found):
    """Puts a `payload` on the model, or into its adapter: all of it, or ValueError and nothing."""
    there, new, state, old = modules(model), {}, found["state"], layers(model)
    has = {n: layer.settings for n, layer in old.items()}
    if has:
        for n in has | found["layers"]:
            a, b = found["layers"].get(n), has.get(n)
            require(a == b, f"layer {n!r}: {a} in the file, {b} in the model")
    for n, settings in found["layers"].items():
        with naming(n), torch.random.fork_rng(devices=[]):
            require(n in there and shape(there[n]), "the model has no such linear layer")
            P = state.get(f"{n}.rotation.P".lstrip("."))
            new[n] = old.get(n) or wrap(there[n], P, **settings)
    adapters = adapter_state(new)
    own = plain_parameters(model) | adapters
    for n in adapters | state:
        has, wants = (getattr(tensors.get(n), "shape", None) for tensors in (own, state))
        require(has == wants, f"{n!r} is {wants} in the file, {has} in the model")

    if not old:
        model.requires_grad_(False)
        model = replace(model, {there[n]: layer for n, layer in new.items()})
    with torch.no_grad():
        for n, value in state.items():                   # in place, for optimizers that hold them
            own[n].copy_(value).requires_grad_(True)
    return model


def adapter_state(found):
    """{name: tensor} of all that the layers {name: layer} learn, and of P."""
    return {f"{n}.{k}".lstrip("."): t for n, layer in found.items()
            for k, t in layer.state_dict().items() if not k.startswith("base.")}


# --------------------------------------------------------------------------------------------------
# Names and shapes

WRAPPERS = {"module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}
HEADS = {"lm_head", "head", "classifier", "score"}


def modules(model):
    """{name: module} as in the plain model: no wrapper's name, nothing inside an adapted layer."""
    found, inside = {}, set()
    for name, module in model.named_modules():
        if module not in inside:
            found[".".join(part for part in name.split(".") if part not in WRAPPERS)] = module
        if isinstance(module, LOFTLinear):
            inside.update(module.modules())
    return found


def plain_parameters(model):
    """{name as in the plain model: parameter} of all but adapters; tied ones by each name."""
    found = {}
    for name, module in modules(model).items():
        inner = isinstance(module, LOFTLinear)
        for key, p in (module.base if inner else module).named_parameters(recurse=inner):
            found[f"{name}.{key}".lstrip(".")] = p
    return found


def matches(what, wanted, names):
    """The names that a regex finds, or a list means: entries are one or more parts of a name."""
    entries = [wanted] if isinstance(wanted, str) else wanted

    def hit(entry, name):
        return re.search(entry, name) if entry is wanted else f".{entry}." in f".{name}."

    for e in entries:
        require(any(hit(e, n) for n in names), f"{what}: {e!r} is in none of {list(names)[:8]}, …")
    return [n for n in names if any(hit(e, n) for e in entries)]


def replace(model, new):
    """Puts new[m] in every place where module m stands; returns the model, or what replaces it."""
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            parent._modules[key] = new.get(child, child)
    return new.get(model, model)


def adapted(model):
    found = layers(model)
    require(found, "the model is not adapted: call loft.adapt or loft.load first")
    return found


def floating(module):
    """Whether its weight can be computed with: not quantised, 8-bit, or a foreign tensor."""
    weight = getattr(module, "weight", None)
    foreign = hasattr(weight, "__tensor_flatten__") and not hasattr(weight, "full_tensor")
    numbers = torch.is_tensor(weight) and not foreign
    return numbers and weight.dtype.is_floating_point and weight.dtype.itemsize > 1


def shape(module):
    """(in, out) of a linear layer; None of what is not one."""
    features = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if None not in features:
        return features
    return tuple(module.weight.shape) if hasattr(module, "nf") and floating(module) else None


def matrix(module):
    """The weight as (out, in); a DTensor's (FSDP2, tensor parallel), from all its shards."""
    W = module.weight
    W = W.full_tensor() if hasattr(W, "full_tensor") else W
    return W.mT if hasattr(module, "nf") else W


def wide(x):
    return x.float() if x.is_mps else x.double()


def at_least_float32(x):
    return torch.promote_types(x.dtype, torch.float32)


def beside(name):
    """The file of that name beside this one, imported when it is needed."""
    return importlib.import_module(f"{__name__}.{name}")


def require(condition, otherwise):
    if not condition:
        raise ValueError(otherwise)


def one_of(what, value, valid):
    require(value in valid, f"unknown {what} {value!r}; valid: {', '.join(valid)}")


@contextlib.contextmanager
def naming(name):
    """Errors inside say which layer they are about."""
    try:
        yield
    except (ValueError, TypeError, RuntimeError) as e:
        raise type(e)(f"layer {name!r}: {e}") from None


# --------------------------------------------------------------------------------------------------
# What is promised, measured: `python loft.py`

def demo():
    base, x = nn.Linear(64, 96).double(), torch.randn(32, 64).double()
    print("method  parameters  at start  |RᵀR − I|  |σ(W) − σ(W0)|  |merged − adapted|")
    for method in METHODS:
        before, sigma = base(x), torch.linalg.svdvals(base.weight)
        layer = adapt(base, method=method)
        start, theta = (layer(x) - before).abs().max(), list(layer.rotation.parameters())
        for p in theta:
            nn.init.normal_(p, std=0.3)
        y, error = layer(x), orthogonality_error(layer).get("", math.nan)
        base = merge(layer)
        print(f"{method:6}{sum(p.numel() for p in theta):12}{start:10.0e}{error:11.0e}"
              f"{(torch.linalg.svdvals(base.weight) - sigma).abs().max():16.0e}"
              f"{(base(x) - y).abs().max():20.0e}")
    if os.path.exists(f"{__path__[0]}/selectors.py"):
        beside("selectors").demo()


if __name__ == "__main__":
    demo()
