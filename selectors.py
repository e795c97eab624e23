"""Supports: where a rotation W0 (I + P (T − I) Pᵀ) should act.

With G = ∂L/∂W at W0 (out × in) and R = exp(P A Pᵀ), A skew, the loss moves to first order by

    dL = ⟨Pᵀ S P, A⟩_F,     S = skew(W0ᵀ G) = ½ (W0ᵀG − GᵀW0)      (in × in)            (LOFT, arXiv 2605.11872)

so ‖PᵀSP‖_F, the **score** of P, is the steepest decrease that a rotation inside span(P) can make per unit ‖A‖_F,
and nothing of G but S matters. Every function here is pure: tensors in, P (in, r) with orthonormal columns out.
For a rotation on the output side (R W0) pass the transposes: S = skew(W0Gᵀ) up to sign. `select` does it for a model.

    from loft import selectors
    P = selectors.skew(W0, G, r=32)                                            # the best P there is, for this G
    P = selectors.select(model, batches, loss_fn, rank=32, kind="skew")        # {layer: P}; dense G only where layers are small
    loft.adapt(model, support=P)
    P = selectors.within(model, batches, loss_fn, budget=20_000)               # or: parameters where planes are strongest
"""
from __future__ import annotations

if __name__ == "selectors":
    # Not ours: somebody (subprocess, asyncio) wants the standard library's `selectors` and this file's folder
    # stands first on sys.path. Hand that module over; ours is `loft.selectors`.
    import importlib.machinery
    import importlib.util
    import os
    import sys
    _here = os.path.dirname(os.path.realpath(__file__))
    _spec = importlib.machinery.PathFinder.find_spec(
        "selectors", [p for p in sys.path if os.path.realpath(p or os.getcwd()) != _here])
    sys.modules["selectors"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["selectors"])
else:
    import contextlib
    import re
    import sys
    import warnings

    import torch
    from torch import Tensor, nn

KINDS = ("random", "coordinate", "principal", "minor", "activation", "gradient", "paired", "rescored", "skew")


# ------------------------------------------------------------------------------------ from W0 alone

def random(W: Tensor, r: int, generator: torch.Generator | None = None) -> Tensor:
    """Uniformly random support, for W (out, in)."""
    return _start(W, 1, _rank(r, W.shape[1]), generator)


def principal(W: Tensor, r: int) -> Tensor:
    """Top r right singular vectors of W (out, in): PSOFT's support (arXiv 2505.11235)."""
    return _right_singular(W, r)


def minor(W: Tensor, r: int) -> Tensor:
    """The r right singular vectors of W (out, in) with the smallest of its min(out, in) singular values: its null space is
    left out, for a rotation there leaves W0 R = W0. Raises ValueError for a larger r."""
    short = min(W.shape)
    if r > short:
        raise ValueError(f"rank {r}: W {tuple(W.shape)} has only {short} singular directions outside its null space")
    return torch.linalg.svd(_wide(W), full_matrices=False)[2][short - _rank(r, W.shape[1]):].mT.contiguous()


# ------------------------------------------------------------------------------------ from the gradient or the inputs

def gradient(W: Tensor, G: Tensor, r: int) -> Tensor:
    """Top r right singular vectors of G (out, in). It holds where G looks, and misses where W0 sends it: see `paired`."""
    return _right_singular(G, r)


def activation(X: Tensor, r: int) -> Tensor:
    """Top r principal directions (uncentred PCA) of a layer's inputs X (n, in), or of their second moment XᵀX (in, in)."""
    return _right_singular(X, r)


def coordinate(W: Tensor, G: Tensor, r: int) -> Tensor:
    """The r coordinates e_i with the largest ‖S e_i‖, as columns of the identity (OFT's kind of support, chosen)."""
    W, G = _wide(W), _wide(G)
    # column norms of S without S: ‖S e_i‖² = ¼ (‖W0ᵀg_i‖² + ‖Gᵀw_i‖² − 2 ⟨W0ᵀg_i, Gᵀw_i⟩), a block of columns at a time
    norms = torch.cat([(W.mT @ g - G.mT @ w).norm(dim=0) for w, g in zip(W.split(1024, 1), G.split(1024, 1))])
    return _axes(norms, _rank(r, W.shape[1]))


