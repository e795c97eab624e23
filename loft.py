"""LOFT: low-rank orthogonal fine-tuning.

A frozen weight W0 (out × in) is adapted by a rotation of a small subspace (LOFT, arXiv 2605.11872):

    W = W0 R,    R = I + P (T − I) Pᵀ,    PᵀP = I_r,  TᵀT = I_r          (side="input")
    W = R W0,    the same R, with P (out × r)                            (side="output")

The **support** P says where to adapt, the **transform** T how. R is orthogonal for every P and T, is the
identity off span(P), and is I at the start. On activations (rows x), no rotated weight is ever formed:

    z = x P,    y = base(x + z (Tᵀ − I) Pᵀ)

    import loft                                        # five lines of use
    model = loft.adapt(model, rank=32)                 # in place: base frozen, rotations train
    train(model)                                       # any optimizer over the parameters that require grad
    loft.save(model, "adapter.pt")                     # the adapter alone
    model = loft.merge(model)                          # plain layers again

This file stands alone on torch ≥ 2.6 and can be copied by itself. Beside it, selectors.py chooses supports
from the downstream gradient.
"""
from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib
import inspect
import io
import itertools
import os
import re
from typing import Callable, Iterable

import torch
from torch import Tensor, nn

# Makes this single file a package, so that `from loft import selectors` always means the file beside it,
# never the standard library's module of the same name.
__path__ = [os.path.dirname(os.path.abspath(__file__))]

SIDES = ("input", "output")

# name: (support, transform, further options); `adapt` takes any of them as an override.
METHODS = {
    "loft": dict(support="principal", transform="cayley"),                    # arXiv 2605.11872
    "psoft": dict(support="principal", transform="cayley", scale=True),       # arXiv 2505.11235
    "oft": dict(support="all", transform="block"),                            # arXiv 2306.07280, 2506.19847
    "boft": dict(support="all", transform="butterfly"),                       # arXiv 2311.06243
    "goft": dict(support="all", transform="givens"),                          # arXiv 2404.04316
    "hra": dict(support="all", transform="householder"),                      # arXiv 2405.17484
    "lora": dict(support=None, transform="lora"),                             # arXiv 2106.09685: for comparison, no rotation
}


# ---------------------------------------------------------------------------------------------------------
# Transforms: an orthogonal T (r × r), applied to rows z (…, r) as z ↦ z Tᵀ. Each is the identity, to the
# last bit, at the start; so each computes the difference  delta(z) = z (T − I)ᵀ  rather than z Tᵀ.
# All are built in float64 (float32 on MPS) and handed over in the parameters' precision.
# ---------------------------------------------------------------------------------------------------------

def _wide(x: Tensor) -> Tensor:
    return x.float() if x.device.type == "mps" else x.double()


def _uncast(device: torch.device):
    """No autocast inside: T, merges and errors are computed in full precision."""
    return contextlib.nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def skew(generator: Tensor, b: int) -> Tensor:
    """Q = U − Uᵀ (…, b, b), with U strictly upper triangular and filled, row by row, by `generator` (…, b(b−1)/2)."""
    i, j = torch.triu_indices(b, b, 1, device=generator.device)
    U = generator.new_zeros(*generator.shape[:-1], b, b)
    U[..., i, j] = generator
    return U - U.mT


def cayley(Q: Tensor) -> Tensor:
    """T − I for the Cayley transform T = (I + Q)(I − Q)⁻¹ of a skew Q (…, b, b): every rotation without eigenvalue −1."""
    eye = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
    solve = lambda Q: torch.linalg.solve(eye - Q, 2 * Q, left=False)          # T − I = 2 Q (I − Q)⁻¹: no cancellation
    if Q.device.type == "cpu" and Q.shape[-1] > 64:                           # one by one: torch's batched LU hangs in MKL's
        return _polish(torch.stack([solve(q) for q in Q.reshape(-1, *Q.shape[-2:])]).view_as(Q))   # threads (pytorch#142815)
    return _polish(solve(Q))


def cayley_neumann(Q: Tensor, terms: int) -> Tensor:
    """T − I for OFTv2's truncated series (arXiv 2506.19847), T ≈ (I + Q)(I + Q + … + Q^(terms−2)).

    Orthogonal only up to ‖TᵀT − I‖ = O(‖Q‖^(terms−1)): bound ‖Q‖ (see `Skew`), or read `orthogonality_error`.
    """
    power, D = Q, 2 * Q                                                       # terms = 5:  2Q + 2Q² + 2Q³ + Q⁴
    for k in range(2, terms):
        power = power @ Q
        D = D + (2 if k < terms - 1 else 1) * power
    return D


def expm(Q: Tensor) -> Tensor:
    """T − I for T = exp(Q), Q skew (…, b, b): reaches every rotation. (In float64 the subtraction costs 1e-16.)"""
    return _polish(torch.linalg.matrix_exp(Q) - torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device))


def _polish(D: Tensor) -> Tensor:
    """Two Newton–Schulz steps T ← T (I − ½(TᵀT − I)): a huge generator costs the map digits, this restores TᵀT = I.

    Their derivative along the orthogonal group is the identity, so autograd may pass them by.
    """
    with torch.no_grad():
        X = D
        for _ in range(2):
            E = X + X.mT + X.mT @ X                                           # TᵀT − I, written in X = T − I
            X = X - (E + X @ E) / 2
    return D + (X - D).detach()


