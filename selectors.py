"""Supports: where a rotation W0 (I + P (T − I) Pᵀ) should act.

With G = ∂L/∂W at W0 (out × in) and R = exp(P A Pᵀ), A skew, the loss moves to first order by

    dL = ⟨Pᵀ S P, A⟩_F,     S = skew(W0ᵀ G) = ½ (W0ᵀG − GᵀW0)      (in × in)            (LOFT, arXiv 2605.11872)

so ‖PᵀSP‖_F, the **score** of P, is the steepest decrease that a rotation inside span(P) can make per unit ‖A‖_F,
and nothing of G but S matters. Every function here is pure: tensors in, P (in, r) with orthonormal columns out.
For a rotation on the output side (R W0) pass the transposes: S = skew(W0Gᵀ) up to sign. `select` does it for a model.

    from loft import selectors
    P = selectors.skew(W0, G, r=32)                                            # the best P there is, for this G
    P = selectors.select(model, batches, loss_fn, rank=32, kind="skew")        # {layer: P}
    loft.adapt(model, support=P)
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
    import re

    import torch
    from torch import Tensor, nn

KINDS = ("random", "coordinate", "principal", "minor", "activation", "gradient", "paired", "skew")


# ---------------------------------------------------------------------------------------------------------
# From W0 alone
# ---------------------------------------------------------------------------------------------------------

def random(W: Tensor, r: int, generator: torch.Generator | None = None) -> Tensor:
    """Uniformly random support, for W (out, in)."""
    return _orthonormal(torch.randn(W.shape[1], _rank(r, W), generator=generator, dtype=_wide(W).dtype)).to(W.device)


def principal(W: Tensor, r: int) -> Tensor:
    """Top r right singular vectors of W (out, in): PSOFT's support (arXiv 2505.11235)."""
    return _right_singular(W, r)


def minor(W: Tensor, r: int) -> Tensor:
    """The r right singular vectors of W (out, in) with the smallest singular values.

    Of the min(out, in) that W has: its null space is left out, for a rotation there leaves W0 R = W0.
    """
    short = min(W.shape)
    if r > short:
        raise ValueError(f"rank {r}: W {tuple(W.shape)} has only {short} singular directions outside its null space")
    return torch.linalg.svd(_wide(W), full_matrices=False)[2][short - _rank(r, W):].mT.contiguous()


# ---------------------------------------------------------------------------------------------------------
# From the gradient or the inputs
# ---------------------------------------------------------------------------------------------------------

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
    chosen = norms.topk(_rank(r, W)).indices.sort().values
    return torch.eye(W.shape[1], dtype=W.dtype, device=W.device)[:, chosen]


def paired(W: Tensor, G: Tensor, r: int) -> Tensor:
    """Orthonormal basis of [v_1, W0ᵀu_1, v_2, W0ᵀu_2, …] for the top r/2 singular triplets (u, σ, v) of G.

    For a rank-one G = σ u vᵀ the plane span{v, W0ᵀu} is the best there is; v alone scores exactly 0.
    An odd r takes one more v.
    """
    k = (_rank(r, W) + 1) // 2
    U, _, Vh = torch.linalg.svd(_wide(G), full_matrices=False)
    pairs = torch.stack([Vh[:k].mT, _unit(_wide(W).mT @ U[:, :k])], -1)        # (in, k, 2)
    return _orthonormal(pairs.flatten(-2)[:, :r], r)


def skew(W: Tensor, G: Tensor, r: int, generator: torch.Generator | None = None) -> Tensor:
    """The support of largest score: the r/2 planes of S with the largest σ_j, where ‖PᵀSP‖_F² = 2 Σ_{j ≤ r/2} σ_j².

    Exact up to in = 1024. Above, randomised subspace iteration with thin products (S is never formed) and
    Rayleigh–Ritz. An odd r holds (r−1)/2 planes and one direction that is of no use to first order.
    """
    W, G, r = _wide(W), _wide(G), _rank(r, W)
    if W.shape[1] <= 1024:
        return planes((W.mT @ G - G.mT @ W) / 2, r)[0]
    Q = _orthonormal(torch.randn(W.shape[1], min(r + 16, W.shape[1]), generator=generator, dtype=W.dtype).to(W.device))
    for _ in range(6):
        Q = _orthonormal(_skew_times(W, G, Q))
    return Q @ planes(Q.mT @ _skew_times(W, G, Q), r)[0]


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
    WP, GP = _wide(W).to(P.dtype) @ P, _wide(G).to(P.dtype) @ P
    M = WP.mT @ GP
    return ((M - M.mT) / 2).norm().item()


# ---------------------------------------------------------------------------------------------------------
# Over a model
# ---------------------------------------------------------------------------------------------------------

