"""LOFT: low-rank orthogonal fine-tuning.

A frozen weight W0 (out × in) is adapted by a rotation of a small subspace (LOFT, arXiv 2605.11872):

    W = W0 R,    R = I + P (T − I) Pᵀ,    PᵀP = I_r,  TᵀT = I_r          (side="input")
    W = R W0,    the same R, with P (out × r)                            (side="output")

The **support** P says where to adapt, the **transform** T how. R is orthogonal for every P and T, is the identity off
span(P), and is I at the start. On activations (rows x), no rotated weight is ever formed:

    z = x P,    y = base(x + z (Tᵀ − I) Pᵀ)

    import loft                                        # five lines of use
    model = loft.adapt(model, rank=32)                 # in place: base frozen, rotations train
    train(model)                                       # any optimizer over the parameters that require grad
    loft.save(model, "adapter.pt")                     # the adapter alone
    model = loft.merge(model)                          # plain layers again

This file stands alone on torch ≥ 2.6 and can be copied by itself. Beside it, selectors.py chooses supports from the
downstream gradient.
"""
from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib
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
FROM_WEIGHT, FROM_DATA = ("principal", "minor", "random"), ("coordinate", "activation", "gradient", "paired", "rescored", "skew")

# name: support, transform, further options; `adapt` takes any of them as an override.
METHODS = {
    "loft": dict(support="principal", transform="cayley"),                    # arXiv 2605.11872
    "psoft": dict(support="principal", transform="cayley", scale=True),       # arXiv 2505.11235
    "oft": dict(support="all", transform="block"),                            # arXiv 2306.07280, 2506.19847
    "boft": dict(support="all", transform="butterfly"),                       # arXiv 2311.06243
    "goft": dict(support="all", transform="givens"),                          # arXiv 2404.04316
    "hra": dict(support="all", transform="householder"),                      # arXiv 2405.17484
    "lora": dict(support=None, transform="lora"),                             # arXiv 2106.09685: for comparison, no rotation
}


# ------------------------------------------------------------------------------------ transforms
# An orthogonal T (r × r), applied to rows z (…, r) as z ↦ z Tᵀ. Each is the identity, to the last bit, at the start, so each
# computes the difference  delta(z) = z (T − I)ᵀ  rather than z Tᵀ. All are built in float64 (float32 on MPS) and handed over
# in the parameters' precision, float32 at least.

def _wide(x: Tensor) -> Tensor:
    return x.float() if x.device.type == "mps" else x.double()