def paired(W: Tensor, G: Tensor, r: int) -> Tensor:
    """Orthonormal basis of [v_1, W0ᵀu_1, v_2, W0ᵀu_2, …] for the top r/2 singular triplets (u, σ, v) of G.

    For a rank-one G = σ u vᵀ the plane span{v, W0ᵀu} is the best there is; v alone scores 0. An odd r takes one more v.
    """
    U, _, Vh = torch.linalg.svd(_wide(G), full_matrices=False)
    return _pairs(_wide(W), U, Vh.mT, _rank(r, W.shape[1]))


def rescored(W: Tensor, G: Tensor, r: int, pool: int = 4) -> Tensor:
    """The best r dimensions for G inside the top pool·r principal directions V of W: P = V · planes(VᵀSV).

    Between `principal` (pool = 1) and `skew` (pool·r = in): what the task asks for, within what the layer does most.
    """
    W = _wide(W)
    return _rescore(lambda n: W, _products(_wide(G)), {"W": _rank(r, W.shape[1])}, pool)["W"][0]


def skew(W: Tensor, G: Tensor, r: int, generator: torch.Generator | None = None) -> Tensor:
    """The support of largest score: the r/2 planes of S with the largest σ_j, where ‖PᵀSP‖_F² = 2 Σ_{j ≤ r/2} σ_j².

    Exact up to in = 1024. Above, randomised subspace iteration with thin products (S is never formed) and
    Rayleigh–Ritz. An odd r holds (r−1)/2 planes and one direction that is of no use to first order.
    """
    return _skew("W", _wide(W), _wide(G), _rank(r, W.shape[1]), 1024, 5, generator)[0]