class Skew(nn.Module):
    """T = T_1 T_2 … T_m, each stage block-diagonal: blocks (b × b) that are a map of a learned skew generator.

    One class says five transforms: `cayley`, `cayley_neumann` and `expm` are one stage with one block of size r;
    `block` (OFT) is one stage of r/b blocks; `butterfly` (BOFT) is m stages, where stage s joins half-blocks that
    lie 2^s half-blocks apart.

    Args:
        r: size of T.
        block_size: b, a divisor of r (default: r).
        stages: m; stage s needs b·2^s to divide r.
        map: "cayley", "cayley_neumann" or "expm".
        terms: matrices in the Cayley–Neumann series (5 in OFTv2).
        bound: Frobenius bound on each block's Q, which is scaled back when longer (COFT's ε; OFTv2's norm bound).
        share: one generator for all blocks of a stage (OFT's block sharing).
    Parameters: generator (m, blocks or 1, b(b−1)/2), zero at the start.
    """

    def __init__(self, r: int, block_size: int | None = None, stages: int = 1, map: str = "cayley",
                 terms: int = 5, bound: float | None = None, share: bool = False):
        super().__init__()
        b = r if block_size is None else block_size
        if not (isinstance(b, int) and 1 <= b <= r and r % b == 0):
            good = [k for k in range(1, r + 1) if r % k == 0]
            raise ValueError(f"block_size={b} does not divide {r}; nearest that do: {_around(b, good)}")
        most = 1                                                              # stages that b·2^s | r allows
        while b % 2 == 0 and r % (b << most) == 0:
            most += 1
        if not (isinstance(stages, int) and 1 <= stages <= most):
            raise ValueError(f"stages={stages} with blocks of {b} in {r} dimensions: must be 1 to {most} "
                             f"(stage s joins blocks of {b}·2^s, which has to divide {r})")
        if map not in ("cayley", "cayley_neumann", "expm"):
            raise ValueError(_unknown("map", map, ("cayley", "cayley_neumann", "expm")))
        if map == "cayley_neumann" and terms < 2:
            raise ValueError(f"terms={terms}: the Cayley–Neumann series needs at least 2 (I + 2Q)")
        if bound is not None and not bound > 0:
            raise ValueError(f"bound={bound} must be positive (or None)")
        self.r, self.b, self.map, self.terms, self.bound = r, b, map, terms, bound
        self.generator = nn.Parameter(torch.zeros(stages, 1 if share else r // b, b * (b - 1) // 2))

    def blocks(self) -> Tensor:
        """T − I of every block, (m, blocks, b, b), in the generator's dtype (float32 or wider)."""
        with _uncast(self.generator.device):
            g = _wide(self.generator)
            Q = skew(g, self.b)
            if self.bound is not None:                                        # Q ← Q min(1, bound / ‖Q‖_F), block by block
                square = Q.square().sum((-2, -1), keepdim=True).clamp(min=self.bound ** 2)   # smooth at Q = 0, too
                Q = Q * (self.bound * square.rsqrt())
            D = (cayley_neumann(Q, self.terms) if self.map == "cayley_neumann" else
                 expm(Q) if self.map == "expm" else cayley(Q))
            return D.to(torch.promote_types(self.generator.dtype, torch.float32))

    def delta(self, z: Tensor) -> Tensor:
        """z (T − I)ᵀ for rows z (…, r)."""
        D = self.blocks().to(z.dtype)
        if D.shape[0] == 1:
            return self._stage(z, D[0], 0)
        y = z
        for s in reversed(range(D.shape[0])):                                 # z Tᵀ = z T_mᵀ … T_1ᵀ
            y = y + self._stage(y, D[s], s)
        return y - z

    def _stage(self, z: Tensor, D: Tensor, s: int) -> Tensor:
        """z (T_s − I)ᵀ: view z (…, r) as (…, blocks, b), multiply block by block, view back."""
        if self.b == self.r:
            return z @ D[0].mT
        if s == 0:
            return torch.einsum("...nb,ncb->...nc", z.unflatten(-1, (-1, self.b)),
                                D.expand(self.r // self.b, -1, -1)).flatten(-2)
        z = z.unflatten(-1, (-1, 2, 2 ** s, self.b // 2)).transpose(-3, -2)   # (…, groups, 2^s, 2, b/2)
        y = torch.einsum("...nb,ncb->...nc", z.flatten(-2).flatten(-3, -2),
                         D.expand(self.r // self.b, -1, -1))                  # (…, blocks, b)
        return y.unflatten(-1, (2, -1)).unflatten(-3, (-1, 2 ** s)).transpose(-3, -2).flatten(-4)


class Givens(nn.Module):
    """GOFT's tree of r − 1 plane rotations in ⌈log2 r⌉ stages (arXiv 2404.04316, eqs. 3 and 4), for any r.

    Stage s takes every 2^s-th coordinate and rotates them pair by pair: row pairs (a, b) ↦ (a, b) G with
    G = [[cos θ, −sin θ], [sin θ, cos θ]]; Tᵀ = P_1 P_2 … in the paper's letters. With relaxed=True (qGOFT, eq. 5)
    each G is any 2 × 2 matrix, no longer orthogonal unless `regularizer` holds it there.

    Parameters: generator (r − 1, 1), the angles, or (r − 1, 4), the entries of G − I. Zero at the start.
    """

    def __init__(self, r: int, relaxed: bool = False):
        super().__init__()
        self.r, self.relaxed = r, relaxed
        self.generator = nn.Parameter(torch.zeros(r - 1, 4 if relaxed else 1))

    def blocks(self) -> Tensor:
        """G − I of every pair, (r − 1, 2, 2), finest stage first."""
        g = _wide(self.generator)
        if not self.relaxed:
            c, s = -2 * torch.sin(g / 2) ** 2, torch.sin(g)                   # cos θ − 1 = −2 sin²(θ/2)
            g = torch.cat([c, -s, s, c], -1)
        return g.unflatten(-1, (2, 2)).to(torch.promote_types(self.generator.dtype, torch.float32))

    def delta(self, z: Tensor) -> Tensor:
        """z (T − I)ᵀ for rows z (…, r)."""
        D, y, start, step = self.blocks().to(z.dtype), z, 0, 1
        while step < self.r:
            index = torch.arange(0, self.r, step, device=z.device)
            n = len(index) // 2                                               # an odd one out waits for the next stage
            pairs = y[..., index[:2 * n]].unflatten(-1, (n, 2))
            change = torch.einsum("...nb,nbc->...nc", pairs, D[start:start + n])
            y, start, step = y.index_add(-1, index[:2 * n], change.flatten(-2).to(y.dtype)), start + n, 2 * step
        return y - z


class Householder(nn.Module):
    """T = H_1 H_2 … H_k, H_i = I − 2 u_i u_iᵀ / ‖u_i‖² (HRA, arXiv 2405.17484), in compact WY form.

    With unit columns V = [v_1 … v_k]:  T = I − V S⁻¹ Vᵀ,  S = ½ I + strictly upper part of VᵀV  (k × k).
    The u come in equal pairs at the start, so T = I; a pair (a, b) is carried as (a, b − a), which makes that
    exact to the last bit. An odd k has det T = −1 and cannot start at the identity: refused.

    Parameters: u (r, k), in pairs from a unit Gaussian.
    """

    def __init__(self, r: int, reflections: int = 8):
        super().__init__()
        k = reflections
        if not isinstance(k, int) or k < 2 or k % 2:
            raise ValueError(f"reflections={k}: must be even and ≥ 2, an odd product has determinant −1 and cannot "
                             f"start at the identity; nearest: {_around(k, range(2, 4098, 2))}")
        self.r = r
        self.u = nn.Parameter(torch.randn(r, k // 2).repeat_interleave(2, dim=1))

    def delta(self, z: Tensor) -> Tensor:
        """z (T − I)ᵀ = −(z V) S⁻ᵀ Vᵀ for rows z (…, r)."""
        with _uncast(self.u.device):
            u = _wide(self.u)
            v = u / torch.linalg.vector_norm(u, dim=0)
            a, c = v[:, 0::2], v[:, 1::2] - v[:, 0::2]                        # b = a + c,  c = 0 at the start
            V = torch.stack([a, c], -1).flatten(-2)                           # (r, k) = [a_1 c_1 a_2 c_2 …]
            S = torch.triu(V.mT @ V, diagonal=1)
            # S in this basis: the 2 × 2 diagonal blocks are [[½, ½ − h], [−½, h]] with h = ‖c‖²/2 = 1 − aᵀb
            h = (c * c).sum(0) / 2
            half = torch.full_like(h, 0.5)
            block = torch.stack([torch.stack([half, half - h], -1), torch.stack([-half, h], -1)], -2)
            pair = torch.arange(V.shape[1], device=V.device) // 2
            S = torch.where(pair[:, None] == pair, torch.block_diag(*block), S)
            K = torch.linalg.inv(S)
            V, K = (t.to(torch.promote_types(self.u.dtype, torch.float32)) for t in (V, K))
        V, K = V.to(z.dtype), K.to(z.dtype)
        return -((z @ V) @ K.mT) @ V.mT


class Fixed(nn.Module):
    """A given T, as T − I in the buffer D (r, r): rotations that `refresh` has put behind."""

    def __init__(self, r: int):
        super().__init__()
        self.register_buffer("D", torch.zeros(r, r))

    def delta(self, z: Tensor) -> Tensor:
        return z @ self.D.to(z.dtype).mT


def _options(name: str, r: int, given: dict) -> dict:
    """Every option of the transform called `name`, of size r: what is given, else the default."""
    if name not in TRANSFORMS:
        raise ValueError(_unknown("transform", name, TRANSFORMS))
    cls, defaults, allowed = TRANSFORMS[name]
    for key in given:
        if key not in allowed:
            raise ValueError(f"transform {name!r} has no option {key!r}; it has: {', '.join(allowed) or 'none'}")
    signature = inspect.signature(cls).parameters
    options = {key: signature[key].default for key in allowed} | defaults | given
    if name == "block" and options["block_size"] is None:                     # 32, or the next smaller that divides r
        options["block_size"] = max(b for b in range(1, 33) if r % b == 0)
    if name == "butterfly" and options["block_size"] is None:
        fits = [b for b in range(2, 9, 2) if r % (b << options["stages"] - 1) == 0]
        options["block_size"] = max(fits, default=8)
    return options


TRANSFORMS = {  # name: (class, defaults, options a user may set)
    "cayley": (Skew, dict(map="cayley"), ("bound",)),
    "cayley_neumann": (Skew, dict(map="cayley_neumann", bound=0.9), ("terms", "bound")),
    "expm": (Skew, dict(map="expm"), ("bound",)),
    "block": (Skew, {}, ("block_size", "map", "terms", "bound", "share")),
    "butterfly": (Skew, dict(stages=2), ("block_size", "stages", "map", "terms", "bound", "share")),
    "givens": (Givens, {}, ("relaxed",)),
    "householder": (Householder, {}, ("reflections",)),
}


# ---------------------------------------------------------------------------------------------------------
# The rotation and the layer
# ---------------------------------------------------------------------------------------------------------

def _precise(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`fn` of nn.Module._apply, but .half() and .bfloat16() only move: an adapter keeps its precision."""
    return lambda t: t.to(new.device) if (new := fn(t)).dtype in (torch.float16, torch.bfloat16) else new


class Rotation(nn.Module):
    """R = I + P (T − I) Pᵀ (d × d), orthogonal; as a module it maps rows x (…, d) to x Rᵀ.

    Args:
        d: dimension that is rotated (in_features for side="input", out_features for side="output").
        support: P (d, r) with orthonormal columns, or None for all coordinates (P = I, r = d).
        transform: a name in `TRANSFORMS`; its options follow by keyword.
        scale: PSOFT's two vectors (arXiv 2505.11235): T becomes diag(β) T diag(α), no longer orthogonal; both are
            ones at the start.
        gauge: g (r,), for PSOFT's symmetric (PiSSA-like) split of the singular values: T becomes diag(g)⁻¹ T diag(g).
        dtype: of the parameters; float32 or float64. P is kept in it.
    Raises:
        ValueError: P is not a finite (d, r) matrix with |PᵀP − I| ≤ 1e-5, or an option does not fit.
    """

    def __init__(self, d: int, support: Tensor | None = None, transform: str = "cayley", *, scale: bool = False,
                 gauge: Tensor | None = None, dtype: torch.dtype = torch.float32, **options):
        super().__init__()
        self.d, self.r = d, d if support is None else _check_support(support, d)
        options = {} if transform == "fixed" else _options(transform, self.r, options)
        settable = {k: v for k, v in options.items() if k in TRANSFORMS[transform][2]} if options else {}
        self.config = dict(d=d, transform=transform, scale=scale, **settable) # rebuilds this module, with P, at load
        if gauge is not None and not (gauge > 0).all():
            raise ValueError("the gauge has zeros: the weight sends a direction of the support to 0, which cannot be split evenly")
        self.register_buffer("P", None if support is None else support.detach().to(dtype).clone())
        self.register_buffer("gauge", None if gauge is None else gauge.detach().to(dtype).clone())
        self.transform = (Fixed(self.r) if transform == "fixed" else TRANSFORMS[transform][0](self.r, **options)).to(dtype)
        self.alpha = nn.Parameter(torch.ones(self.r, dtype=dtype)) if scale else None
        self.beta = nn.Parameter(torch.ones(self.r, dtype=dtype)) if scale else None

    def _delta_in_support(self, z: Tensor) -> Tensor:
        """z (T − I)ᵀ, (…, r) → (…, r); with vectors, z (M − I)ᵀ for M = diag(β/g) T diag(α g)."""
        if self.alpha is None and self.gauge is None:
            return self.transform.delta(z)
        g = torch.ones_like(self.alpha) if self.gauge is None else self.gauge
        alpha, beta = (torch.ones_like(g), 1) if self.alpha is None else (self.alpha, self.beta)
        left, right, rest = ((t.to(z.dtype)) for t in (alpha * g, beta / g, alpha * beta - 1))   # αβ − 1 before bf16 rounds it to 0
        return self.transform.delta(z * left) * right + z * rest

    def delta(self, x: Tensor) -> Tensor:
        """x (Rᵀ − I) = x P (Tᵀ − I) Pᵀ for rows x (…, d). Autograd keeps z = x P (…, r), never x."""
        if self.P is None:
            return self._delta_in_support(x)
        P = self.P.to(x.dtype)
        return self._delta_in_support(x @ P) @ P.mT

    def forward(self, x: Tensor) -> Tensor:
        return x + self.delta(x)                                              # x Rᵀ

    def matrix(self) -> Tensor:
        """The dense R (d, d), in the parameters' dtype."""
        eye = torch.eye(self.d, dtype=self.dtype, device=self.device)
        return self(eye).mT                                                   # rows e_iᵀ Rᵀ are the columns of R

    def rotate(self, W: Tensor, side: str) -> Tensor:
        """W R = W + (W P)(T − I) Pᵀ (side="input"), or R W = W + P (T − I)(Pᵀ W) (side="output"); W (out, in)."""
        with _uncast(W.device):
            D, P, W = self.difference(), self.P, W.to(self.dtype)
            if side == "output":
                return W + (D @ W if P is None else P @ (D @ (P.mT @ W)))
            return W + (W @ D if P is None else (W @ P) @ D @ P.mT)

    def difference(self) -> Tensor:
        """T − I (r, r), scaling vectors included."""
        with _uncast(self.device):
            return self._delta_in_support(torch.eye(self.r, dtype=self.dtype, device=self.device)).mT

    @property
    def strict(self) -> bool:
        """Whether R is meant to be orthogonal: not with scaling vectors, qGOFT's relaxation or a truncated series."""
        T = self.transform
        return self.alpha is None and self.gauge is None and not getattr(T, "relaxed", False) and getattr(T, "map", "") != "cayley_neumann"

    @torch.no_grad()
    def orthogonality_error(self) -> float:
        """max |RᵀR − I| on the support, in float64: with D = T − I,  Pᵀ(RᵀR − I)P = D + Dᵀ + Dᵀ(PᵀP)D  (PᵀP ≈ I)."""
        D = self.difference().double()
        G = D if self.P is None else self.P.double().mT @ self.P.double() @ D
        return (D + D.mT + D.mT @ G).abs().max().item()

    dtype = property(lambda self: next(itertools.chain(self.parameters(), self.buffers())).dtype)
    device = property(lambda self: _device(self))

    def _apply(self, fn, recurse=True):
        return super()._apply(_precise(fn), recurse)

    def extra_repr(self) -> str:
        return f"d={self.d}, r={self.r}, {self.config['transform']}"


class LOFTLinear(nn.Module):
    """A frozen linear layer, rotated: y = base(x Rᵀ) for side="input", y = base(x) Rᵀ (bias apart) for "output".

    `base` is any module that is affine in its input and has in_features and out_features; side="input" never
    looks at its weight. `weight` and `bias` read as those of the merged layer, so that code which takes the
    weight and never calls forward (nn.MultiheadAttention's out_proj, say) still sees, and trains, the rotation.
    magnitude=True adds a learned scale for every output, s (out,), ones at the start (in OFT and BOFT).
    `past` is the product of the rotations before the last `refresh`: W = W0 R_past R, or R R_past W0.
    A second adapter wraps the first: its `base` is the LOFTLinear of the one put on before, and W0 that one's weight.
    """

    def __init__(self, base: nn.Module, rotation: nn.Module, side: str = "input", method: str = "loft", magnitude: bool = False,
                 name: str = "default"):
        super().__init__()
        if side not in SIDES:
            raise ValueError(_unknown("side", side, SIDES))
        self.in_features, self.out_features = _shape(base)
        d = self.in_features if side == "input" else self.out_features
        if rotation.d != d:
            raise ValueError(f"a rotation of {rotation.d} dimensions on a layer whose {side} side has {d}")
        self.base, self.rotation, self.side, self.method, self.name, self.enabled = base, rotation, side, method, name, True
        self.magnitude = nn.Parameter(torch.ones(self.out_features, dtype=rotation.dtype, device=rotation.device)) if magnitude else None
        self.past: Rotation | None = None
        self.fused = None                                                     # set by kernels.fuse: the fast path

    bias = property(lambda self: self.base.bias)
    nf = property(lambda self: self.base.nf)                                  # marks transformers' Conv1D, a transposed weight

    @property
    def weight(self) -> Tensor:
        """The rotated weight diag(s) W0 R or diag(s) R W0, in W0's dtype and layout, differentiable."""
        if _weight(_plain(self)) is None:
            raise AttributeError(f"a {type(_plain(self)).__name__} has no floating weight to rotate")
        return self.exact_weight().to(_plain(self).weight.dtype) if self.enabled else self.base.weight

    def exact_weight(self) -> Tensor:
        """The rotated weight in W0's layout, in the rotation's precision."""
        W = _matrix(self.base)
        for R in (self.past, self.rotation):
            W = W if R is None else R.rotate(W, self.side)
        W = W if self.magnitude is None else self.magnitude[:, None] * W
        return W.mT if hasattr(self, "nf") else W.view(_plain(self).weight.shape)

    def _apply(self, fn, recurse=True):
        magnitude = None if self.magnitude is None else _precise(fn)(self.magnitude.data)
        super()._apply(fn, recurse)
        if magnitude is not None:
            self.magnitude.data = magnitude
        return self

    def forward(self, input: Tensor) -> Tensor:
        if not self.enabled:
            return self.base(input)
        y, b = self._rotated(input)
        if self.magnitude is None:
            return y
        return y + (y if b is None else y - b) * (self.magnitude - 1).to(y.dtype)   # s (y − b) + b, exact at s = 1

    def _rotated(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The rotated layer's output and its bias b."""
        b = getattr(self.base, "bias", None)
        b = b() if callable(b) else b                                         # a method in torch.ao's quantised layers
        if self.fused is not None:
            return self.fused(self, x), b                                     # the same, by kernels.py
        if self.side == "input":
            x = self.rotation(x)
            return self.base(x if self.past is None else self.past(x)), b     # y = (x Rᵀ R_pastᵀ) W0ᵀ + b
        y = self.base(x)
        for R in (self.past, self.rotation):
            y = y if R is None else y + R.delta(y if b is None else y - b)    # y = (x W0ᵀ) R_pastᵀ Rᵀ + b
        return y, b

    def adapter_state(self) -> dict[str, Tensor]:
        """Everything in state_dict() but the base layer."""
        return {k: v for k, v in self.state_dict().items() if not k.startswith("base.")}

    def extra_repr(self) -> str:
        return f"{self.name}, side={self.side}"


class LOFTConv2d(LOFTLinear):
    """A convolution with its kernel, as a matrix (out, channels × height × width), rotated: one thin product a forward pass."""

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.weight, self.bias)

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self.base._conv_forward(x, weight, bias)


class LoRA(nn.Module):
    """W0 + (α/r) B A (arXiv 2106.09685), A (r, in), B (out, r) = 0: what rotations are compared with, not one of them."""

    def __init__(self, d: int, out: int, rank: int = 8, lora_alpha: float | None = None, dtype: torch.dtype = torch.float32):
        super().__init__()
        if not isinstance(rank, int) or rank < 1:
            raise ValueError(f"rank={rank} must be an int ≥ 1")
        self.d, self.r, self.scaling = d, rank, 1.0 if lora_alpha is None else lora_alpha / rank
        self.config = dict(d=d, out=out, rank=rank, lora_alpha=lora_alpha, transform="lora")
        self.A = nn.Parameter(torch.randn(rank, d, dtype=dtype) / d ** 0.5)
        self.B = nn.Parameter(torch.zeros(out, rank, dtype=dtype))

    dtype, device, strict = property(lambda self: self.A.dtype), property(lambda self: self.A.device), False

    def rotate(self, W: Tensor, side: str) -> Tensor:
        return W.to(self.dtype) + self.scaling * self.B @ self.A

    def orthogonality_error(self) -> float:
        return float("nan")

    def _apply(self, fn, recurse=True):
        return super()._apply(_precise(fn), recurse)


class LoRALinear(LOFTLinear):
    """y = base(x) + (α/r) (x Aᵀ) Bᵀ."""

    def _rotated(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        A, B = self.rotation.A.to(x.dtype), self.rotation.B.to(x.dtype)
        return self.base(x) + self.rotation.scaling * (x @ A.mT) @ B.mT, getattr(self.base, "bias", None)


# ---------------------------------------------------------------------------------------------------------
# Functions of a model
# ---------------------------------------------------------------------------------------------------------

Targets = "str | Iterable[str] | Callable[[str, nn.Module], bool] | None"


def adapt(model: nn.Module, targets: Targets = None, *, method: str = "loft", rank: int | dict[str, int] | None = None,
          support: str | Tensor | dict[str, Tensor] | None = None, transform: str | None = None, side: str = "input",
          magnitude: bool = False, svd: str = "auto", symmetric: bool = False, trainable: Targets = (), seed: int = 0,
          name: str = "default", backend: str = "eager", **options) -> nn.Module:
    """Wraps linear layers of `model` in rotations, in place, and freezes everything else. Outputs do not change.

    Args:
        targets: which layers. A regex (searched in the name), a list of names or of their last components, or a
            callable (name, module) → bool. None: the keys of a support dict, else every linear layer but the
            output head (see `target_layers`).
        method: a name in `METHODS`, which sets the defaults of support, transform and options.
        rank: r, one for all layers or {layer: r}; default 32 (a smaller layer: its dimension). With
            support="all" it is the number of reflections of `householder` (default 8) and is refused otherwise.
        support: "principal" (top singular vectors of W0), "minor", "random", "all" (every coordinate), an
            orthonormal tensor (d, r), or {layer: tensor}, as `selectors.select` returns for a gradient-chosen one.
        transform: a name in `TRANSFORMS`; `options` go to it (block_size, stages, bound, …) and to `Rotation` (scale).
        side: "input" (W0 R) or "output" (R W0).
        magnitude: also learn a scale for every output (see `LOFTLinear`).
        svd, symmetric: PSOFT's variants. Of support="principal": "full", "lowrank" (randomised) or "auto"; and whether
            the singular values are split evenly between the two factors (see `Rotation`'s gauge).
        trainable: further parameters that stay trainable, by name: a regex or a list, as in `targets`.
        seed: of random supports and of initial reflections.
        name: of this adapter. A second one, of another name, is put on top of the first (W0 R_1 R_2), which is frozen.
        backend: "eager", or "fused" for the fast twins in kernels.py (see `kernels.fuse`).
    Returns:
        the model itself (of a bare linear layer: its wrapper).
    Raises:
        ValueError, TypeError: naming the layer, the value and what is valid. The model is then as it was.
    """
    if method not in METHODS:
        raise ValueError(_unknown("method", method, METHODS))
    if side not in SIDES:
        raise ValueError(_unknown("side", side, SIDES))
    if backend not in ("eager", "fused"):
        raise ValueError(_unknown("backend", backend, ("eager", "fused")))
    kernels = importlib.import_module(__name__ + ".kernels") if backend == "fused" else None
    if adapted := [n for n, _ in layers(model, name)]:
        raise ValueError(f"the model already has an adapter {name!r} (on {adapted[0]} and {len(adapted) - 1} more layers); "
                         "merge it first, or give this one another name")
    preset = METHODS[method]
    support = preset["support"] if support is None else support
    transform = transform or preset["transform"]
    options = {**{k: v for k, v in preset.items() if k not in ("support", "transform")}, **options}
    if (method == "lora") != (transform == "lora") or method == "lora" and (support is not None or side != "input"):
        raise ValueError("method='lora' is not a rotation: it takes rank and lora_alpha, no support, transform or side")
    if svd not in ("auto", "full", "lowrank"):
        raise ValueError(_unknown("svd", svd, ("auto", "full", "lowrank")))
    if symmetric and support != "principal":
        raise ValueError("symmetric=True splits singular values, which only support='principal' has")
    if transform == "householder" and rank is not None and "reflections" in options and isinstance(support, str) and support == "all":
        raise ValueError("with support='all', rank is the number of reflections: give one of the two")
    if isinstance(support, dict) and targets is None:
        found = target_layers(model, lambda n, m: n in support)
        if unknown := [n for n in support if n not in found]:
            raise ValueError(f"the support names {unknown[0]!r}, which is no linear layer of the model{_nearest(unknown[0], found)}")
    else:
        found = target_layers(model, targets)
    keep = _matches([n for n, _ in model.named_parameters()], trainable)

    wrapped = {}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for n, base in found.items():
            try:
                P, extra = _resolve_support(support, n, base, side, rank, transform, svd)
                if symmetric:                                                 # σ_i = ‖W0 p_i‖ for singular vectors p_i
                    W = _matrix(base) if side == "input" else _matrix(base).mT
                    extra["gauge"] = (W.to(P.dtype) @ P).norm(dim=0).sqrt()
                layer = _build(base, name, method, side, P, magnitude, transform, {**options, **extra})
                if not sum(p.numel() for p in layer.rotation.parameters()):
                    raise ValueError(f"a {layer.rotation.r} × {layer.rotation.r} {transform!r} has no parameters, so "
                                     "nothing would train; use rank ≥ 2 (or a block_size ≥ 2)")
                wrapped[base] = layer
            except (ValueError, TypeError) as e:
                raise type(e)(f"layer {n!r}: {e}") from None

    for n, p in model.named_parameters():                                     # from here on nothing can fail
        p.requires_grad_(n in keep)
    model = _replace(model, wrapped)
    return model if kernels is None else kernels.fuse(model)


def target_layers(model: nn.Module, targets: Targets = None) -> dict[str, nn.Module]:
    """{name: linear layer} that `targets` means (see `adapt`); a layer used in two places counts once.

    Linear is what has in_features and out_features, transformers' Conv1D, and Conv2d where `targets` name it.
    None is every linear layer but Conv2d and the output head: the model's get_output_embeddings() where it has one, and any
    layer that shares its weight with an embedding or is called lm_head, head, classifier or score; where there is
    none of these, the last linear layer.
    """
    inner = {m.base for m in model.modules() if isinstance(m, LOFTLinear)}     # an adapted layer is the outermost wrapper
    linear = {n: m for n, m in model.named_modules() if _shape(m) and m not in inner}
    if "" in linear:
        return {"": model}
    linear = {n: m for n, m in linear.items() if not any(k.startswith(n + ".") for k in linear)}
    if targets is None:
        linear = {n: m for n, m in linear.items() if not isinstance(m, (nn.Conv2d, LOFTConv2d))}
    if not linear:
        raise ValueError("the model has no linear layer inside it")
    if targets is None:
        embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        output = getattr(model, "get_output_embeddings", lambda: None)()
        heads = {n for n, m in linear.items() if m is output or id(getattr(m, "weight", None)) in embeddings
                 or n.rsplit(".", 1)[-1] in ("lm_head", "head", "classifier", "score")} or {list(linear)[-1]}
        found = {n: m for n, m in linear.items() if n not in heads}
        if not found:
            raise ValueError(f"every linear layer is an output head ({', '.join(heads)}); name the targets")
        return found
    if callable(targets):
        names = [n for n, m in linear.items() if targets(n, m)]
    else:
        names = _matches(list(linear), targets)
    if not names:
        shown = ", ".join(list(linear)[:8])
        raise ValueError(f"targets={targets!r} match no linear layer; the model has {len(linear)}: {shown}, …")
    return {n: linear[n] for n in names}


def layers(model: nn.Module, name: str | None = None) -> list[tuple[str, LOFTLinear]]:
    """(name, layer) of every adapted layer, of one adapter or of all; of several on one layer, the last put on comes first."""
    found = {}
    for n, m in model.named_modules():
        if isinstance(m, LOFTLinear):
            parent = n.removesuffix(".base")
            found[n] = (found[parent][0] if n != parent and parent in found else n, m)
    return [(n, m) for n, m in found.values() if name in (None, m.name)]


def _adapted(model: nn.Module, name: str | None = None, single: bool = False) -> list[tuple[str, LOFTLinear]]:
    """`layers`, or a ValueError where there are none; with `single`, also where there are several adapters to choose from."""
    found, names = layers(model, name), sorted({m.name for _, m in layers(model)})
    if not found:
        raise ValueError(f"the model has no adapter {name!r}, it has: {', '.join(names)}" if names else
                         "the model is not adapted: call loft.adapt (or loft.load) first")
    if single and name is None and len(names) > 1:
        raise ValueError(f"the model has several adapters, {', '.join(names)}: say which by name=")
    return found


def _outermost(model: nn.Module) -> list[tuple[str, LOFTLinear]]:
    """The last adapter of every adapted layer, which holds the others."""
    found = _adapted(model)
    inner = {m.base for _, m in found}
    return [(n, m) for n, m in found if m not in inner]


@torch.no_grad()
def merge(model: nn.Module, name: str | None = None, dtype: torch.dtype | None = None) -> nn.Module:
    """Folds rotations into their weights, in place, and puts the plain layers back (still frozen). Returns the model.

    Computed in float32 or wider, so it equals the adapted model to rounding in the weight's dtype (`merge_error` says how
    much that is in bf16), or in `dtype`. A weight that is shared with another layer (a tied head) is not touched: the
    merged layer gets its own. All adapters, the first put on first, or the one called `name`, if nothing lies under it.
    """
    found = _adapted(model, name)[::-1]
    for n, layer in found:
        if not _mergeable(layer):
            raise ValueError(f"layer {n!r}: a {type(_plain(layer)).__name__} has no floating weight to merge into; keep it adapted")
        if name is not None and isinstance(layer.base, LOFTLinear):
            raise ValueError(f"layer {n!r}: adapter {layer.base.name!r} lies under {name!r}; merge that one first")
        if not layer.enabled:
            raise ValueError(f"layer {n!r}: adapter {layer.name!r} is switched off; switch it on first (loft.use)")
        if not all(t.isfinite().all() for t in layer.adapter_state().values()):
            raise ValueError(f"layer {n!r}: its rotation is not finite")
    if was_fused := any(layer.fused is not None for _, layer in found):
        importlib.import_module(__name__ + ".kernels").unfuse(model)          # takes its hooks off the model
    for _, layer in found:                                                    # one by one: at any moment the model computes the same
        weight = layer.exact_weight().to(dtype or layer.base.weight.dtype)
        layer.base.weight = nn.Parameter(weight, requires_grad=layer.base.weight.requires_grad)
        model = _replace(model, {layer: layer.base})
    return importlib.import_module(__name__ + ".kernels").fuse(model) if was_fused and layers(model) else model


def _mergeable(layer: nn.Module) -> bool:
    """Whether the layer under all adapters keeps a floating weight as a parameter of its own."""
    weight = _plain(layer)._parameters.get("weight")
    return weight is not None and weight.is_floating_point()


def _plain(layer: nn.Module) -> nn.Module:
    """The layer under all adapters."""
    while isinstance(layer, LOFTLinear):
        layer = layer.base
    return layer


@torch.no_grad()
def merge_error(model: nn.Module, dtype: torch.dtype | None = None) -> dict[str, float]:
    """{layer: ‖round(W) − W‖_F / ‖W − W0‖_F}: how much of what was learned a merge into the weight's dtype (or `dtype`) rounds
    away. Layers that cannot be merged are left out.
    """
    errors = {}
    for n, layer in _outermost(model):
        if _mergeable(layer):
            W, W0 = layer.exact_weight(), _plain(layer).weight
            rounded, learned = W.to(dtype or W0.dtype).to(W.dtype), (W - W0.to(W.dtype)).norm()
            errors[n] = ((rounded - W).norm() / learned).item() if learned else 0.0
    return errors


@contextlib.contextmanager
def merged(model: nn.Module):
    """Inside `with loft.merged(model):` the rotations are folded into the weights, at the speed of the plain model; afterwards
    the weights are what they were, bit for bit (they are kept meanwhile: one more copy of the adapted weights)."""
    found = _outermost(model)
    for n, layer in found:
        if not _mergeable(layer):
            raise ValueError(f"layer {n!r}: a {type(_plain(layer)).__name__} has no floating weight to merge into")
    kept = [(_plain(layer), _plain(layer).weight) for _, layer in found]
    with torch.no_grad():
        weights = [layer.weight for _, layer in found]
    try:
        with disabled(model):
            for (base, W0), W in zip(kept, weights):
                base.weight = nn.Parameter(W, requires_grad=W0.requires_grad)
            yield model
    finally:
        for base, W0 in kept:
            base.weight = W0


@contextlib.contextmanager
def disabled(model: nn.Module, name: str | None = None):
    """Inside `with loft.disabled(model):` the model is the one before adaptation (or before that of one adapter)."""
    found = _adapted(model, name)
    was = [layer.enabled for _, layer in found]
    try:
        for _, layer in found:
            layer.enabled = False
        yield model
    finally:
        for (_, layer), enabled in zip(found, was):
            layer.enabled = enabled


def use(model: nn.Module, *names: str) -> nn.Module:
    """Switches the adapters called `names` on and all others off."""
    for name in names:
        _adapted(model, name)
    for _, layer in layers(model):
        layer.enabled = layer.name in names
    return model


def orthogonality_error(model: nn.Module) -> dict[str, float]:
    """{layer: max |RᵀR − I| on its support, in float64}; the largest where there are several rotations."""
    errors: dict[str, list[float]] = {}
    for n, layer in _adapted(model):
        errors.setdefault(n, []).extend(R.orthogonality_error() for R in (layer.rotation, layer.past) if R is not None)
    return {n: torch.tensor(e, dtype=torch.float64).max().item() for n, e in errors.items()}   # a NaN stays one


def check(model: nn.Module, batch, loss_fn: Callable | None = None) -> dict[str, str]:
    """{layer: what is wrong with its adapter}; empty when every one is reached, gets gradient, merges and is orthogonal.

    Args:
        batch: what the model takes (a tensor, a tuple of arguments or a dict of keywords), or what loss_fn(model, batch)
            takes; without loss_fn the gradient is that of a random linear function of the output.
    The entry "" speaks of the model as a whole: its output with merged weights against the adapted one.
    """
    def run():
        out = (loss_fn(model, batch) if loss_fn else model(**batch) if isinstance(batch, dict) else
               model(*batch) if isinstance(batch, tuple) else model(batch))
        return [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor) and t.is_floating_point()]

    found, reached, modes = _outermost(model), set(), [(m, m.training) for m in model.modules()]
    handles = [m.register_forward_hook(lambda m, *_: reached.add(m)) for _, m in found]
    try:
        model.eval()
        with torch.enable_grad():
            out, generator = run(), torch.Generator().manual_seed(0)
            if not out:
                raise ValueError("the model's output holds no floating tensor; give a loss_fn(model, batch)")
            loss = sum((t.float() * torch.randn(t.shape, generator=generator).to(t.device)).sum() for t in out)
        wrong = {n: problem for n, m in found if (problem := _problem(m, m in reached, loss))}
        if all(_mergeable(m) for _, m in found):
            with merged(model), torch.no_grad():
                folded = run()
            for a, b in zip(folded, out):
                if (a - b).abs().max() > {torch.float64: 1e-10, torch.float32: 1e-4}.get(a.dtype, 0.05) * b.abs().max():
                    wrong[""] = f"with merged weights the output differs by {(a - b).abs().max():.0e}"
    finally:
        for handle in handles:
            handle.remove()
        for m, mode in modes:
            m.training = mode
    return wrong


def _problem(layer: LOFTLinear, reached: bool, loss: Tensor) -> str | None:
    own = [p for k, p in layer.named_parameters() if not k.startswith("base.") and p.requires_grad]
    grads = torch.autograd.grad(loss, own, retain_graph=True, allow_unused=True) if own and loss.requires_grad else []
    if not layer.enabled:
        return "it is switched off (see loft.use)"
    if not own:
        return "none of its parameters require grad"
    if all(g is None for g in grads):
        return "it is reached, but gets no gradient" if reached else "it is never reached: its layer is bypassed, or not used for this batch"
    if not all(g.isfinite().all() for g in grads if g is not None):
        return "its gradient is not finite"
    if layer.rotation.strict and not (error := layer.rotation.orthogonality_error()) <= 1e-5:
        return f"|RᵀR − I| = {error:.0e}"
    return None


@torch.no_grad()
def refresh(model: nn.Module, support: dict[str, Tensor], optimizer: torch.optim.Optimizer | None = None, *,
            name: str | None = None) -> nn.Module:
    """Puts the learned rotations behind, as R_past ← R_past R (input side; R R_past on the output side), and starts
    anew from the identity in another support, which `selectors.select` chooses at this very point:

        loft.refresh(model, selectors.select(model, batches, loss_fn, rank), optimizer)

    Outputs do not change but for rounding. R_past = I + P (T − I) Pᵀ stays one rotation, with P an orthonormal basis of
    all supports so far, so W0 stays as it is (a quantised or tied one too) and `save` stays compact. Layers that
    `support` does not name go on as they are.

    In `optimizer` the new generators take the place of the old, with no state: moments are kept per entry of a
    generator, and in another support an entry is another plane.
    """
    found, outermost = dict(_adapted(model, name, single=True)), {m for _, m in _outermost(model)}
    if unknown := [n for n in support if n not in found]:
        raise ValueError(f"layer {unknown[0]!r} is not adapted; adapted are: {', '.join(found)}")
    new = {}
    for n, P in support.items():
        layer, old = found[n], found[n].rotation
        try:
            if getattr(old, "P", None) is None:
                raise ValueError(f"method {layer.method!r} has no support to refresh")
            if layer not in outermost or layer.magnitude is not None and layer.side == "output":
                raise ValueError("something is applied after this rotation (another adapter, or the magnitude), so a support chosen "
                                 "for the layer as it is now does not fit here")
            rotation = Rotation(old.d, P, dtype=old.dtype, **{k: v for k, v in old.config.items() if k != "d"}).to(old.device)
            both = (layer.past, old) if layer.side == "input" else (old, layer.past)
            new[n] = rotation, _product(*(R for R in both if R is not None))
        except ValueError as e:
            raise ValueError(f"layer {n!r}: {e}") from None
    for n, (rotation, past) in new.items():
        layer = found[n]
        swap = dict(zip(layer.rotation.parameters(), rotation.parameters()))
        for group in optimizer.param_groups if optimizer else ():
            group["params"] = [swap.get(p, p) for p in group["params"]]
        for p in swap if optimizer else ():
            optimizer.state.pop(p, None)
        layer.rotation, layer.past = rotation, past
    return importlib.import_module(__name__ + ".kernels").fuse(model) if any(m.fused is not None for m in found.values()) else model


def _product(*rotations: Rotation) -> Rotation:
    """R_1 R_2 … as one frozen rotation I + P (T − I) Pᵀ: P spans all supports, T = Pᵀ R_1 R_2 … P. In float64."""
    like = rotations[0]
    U, s, _ = torch.linalg.svd(torch.cat([_wide(R.P) for R in rotations], 1), full_matrices=False)
    P = U[:, s > 1e-6]
    T = eye = torch.eye(P.shape[1], dtype=P.dtype, device=P.device)
    for R in rotations:
        C = P.mT @ _wide(R.P)                                                 # PᵀRP = I + (PᵀP_i)(T_i − I)(PᵀP_i)ᵀ
        T = T + T @ C @ _wide(R.difference()) @ C.mT
    R = Rotation(like.d, P, "fixed", dtype=like.dtype).to(like.device)
    R.transform.D.copy_(T - eye)
    return R


def regularizer(model: nn.Module) -> Tensor:
    """The papers' soft orthogonality, to add to the loss with a weight λ; 0 for methods that have none.

    HRA: Σ ‖VᵀV − I‖_F² over layers, V the unit u's (large λ makes reflections commute). qGOFT: Σ ⟨α_i, β_i⟩² over
    all 2 × 2 matrices G̃_i = (α_i, β_i).
    """
    terms = []
    for _, layer in _adapted(model):
        T = getattr(layer.rotation, "transform", None)
        if isinstance(T, Householder):
            V = T.u / torch.linalg.vector_norm(T.u, dim=0)
            terms.append((V.mT @ V - torch.eye(V.shape[1], dtype=V.dtype, device=V.device)).square().sum())
        elif isinstance(T, Givens) and T.relaxed:
            G = T.blocks() + torch.eye(2, dtype=T.generator.dtype, device=T.generator.device)
            terms.append((G[..., 0] * G[..., 1]).sum(-1).square().sum())
    return sum(terms, torch.zeros((), device=_device(model)))


def save(model: nn.Module, path, *, name: str | None = None) -> None:
    """Writes the adapter (supports, generators, settings; of several, the one called `name`) and whatever else of the model
    is trainable to `path`.

    Written beside `path` and then moved over it: an interrupted save leaves the older file. P itself is stored,
    since a support computed again elsewhere is another one up to sign, rotation or worse. The file is torch.save's,
    followed by the SHA-256 of its bytes.
    """
    payload = _payload(model, name)
    torch.save(payload, buffer := io.BytesIO())
    path, data = os.fspath(path), buffer.getvalue()
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as f:
            f.write(data + hashlib.sha256(data).digest())
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def load(model: nn.Module, path, *, name: str = "default") -> nn.Module:
    """Puts the adapter at `path` on `model` under `name`: put on new, as the file says, or into one of that name, which
    must agree.

    Nothing is executed from the file (weights_only). Everything is checked before the model is touched.
    Raises ValueError naming each layer, shape or setting that differs, or saying that the file is not an adapter.
    """
    path = os.fspath(path)
    with open(path, "rb") as f:
        data = f.read()
    if hashlib.sha256(data[:-32]).digest() != data[-32:]:
        raise ValueError(f"{path} is not a LOFT adapter file, or is damaged")
    try:
        payload = torch.load(io.BytesIO(data[:-32]), map_location="cpu", weights_only=True)
    except Exception as e:                                                    # e.g. pickled code, which weights_only refuses
        raise ValueError(f"{path} is not a LOFT adapter file: {str(e).splitlines()[0]}") from e
    if not isinstance(payload, dict) or (payload.get("format"), payload.get("version")) != ("loft", 1):
        found = f"format {payload.get('format')!r}, version {payload.get('version')!r}" if isinstance(payload, dict) else type(payload).__name__
        raise ValueError(f"{path} is not a LOFT adapter file of version 1: it holds {found}")
    try:
        return _attach(model, payload, path, name)
    except (KeyError, TypeError, AttributeError, RuntimeError) as e:          # a well-formed file with nonsense in it
        raise ValueError(f"{path} is not a LOFT adapter file, or is damaged: {type(e).__name__} {e}") from e


def from_peft(source, model: nn.Module | None = None) -> nn.Module:
    """Takes over an adapter trained with peft's OFT, BOFT, HRA, PSOFT or LoRA: same outputs, and it trains on.

    Args:
        source: a PeftModel (its adapter is taken off, and its base model adapted here instead), or the folder that
            save_pretrained wrote, with `model` the base model to adapt.
    What has no counterpart here (a setting, a kind of layer) is refused by name.
    """
    bases, payload, unload = importlib.import_module(__name__ + ".interop").read_peft(source, model)
    for name, spec in payload["layers"].items():                              # all of it fits, before anything is taken apart
        _from_spec(bases[name], spec, "default", name)
    return _attach(unload(), payload, "the peft adapter", "default")


def to_peft(model: nn.Module, path) -> None:
    """Writes the model's adapter to the folder `path` for PeftModel.from_pretrained(base, path); see `from_peft`."""
    weights = {n: _matrix(layer.base) for n, layer in _adapted(model)}
    importlib.import_module(__name__ + ".interop").write_peft(_payload(model), weights, path)


def _payload(model: nn.Module, name: str | None = None) -> dict:
    """What `save` writes: plain containers and tensors."""
    trainable = {n: p.detach().cpu() for n, p in _plain_parameters(model).items() if p.requires_grad}
    return {"format": "loft", "version": 1, "trainable": trainable,
            "layers": {n: _spec(layer) for n, layer in _adapted(model, name, single=True)}}


def _spec(layer: LOFTLinear) -> dict:
    """All that `_from_spec` needs to build the adapter of a layer again."""
    return dict(method=layer.method, side=layer.side, shape=list(_shape(layer)), config=layer.rotation.config,
                dtype=str(layer.rotation.dtype).removeprefix("torch."), state={k: v.cpu() for k, v in layer.adapter_state().items()})


def _from_spec(base: nn.Module, spec: dict, adapter: str, name: str) -> LOFTLinear:
    """`base` wrapped as `_spec` says; a ValueError naming the layer where they do not fit."""
    if list(_shape(base)) != list(spec["shape"]):
        raise ValueError(f"layer {name!r} has shape {tuple(spec['shape'])} (in, out) in the file, {_shape(base)} in the model")
    state, config = spec["state"], spec["config"]
    options = {k: v for k, v in config.items() if k not in ("d", "out", "transform")}
    if "rotation.gauge" in state:
        options["gauge"] = state["rotation.gauge"]
    try:
        layer = _build(base, adapter, spec["method"], spec["side"], state.get("rotation.P"), "magnitude" in state,
                       config["transform"], options, getattr(torch, spec["dtype"]))
        if "past.P" in state:
            layer.past = Rotation(layer.rotation.d, state["past.P"], "fixed", dtype=layer.rotation.dtype).to(_device(base))
        differ = {k for k in layer.adapter_state().keys() | state.keys()
                  if k not in state or k not in layer.adapter_state() or state[k].shape != layer.adapter_state()[k].shape}
        if differ:
            raise ValueError(f"{', '.join(sorted(differ))} missing, unknown or of another shape")
        layer.load_state_dict(state, strict=False)
    except ValueError as e:
        raise ValueError(f"layer {name!r}: {e}") from None
    return layer


def _plain_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """{name as in the plain model: parameter} of everything but adapters."""
    wrappers = sorted((n for n, m in model.named_modules() if isinstance(m, LOFTLinear)), key=len, reverse=True)
    own, found = {id(p) for _, m in layers(model) for k, p in m.named_parameters() if not k.startswith("base.")}, {}
    for n, p in model.named_parameters():
        for w in wrappers:                                                    # innermost first
            prefix = f"{w}." if w else ""
            n = prefix + n.removeprefix(prefix + "base.") if n.startswith(prefix + "base.") else n
        if id(p) not in own:
            found[n] = p
    return found


def _build(base: nn.Module, name: str, method: str, side: str, P: Tensor | None, magnitude: bool, transform: str, options: dict,
           dtype: torch.dtype | None = None) -> LOFTLinear:
    """One wrapped layer, in the precision of its weight (float32 at least) and on its device."""
    if dtype is None:
        W = getattr(base, "weight", None)
        dtype = torch.promote_types(W.dtype if isinstance(W, Tensor) and W.is_floating_point() else torch.float32, torch.float32)
    if getattr(base, "groups", 1) != 1:
        raise ValueError(f"a convolution with groups={base.groups} has no one input side to rotate; leave it out of targets")
    if transform == "lora":
        adapter = LoRA(*_shape(base), dtype=dtype, **options)
    else:
        adapter = Rotation(_shape(base)[SIDES.index(side)], P, transform, dtype=dtype, **options)
    layer = LOFTConv2d if isinstance(base, (nn.Conv2d, LOFTConv2d)) else LoRALinear if transform == "lora" else LOFTLinear
    return layer(base, adapter.to(_device(base)), side, method, magnitude, name).train(base.training)


def _attach(model: nn.Module, payload: dict, origin: str, adapter: str) -> nn.Module:
    """Puts a `_payload` on the model as a new adapter, or into the one of that name if it agrees; all or nothing."""
    targets = {n: m for n, m in model.named_modules() if _shape(m)}
    parameters, adapted, new = _plain_parameters(model), dict(layers(model, adapter)), {}
    wrong = [f"layer {n!r} is adapted in the model but not in the file" for n in adapted if n not in payload["layers"]]
    for name, spec in payload["layers"].items():
        if adapted and name not in adapted:
            wrong.append(f"layer {name!r} is adapted in the file but not in the model")
        elif name not in targets:
            wrong.append(f"layer {name!r} is not in the model{_nearest(name, targets)}")
        else:
            old = adapted.get(name)
            try:
                new[name] = _from_spec(old.base if old else targets[name], spec, adapter, name)
            except ValueError as e:
                wrong.append(str(e))
                continue
            if old:
                keys = lambda layer: {k: tuple(v.shape) for k, v in layer.adapter_state().items() if not k.startswith("past.")}
                pairs = (("method", spec["method"], old.method), ("side", spec["side"], old.side), ("rank", new[name].rotation.r, old.rotation.r),
                         ("setting", spec["config"], old.rotation.config), ("state", keys(new[name]), keys(old)))
                wrong += [f"layer {name!r}: {what} is {there!r} in the file, {here!r} in the model" for what, there, here in pairs
                          if there != here][:1]
    for name, value in payload["trainable"].items():
        has = parameters[name].shape if name in parameters else None
        if has != value.shape:
            wrong.append(f"parameter {name!r} has shape {tuple(value.shape)} in the file, {has and tuple(has)} in the model")
    if wrong:
        raise ValueError(f"{origin} does not fit this model:\n  " + "\n  ".join(wrong))

    for name, layer in new.items() if adapted else ():                        # in place: an optimizer may hold the parameters
        adapted[name].past = layer.past
        adapted[name].load_state_dict(layer.adapter_state(), strict=False)
    if not adapted:
        model.requires_grad_(False)
        model = _replace(model, {targets[name]: layer for name, layer in new.items()})
    with torch.no_grad():
        for name, value in payload["trainable"].items():
            parameters[name].copy_(value).requires_grad_(True)
    return model


# ---------------------------------------------------------------------------------------------------------
# Supports from the weight alone, and small helpers
# ---------------------------------------------------------------------------------------------------------

def principal(W: Tensor, r: int, svd: str = "auto") -> Tensor:
    """Top r right singular vectors of W (out, in) → P (in, r), float32 or wider (PSOFT, arXiv 2505.11235).

    svd="full" is exact; "lowrank" is torch.svd_lowrank with six subspace iterations; "auto" takes it for large
    weights at a small rank (min(out, in) > 2048 and 8 r below it). r above min(out, in) goes on into the null space.
    """
    W, short = W.detach().to(torch.promote_types(W.dtype, torch.float32)), min(W.shape)
    if not W.isfinite().all():
        raise ValueError("its weight is not finite")
    if svd == "lowrank" or svd == "auto" and short > 2048 and 8 * r < short:
        return torch.svd_lowrank(W, q=min(r + 16, short), niter=6)[2][:, :r].contiguous()
    return torch.linalg.svd(W, full_matrices=r > short)[2][:r].mT.contiguous()


def random(W: Tensor, r: int) -> Tensor:
    """A uniformly random r-dimensional support of W (out, in) → P (in, r), from torch's generator."""
    return torch.linalg.qr(torch.randn(W.shape[1], r, dtype=torch.promote_types(W.dtype, torch.float32)))[0].to(W.device)


def _resolve_support(support, name: str, base: nn.Module, side: str, rank, transform: str, svd: str) -> tuple[Tensor | None, dict]:
    """The support of one layer, P (d, r) or None for all coordinates, and further options of its transform."""
    d = _shape(base)[SIDES.index(side)]
    for what, value in (("rank", rank), ("support", support)):
        if isinstance(value, dict) and name not in value:
            raise ValueError(f"no {what} for this layer in the dict given")
    r = rank[name] if isinstance(rank, dict) else rank
    support = support[name] if isinstance(support, dict) else support
    if isinstance(r, bool) or not isinstance(r, int | None):
        raise TypeError(f"rank={r!r} is not an int")
    if transform == "lora":
        return None, {} if r is None else {"rank": r}
    if isinstance(support, Tensor):
        if r not in (None, support.shape[-1]):
            raise ValueError(f"rank={r}, but the support given has {support.shape[-1]} columns")
        return support, {}
    if support == "all":
        if r is not None and transform != "householder":
            raise ValueError(f"rank={r} means nothing to a {transform!r} of all {d} coordinates; "
                             "its size is set by its options (block_size, stages), or choose another support")
        return None, {} if r is None else {"reflections": r}
    r = min(32, d) if r is None else r
    if not 1 <= r <= d:
        raise ValueError(f"rank={r} must be between 1 and the dimension, {d}")
    if support in ("principal", "minor", "random"):
        if _weight(base) is None:
            raise ValueError(f"a {type(base).__name__} has no floating weight for support={support!r}; give a tensor")
        W = _matrix(base)
        if support == "minor":
            choose = importlib.import_module(__name__ + ".selectors").minor
        else:
            choose = random if support == "random" else lambda W, r: principal(W, r, svd)
        return choose(W if side == "input" else W.mT, r), {}
    if support in ("coordinate", "activation", "gradient", "paired", "skew"):
        raise ValueError(f"support={support!r} needs data: P = selectors.select(model, batches, loss_fn, rank, "
                         f"kind={support!r}), then adapt(model, support=P)")
    raise ValueError(_unknown("support", support, ("principal", "minor", "random", "all", "coordinate", "activation",
                                                   "gradient", "paired", "skew")))


def _check_support(P: Tensor, d: int) -> int:
    """The rank of a valid support; otherwise a ValueError."""
    if P.ndim != 2 or P.shape[0] != d or not 1 <= P.shape[1] <= d:
        raise ValueError(f"the support has shape {tuple(P.shape)}, expected ({d}, r) with r ≤ {d}")
    if not P.is_floating_point() or not P.isfinite().all():
        raise ValueError(f"the support ({P.dtype}) has to be floating and finite")
    P = P.double() if P.device.type != "mps" else P.float()
    error = (P.mT @ P - torch.eye(P.shape[1], dtype=P.dtype, device=P.device)).abs().max().item()
    if error > 1e-5:
        raise ValueError(f"the support is not orthonormal: |PᵀP − I| = {error:.1e} > 1e-5; use torch.linalg.qr(P.float())[0]")
    return P.shape[1]


def _matches(names: list[str], wanted) -> list[str]:
    """Names that a regex finds, or a list means (an entry is one or more whole dotted components)."""
    if isinstance(wanted, str):
        try:
            return [n for n in names if re.search(wanted, n)]
        except re.error as e:
            raise ValueError(f"{wanted!r} is not a regular expression: {e}") from None
    wanted = list(wanted or ())
    for w in wanted:
        if not any(f".{w}." in f".{n}." for n in names):
            raise ValueError(f"{w!r} is none of the model's names" + _nearest(w, names))
    return [n for n in names if any(f".{w}." in f".{n}." for w in wanted)]


def _weight(module: nn.Module) -> Tensor | None:
    """Its floating weight, if it has one."""
    weight = getattr(module, "weight", None)
    return weight if isinstance(weight, Tensor) and weight.is_floating_point() else None


def _shape(module: nn.Module) -> tuple[int, int] | None:
    """(in, out) of a layer that can be adapted: linear-like, transformers' Conv1D, or Conv2d with in = channels × kernel."""
    if isinstance(module, nn.Conv2d):
        return module.weight[0].numel(), module.out_channels
    if isinstance(getattr(module, "nf", None), int) and not isinstance(module, LOFTLinear):
        return tuple(module.weight.shape) if isinstance(_weight(module), Tensor) and module.weight.ndim == 2 else None
    shape = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return shape if all(isinstance(n, int) for n in shape) else None


def _matrix(module: nn.Module) -> Tensor:
    """The weight as (out, in): Conv1D stores its transpose, a convolution (out, channels, height, width)."""
    weight = module.exact_weight() if isinstance(module, LOFTLinear) and module.enabled else module.weight
    return weight.mT if hasattr(module, "nf") else weight.flatten(1)


def _replace(model: nn.Module, new: dict[nn.Module, nn.Module]) -> nn.Module:
    """Puts new[m] in every place where module m stands; returns the model, or what stands for it."""
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if child in new:
                parent._modules[key] = new[child]
    return new.get(model, model)


def _device(module: nn.Module) -> torch.device:
    return next((t.device for group in (module.parameters(), module.buffers()) for t in group), torch.device("cpu"))


def _nearest(value, valid: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(value), list(valid), n=3)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""


def _unknown(what: str, value, valid: Iterable[str]) -> str:
    return f"unknown {what} {value!r}{_nearest(value, valid)} Valid: {', '.join(valid)}"


def _around(value, good: Iterable[int]) -> str:
    """The valid numbers nearest to an invalid one, for an error message."""
    value = value if isinstance(value, int) else 0
    return ", ".join(map(str, sorted(sorted(good, key=lambda k: abs(k - value))[:3])))