def select(model: nn.Module, batches, loss_fn, rank: int | dict[str, int], kind: str = "skew", targets=None, *,
           side: str = "input", seed: int = 0) -> dict[str, Tensor]:
    """Chooses a support for every target layer: {layer: P}, for `loft.adapt(model, support=…)`.

    Args:
        batches: iterable of whatever loss_fn takes; its gradients are summed.
        loss_fn: (model, batch) → scalar loss. Any task.
        rank, targets, side: as in `loft.adapt`; kind: one of `KINDS`.
    Weights keep requires_grad as it was and get no .grad; the model runs in eval mode and is put back.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}; valid: {', '.join(KINDS)}")
    found = _target_layers(model, targets)
    generator = torch.Generator().manual_seed(seed)
    statistics = {}
    if kind not in ("random", "principal", "minor"):
        statistics = moments(model, batches, loss_fn, found, side if kind == "activation" else None)
    supports = {}
    for name, layer in found.items():
        r = rank[name] if isinstance(rank, dict) else rank
        W, M = layer.weight.detach(), statistics.get(name)
        if side == "output":
            W, M = W.mT, M.mT if M is not None else None
        try:
            supports[name] = (random(W, r, generator) if kind == "random" else
                              principal(W, r) if kind == "principal" else
                              minor(W, r) if kind == "minor" else
                              activation(M, r) if kind == "activation" else
                              skew(W, M, r, generator) if kind == "skew" else
                              {"coordinate": coordinate, "gradient": gradient, "paired": paired}[kind](W, M, r))
        except ValueError as e:
            raise ValueError(f"layer {name!r}: {e}") from None
    return supports


def moments(model: nn.Module, batches, loss_fn, layers: dict[str, nn.Module], second: str | None = None) -> dict[str, Tensor]:
    """Sums over `batches`, layer by layer, in float32 or wider: the gradient G = Σ δᵀx (out, in) of the loss, from the
    layer's input rows x and output gradients δ; or, with second="input" or "output", the second moment Σ xᵀx of x or y.
    """
    sums: dict[str, Tensor] = {}

    def hook(name):
        def add(a, b):
            a, b = _rows(a), _rows(b)
            sums[name] = sums[name] + a.mT @ b if name in sums else a.mT @ b

        def forward(module, args, y):
            x = args[0].detach()
            if second:
                rows = x if second == "input" else y.detach()
                add(rows, rows)
            elif torch.is_grad_enabled():
                # frozen weights below this layer: the graph has to begin here (cloned, so later in-place steps may act)
                y = y if y.requires_grad else y.detach().requires_grad_().clone()
                y.register_hook(lambda delta: add(delta, x))
            return y
        return forward

    flags, modes = [(p, p.requires_grad) for p in model.parameters()], [(m, m.training) for m in model.modules()]
    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    try:
        model.requires_grad_(False).eval()
        count = 0
        for count, batch in enumerate(batches, 1):
            with torch.set_grad_enabled(second is None):
                loss = loss_fn(model, batch)
            if not isinstance(loss, Tensor) or loss.numel() != 1:
                raise ValueError(f"loss_fn returned {tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__},"
                                 " expected a scalar tensor")
            if not loss.isfinite():
                raise ValueError(f"the loss of calibration batch {count} is {loss.item()}")
            if second is None:
                if not loss.requires_grad:
                    raise ValueError("the loss does not depend on any target layer")
                loss.backward()
        if not count:
            raise ValueError("batches is empty: nothing to choose a support from")
    finally:
        for handle in handles:
            handle.remove()
        for p, flag in flags:
            p.requires_grad_(flag)
        for m, mode in modes:
            m.training = mode
    if missing := [n for n in layers if n not in sums]:
        raise ValueError(f"no gradient reached {', '.join(missing[:5])}{', …' if len(missing) > 5 else ''}: "
                         "leave these layers out of targets")
    return sums


# ---------------------------------------------------------------------------------------------------------
# Helpers
# ---------------------------------------------------------------------------------------------------------

def _wide(X: Tensor) -> Tensor:
    """Detached, float32 or wider."""
    return X.detach().to(torch.promote_types(X.dtype, torch.float32))


def _rows(x: Tensor) -> Tensor:
    return _wide(x).flatten(0, -2) if x.ndim > 1 else _wide(x)[None]


def _unit(X: Tensor) -> Tensor:
    return X / X.norm(dim=0).clamp(min=torch.finfo(X.dtype).tiny)


def _rank(r: int, W: Tensor) -> int:
    if not isinstance(r, int) or isinstance(r, bool) or not 1 <= r <= W.shape[1]:
        raise ValueError(f"rank {r!r} must be an int between 1 and the dimension, {W.shape[1]}")
    return r


def _orthonormal(X: Tensor, r: int | None = None) -> Tensor:
    """Orthonormal basis of the columns of X (d, k), completed to r columns where X has fewer or is rank-deficient."""
    if r is not None and X.shape[1] < r:
        X = torch.cat([X, torch.eye(X.shape[0], dtype=X.dtype, device=X.device)[:, :r - X.shape[1]]], 1)
    return torch.linalg.qr(X)[0]


def _right_singular(M: Tensor, r: int) -> Tensor:
    """Top r right singular vectors of M (n, d) → (d, r); beyond min(n, d) it goes on into the null space."""
    return torch.linalg.svd(_wide(M), full_matrices=_rank(r, M) > min(M.shape))[2][:r].mT.contiguous()


def _skew_times(W: Tensor, G: Tensor, X: Tensor) -> Tensor:
    """S X = ½ (W0ᵀ(G X) − Gᵀ(W0 X)), X (in, k): thin products only."""
    return (W.mT @ (G @ X) - G.mT @ (W @ X)) / 2


def _target_layers(model: nn.Module, targets) -> dict[str, nn.Module]:
    """The layers that `loft.target_layers` names: its twin, so that this file needs no other."""
    if isinstance(targets, dict):
        return targets
    linear = {n: m for n, m in model.named_modules() if n and hasattr(m, "in_features") and hasattr(m, "out_features")}
    if targets is None:
        tied = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        output = getattr(model, "get_output_embeddings", lambda: None)()
        heads = [n for n, m in linear.items() if m is output or id(m.weight) in tied
                 or n.split(".")[-1] in ("lm_head", "head", "classifier", "score")] or list(linear)[-1:]
        wanted = lambda n, m: n not in heads
    elif isinstance(targets, str):
        wanted = lambda n, m: re.search(targets, n)
    else:
        wanted = targets if callable(targets) else lambda n, m: any(f".{t}." in f".{n}." for t in targets)
    found = {n: m for n, m in linear.items() if wanted(n, m)}
    if not found:
        raise ValueError(f"targets={targets!r} match none of the linear layers: {', '.join(list(linear)[:8])}")
    return found