def planes(S: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """The leading invariant planes of a skew S (d, d) → basis (d, r), and every plane's σ in falling order.

    iS is Hermitian with eigenvalues ±σ_j. For a unit eigenvector v of +σ, √2 Re v and √2 Im v are an orthonormal
    basis of the plane: exact also where several σ are equal, where singular vectors of S would tear planes apart.
    """
    sigma, V = torch.linalg.eigh(1j * S)                                       # ascending, −σ … +σ
    V = V.flip(-1)[:, :(r + 1) // 2]
    basis = torch.stack([V.real, V.imag], -1).flatten(-2) * 2 ** 0.5           # (d, 2⌈r/2⌉), plane by plane
    return _orthonormal(basis[:, :r], r), sigma.flip(-1)[:S.shape[0] // 2]     # QR only tidies planes with σ = 0


def score(W: Tensor, G: Tensor, P: Tensor) -> float:
    """‖PᵀSP‖_F, with PᵀSP = ½ ((W0P)ᵀ(GP) − (GP)ᵀ(W0P)): r × r from thin products."""
    P = _wide(P)
    M = (_wide(W).to(P.dtype) @ P).mT @ (_wide(G).to(P.dtype) @ P)
    return ((M - M.mT) / 2).norm().item()


# ------------------------------------------------------------------------------------ over a model
# Everything below asks one thing of the gradient: its thin products G A and GᵀB, which hooks sum over batches,
# G A = Σ δᵀ(x A), GᵀB = Σ xᵀ(δ B), from a layer's input rows x (n, in) and output gradients δ (n, out).

class Supports(dict):
    """{layer: P (in, r)}, and in .sigma {layer: σ_1 ≥ σ_2 ≥ …}, the strengths of the planes P[:, 0:2], P[:, 2:4], …"""

    def __init__(self, supports=(), sigma=()):
        super().__init__(supports)
        self.sigma = dict(sigma)


def select(model: nn.Module, batches, loss_fn, rank: int | dict[str, int], kind: str = "skew", targets=None, *,
           side: str = "input", passes: int = 3, oversample: int = 16, exact: bool | None = None, pool: int = 4,
           seed: int = 0) -> Supports:
    """Chooses a support for every target layer, for `loft.adapt(model, support=…)`. Layers not reached are warned of, left out.

    Args:
        batches: iterable of whatever loss_fn takes (a one-shot iterator is kept in a list); gradients are summed,
            over the ranks too when torch.distributed is initialised.
        loss_fn: (model, batch) → scalar loss of any task; for several tasks at once, the sum of their losses sums their S.
        rank, targets, side: as in `loft.adapt`; kind: one of `KINDS`.
        exact: True sums the dense G (out, in) of each layer in one pass, and decomposes it exactly; False keeps in ×
            (rank + oversample) by randomised subspace iteration over `passes` passes; None: dense G in one pass where
            in and out are at most 1024, decomposed exactly up to in = 256 and by eight iterations above.
        pool: of `rescored`. seed: of random starts; the result is a function of it.
    Weights keep requires_grad as it was and get no .grad; the model runs in eval mode and is put back. Works under autocast
    and in bf16 (sums are float32), with checkpointing and with layers that are called several times; rows that the loss does
    not depend on (padding) count nothing. An adapted layer counts as the layer it is now, rotated weight and all.
    Raises ValueError for what does not fit, naming the layer, and for a loss that is not finite or depends on no target.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}; valid: {', '.join(KINDS)}")
    _side(side)
    if passes < 2:
        raise ValueError(f"passes={passes}: one pass to find the subspace and one to measure it are the least")
    found = _target_layers(model, targets)
    ranks = {n: rank.get(n) if isinstance(rank, dict) else rank for n in found}
    if odd := [n for n, r in ranks.items() if isinstance(r, int) and r % 2 and kind in ("skew", "rescored")]:
        warnings.warn(f"an odd rank ({ranks[odd[0]]} in {odd[0]}) holds one direction that is in no plane: take an even one")
    for n, m in found.items():
        _rank(ranks[n], _shape(m, side)[1], f"layer {n!r}: ")
    turn = (lambda X: X.mT) if side == "output" else (lambda X: X)            # output side: S of the transposes
    W = lambda n: turn(_wide(_matrix(found[n])))                              # float32 when asked for, never all at once
    generator, second = torch.Generator().manual_seed(seed), side if kind == "activation" else None
    if kind in ("random", "principal", "minor"):
        choose = {"random": lambda W, r: random(W, r, generator), "principal": principal, "minor": minor}[kind]
        return Supports({n: choose(W(n), ranks[n]) for n in found})
    batches = list(batches) if iter(batches) is batches else batches
    dense = {n: m for n, m in found.items() if (max(_shape(m)) <= 1024 if exact is None else exact)}
    sums = moments(model, batches, loss_fn, dense, second) if dense else {}
    exact_to = sys.maxsize if exact else 256                                  # above, an eigendecomposition outlasts the pass
    chosen = {n: _dense(kind, n, W(n), turn(M), ranks[n], pool, exact_to, generator) for n, M in sums.items()}
    if thin := {n: r for n, r in ranks.items() if n not in dense}:
        products = lambda pairs: _thin_products(model, batches, loss_fn, {n: found[n] for n in pairs}, pairs, side, second)
        chosen |= _streaming(kind, W, products, thin, passes, oversample, pool, generator)
    if not chosen:
        raise ValueError("the loss does not depend on any target layer")
    if missing := [n for n in found if n not in chosen]:
        warnings.warn(f"no gradient reached {', '.join(missing)}: no support chosen there")
    order = [n for n in found if n in chosen]
    return Supports({n: chosen[n][0] for n in order}, {n: chosen[n][1] for n in order})


def _dense(kind: str, n: str, W: Tensor, M: Tensor, r: int, pool: int, exact_to: int, generator) -> tuple[Tensor, Tensor]:
    """(P, σ of its planes) of layer n from its dense gradient M = G, or second moment for `activation`."""
    if kind == "skew":
        return _skew(n, W, M, r, exact_to, 8, generator)
    if kind == "rescored":
        return _rescore(lambda n: W, _products(M), {n: r}, pool)[n]
    choose = {"coordinate": coordinate, "gradient": gradient, "paired": paired, "activation": lambda W, M, r: activation(M, r)}
    return choose[kind](W, M, r), torch.empty(0)


def _skew(n: str, W: Tensor, G: Tensor, r: int, exact_to: int, passes: int, generator) -> tuple[Tensor, Tensor]:
    """`skew` of layer n and its σ, (P (in, r), σ (r/2)): by eigendecomposition, above in = exact_to by iteration."""
    if W.shape[1] > exact_to:
        return _iterate(lambda n: W, _products(G), {n: r}, passes, 16, generator)[n]
    P, sigma = planes((W.mT @ G - G.mT @ W) / 2, r)
    return P, sigma[:r // 2]


def _streaming(kind: str, W, products, ranks: dict[str, int], passes: int, oversample: int, pool: int,
               generator) -> dict[str, tuple[Tensor, Tensor]]:
    """{layer: (P, σ)} by passes of thin products, for all layers at once."""
    if kind == "skew":
        return _iterate(W, products, ranks, passes, oversample, generator)
    if kind == "rescored":
        return _rescore(W, products, ranks, pool)
    if kind == "coordinate":                                                  # row norms of S Q, Q spanning S's strongest planes
        _, SQ = _subspace(W, products, ranks, passes, oversample, generator)
        return {n: (_axes(X.norm(dim=1), ranks[n]), torch.empty(0)) for n, X in SQ.items()}
    A, B = ({n: _start(W(n), side, min(r + oversample, *W(n).shape), generator) for n, r in ranks.items()} for side in (1, 0))
    for i in range(passes):                                                   # activation: A → C A; else A → GᵀB, B → G A
        done = products({n: (A[n],) if kind == "activation" else (A[n], B[n]) for n in A})
        if i < passes - 1:
            A, B = ({n: _orthonormal(parts[j]) for n, parts in done.items()} for j in (-1, 0))
    chosen = {}
    for n, (GA, *_) in done.items():
        U, _, Zh = torch.linalg.svd(GA, full_matrices=False)                  # G ≈ (G A) Aᵀ = U Σ (A Zhᵀ)ᵀ
        V, r = A[n] @ Zh.mT, ranks[n]
        chosen[n] = (_pairs(W(n), U, V, r) if kind == "paired" else _orthonormal(V, r)[:, :r]), torch.empty(0)
    return chosen


def _products(G: Tensor):
    """G A and GᵀB of a dense G, in the form of passes over batches."""
    return lambda pairs: {n: (G @ A, G.mT @ B) for n, (A, B) in pairs.items()}


def _rescore(W, products, ranks: dict[str, int], pool: int) -> dict[str, tuple[Tensor, Tensor]]:
    """`rescored`, for all layers: the subspaces V are known, so one pass measures VᵀSV. {layer: (P (in, r), σ (r/2))}"""
    V = {n: _right_singular(W(n), min(pool * r, W(n).shape[1])) for n, r in ranks.items()}
    done, chosen = products({n: (V[n], W(n) @ V[n]) for n in V}), {}
    for n, (GV, GtWV) in done.items():
        P, sigma = planes(V[n].mT @ (W(n).mT @ GV - GtWV) / 2, ranks[n])
        chosen[n] = V[n] @ P, sigma[:ranks[n] // 2]
    return chosen


def _subspace(W, products, ranks: dict[str, int], passes: int, oversample: int, generator) -> tuple[dict, dict]:
    """Subspace iteration on S for all layers at once: {layer: Q (in, k)} and {layer: S Q}.

    S Q = ½ (W0ᵀ(G Q) − Gᵀ(W0 Q)): a pass each. In memory a layer has Q, W0Q, their two products and S Q.
    """
    Q = {n: _start(W(n), 1, min(r + oversample, W(n).shape[1]), generator) for n, r in ranks.items()}
    for i in range(passes):
        done = products({n: (Q[n], W(n) @ Q[n]) for n in Q})
        SQ = {n: (W(n).mT @ GQ).sub_(GtWQ).div_(2) for n in list(done) for GQ, GtWQ in [done.pop(n)]}
        if i < passes - 1:
            Q.clear()                                                         # what is not needed goes before more is made
            Q.update({n: _orthonormal(SQ.pop(n)) for n in list(SQ)})
    return Q, SQ


def _iterate(W, products, ranks: dict[str, int], passes: int, oversample: int, generator) -> dict[str, tuple[Tensor, Tensor]]:
    """`skew`, for all layers: the subspace, then Rayleigh–Ritz on QᵀSQ. {layer: (P (in, r), σ (r/2))}"""
    Q, SQ = _subspace(W, products, ranks, passes, oversample, generator)
    chosen, rough = {}, []
    for n, X in SQ.items():
        V, sigma = planes(Q[n].mT @ X, ranks[n])
        P, SP = Q[n] @ V, X @ V
        rest = (SP - P @ (P.mT @ SP)).norm() / SP.norm().clamp(min=torch.finfo(SP.dtype).tiny)
        rough += [n] * bool(ranks[n] % 2 == 0 and rest > 0.1)                 # 0.1 off invariance: about 99 % of the score
        chosen[n] = P, sigma[:ranks[n] // 2]
    if rough:
        warnings.warn(f"the planes found in {', '.join(rough[:5])} have not settled (the spectrum of S falls slowly there): "
                      f"raise passes={passes} or oversample={oversample}, or take exact=True")
    return chosen


def scores(model: nn.Module, batches, loss_fn, supports: dict[str, Tensor], *, side: str = "input") -> dict[str, float]:
    """{layer: ‖PᵀSP‖_F} of given supports, in one pass of thin products: PᵀSP = ½ ((W0P)ᵀ(GP) − (GP)ᵀ(W0P))."""
    _side(side)
    found, P = {n: model.get_submodule(n) for n in supports}, {n: _wide(X) for n, X in supports.items()}
    result = dict.fromkeys(supports, 0.0)                                     # of a layer that no gradient reaches
    for n, (GP,) in _thin_products(model, batches, loss_fn, found, {n: (X,) for n, X in P.items()}, side).items():
        W = _wide(_matrix(found[n]))
        M = ((W if side == "input" else W.mT) @ P[n]).mT @ GP
        result[n] = ((M - M.mT) / 2).norm().item()
    return result


# ------------------------------------------------------------------------------------ ranks under a budget, several tasks

def spend(sigma: dict[str, Tensor], budget: int) -> dict[str, int]:
    """Even ranks r that collect the most Σ 2σ_j² for Σ r(r−1)/2 ≤ budget parameters; layers that get none are left out.

    A plane adds 2σ² and costs 2r + 1, r the rank so far: taken in the order of gain per parameter, which is the best possible
    up to the last plane, for gains fall and costs rise. Raises ValueError where the budget buys none.
    """
    ranks, spent = dict.fromkeys(sigma, 0), 0
    gains = [(float(s) ** 2 / (4 * j + 1), n, j) for n, values in sigma.items() for j, s in enumerate(values) if s > 0]
    for _, n, j in sorted(gains, key=lambda plane: (-plane[0], plane[2])):
        cost = 4 * j + 1                                                      # of plane j, at r = 2j
        if ranks[n] == 2 * j and spent + cost <= budget:                      # too dear: a cheaper layer may still fit
            spent, ranks[n] = spent + cost, ranks[n] + 2
    if not any(ranks.values()):
        raise ValueError(f"budget={budget} buys no plane (the first costs 1 parameter), or no σ is known: choose with "
                         "kind='skew'")
    return {n: r for n, r in ranks.items() if r}


def trim(supports: Supports, ranks: dict[str, int]) -> Supports:
    """The leading columns of each support: planes come strongest first, so a smaller rank needs no new selection."""
    return Supports({n: supports[n][:, :r] for n, r in ranks.items()}, {n: supports.sigma[n][:r // 2] for n, r in ranks.items()})


def within(model: nn.Module, batches, loss_fn, budget: int, targets=None, *, max_rank: int = 64, **options) -> Supports:
    """Supports of kind "skew" whose ranks spend `budget` parameters of dense transforms where the planes are strongest: one
    selection at max_rank, `spend`, `trim`. `options` go to `select`."""
    found, side = _target_layers(model, targets), options.get("side", "input")
    rank = {n: r for n, m in found.items() if (r := min(max_rank, _shape(m, _side(side))[1]) // 2 * 2)}
    if not rank:
        raise ValueError(f"max_rank={max_rank} leaves no layer a plane: give 2 or more")
    wide = select(model, batches, loss_fn, rank, "skew", {n: found[n] for n in rank}, **options)
    return trim(wide, spend(wide.sigma, budget))


def allocate(model: nn.Module, batches, loss_fn, budget: int, targets=None, **options) -> dict[str, int]:
    """{layer: even rank} of `within`, for another transform or kind of support; layers that get nothing are left out."""
    return {n: P.shape[1] for n, P in within(model, batches, loss_fn, budget, targets, **options).items()}


def union(tasks: list[Supports], rank: int) -> Supports:
    """One support for several tasks: the leading `rank` singular directions of all their planes, each weighted by its σ
    (relative to its task's largest). Opposing gradients of two tasks ask for the same planes here, and for none in a `select`
    on the sum of their losses. Raises ValueError for supports without a σ for every plane.
    """
    joined = Supports()
    for n in tasks[0]:
        if not all(n in t and 2 * len(t.sigma.get(n, ())) == t[n].shape[1] for t in tasks):
            raise ValueError(f"layer {n!r}: every task needs a support of kind 'skew' (or 'rescored') and even rank for it")
        shares = [t.sigma[n] / t.sigma[n][0].clamp(min=torch.finfo(t[n].dtype).tiny) for t in tasks]
        weighted = [t[n] * share.repeat_interleave(2) for t, share in zip(tasks, shares)]         # (in, 2·planes)
        U, s, _ = torch.linalg.svd(torch.cat(weighted, 1), full_matrices=False)
        r = min(rank, int((s > 1e-4 * s[0]).sum()))
        joined[n], joined.sigma[n] = U[:, :r].contiguous(), s[:r:2]
    return joined


# ------------------------------------------------------------------------------------ one pass over the batches

def moments(model: nn.Module, batches, loss_fn, layers: dict[str, nn.Module], second: str | None = None) -> dict[str, Tensor]:
    """Dense sums over `batches`: the gradient G = Σ δᵀx (out, in) of every layer; or, with second="input" or "output",
    the second moment Σ xᵀx of its inputs x, or of its outputs."""
    found = _sums(model, batches, loss_fn, layers, lambda name, x, delta: [(delta, x)], second)
    return {n: G for n, (G,) in found.items()}


def _thin_products(model, batches, loss_fn, layers, pairs, side: str, second: str | None = None) -> dict[str, list[Tensor]]:
    """{layer: [G A (out, k), GᵀB (in, k)]} for pairs (A (in, k), B (out, k)) or (A,); on the output side with Gᵀ for G."""
    def factors(name, x, delta):
        rows = (x, delta) if side == "input" else (delta, x)
        return [(v, u @ X) for u, v, X in zip(rows, rows[::-1], pairs[name])] # δᵀ(x A), xᵀ(δ B)
    return _sums(model, batches, loss_fn, layers, factors, second)


def _sums(model, batches, loss_fn, layers: dict[str, nn.Module], factors, second: str | None) -> dict[str, list[Tensor]]:
    """{layer: [Σ aᵀb for (a, b) in factors(layer, x, δ)]} over batches, and over the ranks of torch.distributed if it runs.

    With second="input" or "output", the rows of inputs or outputs that the loss depends on stand for both x and δ.
    """
    sums: dict[str, list[Tensor]] = {}

    def add(name, x, delta, y):
        if second is not None:
            x = delta = (x if second == "input" else y)[delta.any(dim=1)]     # a row with δ = 0 is padding
        new = factors(name, x, delta)
        sums[name] = ([S.addmm_(a.mT, b) for S, (a, b) in zip(sums[name], new)] if name in sums else
                      [a.mT @ b for a, b in new])

    _sweep(model, batches, loss_fn, layers, add, second == "output")
    for n, parts in sums.items():
        if not all(X.isfinite().all() for X in parts):
            raise ValueError(f"layer {n!r}: its gradient (or input) is not finite")
    for n, layer in layers.items() if torch.distributed.is_available() and torch.distributed.is_initialized() else ():
        if n not in sums:                                                     # only another rank reached it: no rows here
            W = _wide(_matrix(layer))
            add(n, W[:0], W.mT[:0], W.mT[:0])
        for X in sums[n]:
            torch.distributed.all_reduce(X)
    return {n: parts for n, parts in sums.items() if any(X.any() for X in parts)}


def _sweep(model: nn.Module, batches, loss_fn, layers: dict[str, nn.Module], add, outputs: bool = False) -> None:
    """Runs loss and backward on every batch, calling add(name, x, δ, y if `outputs`) with each layer's rows, float32 or wider.
    Parameters are frozen and the model is in eval mode meanwhile."""
    def hook(name):
        def forward(module, args, kwargs, y):
            if not torch.is_grad_enabled():
                return y                                                      # a checkpointed block: its recomputation comes
            x = (args[0] if args else next(iter(kwargs.values()))).detach()
            version = x._version
            # frozen weights below this layer: the graph has to begin here (cloned, so later in-place steps may act)
            y = y if y.requires_grad else y.detach().requires_grad_().clone()
            kept = y.detach().clone() if outputs else None

            def backward(delta):
                if x._version != version:
                    raise ValueError(f"layer {name!r}: its input is changed in place after the call (as in h += layer(h)), so "
                                     "its gradient cannot be read off; use h = h + layer(h), or leave the layer out of targets")
                with torch.no_grad(), torch.autocast(delta.device.type, enabled=False):
                    add(name, _rows(x, module, "input"), _rows(delta, module, "output"),
                        _rows(kept, module, "output") if outputs else None)
            y.register_hook(backward)
            return y
        return forward

    def say(text):
        if sys.stderr.isatty():
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)

    if torch.is_inference_mode_enabled():
        raise ValueError("a support needs gradients: leave torch.inference_mode() for the selection")
    count, total = 0, len(batches) if hasattr(batches, "__len__") else "?"
    with contextlib.ExitStack() as after:                                     # everything is put back, whatever happens
        for p in model.parameters():
            after.callback(p.requires_grad_, p.requires_grad)
        for m in model.modules():
            after.callback(setattr, m, "training", m.training)
        model.requires_grad_(False).eval()
        for name, layer in layers.items():
            after.enter_context(layer.register_forward_hook(hook(name), with_kwargs=True))
            while hasattr(layer, "rotation"):
                layer = layer.base
            layer.training = not _floating(layer)                             # a quantised layer may repack itself in eval mode
        after.callback(say, "")
        for count, batch in enumerate(batches, 1):
            with torch.enable_grad():
                loss = loss_fn(model, batch)
                if not isinstance(loss, Tensor) or loss.numel() != 1:
                    got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
                    raise ValueError(f"loss_fn returned {got}, expected a scalar tensor")
                if not loss.isfinite():
                    raise ValueError(f"the loss of calibration batch {count} is {loss.item()}")
                if not loss.requires_grad:
                    raise ValueError("the loss does not depend on any target layer (or one is inside a reentrant checkpoint, whose "
                                     "input would have to require grad: take use_reentrant=False)")
                loss.backward()
            say(f"choosing supports: batch {count}/{total}")
        if not count:
            raise ValueError("batches is empty: nothing to choose a support from")


# ------------------------------------------------------------------------------------ helpers

def _wide(X: Tensor) -> Tensor:
    """Detached, float32 or wider."""
    return X.detach().to(torch.promote_types(X.dtype, torch.float32))


def _floating(module: nn.Module) -> bool:
    return isinstance(W := getattr(module, "weight", None), Tensor) and W.is_floating_point()


def _matrix(module: nn.Module) -> Tensor:
    """The weight as (out, in): transformers' Conv1D (which has `nf`) stores its transpose, Conv2d (out, channels, height,
    width). A layer without a floating weight (quantised) is asked what it does to the identity."""
    if _floating(module):
        W = module.weight
        return W.mT if hasattr(module, "nf") else W.flatten(1)
    device = next((t.device for t in (*module.parameters(), *module.buffers())), torch.device("cpu"))
    with torch.no_grad():
        x = torch.eye(module.in_features, device=device, requires_grad=True)   # as in training, for the same reason as in _sweep
        return (module(x) - module(0 * x[:1])).mT


def _shape(module: nn.Module, side: str = "input") -> tuple[int, int]:
    """(out, in) of `_matrix`; (in, out) for side="output"."""
    features = getattr(module, "out_features", None), getattr(module, "in_features", None)
    shape = features if isinstance(features[0], int) else tuple(_matrix(module).shape)   # of Conv1D and Conv2d: a view
    return shape if side == "input" else shape[::-1]


def _rows(x: Tensor, module: nn.Module, side: str) -> Tensor:
    """Inputs or outputs of `module` as rows (n, features), float32 or wider; of a convolution, a row a position (its patch)."""
    conv, x = module, _wide(x)
    while hasattr(conv, "rotation"):
        conv = conv.base
    if isinstance(conv, nn.Conv2d) and side == "output":
        x = x.flatten(-2).mT
    elif isinstance(conv, nn.Conv2d):
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        x = nn.functional.pad(x, conv._reversed_padding_repeated_twice, mode=mode)
        x = nn.functional.unfold(x, conv.kernel_size, conv.dilation, 0, conv.stride).mT
    return x.flatten(0, -2) if x.ndim > 1 else x[None]


def _side(side: str) -> str:
    if side not in ("input", "output"):
        raise ValueError(f"unknown side {side!r}; valid: input, output")
    return side


def _rank(r: int, d: int, where: str = "") -> int:
    if not isinstance(r, int) or isinstance(r, bool) or not 1 <= r <= d:
        raise ValueError(f"{where}rank {r!r} must be an int between 1 and the dimension, {d}")
    return r


def _start(W: Tensor, side: int, k: int, generator) -> Tensor:
    """A random orthonormal (out, k) or (in, k), as side = 0 or 1, on W's device and in its dtype, float32 or wider."""
    return _orthonormal(torch.randn(W.shape[side], k, generator=generator, dtype=_wide(W).dtype)).to(W.device)


def _axes(norms: Tensor, r: int) -> Tensor:
    """The columns of the identity where norms (d,) are largest → (d, r)."""
    return torch.eye(len(norms), dtype=norms.dtype, device=norms.device)[:, norms.topk(r).indices.sort().values]


def _pairs(W: Tensor, U: Tensor, V: Tensor, r: int) -> Tensor:
    """Basis of [v_1, W0ᵀu_1, v_2, …] (in, r) from left and right singular vectors in columns."""
    k = (r + 1) // 2
    WtU = nn.functional.normalize(W.mT @ U[:, :k], dim=0, eps=torch.finfo(W.dtype).tiny)
    return _orthonormal(torch.stack([V[:, :k], WtU], -1).flatten(-2)[:, :r], r)


def _orthonormal(X: Tensor, r: int | None = None) -> Tensor:
    """Orthonormal basis of the columns of X (d, k), completed to r columns where X has fewer or is rank-deficient."""
    if r is not None and X.shape[1] < r:
        X = torch.cat([X, torch.eye(X.shape[0], dtype=X.dtype, device=X.device)[:, :r - X.shape[1]]], 1)
    return torch.linalg.qr(X)[0]


def _right_singular(M: Tensor, r: int) -> Tensor:
    """Top r right singular vectors of M (n, d) → (d, r); beyond min(n, d) it goes on into the null space."""
    return torch.linalg.svd(_wide(M), full_matrices=_rank(r, M.shape[1]) > min(M.shape))[2][:r].mT.contiguous()


def _target_layers(model: nn.Module, targets) -> dict[str, nn.Module]:
    """The layers that `loft.target_layers` names: its twin, so that this file needs no other."""
    if isinstance(targets, dict):
        return targets
    linear = {n: m for n, m in model.named_modules() if all(isinstance(getattr(m, k, None), int) for k in ("in_features", "out_features"))
              or isinstance(m, nn.Conv2d) or hasattr(m, "nf") and _floating(m)}
    linear = {n: m for n, m in linear.items() if not (n.endswith(".base") and hasattr(linear.get(n[:-5]), "rotation"))}
    if "" in linear:
        return {"": model}
    linear = {n: m for n, m in linear.items() if hasattr(m, "rotation") or not any(k.startswith(n + ".") for k in linear)}
    lost = []
    if targets is None:
        linear = {n: m for n, m in linear.items() if not isinstance(getattr(m, "base", m), nn.Conv2d)}
        tied = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        output = getattr(model, "get_output_embeddings", lambda: None)()
        heads = [n for n, m in linear.items() if m is output or id(getattr(m, "weight", None)) in tied
                 or n.split(".")[-1] in ("lm_head", "head", "classifier", "score")] or list(linear)[-1:]
        wanted = lambda n, m: n not in heads
    elif callable(targets):
        wanted = targets
    elif isinstance(targets, str):
        try:
            wanted = lambda n, m, find=re.compile(targets).search: find(n)
        except re.error as e:
            raise ValueError(f"targets={targets!r} is not a regular expression: {e}") from None
    else:
        wanted = lambda n, m: any(f".{t}." in f".{n}." for t in targets)
        lost = [t for t in targets if not any(f".{t}." in f".{n}." for n in linear)]
    found = {n: m for n, m in linear.items() if wanted(n, m)}
    if not found or lost:
        raise ValueError(f"targets={lost or targets!r} match none of the linear layers: {', '.join(list(linear)[:8])}")
    if grouped := [n for n, m in found.items() if getattr(getattr(m, "base", m), "groups", 1) != 1]:
        raise ValueError(f"layer {grouped[0]!r}: a grouped convolution has no one input side; leave it out of targets")
    return found
