"""LOFT: low-rank orthogonal fine-tuning.

A frozen weight W0 (out × in) is adapted by a rotation that moves a small subspace of it:

    W = W0 R,    R = I + P (T − I) Pᵀ,    PᵀP = I_r,   TᵀT = I_r          side="input"
    W = R W0,    the same R, with P (out × r)                             side="output"

The **support** P says where to adapt, the **transform** T (r × r, learned) says how. R is orthogonal
for every P and T, is the identity off span(P), and is I at the start. On rows x nothing of the size
of a weight is ever formed:

    z = x P  (n × r),        y = base(x + z (T − I)ᵀ Pᵀ)

Known methods are choices of P and T (d: the rotated dimension, b: a block, m: stages):

    method  support P                   transform T                    parameters     below
    loft    chosen from the new task    any, Cayley by default         r(r−1)/2       Skew
    psoft   top singular vectors of W0  Cayley, two scaling vectors    r(r−1)/2 + 2r  Rotation
    oft     all coordinates             Cayley, block by block         d(b−1)/2       Skew
    boft    all coordinates             m butterfly stages of blocks   m d(b−1)/2     Butterfly
    goft    all coordinates             a tree of plane rotations      d − 1          Givens
    hra     span of learned u_1 … u_k   k reflections                  k d            Householder
    lora    none: W0 + B A, no rotation, for comparison                r(in + out)    LoRA

    model = loft.adapt(model, rank=32)       # in place: the base is frozen, rotations train
    loft.save(model, "adapter.pt")           # loft.load(model, "adapter.pt")
    model = loft.merge(model)                # plain layers again

The file reads from leaf to root: maps (a skew matrix → T − I), transform, rotation, layer; then the
other transforms and the methods; then functions of a model. It stands alone on torch ≥ 2.6 and can be
copied by itself. `python loft.py` measures what is promised.
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

import torch
from torch import Tensor, nn

# Makes this file a package: `from loft import selectors` is the file beside it, never Python's own.
__path__ = [os.path.dirname(os.path.abspath(__file__))]

SIDES = ("input", "output")


# ---------------------------------------------------------------------------------------------------
# Maps: a skew Q (…, b, b) → T − I. The difference, not T: it is exactly 0 at Q = 0, and no digits
# cancel near the identity.

def eye(X: Tensor) -> Tensor:
    """The identity of X's last dimension, on its device and in its dtype."""
    return torch.eye(X.shape[-1], dtype=X.dtype, device=X.device)


def skew(theta: Tensor, b: int) -> Tensor:
    """Q = U − Uᵀ (…, b, b), U strictly upper and filled, row by row, by theta (…, b(b−1)/2)."""
    i, j = torch.triu_indices(b, b, 1, device=theta.device)
    U = theta.new_zeros(*theta.shape[:-1], b, b)
    U[..., i, j] = theta
    return U - U.mT


def cayley(Q: Tensor) -> Tensor:
    """T − I = 2 Q (I − Q)⁻¹ for T = (I + Q)(I − Q)⁻¹: all rotations without the eigenvalue −1."""
    if Q.ndim > 2 and Q.shape[-1] > 64 and Q.device.type == "cpu":
        return torch.stack([cayley(q) for q in Q])       # torch's batched LU hangs there (#142815)
    return polish(torch.linalg.solve(eye(Q) - Q, 2 * Q, left=False))


def expm(Q: Tensor) -> Tensor:
    """T − I for T = exp(Q): all rotations."""
    return polish(torch.linalg.matrix_exp(Q) - eye(Q))


def cayley_neumann(Q: Tensor, terms: int = 5) -> Tensor:
    """T − I for T ≈ (I + Q)(I + Q + … + Q^(terms−2)) (OFTv2, arXiv 2506.19847): no solve.

    Orthogonal only up to ‖TᵀT − I‖ = O(‖Q‖^(terms−1)), for ‖Q‖ < 1.
    """
    power, D = Q, 2 * Q
    for k in range(2, terms):                            # terms = 5:  2Q + 2Q² + 2Q³ + Q⁴
        power = power @ Q
        D = D + (2 if k < terms - 1 else 1) * power
    return D


def polish(D: Tensor) -> Tensor:
    """TᵀT = I restored, of which a huge Q costs digits: Newton–Schulz T ← T (I − ½(TᵀT − I)), twice.

    Along the orthogonal group its derivative is the identity, so autograd passes it by.
    """
    X = D.detach()
    for _ in range(2):
        E = X + X.mT + X.mT @ X                          # TᵀT − I, for X = T − I
        X = X - (E + X @ E) / 2
    return D + (X - D.detach())


MAPS = {"cayley": cayley, "expm": expm, "cayley_neumann": cayley_neumann}


# ---------------------------------------------------------------------------------------------------
# Transform, rotation, layer. Every parameter is used inside the forward of the module that owns it:
# hooks that move weights (offloading, sharding) see nothing else.