def _single(dtype: torch.dtype) -> torch.dtype:
    """float32, or `dtype` where that is wider."""
    return torch.promote_types(dtype, torch.float32)


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
    """T − I for OFTv2's truncated series (arXiv 2506.19847), T ≈ (I + Q)(I + Q + … + Q^(terms−2)), of a skew Q (…, b, b).
    Orthogonal only up to ‖TᵀT − I‖ = O(‖Q‖^(terms−1)): bound ‖Q‖ (see `Skew`), or read `orthogonality_error`."""
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
    Their derivative along the orthogonal group is the identity, so autograd may pass them by."""
    with torch.no_grad():
        X = D
        for _ in range(2):
            E = X + X.mT + X.mT @ X                                           # TᵀT − I, written in X = T − I
            X = X - (E + X @ E) / 2
    return D + (X - D).detach()


class Skew(nn.Module):
    """T = T_1 T_2 … T_m (r × r), each stage block-diagonal: blocks (b × b) that are a map of a learned skew generator.

    `cayley`, `cayley_neumann` and `expm` are one stage with one block of size r; `block` (OFT) is one stage of r/b blocks;
    `butterfly` (BOFT) is m stages, where stage s joins half-blocks that lie 2^s half-blocks apart.

    Args:
        block_size: b, a divisor of r (default: r); stages: m; stage s needs b·2^s to divide r.
        map: "cayley", "cayley_neumann" or "expm"; terms: matrices in the Cayley–Neumann series (5 in OFTv2).
        bound: Frobenius bound on each block's Q, which is scaled back when longer (COFT's ε; OFTv2's norm bound).
        share: one generator for all blocks of a stage (OFT's block sharing).
    Parameters: generator (m, blocks or 1, b(b−1)/2), zero at the start. Raises ValueError for what does not fit.
    """

    def __init__(self, r: int, block_size: int | None = None, stages: int = 1, map: str = "cayley",
                 terms: int = 5, bound: float | None = None, share: bool = False):
        super().__init__()
        b = r if block_size is None else block_size
        if not (isinstance(b, int) and 1 <= b <= r and r % b == 0):
            good = _around(b, (k for k in range(1, r + 1) if r % k == 0))
            raise ValueError(f"block_size={b} does not divide {r}; nearest that do: {good}")
        most = next(s for s in itertools.count(1) if b % 2 or r % (b << s))   # stages that b·2^s | r allows
        _require(isinstance(stages, int) and 1 <= stages <= most, f"stages={stages} with blocks of {b} in {r} dimensions: must "
                 f"be 1 to {most} (stage s joins blocks of {b}·2^s, which has to divide {r})")
        _one_of("map", map, ("cayley", "cayley_neumann", "expm"))
        _require(map != "cayley_neumann" or terms >= 2, f"terms={terms}: the Cayley–Neumann series needs at least 2 (I + 2Q)")
        _require(bound is None or bound > 0, f"bound={bound} must be positive (or None)")
        self.r, self.b, self.map, self.terms, self.bound = r, b, map, terms, bound
        self.generator = nn.Parameter(torch.zeros(stages, 1 if share else r // b, b * (b - 1) // 2))

    def blocks(self) -> Tensor:
        """T − I of every block, (m, blocks, b, b), in the generator's dtype (float32 or wider)."""
        with _uncast(self.generator.device):
            Q = skew(_wide(self.generator), self.b)
            if self.bound is not None:                                        # Q ← Q min(1, bound / ‖Q‖_F), block by block
                square = Q.square().sum((-2, -1), keepdim=True).clamp(min=self.bound ** 2)   # smooth at Q = 0, too
                Q = Q * (self.bound * square.rsqrt())
            D = (cayley_neumann(Q, self.terms) if self.map == "cayley_neumann" else
                 expm(Q) if self.map == "expm" else cayley(Q))
            return D.to(_single(self.generator.dtype))

    def delta(self, z: Tensor) -> Tensor:
        """z (T − I)ᵀ for rows z (…, r)."""
        D = self.blocks().to(z.dtype)
        if len(D) == 1:
            return self._stage(z, D[0], 0)
        y = z
        for s in reversed(range(len(D))):                                     # z Tᵀ = z T_mᵀ … T_1ᵀ
            y = y + self._stage(y, D[s], s)
        return y - z

    def _stage(self, z: Tensor, D: Tensor, s: int) -> Tensor:
        """z (T_s − I)ᵀ: bring together what makes up a block of z (…, r), multiply block by block, put back."""
        if self.b == self.r:
            return z @ D[0].mT
        pieces = (2, 2 ** s, self.b // 2) if s else (1, 1, self.b)            # half-blocks, 2^s half-blocks apart
        z = z.unflatten(-1, (-1, *pieces)).transpose(-3, -2)                  # (…, groups, 2^s, 2, b/2)
        y = torch.einsum("...nb,ncb->...nc", z.flatten(-2).flatten(-3, -2),   # (…, blocks, b)
                         D.expand(self.r // self.b, -1, -1))
        return y.reshape(z.shape).transpose(-3, -2).flatten(-4)


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
        return g.unflatten(-1, (2, 2)).to(_single(self.generator.dtype))

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

    def regularizer(self) -> Tensor:
        """qGOFT's Σ ⟨α_i, β_i⟩² over its matrices G_i = (α_i, β_i); a rotation's columns are orthogonal as they are."""
        G = self.blocks() + torch.eye(2, dtype=self.generator.dtype, device=self.generator.device)
        return (G[..., 0] * G[..., 1]).sum(-1).square().sum()


class Householder(nn.Module):
    """T = H_1 H_2 … H_k, H_i = I − 2 u_i u_iᵀ / ‖u_i‖² (HRA, arXiv 2405.17484, eq. 2), in compact WY form.

    With unit columns V = [v_1 … v_k]:  T = I − V S⁻¹ Vᵀ,  S = ½ I + strictly upper part of VᵀV  (k × k).
    The u come in equal pairs at the start, so T = I; a pair (a, b) is carried as (a, b − a), which makes that exact to the
    last bit. An odd k has det T = −1 and cannot start at the identity: ValueError.
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
            a, b = v[:, 0::2], v[:, 1::2]
            V = torch.stack([a, b - a], -1).flatten(-2)                       # (r, k)
            # in this basis S = strictly upper part of VᵀV + ½ diag(VᵀV) + ½ [[0, 1], [−1, 0]] for every pair
            G, half = V.mT @ V, (torch.arange(1, V.shape[1], device=V.device) % 2 / 2).to(V.dtype)
            S = torch.triu(G, 1) + torch.diag(G.diagonal() / 2) + torch.diag(half, 1) - torch.diag(half, -1)
            K = torch.linalg.inv(S)
            V, K = (t.to(_single(self.u.dtype)).to(z.dtype) for t in (V, K))
        return -((z @ V) @ K.mT) @ V.mT

    def regularizer(self) -> Tensor:
        """HRA's ‖VᵀV − I‖_F², V the unit u's: a large weight on it makes the reflections commute."""
        V = self.u / torch.linalg.vector_norm(self.u, dim=0)
        return (V.mT @ V - torch.eye(V.shape[1], dtype=V.dtype, device=V.device)).square().sum()


class Fixed(nn.Module):
    """A given T, as T − I in the buffer D (r, r): rotations that `refresh` has put behind."""

    def __init__(self, r: int):
        super().__init__()
        self.register_buffer("D", torch.zeros(r, r))

    def delta(self, z: Tensor) -> Tensor:
        return z @ self.D.to(z.dtype).mT


TRANSFORMS = {  # name: (class, what makes it this one, what a user may set and its default)
    "cayley": (Skew, dict(map="cayley"), dict(bound=None)),
    "cayley_neumann": (Skew, dict(map="cayley_neumann"), dict(terms=5, bound=0.9)),
    "expm": (Skew, dict(map="expm"), dict(bound=None)),
    "block": (Skew, {}, dict(block_size=None, map="cayley", terms=5, bound=None, share=False)),
    "butterfly": (Skew, {}, dict(block_size=None, stages=2, map="cayley", terms=5, bound=None, share=False)),
    "givens": (Givens, {}, dict(relaxed=False)),
    "householder": (Householder, {}, dict(reflections=8)),
}


def _transform(name: str, r: int, given: dict) -> tuple[nn.Module, dict]:
    """The transform called `name`, of size r, and every option a user may set: what is given, else the default."""
    if name == "fixed":
        return Fixed(r), {}
    _one_of("transform", name, TRANSFORMS)
    cls, own, settable = TRANSFORMS[name]
    for key in given:
        _require(key in settable, f"transform {name!r} has no option {key!r}; it has: {', '.join(settable)}")
    options = settable | given
    if name == "block" and options["block_size"] is None:                     # 32, or the next smaller that divides r
        options["block_size"] = max(b for b in range(1, 33) if r % b == 0)
    if name == "butterfly" and options["block_size"] is None:
        m = options["stages"] if options["stages"] in range(1, 64) else 1     # any other, `Skew` refuses
        options["block_size"] = max((b for b in (2, 4, 6, 8) if r % (b << m - 1) == 0), default=8)
    return cls(r, **own, **options), options


# ------------------------------------------------------------------------------------ the rotation and the layer

class _Adapter(nn.Module):
    """.half() and .bfloat16() only move an adapter, so it keeps its precision; the layer under it, `base`, is rounded."""

    def _apply(self, fn, recurse=True):
        keep = lambda t: t.to(new.device) if (new := fn(t)).dtype in (torch.float16, torch.bfloat16) else new
        for name, child in self.named_children() if recurse else ():
            child._apply(fn if name == "base" else keep)
        return super()._apply(keep, recurse=False)


class Rotation(_Adapter):
    """R = I + P (T − I) Pᵀ (d × d), orthogonal (arXiv 2605.11872); as a module it maps rows x (…, d) to x Rᵀ.

    Args:
        d: dimension that is rotated (in_features for side="input", out_features for side="output").
        support: P (d, r) with orthonormal columns, or None for all coordinates (P = I, r = d).
        transform: a name in `TRANSFORMS`; its options follow by keyword.
        scale: PSOFT's two vectors (arXiv 2505.11235): T becomes diag(β) T diag(α), no longer orthogonal; ones at the start.
        gauge: g (r,), for PSOFT's symmetric (PiSSA-like) split of the singular values: T becomes diag(g)⁻¹ T diag(g).
        dtype: of the parameters and of P; float32 or float64.
    Raises:
        ValueError: P is not a finite (d, r) matrix with |PᵀP − I| ≤ 1e-5, or an option does not fit.
    """

    def __init__(self, d: int, support: Tensor | None = None, transform: str = "cayley", *, scale: bool = False,
                 gauge: Tensor | None = None, dtype: torch.dtype = torch.float32, **options):
        super().__init__()
        self.d, self.r = d, d if support is None else _check_support(support, d)
        T, options = _transform(transform, self.r, options)
        _require(gauge is None or (gauge > 0).all(), "the gauge has zeros: the weight sends a direction of the support to 0, "
                 "which cannot be split evenly")
        self.config = dict(d=d, transform=transform, scale=scale, **options)  # rebuilds this module, with P, at load
        self.register_buffer("P", None if support is None else support.detach().to(dtype).clone())
        self.register_buffer("gauge", None if gauge is None else gauge.detach().to(dtype).clone())
        self.transform = T.to(dtype)
        self.alpha = nn.Parameter(torch.ones(self.r, dtype=dtype)) if scale else None
        self.beta = nn.Parameter(torch.ones(self.r, dtype=dtype)) if scale else None

    def _delta_in_support(self, z: Tensor) -> Tensor:
        """z (T − I)ᵀ, (…, r) → (…, r); with vectors, z (M − I)ᵀ for M = diag(β/g) T diag(α g)."""
        if self.alpha is None and self.gauge is None:
            return self.transform.delta(z)
        alpha, beta, g = (z.new_ones(()) if v is None else v for v in (self.alpha, self.beta, self.gauge))
        left, right, rest = (t.to(z.dtype) for t in (alpha * g, beta / g, alpha * beta - 1))   # αβ − 1 before bf16 rounds
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
        return self(torch.eye(self.d, dtype=self.dtype, device=self.device)).mT   # rows e_iᵀ Rᵀ are the columns of R

    def difference(self) -> Tensor:
        """T − I (r, r), scaling vectors included."""
        with _uncast(self.device):
            return self._delta_in_support(torch.eye(self.r, dtype=self.dtype, device=self.device)).mT

    def rotate(self, W: Tensor, side: str) -> Tensor:
        """W R = W + (W P)(T − I) Pᵀ (side="input"), or R W = W + P (T − I)(Pᵀ W) (side="output"); W (out, in)."""
        with _uncast(W.device):
            D, P, W = self.difference(), self.P, W.to(self.dtype)
            if side == "output":
                return W + (D @ W if P is None else P @ (D @ (P.mT @ W)))
            return W + (W @ D if P is None else (W @ P) @ D @ P.mT)

    @property
    def strict(self) -> bool:
        """Whether R is meant to be orthogonal: not with scaling vectors, qGOFT's relaxation or a truncated series."""
        T = self.transform
        return (self.alpha is None and self.gauge is None and not getattr(T, "relaxed", False)
                and getattr(T, "map", "") != "cayley_neumann")

    @torch.no_grad()
    def orthogonality_error(self) -> float:
        """max |RᵀR − I| on the support, in float64: with D = T − I,  Pᵀ(RᵀR − I)P = D + Dᵀ + Dᵀ(PᵀP)D  (PᵀP ≈ I)."""
        D = self.difference().double()
        G = D if self.P is None else self.P.double().mT @ self.P.double() @ D
        return (D + D.mT + D.mT @ G).abs().max().item()

    dtype = property(lambda self: next(itertools.chain(self.parameters(), self.buffers())).dtype)
    device = property(lambda self: _device(self))

    def extra_repr(self) -> str:
        return f"d={self.d}, r={self.r}, {self.config['transform']}"


class LoRA(_Adapter):
    """W0 + (α/r) B A (arXiv 2106.09685), A (r, in), B (out, r) = 0: what rotations are compared with, not one of them."""

    def __init__(self, d: int, out: int, rank: int = 8, lora_alpha: float | None = None, dtype: torch.dtype = torch.float32):
        super().__init__()
        _require(isinstance(rank, int) and rank >= 1, f"rank={rank} must be an int ≥ 1")
        self.d, self.r, self.scaling = d, rank, 1.0 if lora_alpha is None else lora_alpha / rank
        self.config = dict(d=d, out=out, rank=rank, lora_alpha=lora_alpha, transform="lora")
        self.A = nn.Parameter(torch.randn(rank, d, dtype=dtype) / d ** 0.5)
        self.B = nn.Parameter(torch.zeros(out, rank, dtype=dtype))

    dtype, device, strict = property(lambda self: self.A.dtype), property(lambda self: self.A.device), False

    def rotate(self, W: Tensor, side: str) -> Tensor:
        return W.to(self.dtype) + self.scaling * self.B @ self.A

    def orthogonality_error(self) -> float:
        return float("nan")


class LOFTLinear(_Adapter):
    """A frozen linear layer, rotated: y = base(x Rᵀ) for side="input", y = base(x) Rᵀ (bias apart) for "output".

    `base` is any module that is affine in its input and has in_features and out_features; side="input" never looks at its
    weight. `weight` and `bias` read as those of the merged layer, so that code which takes the weight and never calls
    forward (nn.MultiheadAttention's out_proj, say) still sees, and trains, the rotation.
    magnitude=True adds a learned scale for every output, s (out,), ones at the start (in OFT and BOFT).
    `past` is the product of the rotations before the last `refresh`: W = W0 R_past R, or R R_past W0.
    A second adapter wraps the first: its `base` is the LOFTLinear of the one put on before, and W0 that one's weight.
    Raises ValueError for an unknown side, or a rotation of another dimension than that side has.
    """

    def __init__(self, base: nn.Module, rotation: nn.Module, side: str = "input", method: str = "loft", magnitude: bool = False,
                 name: str = "default"):
        super().__init__()
        _one_of("side", side, SIDES)
        self.in_features, self.out_features = _shape(base)
        d = _shape(base)[SIDES.index(side)]
        _require(rotation.d == d, f"a rotation of {rotation.d} dimensions on a layer whose {side} side has {d}")
        self.base, self.rotation, self.side, self.method, self.name, self.enabled = base, rotation, side, method, name, True
        ones = torch.ones(self.out_features, dtype=rotation.dtype, device=rotation.device)
        self.magnitude = nn.Parameter(ones) if magnitude else None
        self.past: Rotation | None = None
        self.fused = None                                                     # set by kernels.fuse: the fast path

    bias = property(lambda self: self.base.bias)
    nf = property(lambda self: self.base.nf)                                  # marks transformers' Conv1D, a transposed weight

    @property
    def rotations(self) -> list[nn.Module]:
        """First to last."""
        return [R for R in (self.past, self.rotation) if R is not None]

    @property
    def plain(self) -> nn.Module:
        """The layer under all adapters."""
        return self.base.plain if isinstance(self.base, LOFTLinear) else self.base

    @property
    def mergeable(self) -> bool:
        """Whether the plain layer keeps a floating weight as a parameter of its own."""
        return _weight(self.plain) is not None and "weight" in self.plain._parameters

    @property
    def weight(self) -> Tensor:
        """The rotated weight diag(s) W0 R or diag(s) R W0, in W0's dtype and layout, differentiable."""
        if _weight(self.plain) is None:
            raise AttributeError(f"a {type(self.plain).__name__} has no floating weight to rotate")
        return self.exact_weight().to(self.plain.weight.dtype) if self.enabled else self.base.weight

    def exact_weight(self) -> Tensor:
        """The rotated weight in W0's layout, in the rotation's precision."""
        W = _matrix(self.base)
        for R in self.rotations:
            W = R.rotate(W, self.side)
        W = W if self.magnitude is None else self.magnitude[:, None] * W
        return W.mT if hasattr(self, "nf") else W.view(self.plain.weight.shape)

    def forward(self, input: Tensor) -> Tensor:
        if not self.enabled:
            return self.base(input)
        b = getattr(self.base, "bias", None)
        b = b() if callable(b) else b                                         # a method in torch.ao's quantised layers
        y = self._rotated(input, b) if self.fused is None else self.fused(self, input)   # the same, by kernels.py
        if self.magnitude is None:
            return y
        return y + (y if b is None else y - b.to(y.dtype)) * (self.magnitude - 1).to(y.dtype)   # s (y − b) + b, exact at s = 1

    def _rotated(self, x: Tensor, b: Tensor | None) -> Tensor:
        for R in self.rotations[::-1] if self.side == "input" else ():        # y = (x Rᵀ R_pastᵀ) W0ᵀ + b
            x = R(x)
        y = self.base(x)
        for R in self.rotations if self.side == "output" else ():             # y = (x W0ᵀ) R_pastᵀ Rᵀ + b
            y = y + R.delta(y if b is None else y - b.to(y.dtype))
        return y

    def adapter_state(self) -> dict[str, Tensor]:
        """Everything in state_dict() but the base layer."""
        return {k: v for k, v in self.state_dict().items() if not k.startswith("base.")}

    def extra_repr(self) -> str:
        return f"{self.name}, side={self.side}"


class LOFTConv2d(LOFTLinear):
    """A convolution with its kernel, as a matrix (out, channels × height × width), rotated: one thin product a forward pass."""

    _conv_forward = property(lambda self: self.base._conv_forward)

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.weight, self.bias)


class LoRALinear(LOFTLinear):
    """y = base(x) + (α/r) (x Aᵀ) Bᵀ (arXiv 2106.09685)."""

    def _rotated(self, x: Tensor, b: Tensor | None) -> Tensor:
        A, B = self.rotation.A.to(x.dtype), self.rotation.B.to(x.dtype)
        return self.base(x) + self.rotation.scaling * (x @ A.mT) @ B.mT


# ------------------------------------------------------------------------------------ functions of a model

Targets = "str | Iterable[str] | Callable[[str, nn.Module], bool] | None"


def adapt(model: nn.Module, targets: Targets = None, *, method: str = "loft", rank: int | dict[str, int] | None = None,
          support: str | Tensor | dict[str, Tensor] | None = None, transform: str | None = None, side: str = "input",
          magnitude: bool = False, svd: str = "auto", symmetric: bool = False, trainable: str | Iterable[str] = (), seed: int = 0,
          name: str = "default", backend: str = "eager", **options) -> nn.Module:
    """Wraps linear layers of `model` in rotations, in place, and freezes everything else. Outputs do not change.

    Args:
        targets: which layers. A regex (searched in the name), a list of names or of their last components, or a callable
            (name, module) → bool. None: the keys of a support dict, else all but the output head (see `target_layers`).
        method: a name in `METHODS`, which sets the defaults of support, transform and options.
        rank: r, one for all layers or {layer: r}; default 32 (a smaller layer: its dimension). With support="all" it is the
            number of reflections of `householder` (default 8) and is refused otherwise.
        support: "principal" (top singular vectors of W0), "minor", "random", "all" (every coordinate), an orthonormal
            tensor (d, r), or {layer: tensor}, as `selectors.select` returns for a gradient-chosen one.
        transform: a name in `TRANSFORMS`; `options` go to it (block_size, stages, bound, …) and to `Rotation` (scale).
        side: "input" (W0 R) or "output" (R W0). magnitude: also learn a scale for every output (see `LOFTLinear`).
        svd, symmetric: PSOFT's variants. Of support="principal": "full", "lowrank" (randomised) or "auto"; and whether the
            singular values are split evenly between the two factors (see `Rotation`'s gauge).
        trainable: further parameters that stay trainable, by name: a regex or a list, as in `targets`.
        seed: of random supports and of initial reflections.
        name: of this adapter. A second one, of another name, is put on top of the first (W0 R_1 R_2), which is frozen.
        backend: "eager", or "fused" for the fast twins in kernels.py (see `kernels.fuse`).
    Returns the model itself (of a bare linear layer: its wrapper).
    Raises ValueError, TypeError naming the layer, the value and what is valid; the model is then as it was.
    """
    _one_of("method", method, METHODS)
    _one_of("side", side, SIDES)
    _one_of("backend", backend, ("eager", "fused"))
    _one_of("svd", svd, ("auto", "full", "lowrank"))
    kernels = _beside("kernels") if backend == "fused" else None
    if adapted := [n for n, _ in layers(model, name)]:
        raise ValueError(f"the model already has an adapter {name!r} (on {adapted[0]} and {len(adapted) - 1} more layers); "
                         "merge it first, or give this one another name")
    preset = METHODS[method]
    support = preset["support"] if support is None else support
    transform = transform or preset["transform"]
    options = {k: v for k, v in (preset | options).items() if k not in ("support", "transform")}
    named = support if isinstance(support, str) else None
    _require("lora" not in (method, transform) or method == transform and support is None and side == "input",
             "method='lora' is not a rotation: it takes rank and lora_alpha, no support, transform or side")
    _require(named == "principal" or not symmetric, "symmetric=True splits singular values, which only support='principal' has")
    _require((transform, named) != ("householder", "all") or rank is None or "reflections" not in options,
             "with support='all', rank is the number of reflections: give one of the two")
    chosen = isinstance(support, dict) and targets is None
    found = target_layers(model, (lambda n, m: n in support) if chosen else targets)
    if lost := [n for n in support if n not in found] if chosen else []:
        raise ValueError(f"the support names {lost[0]!r}, which is no linear layer of the model{_nearest(lost[0], found)}")
    parameters = dict(model.named_parameters(remove_duplicate=False))         # a tied weight goes by either name
    keep = {parameters[n] for n in _matches(list(parameters), trainable)}
    _require(keep or not trainable, f"trainable={trainable!r} matches no parameter of the model")

    wrapped = {}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(seed)                             # the CPU's alone: torch.manual_seed is for all devices
        for n, base in found.items():
            with _naming(n):
                P, extra = _resolve_support(n, base, side, support, rank, transform, svd, symmetric)
                wrapped[base] = _build(base, name, method, side, P, magnitude, transform, options | extra)
                _require_parameters(wrapped[base].rotation)
    for p in model.parameters():                                              # from here on nothing can fail
        p.requires_grad_(p in keep)
    model = _replace(model, wrapped)
    return model if kernels is None else kernels.fuse(model)


def _build(base: nn.Module, name: str, method: str, side: str, P: Tensor | None, magnitude: bool, transform: str, options: dict,
           dtype: torch.dtype | None = None) -> LOFTLinear:
    """One wrapped layer, in the precision of its weight (float32 at least) and on its device."""
    _require_values(base)
    groups = getattr(base, "groups", 1)
    _require(groups == 1, f"a convolution with groups={groups} has no one input side to rotate; leave it out of targets")
    if dtype is None:
        dtype = torch.float32 if _weight(base) is None else _single(base.weight.dtype)
    if transform == "lora":
        adapter = LoRA(*_shape(base), dtype=dtype, **options)
    else:
        adapter = Rotation(_shape(base)[SIDES.index(side)], P, transform, dtype=dtype, **options)
    layer = LOFTConv2d if isinstance(base, (nn.Conv2d, LOFTConv2d)) else LoRALinear if transform == "lora" else LOFTLinear
    return layer(base, adapter.to(_device(base)), side, method, magnitude, name).train(base.training)


def target_layers(model: nn.Module, targets: Targets = None) -> dict[str, nn.Module]:
    """{name: linear layer} that `targets` means (see `adapt`); a layer used in two places counts once.

    Linear is what has in_features and out_features, transformers' Conv1D, and Conv2d where `targets` name it. None is every
    linear layer but Conv2d and the output head: the model's get_output_embeddings() where it has one, and any layer that
    shares its weight with an embedding or is called lm_head, head, classifier or score; where there is none of these, the
    last linear layer. Raises ValueError where nothing matches, naming what there is.
    """
    inner = {m.base for m in model.modules() if isinstance(m, LOFTLinear)}    # an adapted layer is the outermost wrapper
    linear = {n: m for n, m in model.named_modules() if _shape(m) and m not in inner}
    if "" in linear:
        return {"": model}
    linear = {n: m for n, m in linear.items() if not any(k.startswith(n + ".") for k in linear)
              and (targets is not None or not isinstance(m, (nn.Conv2d, LOFTConv2d)))}
    _require(linear, "the model has no linear layer inside it")
    if targets is None:
        tied = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        output = getattr(model, "get_output_embeddings", lambda: None)()
        heads = [n for n, m in linear.items() if m is output or id(getattr(m, "weight", None)) in tied
                 or n.split(".")[-1] in ("lm_head", "head", "classifier", "score")] or list(linear)[-1:]
        names = [n for n in linear if n not in heads]
        _require(names, f"every linear layer is an output head ({', '.join(heads)}); name the targets")
    else:
        names = [n for n, m in linear.items() if targets(n, m)] if callable(targets) else _matches(list(linear), targets)
        shown = ", ".join(list(linear)[:8])
        _require(names, f"targets={targets!r} match no linear layer; the model has {len(linear)}: {shown}, …")
    return {n: linear[n] for n in names}


def layers(model: nn.Module, name: str | None = None) -> list[tuple[str, LOFTLinear]]:
    """(name, layer) of every adapted layer, of one adapter or of all; of several on one layer, the last put on comes first."""
    wrappers = {n: m for n, m in model.named_modules() if isinstance(m, LOFTLinear)}
    return [(_plain_name(n, wrappers), m) for n, m in wrappers.items() if name in (None, m.name)]


def _adapted(model: nn.Module, name: str | None = None, single: bool = False) -> list[tuple[str, LOFTLinear]]:
    """`layers`, or a ValueError where there are none; with `single`, also where there are several adapters to choose from."""
    found, names = layers(model, name), sorted({m.name for _, m in layers(model)})
    _require(names, "the model is not adapted: call loft.adapt (or loft.load) first")
    _require(found, f"the model has no adapter {name!r}, it has: {', '.join(names)}")
    _require(not single or name or len(names) == 1, f"the model has several adapters, {', '.join(names)}: say which by name=")
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
    Raises ValueError naming the layer that cannot be merged; the model is then as it was.
    """
    found = _adapted(model, name)[::-1]
    _require_mergeable(found)
    for n, layer in found:
        with _naming(n):
            under = getattr(layer.base, "name", None) if layer.base is not layer.plain else None
            _require(None in (name, under), f"adapter {under!r} lies under {name!r}; merge that one first")
            _require(layer.enabled, f"adapter {layer.name!r} is switched off; switch it on first (loft.use)")
            _require(all(t.isfinite().all() for t in layer.adapter_state().values()), "its rotation is not finite")
    if was_fused := any(layer.fused is not None for _, layer in found):
        _beside("kernels").unfuse(model)                                      # takes its hooks off the model
    for _, layer in found:                                                    # one by one: it computes the same at any moment
        weight = layer.exact_weight().to(dtype or layer.base.weight.dtype)
        layer.base.weight = nn.Parameter(weight, requires_grad=layer.base.weight.requires_grad)
        model = _replace(model, {layer: layer.base})
    return _beside("kernels").fuse(model) if was_fused and layers(model) else model


@torch.no_grad()
def merge_error(model: nn.Module, dtype: torch.dtype | None = None) -> dict[str, float]:
    """{layer: ‖round(W) − W‖_F / ‖W − W0‖_F}: how much of what was learned a merge into the weight's dtype (or `dtype`) rounds
    away. Layers that cannot be merged are left out."""
    errors = {}
    for n, layer in _outermost(model):
        if layer.mergeable:
            W, W0 = layer.exact_weight(), layer.plain.weight
            rounded, learned = W.to(dtype or W0.dtype).to(W.dtype), (W - W0.to(W.dtype)).norm()
            errors[n] = ((rounded - W).norm() / learned).item() if learned else 0.0
    return errors


@contextlib.contextmanager
def merged(model: nn.Module):
    """Inside `with loft.merged(model):` the rotations are folded into the weights, at the speed of the plain model; afterwards
    the weights are what they were, bit for bit (they are kept meanwhile: one more copy of the adapted weights)."""
    found = _outermost(model)
    _require_mergeable(found)
    with torch.no_grad():
        weights = {layer.plain: layer.weight for _, layer in found}
    with disabled(model), contextlib.ExitStack() as after:
        for base, W in weights.items():
            after.callback(setattr, base, "weight", base.weight)
            base.weight = nn.Parameter(W, requires_grad=base.weight.requires_grad)
        yield model


@contextlib.contextmanager
def disabled(model: nn.Module, name: str | None = None):
    """Inside `with loft.disabled(model):` the model is the one before adaptation (or before that of one adapter)."""
    with contextlib.ExitStack() as after:
        for _, layer in _adapted(model, name):
            after.callback(setattr, layer, "enabled", layer.enabled)
            layer.enabled = False
        yield model


def use(model: nn.Module, *names: str) -> nn.Module:
    """Switches the adapters called `names` on and all others off. Raises ValueError for a name that there is not."""
    for name in names:
        _adapted(model, name)
    for _, layer in layers(model):
        layer.enabled = layer.name in names
    return model


def orthogonality_error(model: nn.Module) -> dict[str, float]:
    """{layer: max |RᵀR − I| on its support, in float64}; the largest where there are several rotations."""
    errors: dict[str, list[float]] = {}
    for n, layer in _adapted(model):
        errors.setdefault(n, []).extend(R.orthogonality_error() for R in layer.rotations)
    return {n: torch.tensor(e, dtype=torch.float64).max().item() for n, e in errors.items()}   # a NaN stays one


def check(model: nn.Module, batch, loss_fn: Callable | None = None) -> dict[str, str]:
    """{layer: what is wrong with its adapter}; empty when every one is reached, gets gradient, merges and is orthogonal.

    `batch` is what the model takes (a tensor, a tuple of arguments or a dict of keywords), or what loss_fn(model, batch)
    takes; without loss_fn the gradient is that of a random linear function of the output. The entry "" speaks of the model
    as a whole: its output with merged weights against the adapted one. ValueError where the output holds no floating number.
    """
    def run():
        out = (loss_fn(model, batch) if loss_fn else model(**batch) if isinstance(batch, dict) else
               model(*batch) if isinstance(batch, tuple) else model(batch))
        return [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor) and t.is_floating_point() and t.numel()]

    found, reached = _outermost(model), set()
    with torch.enable_grad(), contextlib.ExitStack() as after:
        for m in model.modules():
            after.callback(setattr, m, "training", m.training)
        for _, layer in found:
            after.enter_context(layer.register_forward_hook(lambda m, *_: reached.add(m)))
        model.eval()
        out, generator = run(), torch.Generator().manual_seed(0)
        _require(out, "the model's output holds no floating number; give a loss_fn(model, batch)")
        loss = sum((t.float() * torch.randn(t.shape, generator=generator).to(t.device)).sum() for t in out)
        wrong = {n: problem for n, m in found if (problem := _problem(m, m in reached, loss))}
        if all(m.mergeable for _, m in found):
            with merged(model), torch.no_grad():
                folded = run()
            for a, b in zip(folded, out):
                if (a - b).abs().max() > {torch.float64: 1e-10, torch.float32: 1e-4}.get(a.dtype, 0.05) * b.abs().max():
                    wrong[""] = f"with merged weights the output differs by {(a - b).abs().max():.0e}"
    return wrong


def _problem(layer: LOFTLinear, reached: bool, loss: Tensor) -> str | None:
    """What is wrong with one layer: the first that holds."""
    own = [p for k, p in layer.named_parameters() if not k.startswith("base.") and p.requires_grad]
    grads = torch.autograd.grad(loss, own, retain_graph=True, allow_unused=True) if own and loss.requires_grad else []
    grads = [g for g in grads if g is not None]
    error = layer.rotation.orthogonality_error() if layer.rotation.strict else 0.0
    problems = ((not layer.enabled, "it is switched off (see loft.use)"),
                (not own, "none of its parameters require grad"),
                (not grads and not reached, "it is never reached: its layer is bypassed, or not used for this batch"),
                (not grads, "it is reached, but gets no gradient"),
                (not all(g.isfinite().all() for g in grads), "its gradient is not finite"),
                (not error <= 1e-5, f"|RᵀR − I| = {error:.0e}"))
    return next((text for wrong, text in problems if wrong), None)


@torch.no_grad()
def refresh(model: nn.Module, support: dict[str, Tensor], optimizer: torch.optim.Optimizer | None = None, *,
            name: str | None = None) -> nn.Module:
    """Puts the learned rotations behind, as R_past ← R_past R (input side; R R_past on the output side), and starts
    anew from the identity in another support, which `selectors.select` chooses at this very point:

        loft.refresh(model, selectors.select(model, batches, loss_fn, rank), optimizer)

    Outputs do not change but for rounding. R_past = I + P (T − I) Pᵀ stays one rotation, with P an orthonormal basis of all
    supports so far, so W0 stays as it is (a quantised or tied one too) and `save` stays compact. Layers that `support` does
    not name go on as they are. In `optimizer` the new generators take the place of the old, with no state: an entry in
    another support is another plane. Raises ValueError naming a layer that cannot be refreshed; nothing has changed then.
    """
    found, outermost, new = dict(_adapted(model, name, single=True)), {m for _, m in _outermost(model)}, {}
    for n, P in support.items():
        _require(n in found, f"layer {n!r} is not adapted; adapted are: {', '.join(found)}")
        layer, old = found[n], found[n].rotation
        with _naming(n):
            _require(getattr(old, "P", None) is not None, f"method {layer.method!r} has no support to refresh")
            _require(layer in outermost and (layer.magnitude is None or layer.side == "input"), "something is applied after "
                     "this rotation (another adapter, or the magnitude), so a support chosen for the layer as it is now does "
                     "not fit here")
            product = _product(*layer.rotations[::1 if layer.side == "input" else -1])
            new[layer] = Rotation(support=P, dtype=old.dtype, **old.config).to(old.device), product
            _require_parameters(new[layer][0])
    for layer, (rotation, past) in new.items():
        swap = dict(zip(layer.rotation.parameters(), rotation.parameters()))
        for p, q in swap.items():
            q.requires_grad_(p.requires_grad)
        for group in optimizer.param_groups if optimizer else ():
            group["params"] = [swap.get(p, p) for p in group["params"]]
        for p in swap if optimizer else ():
            optimizer.state.pop(p, None)
        layer.rotation, layer.past = rotation, past
    return _beside("kernels").fuse(model) if any(m.fused is not None for m in found.values()) else model


def _product(*rotations: Rotation) -> Rotation:
    """R_1 R_2 … as one frozen rotation I + P (T − I) Pᵀ: P spans all supports, T = Pᵀ R_1 R_2 … P. In float64."""
    U, s, _ = torch.linalg.svd(torch.cat([_wide(R.P) for R in rotations], 1), full_matrices=False)
    P = U[:, s > 1e-6]
    T = eye = torch.eye(P.shape[1], dtype=P.dtype, device=P.device)
    for R in rotations:
        C = P.mT @ _wide(R.P)                                                 # PᵀRP = I + (PᵀP_i)(T_i − I)(PᵀP_i)ᵀ
        T = T + T @ C @ _wide(R.difference()) @ C.mT
    past = Rotation(R.d, P, "fixed", dtype=R.dtype).to(R.device)
    past.transform.D.copy_(T - eye)
    return past


def regularizer(model: nn.Module) -> Tensor:
    """The papers' soft orthogonality, summed over layers, to add to the loss with a weight λ: `Householder.regularizer` (HRA)
    and `Givens.regularizer` (qGOFT); 0 for methods that have none."""
    transforms = [getattr(layer.rotation, "transform", None) for _, layer in _adapted(model)]
    return sum((T.regularizer() for T in transforms if hasattr(T, "regularizer")), torch.zeros((), device=_device(model)))


# ------------------------------------------------------------------------------------ files

def save(model: nn.Module, path, *, name: str | None = None) -> None:
    """Writes the adapter (supports, generators, settings; of several, the one called `name`) and whatever else of the model
    is trainable to `path`, a file name or an open binary file.

    Written beside `path` and then moved over it: an interrupted save leaves the older file. P itself is stored, since a
    support computed again elsewhere is another one up to sign, rotation or worse. The file is torch.save's, followed by
    the SHA-256 of its bytes.
    """
    torch.save(_payload(getattr(model, "_orig_mod", model), name), buffer := io.BytesIO())
    data = buffer.getvalue() + hashlib.sha256(buffer.getbuffer()).digest()
    path.write(data) if hasattr(path, "write") else _write(path, data)


def _write(path, data: bytes) -> None:
    """All of it or nothing: written beside `path`, then moved over it."""
    temporary = f"{os.fspath(path)}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):                                    # it is gone, unless we were interrupted
            os.unlink(temporary)


def load(model: nn.Module, path, *, name: str = "default") -> nn.Module:
    """Puts the adapter at `path`, a file name or an open binary file, on `model` under `name`: put on new, as the file says,
    or into one of that name, which must agree.

    Nothing is executed from the file (weights_only). Everything is checked before the model is touched: ValueError naming
    each layer, shape or setting that differs, or saying that the file is not an adapter.
    """
    with contextlib.nullcontext(path) if hasattr(path, "read") else open(path, "rb") as f:
        data, path = f.read(), getattr(f, "name", "the file")
    data, digest = data[:-32], data[-32:]
    _require(hashlib.sha256(data).digest() == digest, f"{path} is not a LOFT adapter file, or is damaged")
    try:
        payload = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as e:                                                    # e.g. pickled code, which weights_only refuses
        raise ValueError(f"{path} is not a LOFT adapter file: {str(e).splitlines()[0]}") from e
    kind = type(payload).__name__
    if isinstance(payload, dict):
        kind = f"format {payload.get('format')!r}, version {payload.get('version')!r}"
    _require(kind == "format 'loft', version 1", f"{path} is not a LOFT adapter file of version 1: it holds {kind}")
    try:
        compiled, model = model, getattr(model, "_orig_mod", model)           # torch.compile's wrapper is no part of a name
        model = _attach(model, payload, path, name)
        return compiled if model is getattr(compiled, "_orig_mod", None) else model
    except (KeyError, TypeError, AttributeError, RuntimeError) as e:          # a well-formed file with nonsense in it
        raise ValueError(f"{path} is not a LOFT adapter file, or is damaged: {type(e).__name__} {e}") from e


def from_peft(source, model: nn.Module | None = None) -> nn.Module:
    """Takes over an adapter trained with peft's OFT, BOFT, HRA, PSOFT or LoRA: same outputs, and it trains on.

    `source` is a PeftModel (its adapter is taken off, and its base model adapted here instead), or the folder that
    save_pretrained wrote, with `model` the base model to adapt. Raises ValueError for what has no counterpart here, by name.
    """
    bases, payload, unload = _beside("interop").read_peft(source, model)
    for name, spec in payload["layers"].items():                              # all of it fits, before anything is taken apart
        _from_spec(bases[name], spec, "default", name)
    return _attach(unload(), payload, "the peft adapter", "default")


def to_peft(model: nn.Module, path) -> None:
    """Writes the model's adapter to the folder `path` for PeftModel.from_pretrained(base, path); see `from_peft`."""
    _beside("interop").write_peft(_payload(model), {n: _matrix(layer.base) for n, layer in _adapted(model)}, path)


def _payload(model: nn.Module, name: str | None = None) -> dict:
    """What `save` writes, plain containers and tensors: all that builds the adapter of each layer again, and what else trains."""
    specs = {n: dict(method=layer.method, side=layer.side, shape=list(_shape(layer)), config=layer.rotation.config,
                     dtype=str(layer.rotation.dtype).removeprefix("torch."),
                     state={k: v.cpu() for k, v in layer.adapter_state().items()})
             for n, layer in _adapted(model, name, single=True)}
    trainable = {n: p.detach().cpu() for n, p in _plain_parameters(model).items() if p.requires_grad}
    return {"format": "loft", "version": 1, "trainable": trainable, "layers": specs}


def _from_spec(base: nn.Module, spec: dict, adapter: str, name: str) -> LOFTLinear:
    """`base` wrapped as a `_payload` says; a ValueError naming the layer where they do not fit."""
    _require(list(_shape(base)) == list(spec["shape"]),
             f"layer {name!r} has shape {tuple(spec['shape'])} (in, out) in the file, {_shape(base)} in the model")
    state, config, dtype = spec["state"], spec["config"], getattr(torch, spec["dtype"])
    options = {k: v for k, v in config.items() if k not in ("d", "out", "transform")}
    if "rotation.gauge" in state:
        options["gauge"] = state["rotation.gauge"]
    with _naming(name), torch.random.fork_rng(devices=[]):
        layer = _build(base, adapter, spec["method"], spec["side"], state.get("rotation.P"), "magnitude" in state,
                       config["transform"], options, dtype)
        if "past.P" in state:
            layer.past = Rotation(layer.rotation.d, state["past.P"], "fixed", dtype=layer.rotation.dtype).to(_device(base))
        differ = {k for k, _ in _shapes(state).items() ^ _shapes(layer.adapter_state()).items()}
        _require(not differ, f"{', '.join(sorted(differ))} missing, unknown or of another shape")
        layer.load_state_dict(state, strict=False)
    return layer


def _shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {k: tuple(v.shape) for k, v in state.items()}


def _attach(model: nn.Module, payload: dict, origin: str, adapter: str) -> nn.Module:
    """Puts a `_payload` on the model as a new adapter, or into the one of that name if it agrees; all or nothing."""
    def settings(layer):                                                      # what old and new have to agree in
        shapes = {k: s for k, s in _shapes(layer.adapter_state()).items() if not k.startswith("past.")}
        return dict(method=layer.method, side=layer.side, rank=layer.rotation.r, setting=layer.rotation.config, state=shapes)

    targets = {n: m for n, m in model.named_modules() if _shape(m)}
    parameters, adapted, new = _plain_parameters(model), dict(layers(model, adapter)), {}
    wrong = [f"layer {n!r} is adapted in the model but not in the file" for n in adapted if n not in payload["layers"]]
    for n, spec in payload["layers"].items():
        old = adapted.get(n)
        try:
            _require(old or not adapted, f"layer {n!r} is adapted in the file but not in the model")
            if not old and n not in targets:
                raise ValueError(f"layer {n!r} is not in the model{_nearest(n, targets)}")
            new[n] = _from_spec(old.base if old else targets[n], spec, adapter, n)
            for (what, there), here in zip(settings(new[n]).items(), settings(old).values() if old else ()):
                _require(there == here, f"layer {n!r}: {what} is {there!r} in the file, {here!r} in the model")
        except ValueError as e:
            wrong.append(str(e))
    for n, value in payload["trainable"].items():
        has = tuple(parameters[n].shape) if n in parameters else None
        if has != tuple(value.shape):
            wrong.append(f"parameter {n!r} has shape {tuple(value.shape)} in the file, {has} in the model")
    _require(not wrong, f"{origin} does not fit this model:\n  " + "\n  ".join(wrong))

    for n, old in adapted.items():                                            # in place: an optimizer may hold the parameters
        old.past = new[n].past
        old.load_state_dict(new[n].adapter_state(), strict=False)
    if not adapted:
        model.requires_grad_(False)
        model = _replace(model, {targets[n]: layer for n, layer in new.items()})
    with torch.no_grad():
        for n, value in payload["trainable"].items():
            parameters[n].copy_(value).requires_grad_(True)
    return model


# ------------------------------------------------------------------------------------ supports from the weight alone

def principal(W: Tensor, r: int, svd: str = "auto") -> Tensor:
    """Top r right singular vectors of W (out, in) → P (in, r), float32 or wider (PSOFT, arXiv 2505.11235).

    svd="full" is exact; "lowrank" is torch.svd_lowrank with six subspace iterations; "auto" takes it for large weights at a small
    rank (min(out, in) > 2048 and 8 r below it). r above min(out, in) goes on into the null space. ValueError: W is not finite.
    """
    W, short = W.detach().to(_single(W.dtype)), min(W.shape)
    _require(W.isfinite().all(), "its weight is not finite")
    if svd == "lowrank" or svd == "auto" and short > 2048 and 8 * r < short:
        return torch.svd_lowrank(W, q=min(r + 16, short), niter=6)[2][:, :r].contiguous()
    return torch.linalg.svd(W, full_matrices=r > short)[2][:r].mT.contiguous()


def random(W: Tensor, r: int) -> Tensor:
    """A uniformly random r-dimensional support of W (out, in) → P (in, r), float32 or wider, from torch's generator."""
    return torch.linalg.qr(torch.randn(W.shape[1], r, dtype=_single(W.dtype)))[0].to(W.device)


def _resolve_support(name: str, base: nn.Module, side: str, support, rank, transform: str, svd: str,
                     symmetric: bool) -> tuple[Tensor | None, dict]:
    """The support of one layer, P (d, r) or None for all coordinates, and further options of its transform."""
    for what, value in (("rank", rank), ("support", support)):
        _require(not isinstance(value, dict) or name in value, f"no {what} for this layer in the dict given")
    r, support = (value[name] if isinstance(value, dict) else value for value in (rank, support))
    if isinstance(r, bool) or not isinstance(r, int | None):
        raise TypeError(f"rank={r!r} is not an int")
    if transform == "lora":
        return None, {} if r is None else {"rank": r}
    if isinstance(support, Tensor):
        _require(r in (None, support.shape[-1]), f"rank={r}, but the support given has {support.shape[-1]} columns")
        return support, {}
    d = _shape(base)[SIDES.index(side)]
    if support == "all":
        _require(r is None or transform == "householder", f"rank={r} means nothing to a {transform!r} of all {d} coordinates; "
                 "its size is set by its options (block_size, stages), or choose another support")
        return None, {} if r is None else {"reflections": r}
    r = min(32, d) if r is None else r
    _require(1 <= r <= d, f"rank={r} must be between 1 and the dimension, {d}")
    _one_of("support", support, (*FROM_WEIGHT, "all", *FROM_DATA))
    _require(support not in FROM_DATA, f"support={support!r} needs data: P = selectors.select(model, batches, loss_fn, rank, "
             f"kind={support!r}), then adapt(model, support=P)")
    _require(_weight(base) is not None, f"a {type(base).__name__} has no floating weight for support={support!r}; give a tensor")
    W = _matrix(base) if side == "input" else _matrix(base).mT
    _require_values(base)
    P = (principal(W, r, svd) if support == "principal" else random(W, r) if support == "random" else
         _beside("selectors").minor(W, r))
    return P, {"gauge": (W.to(P.dtype) @ P).norm(dim=0).sqrt()} if symmetric else {}   # √σ_i, σ_i = ‖W0 p_i‖


def _check_support(P: Tensor, d: int) -> int:
    """The rank of a valid support; otherwise a ValueError."""
    _require(P.ndim == 2 and P.shape[0] == d and 1 <= P.shape[1] <= d,
             f"the support has shape {tuple(P.shape)}, expected ({d}, r) with r ≤ {d}")
    _require(P.is_floating_point() and P.isfinite().all(), f"the support ({P.dtype}) has to be floating and finite")
    P = _wide(P)
    error = (P.mT @ P - torch.eye(P.shape[1], dtype=P.dtype, device=P.device)).abs().max().item()
    _require(error <= 1e-5, f"the support is not orthonormal: |PᵀP − I| = {error:.1e} > 1e-5; use torch.linalg.qr(P.float())[0]")
    return P.shape[1]


# ------------------------------------------------------------------------------------ small helpers

def _plain_name(name: str, wrappers) -> str:
    """The name in the plain model of what is called `name` in an adapted one: without the "base" of each of its wrappers."""
    parts = name.split(".")
    return ".".join(p for i, p in enumerate(parts) if not (p == "base" and ".".join(parts[:i]) in wrappers))


def _plain_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """{name as in the plain model: parameter} of everything but adapters."""
    wrappers = {n for n, m in model.named_modules() if isinstance(m, LOFTLinear)}
    own = {id(p) for _, m in layers(model) for k, p in m.named_parameters() if not k.startswith("base.")}
    return {_plain_name(n, wrappers): p for n, p in model.named_parameters() if id(p) not in own}


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
            raise ValueError(f"{w!r} is none of the model's names{_nearest(w, names)}")
    return [n for n in names if any(f".{w}." in f".{n}." for w in wanted)]


def _weight(module: nn.Module) -> Tensor | None:
    """Its floating weight, if it has one."""
    weight = getattr(module, "weight", None)
    return weight if isinstance(weight, Tensor) and weight.is_floating_point() else None


def _shape(module: nn.Module) -> tuple[int, int] | None:
    """(in, out) of a layer that can be adapted: linear-like, transformers' Conv1D, or Conv2d with in = channels × kernel."""
    shape = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if all(isinstance(n, int) for n in shape):
        return shape
    if isinstance(module, nn.Conv2d):
        return module.weight[0].numel(), module.out_channels
    W = _weight(module) if isinstance(getattr(module, "nf", None), int) else None
    return tuple(W.shape) if W is not None and W.ndim == 2 else None


def _matrix(module: nn.Module) -> Tensor:
    """The weight as (out, in): Conv1D stores its transpose, a convolution (out, channels, height, width)."""
    weight = module.exact_weight() if isinstance(module, LOFTLinear) and module.enabled else module.weight
    return weight.mT if hasattr(module, "nf") else weight.flatten(1)


def _replace(model: nn.Module, new: dict[nn.Module, nn.Module]) -> nn.Module:
    """Puts new[m] in every place where module m stands; returns the model, or what stands for it."""
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            parent._modules[key] = new.get(child, child)
    return new.get(model, model)


def _device(module: nn.Module) -> torch.device:
    return next((t.device for t in itertools.chain(module.parameters(), module.buffers())), torch.device("cpu"))


def _beside(name: str):
    """The file of that name beside this one, imported when it is needed."""
    return importlib.import_module(f"{__name__}.{name}")


def _require(condition, otherwise: str) -> None:
    if not condition:
        raise ValueError(otherwise)


def _require_values(base: nn.Module) -> None:
    _require(_device(base).type != "meta", "it is on the meta device, which keeps no values; give the model its weights first")


def _require_parameters(rotation: nn.Module) -> None:
    _require(any(p.numel() for p in rotation.parameters()), f"a {rotation.r} × {rotation.r} {rotation.config['transform']!r} has no "
             "parameters, so nothing would train; use rank ≥ 2 (or a block_size ≥ 2)")


def _require_mergeable(found: list[tuple[str, LOFTLinear]]) -> None:
    for n, layer in found:
        _require(layer.mergeable,
                 f"layer {n!r}: a {type(layer.plain).__name__} has no floating weight of its own to "
                 "merge into (it is quantised, or computed anew, as by weight_norm); keep it adapted")


def _one_of(what: str, value, valid: Iterable[str]) -> None:
    if value not in valid:
        raise ValueError(f"unknown {what} {value!r}{_nearest(value, valid)} Valid: {', '.join(valid)}")


@contextlib.contextmanager
def _naming(layer: str):
    """Errors inside say which layer they are about."""
    try:
        yield
    except (ValueError, TypeError) as e:
        raise type(e)(f"layer {layer!r}: {e}") from None


def _nearest(value, valid: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(value), list(valid), n=3)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""


def _around(value, good: Iterable[int]) -> str:
    """The valid numbers nearest to an invalid one, for an error message."""
    value = value if isinstance(value, int) else 0
    return ", ".join(map(str, sorted(sorted(good, key=lambda k: abs(k - value))[:3])))