class Transform(nn.Module):
    """An orthogonal T (r × r), as a map of rows z (…, r) to z (T − I)ᵀ; I at the start.

    A subclass has `compute`, from theta the small tensors that T is made of, and `act`, which passes
    rows through them. They are computed in float64 (float32 on MPS), and kept in float32 at least.
    """

    orthogonal = True

    def __init__(self, r: int, theta: Tensor):
        super().__init__()
        self.r, self.theta = r, nn.Parameter(theta)

    def forward(self, z: Tensor) -> Tensor:
        return self.act(z, *(t.to(z.dtype) for t in self.factors()))

    def factors(self) -> tuple[Tensor, ...]:
        with torch.autocast(self.theta.device.type, enabled=False):
            parts = self.compute(wide(self.theta))
        return tuple(t.to(at_least_float32(self.theta)) for t in parts)

    def regularizer(self):
        return 0.0


class Skew(Transform):
    """T of blocks b × b, each the map of a skew matrix: one block (`cayley`, `expm`, `cayley_neumann`)
    or r/b of them (`block`: OFT, arXiv 2306.07280, eq. 2).

    Options: block_size b, a divisor of r (default r); map, a name in `MAPS`; terms of the series;
    bound of each ‖Q‖_F (COFT's ε, OFTv2's norm bound); share one Q between all blocks.
    theta: (1, r/b or 1, b(b−1)/2), zero at the start.
    """

    def __init__(self, r, block_size=None, map="cayley", terms=5, bound=None, share=False, stages=1):
        b = block_size or r
        one_of("map", map, MAPS)
        require(r % b == 0, f"block_size={b} does not divide {r}; {math.gcd(b, r)} does")
        require(terms >= 2, f"terms={terms}: the series has 2 at least, I + 2Q")
        require(bound is None or bound > 0, f"bound={bound} must be positive, or None")
        super().__init__(r, torch.zeros(stages, 1 if share else r // b, b * (b - 1) // 2))
        self.b, self.bound, self.orthogonal = b, bound, map != "cayley_neumann"
        self.map = MAPS[map] if self.orthogonal else partial(cayley_neumann, terms=terms)

    def compute(self, theta):
        Q = skew(theta, self.b)                          # (…, stages, r/b or 1, b, b)
        if self.bound:                                   # Q ← Q min(1, bound / ‖Q‖_F)
            square = Q.square().sum((-2, -1), keepdim=True).clamp(min=self.bound ** 2)
            Q = Q * (self.bound * square.rsqrt())
        return self.map(Q),

    def act(self, z, D):
        return self.by_blocks(z, D[0])

    def by_blocks(self, z, D):
        """z (T − I)ᵀ for z (…, r) and the blocks of T − I, D (r/b or 1, b, b)."""
        if self.b == self.r:
            return z @ D[0].mT
        rows = z.unflatten(-1, (-1, self.b))             # (…, r/b, b)
        return torch.einsum("...kb,kcb->...kc", rows, D.expand(rows.shape[-2], -1, -1)).flatten(-2)


class Adapter(nn.Module):
    """What is learned: .half() and .bfloat16() move it, and leave its precision."""

    def _apply(self, fn, recurse=True):
        def keep(t):
            new = fn(t)
            return t.to(new.device) if new.dtype in (torch.float16, torch.bfloat16) else new
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

    def __init__(self, d: int, support: Tensor | None = None, transform: str = "cayley",
                 scale: bool = False, dtype: torch.dtype = torch.float32, **options):
        super().__init__()
        one_of("transform", transform, TRANSFORMS)
        P = None if support is None else check_support(support, d).to(dtype)
        self.d, self.r = d, d if P is None else P.shape[1]
        self.config = dict(transform=transform, scale=scale, **options)
        self.register_buffer("P", P)
        self.transform = TRANSFORMS[transform](self.r, **options).to(dtype)
        self.scale = nn.Parameter(torch.zeros(2, self.r, dtype=dtype)) if scale else None

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x Rᵀ = x + x P (T − I)ᵀ Pᵀ; around a bias b (d,), (x − b) Rᵀ + b. Autograd keeps x P."""
        u = x if bias is None else x - bias.to(x.dtype)
        if self.P is None:
            return x + self.in_support(u)
        P = self.P.to(x.dtype)
        return x + self.in_support(u @ P) @ P.mT         # (…, d) → (…, r) → (…, d)

    def in_support(self, z):
        """z (T − I)ᵀ for z (…, r), scaling vectors included."""
        if self.scale is None:
            return self.transform(z)
        a, b = self.scale
        h = self.transform(z + z * a.to(z.dtype))
        return h + h * b.to(z.dtype) + z * (a + b + a * b).to(z.dtype)

    def difference(self) -> Tensor:
        """T − I (r, r), scaling vectors included."""
        rows = eye(self.transform.theta.new_empty(self.r))
        with torch.autocast(rows.device.type, enabled=False):
            return self.in_support(rows).mT

    def rotate(self, W: Tensor, side: str) -> Tensor:
        """W R (side="input") or R W ("output") of a weight (out, in), in theta's dtype."""
        D, P = self.difference(), self.P
        W = W.to(D.dtype)
        with torch.autocast(W.device.type, enabled=False):
            if side == "output":
                return self(W.mT).mT                     # (Wᵀ Rᵀ)ᵀ
            return W + (W @ D if P is None else (W @ P) @ D @ P.mT)

    @property
    def orthogonal(self) -> bool:
        """Whether R is so by construction."""
        return self.scale is None and self.transform.orthogonal

    @torch.no_grad()
    def orthogonality_error(self) -> float:
        """max |RᵀR − I| on the support, in float64: D + Dᵀ + (PD)ᵀ(PD) with D = T − I."""
        D = self.difference().double()
        PD = D if self.P is None else self.P.double() @ D
        return (D + D.mT + PD.mT @ PD).abs().max().item()


class LOFTLinear(nn.Module):
    """A frozen linear layer, rotated: y = base(x Rᵀ) on the input side, base(x) Rᵀ on the output.

    `base` is any module that is affine in its rows and has in_features and out_features, or is
    transformers' Conv1D; a quantised one is rotated on its activations. `weight` and `bias` read as
    the merged layer's, for code that takes them and never calls forward. magnitude=True also learns
    a scale of every output.
    """

    fused = False                                        # True: kernels.py has its fast twin in place

    def __init__(self, base: nn.Module, rotation: nn.Module, side: str = "input",
                 method: str = "loft", magnitude: bool = False):
        super().__init__()
        self.in_features, self.out_features = shape(base)
        self.base, self.rotation, self.side, self.method = base, rotation, side, method
        self.magnitude = Magnitude(next(rotation.parameters()), self.out_features) if magnitude else None
        self.enabled = True

    def forward(self, input: Tensor) -> Tensor:
        if not self.enabled:
            return self.base(input)
        y = self.rotated(input)
        return y if self.magnitude is None else self.magnitude(y, self.bias)

    def rotated(self, x):
        if self.side == "input":
            return self.base(self.rotation(x))           # (x Rᵀ) W0ᵀ + b
        return self.rotation(self.base(x), self.bias)    # (x W0ᵀ) Rᵀ + b

    @property
    def weight(self) -> Tensor:
        """The rotated weight in W0's dtype and layout, differentiable."""
        if not (self.enabled and floating(self.base)):
            return self.base.weight
        W = self.rotation.rotate(matrix(self.base), self.side)           # W0 R or R W0
        if self.magnitude is not None:
            W = W + self.magnitude.m[:, None] * W                        # diag(1 + m) W
        return (W.mT if hasattr(self, "nf") else W).to(self.base.weight.dtype)

    bias = property(lambda self: getattr(self.base, "bias", None))
    nf = property(lambda self: self.base.nf)             # marks Conv1D, whose weight is transposed

    @property
    def mergeable(self) -> bool:
        """Whether the base keeps a floating weight as a parameter of its own."""
        return floating(self.base) and "weight" in self.base._parameters

    def adapter_state(self):
        """Everything in state_dict() but the base layer."""
        return {k: v for k, v in self.state_dict().items() if not k.startswith("base.")}

    def spec(self):
        """All that builds this layer again on its base: (in, out), the arguments of `wrap`, the state."""
        settings = dict(method=self.method, side=self.side, magnitude=self.magnitude is not None)
        state = {k: v.cpu() for k, v in self.adapter_state().items()}
        return dict(shape=shape(self), settings=settings | self.rotation.config, state=state)


# ---------------------------------------------------------------------------------------------------
# The other transforms, magnitude, LoRA; and the methods

class Butterfly(Skew):
    """T = T_1 … T_m, where stage s joins half-blocks that lie 2^s half-blocks apart (BOFT, 2311.06243).

    Options as in `Skew`; block_size b is even and b·2^(m−1) divides r. theta: (m, r/b or 1, b(b−1)/2).
    """

    def __init__(self, r, block_size=None, stages=2, **options):
        halves = 2 ** (stages - 1)
        b = block_size or max((b for b in (2, 4, 6, 8) if r % (b * halves) == 0), default=2)
        require(stages > 0 and b % 2 == 0 and r % (b * halves) == 0, f"stages={stages}, block_size={b}: "
                f"b·2^(stages−1) has to divide {r}, and b to be even; take fewer stages")
        super().__init__(r, b, stages=stages, **options)

    def act(self, z, D):
        y = z
        for s in reversed(range(len(D))):                # z Tᵀ = z T_mᵀ … T_1ᵀ
            apart = (2, 2 ** s, self.b // 2) if s else (1, 1, self.b)
            y = y.unflatten(-1, (-1, *apart)).transpose(-3, -2)          # a block's halves side by side
            y = y + self.by_blocks(y.flatten(-4), D[s]).view(y.shape)
            y = y.transpose(-3, -2).flatten(-4)
        return y - z


class Givens(Transform):
    """A tree of r − 1 plane rotations, for any r (GOFT, arXiv 2404.04316, eqs. 3 and 4).

    Stage s turns each 2^s-th coordinate with its neighbour among them: row pairs (a, b) G with
    G = [[cos θ, −sin θ], [sin θ, cos θ]]; relaxed=True (qGOFT, eq. 5): any G, which `regularizer`
    keeps near rotations. theta: the angles (r − 1, 1), or G − I (r − 1, 4); zero at the start.
    """

    def __init__(self, r, relaxed=False):
        super().__init__(r, torch.zeros(r - 1, 4 if relaxed else 1))
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
        a, b, rest = y[..., 0:2 * n:2], y[..., 1:2 * n:2], y[..., 2 * n:]
        aa, ab, ba, bb = D[:n].unbind(-1)
        first, second = a + (a * aa + b * ba), b + (a * ab + b * bb)     # (a, b) ← (a, b) G
        first = self.tree(torch.cat([first, rest], -1), D[n:])
        return torch.cat([torch.stack([first[..., :n], second], -1).flatten(-2), first[..., n:]], -1)

    def regularizer(self):
        """qGOFT's Σ ⟨α, β⟩² over the columns α, β of its G."""
        aa, ab, ba, bb = self.factors()[0].unbind(-1)
        return ((1 + aa) * ab + ba * (1 + bb)).square().sum()


class Householder(Transform):
    """T = H_1 … H_k, H_i = I − 2 v_i v_iᵀ, v_i = u_i / ‖u_i‖ (HRA, arXiv 2405.17484, eq. 2).

    In compact WY form T = I − V S⁻¹ Vᵀ, S = ½ I + the strictly upper part of VᵀV (k × k). The u come
    in equal pairs at the start, so T = I; a pair (a, b) is carried as (a, b − a), which makes it
    exact. k is even: an odd product has determinant −1. theta: u (r, k), Gaussian pairs.
    """

    def __init__(self, r, reflections=8):
        k = reflections
        require(isinstance(k, int) and k >= 2 and k % 2 == 0, f"reflections={k} must be even and ≥ 2: "
                "an odd product has determinant −1, and cannot start at the identity")
        super().__init__(r, torch.randn(r, k // 2).repeat_interleave(2, dim=1))

    def compute(self, u):
        """V (…, r, k) and S⁻¹ (…, k, k)."""
        v = nn.functional.normalize(u, dim=-2)
        a, b = v[..., 0::2], v[..., 1::2]
        V = torch.stack([a, b - a], -1).flatten(-2)
        G = V.mT @ V                                     # S = upper(G) + ½ diag(G) + ½ [[0, 1], [−1, 0]]
        half = (torch.arange(1, G.shape[-1], device=u.device) % 2 / 2).to(G.dtype)
        pairs = torch.diag(half, 1) - torch.diag(half, -1)
        return V, torch.linalg.inv((G.triu() + G.triu(1)) / 2 + pairs)

    def act(self, z, V, K):
        return -((z @ V) @ K.mT) @ V.mT

    def regularizer(self):
        """HRA's ‖VᵀV − I‖_F², V the unit u's: a large weight on it makes the reflections commute."""
        V = nn.functional.normalize(self.theta, dim=0)
        return (V.mT @ V - eye(V)).square().sum()


def block(r, block_size=None, **options):
    """`Skew` in blocks: of 32, or of the next smaller divisor of r."""
    return Skew(r, block_size or max(b for b in range(1, 33) if r % b == 0), **options)


TRANSFORMS = {
    "cayley": partial(Skew, map="cayley"),
    "expm": partial(Skew, map="expm"),
    "cayley_neumann": partial(Skew, map="cayley_neumann", bound=0.9),
    "block": block,
    "butterfly": Butterfly,
    "givens": Givens,
    "householder": Householder,
}


class Magnitude(Adapter):
    """A learned scale of every output: y (1 + m) but for the bias; m (out,) is zero at the start."""

    def __init__(self, like, out):
        super().__init__()
        self.m = nn.Parameter(like.detach().new_zeros(out))

    def forward(self, y, bias):
        return y + (y if bias is None else y - bias.to(y.dtype)) * self.m.to(y.dtype)


class LoRA(Adapter):
    """Rows x to x Aᵀ Bᵀ: A (r, in) Gaussian, B (out, r) zero (arXiv 2106.09685, with α = r)."""

    orthogonal = False

    def __init__(self, d, out, rank=8, dtype=torch.float32):
        super().__init__()
        self.d, self.r, self.config = d, rank, dict(rank=rank)
        self.A = nn.Parameter(torch.randn(rank, d, dtype=dtype) / d ** 0.5)
        self.B = nn.Parameter(torch.zeros(out, rank, dtype=dtype))

    def forward(self, x):
        return (x @ self.A.to(x.dtype).mT) @ self.B.to(x.dtype).mT

    def rotate(self, W, side):
        return W.to(self.A.dtype) + self.B @ self.A

    def orthogonality_error(self):
        return float("nan")


class LoRALinear(LOFTLinear):
    """y = base(x) + x Aᵀ Bᵀ."""

    def rotated(self, x):
        return self.base(x) + self.rotation(x)


METHODS = {  # name: support, transform, options, where `adapt` is given no others
    "loft": ("principal", "cayley", {}),                                       # arXiv 2605.11872
    "psoft": ("principal", "cayley", dict(scale=True)),                        # arXiv 2505.11235
    "oft": ("all", "block", {}),                                  # arXiv 2306.07280, 2506.19847
    "boft": ("all", "butterfly", {}),                                          # arXiv 2311.06243
    "goft": ("all", "givens", {}),                                             # arXiv 2404.04316
    "hra": ("all", "householder", {}),                                         # arXiv 2405.17484
    "lora": (None, None, {}),                                                  # arXiv 2106.09685
}


# ---------------------------------------------------------------------------------------------------
# Supports from the weight alone (selectors.py: from data)

def principal(W: Tensor, r: int) -> Tensor:
    """Top r right singular vectors of W (out, in) → P (in, r), float32 or wider: PSOFT's support.

    Of large weights (min(out, in) > 2048 and > 8 r) by torch.svd_lowrank with six iterations. Beyond
    min(out, in) it goes on into the null space. ValueError: W is not finite.
    """
    W, short = W.detach().to(at_least_float32(W)), min(W.shape)
    require(W.isfinite().all(), "its weight is not finite")
    if short > max(2048, 8 * r):
        return torch.svd_lowrank(W, q=r + 16, niter=6)[2][:, :r].contiguous()
    return torch.linalg.svd(W, full_matrices=r > short)[2][:r].mT.contiguous()


def random(W: Tensor, r: int) -> Tensor:
    """A uniformly random support of W (out, in) → P (in, r), from torch's CPU generator."""
    X = torch.randn(W.shape[1], r, dtype=at_least_float32(W))
    return torch.linalg.qr(X)[0].to(W.device)


# ---------------------------------------------------------------------------------------------------
# Functions of a model: adapt

def adapt(model: nn.Module, targets=None, *, method: str = "loft", rank=None, support=None,
          transform: str | None = None, side: str = "input", magnitude: bool = False,
          trainable=(), seed: int = 0, backend: str = "eager", **options) -> nn.Module:
    """Wraps linear layers of `model` in rotations, in place, and freezes the rest; no output changes.

    Args:
        targets: a regex searched in layer names, a list of names or parts of them, or a callable
            (name, module) → bool. Default: a support dict's keys, else all but heads.
        method: a name in `METHODS`: defaults of support, transform and options.
        rank: r (or lora's), default 32; a smaller layer takes its dimension, with a warning.
        support: "principal", "random", "all" (coordinates), a tensor P (d, r), or {layer: P}, as
            `selectors.select` chooses it from data.
        transform: a name in `TRANSFORMS`. options: its own (block_size, bound, …), and `scale`.
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
    require(method != "lora" or (support, transform, side) == (None, None, "input"),
            "method='lora' is no rotation: it takes a rank, no support, transform or side")
    preset, default, options = *METHODS[method][:2], METHODS[method][2] | options
    support, transform = preset if support is None else support, transform or default
    if targets is None and isinstance(support, dict):
        targets = list(support)
    found, parameters = target_layers(model, targets), plain_parameters(model)
    keep = {id(parameters[n]) for n in matches("trainable", trainable or [], parameters)}

    new, small = {}, []
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(seed)        # the CPU's alone
        for n, base in found.items():
            with naming(n):
                require(not isinstance(support, dict) or n in support, "the support given has no P for it")
                P = support[n] if isinstance(support, dict) else support
                d = shape(base)[SIDES.index(side)]
                small += [n] * (rank is not None and rank > d)
                if method == "lora":
                    options["rank"] = rank or 8
                elif isinstance(P, str):
                    P = own_support(base, d, side, P, rank)
                else:
                    require(rank in (None, P.shape[-1]), f"rank={rank}, but P is {tuple(P.shape)}")
                new[base] = wrap(base, P, method=method, side=side, magnitude=magnitude,
                                 transform=transform, **options)
    if small:
        warnings.warn(f"rank={rank} is more than the dimension, which they take, of {', '.join(small)}")
    for p in model.parameters():                         # from here on nothing fails
        p.requires_grad_(id(p) in keep)
    model = replace(model, new)
    return beside("kernels").fuse(model) if backend == "fused" else model


def own_support(base, d, side, name, r):
    """The support called `name` of one layer, P (d, r), or None: all coordinates."""
    if name == "all":
        require(r is None, f"rank={r} means nothing to all {d} coordinates: the options of the transform "
                "(block_size, stages, reflections) set its size")
        return None
    r = min(32 if r is None else r, d)
    require(r >= 1, f"rank={r} must be an int ≥ 1")
    require(name in ("principal", "random"), f"support={name!r} is none of principal, random, all, a "
            "tensor, a dict of tensors; from data: P = selectors.select(model, batches, loss_fn, rank), "
            "then adapt(model, support=P)")
    require(floating(base), f"its weight cannot be read; support={name!r} needs it: give a tensor")
    W = matrix(base) if side == "input" else matrix(base).mT
    return (principal if name == "principal" else random)(W, r)


def wrap(base, P, *, method, side, magnitude, dtype=None, **config):
    """One layer, rotated: in its weight's precision (float32 at least), on its device."""
    device = next((t.device for t in (*base.parameters(), *base.buffers())), torch.device("cpu"))
    require(device.type != "meta", "it is on the meta device: give the model its weights first")
    dtype = dtype or (at_least_float32(base.weight) if floating(base) else torch.float32)
    kind, d = LOFTLinear, shape(base)[SIDES.index(side)]
    if method == "lora":
        kind, adapter = LoRALinear, LoRA(*shape(base), config["rank"], dtype)
    else:
        adapter = Rotation(d, P, dtype=dtype, **config)
    require(next(adapter.parameters()).numel(), f"rank {adapter.r} leaves nothing to train; take ≥ 2")
    return kind(base, adapter.to(device), side, method, magnitude).train(base.training)


def check_support(P, d):
    """A copy of a valid support; otherwise a ValueError."""
    require(P.ndim == 2 and P.shape[0] == d and 1 <= P.shape[1] <= d,
            f"the support has shape {tuple(P.shape)}, expected ({d}, r) with r ≤ {d}")
    require(P.is_floating_point() and P.isfinite().all(), "the support has to be floating and finite")
    gram = wide(P).mT @ wide(P)
    error = (gram - eye(gram)).abs().max().item()
    require(error <= 1e-5, f"the support is not orthonormal: |PᵀP − I| = {error:.1e} > 1e-5; take "
            "torch.linalg.qr(P.float())[0]")
    return P.detach().clone()


def target_layers(model: nn.Module, targets=None) -> dict[str, nn.Module]:
    """{name: linear layer} that `targets` means (see `adapt`); one in two places counts once.

    Linear is what has in_features and out_features, and Conv1D. Default: all but output heads, which
    are get_output_embeddings(), share an embedding's weight, or are called one of `HEADS`.
    ValueError: nothing matches.
    """
    linear = {n: m for n, m in modules(model).items() if shape(m)}
    holders = {n[:i] for n in linear for i, c in enumerate(n) if c == "."}
    linear = {n: m for n, m in linear.items() if n not in holders}       # their own linear layers count
    names = list(linear)
    if callable(targets):
        names = [n for n in names if targets(n, linear[n])]
    elif targets is not None:
        names = matches("targets", targets, names)
    elif "" not in linear:
        heads = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        heads.add(id(getattr(model, "get_output_embeddings", lambda: None)()))
        names = [n for n in names if n.split(".")[-1] not in HEADS and id(linear[n]) not in heads
                 and id(getattr(plain(linear[n]), "weight", None)) not in heads]
    require(names, f"no layer to adapt among the linear ones, {', '.join(linear)}: name targets")
    return {n: linear[n] for n in names}


def layers(model: nn.Module) -> list[tuple[str, LOFTLinear]]:
    """(name in the plain model, layer) of every adapted layer."""
    return [(n, m) for n, m in modules(model).items() if isinstance(m, LOFTLinear)]


# ---------------------------------------------------------------------------------------------------
# Functions of a model: merge, switch off, measure

@torch.no_grad()
def merge(model: nn.Module) -> nn.Module:
    """Folds the rotations into the weights, in place: plain layers again, still frozen.

    In float32 or wider, so merged equals adapted to rounding in the weight's dtype. A weight shared
    with another layer is left to that one. ValueError: names the layer that cannot be merged; the
    model is then as it was.
    """
    weights = rotated_weights(model)
    if any(layer.fused for layer in weights):
        beside("kernels").unfuse(model)
    for layer, W in weights.items():
        layer.base.weight = nn.Parameter(W, layer.base.weight.requires_grad)
    return replace(model, {layer: layer.base for layer in weights})


@contextlib.contextmanager
def merged(model: nn.Module):
    """`with loft.merged(model):` runs as fast as the plain model; its weights come back bit for bit."""
    weights = rotated_weights(model)
    with disabled(model), contextlib.ExitStack() as after:
        for layer, W in weights.items():
            after.callback(setattr, layer.base, "weight", layer.base.weight)
            layer.base.weight = nn.Parameter(W, layer.base.weight.requires_grad)
        yield model


@contextlib.contextmanager
def disabled(model: nn.Module):
    """`with loft.disabled(model):` is the model before adaptation, a reference model say."""
    with contextlib.ExitStack() as after:
        for layer in adapted(model).values():
            after.callback(setattr, layer, "enabled", layer.enabled)
            layer.enabled = False
        yield model


@torch.no_grad()
def rotated_weights(model):
    """{layer: its rotated weight}; ValueError where one has none, or a rotation is not finite."""
    found = adapted(model)
    for n, layer in found.items():
        require(layer.mergeable, f"layer {n!r}: a {type(layer.base).__name__} has no floating weight of "
                "its own to merge into (it is quantised, or computed anew); keep it adapted")
        require(all(t.isfinite().all() for t in layer.adapter_state().values()),
                f"layer {n!r}: its rotation is not finite")
    return {layer: layer.weight for layer in found.values()}


def orthogonality_error(model: nn.Module) -> dict[str, float]:
    """{layer: max |RᵀR − I| on its support, in float64}; NaN for lora."""
    return {n: layer.rotation.orthogonality_error() for n, layer in adapted(model).items()}


def regularizer(model: nn.Module):
    """The papers' soft orthogonality (HRA, qGOFT), summed, to add to the loss; 0 for the others."""
    return sum(m.regularizer() for m in model.modules() if isinstance(m, Transform))


def check(model: nn.Module, batch, loss_fn=None) -> dict[str, str]:
    """{layer: what is wrong with it}; empty where all get gradient, are orthogonal, and merge.

    `batch` is what loss_fn(model, batch) takes; without one, what the model takes: a tensor, a tuple
    of arguments or a dict of keywords. The entry "" speaks of the output with merged weights.
    """
    def outputs():
        call = loss_fn or (lambda model, batch: model(**batch) if isinstance(batch, dict) else model(batch))
        leaves = torch.utils._pytree.tree_leaves(call(model, batch))
        return torch.cat([t.flatten().double() for t in leaves if torch.is_tensor(t) and t.is_floating_point()])

    found, wrong = adapted(model), {}
    with contextlib.ExitStack() as after, torch.enable_grad():
        for m in model.modules():
            after.callback(setattr, m, "training", m.training)
        model.eval()
        y = outputs()
        loss = y @ torch.linspace(-1, 1, len(y), dtype=y.dtype, device=y.device)
        for n, layer in found.items():
            theta, g = next(layer.rotation.parameters()), None
            if theta.requires_grad and loss.requires_grad:
                g, = torch.autograd.grad(loss, theta, retain_graph=True, allow_unused=True)
            error = layer.rotation.orthogonality_error() if layer.rotation.orthogonal else 0.0
            if g is None:
                wrong[n] = "no gradient reaches it: it is bypassed, frozen, or not used for this batch"
            elif not g.isfinite().all():
                wrong[n] = "its gradient is not finite"
            elif not error <= 1e-5:
                wrong[n] = f"|RᵀR − I| = {error:.0e}"
        if all(layer.mergeable for layer in found.values()):
            with merged(model), torch.no_grad():
                gap = ((outputs() - y).abs().max() / y.abs().max()).item()
            eps = max(torch.finfo(layer.base.weight.dtype).eps for layer in found.values())
            if not gap <= min(0.05, 1e3 * eps):
                wrong[""] = f"with merged weights the output differs by {gap:.0e} of its size"
    return wrong


# ---------------------------------------------------------------------------------------------------
# Functions of a model: files

FORMAT = "loft 2"


def save(model: nn.Module, path) -> None:
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


def load(model: nn.Module, path) -> nn.Module:
    """Puts the adapter at `path` on `model`, or into the one that it has, which must agree.

    No code in the file is run. ValueError, before the model is touched: names the layer, shape or
    setting that differs, or says that the file is no adapter, or damaged.
    """
    data = Path(path).read_bytes()
    require(hashlib.sha256(data[:-32]).digest() == data[-32:], f"{path} is no LOFT adapter, or damaged")
    try:
        found = torch.load(io.BytesIO(data[:-32]), map_location="cpu", weights_only=True)
        require(found["format"] == FORMAT, f"it is of format {found['format']!r}, not {FORMAT!r}")
        return attach(model, found)
    except Exception as e:                               # torch.load's own, or nonsense in the file
        raise ValueError(f"{path} is no LOFT adapter, or does not fit this model: {e}") from e


def payload(model: nn.Module) -> dict:
    """What `save` writes: plain containers and tensors, all that builds the adapter again."""
    trains = {n: p.detach().cpu() for n, p in plain_parameters(model).items() if p.requires_grad}
    specs = {n: layer.spec() for n, layer in adapted(model).items()}
    return dict(format=FORMAT, layers=specs, trainable=trains)


def attach(model: nn.Module, found: dict) -> nn.Module:
    """Puts a `payload` on the model, or into its adapter: all of it, or a ValueError and nothing."""
    there, parameters, old, new = modules(model), plain_parameters(model), dict(layers(model)), {}
    require(not old or old.keys() == found["layers"].keys(), "other layers are adapted: "
            f"{', '.join(old.keys() ^ found['layers'].keys())}")
    for n, spec in found["layers"].items():
        with naming(n), torch.random.fork_rng(devices=[]):
            has = shape(there[n]) if n in there else None
            require(has == spec["shape"], f"(in, out) is {spec['shape']} in the file, {has} in the model")
            P, dtype = spec["state"].get("rotation.P"), next(iter(spec["state"].values())).dtype
            new[n] = wrap(plain(there[n]), P, dtype=dtype, **spec["settings"])
            for layer in (new[n], old.get(n, new[n])):
                has, wants = outline(layer.spec()), outline(spec)
                require(has == wants, f"{dict(wants - has)} in the file, {dict(has - wants)} in the model")
            new[n].load_state_dict(spec["state"], strict=False)
    for n, value in found["trainable"].items():
        has = parameters[n].shape if n in parameters else None
        require(has == value.shape, f"parameter {n!r} is {value.shape} in the file, {has} in the model")

    for n, layer in old.items():                         # in place: an optimizer holds the parameters
        layer.load_state_dict(new[n].adapter_state(), strict=False)
    if not old:
        model.requires_grad_(False)
        model = replace(model, {there[n]: layer for n, layer in new.items()})
    with torch.no_grad():
        for n, value in found["trainable"].items():
            parameters[n].copy_(value).requires_grad_(True)
    return model


def outline(spec):
    """What two adapters have to agree in: settings, and shapes of tensors."""
    return {**spec["settings"], **{k: v.shape for k, v in spec["state"].items()}}.items()


# ---------------------------------------------------------------------------------------------------
# Names and shapes

WRAPPERS = {"module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}
HEADS = {"lm_head", "head", "classifier", "score"}


def modules(model) -> dict[str, nn.Module]:
    """{name: module} as in the plain model: no name of a wrapper, nothing inside an adapted layer."""
    found, inside = {}, set()
    for name, module in model.named_modules():
        if module not in inside:
            found[".".join(part for part in name.split(".") if part not in WRAPPERS)] = module
        if isinstance(module, LOFTLinear):
            inside.update(module.modules())
    return found


def plain_parameters(model) -> dict[str, nn.Parameter]:
    """{name as in the plain model: parameter} of everything but adapters; tied ones by each name."""
    found = {}
    for name, module in modules(model).items():
        for key, p in plain(module).named_parameters(recurse=isinstance(module, LOFTLinear)):
            found[f"{name}.{key}".lstrip(".")] = p
    return found


def matches(what, wanted, names):
    """The names that a regex finds, or a list means: its entries are one or more parts of a name."""
    entries = [wanted] if isinstance(wanted, str) else wanted
    finds = re.search if isinstance(wanted, str) else (lambda entry, n: f".{entry}." in f".{n}.")
    found = {entry: [n for n in names if finds(entry, n)] for entry in entries}
    for entry in entries:
        require(found[entry], f"{what}: {entry!r} matches none of {', '.join(list(names)[:8])}, …")
    return [n for n in names if any(n in each for each in found.values())]


def replace(model, new):
    """Puts new[m] in every place where module m stands; returns the model, or what stands for it."""
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            parent._modules[key] = new.get(child, child)
    return new.get(model, model)


def adapted(model):
    found = dict(layers(model))
    require(found, "the model is not adapted: call loft.adapt or loft.load first")
    return found


def plain(module):
    return module.base if isinstance(module, LOFTLinear) else module


def floating(module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.is_floating_point()


def shape(module) -> tuple[int, int] | None:
    """(in, out) of a linear layer; None of what is not one."""
    features = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if None in features and hasattr(module, "nf") and floating(module):
        features = tuple(module.weight.shape)            # Conv1D's is (in, out)
    return features if all(isinstance(n, int) for n in features) else None


def matrix(module) -> Tensor:
    """The weight as (out, in)."""
    return module.weight.mT if hasattr(module, "nf") else module.weight


def wide(x) -> Tensor:
    return x.float() if x.device.type == "mps" else x.double()


def at_least_float32(x) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def beside(name):
    """The file of that name beside this one, imported when it is needed."""
    return importlib.import_module(f"{__name__}.{name}")


def require(condition, otherwise) -> None:
    if not condition:
        raise ValueError(otherwise)


def one_of(what, value, valid):
    require(value in valid, f"unknown {what} {value!r}; valid: {', '.join(valid)}")


@contextlib.contextmanager
def naming(name):
    """Errors inside say which layer they are about."""
    try:
        yield
    except (ValueError, TypeError) as e:
        raise type(e)(f"layer {name!r}: {e}") from None
