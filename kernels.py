"""Fast twins of loft.py's mathematics: equal to it in values and gradients up to rounding, chosen by

    loft.adapt(model, ..., backend="fused")            # or, on a model that is adapted already:
    kernels.fuse(model);  kernels.unfuse(model)

1. y = base(x + z (Tᵀ − I) Pᵀ), z = x P, in the one of three forms with the fewest products; autograd keeps z (n × r) alone.
2. T − I of all layers of one shape in one batched computation: one solve for the model, not one a layer. A product of
   sparse stages (BOFT's butterflies, GOFT's tree) is multiplied out into small dense blocks, at a cost that does not
   grow with the rows, which then pass through one batched product in place of m gathers.
3. A cache of those T, which gradient accumulation, recomputation in checkpoints and evaluation reuse. (Under
   torch.compile T is built inside the graph, in the same batches.)

This file imports torch alone; it knows loft.py's layers by their attributes.
"""
from __future__ import annotations

if __name__ == "kernels":
    # Not ours: transformers (or bitsandbytes) looks for PyPI's `kernels` and this file's folder stands first on
    # sys.path. Hand that package over where it is installed; ours is `loft.kernels`.
    import importlib.machinery, importlib.util, os, sys                       # noqa: E401
    _here = os.path.dirname(os.path.realpath(__file__))
    _spec = importlib.machinery.PathFinder.find_spec(
        "kernels", [p for p in sys.path if os.path.realpath(p or os.getcwd()) != _here])
    if _spec is not None and _spec.loader is not None:
        sys.modules["kernels"] = importlib.util.module_from_spec(_spec)
        _spec.loader.exec_module(sys.modules["kernels"])

import weakref
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.compiler import is_compiling
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook


# ---------------------------------------------------------------------------------------------------------
# 1. Rows through a rotation. D is T − I throughout; h and g are gradients of outputs.
# ---------------------------------------------------------------------------------------------------------

class RotatedLinear(Function):
    """x W0ᵀ + b + z Dᵀ Bᵀ with z = xA: the whole rotated layer, the rotation moved past the frozen weight W0 (out, in).

    A, B (in, r), (out, r) are P, W0P for W0 R and W0ᵀP, P for R W0, so it is one formula for both sides. Where x needs no
    gradient, that of T does not pass through W0 at all. With `whole`, W = W0 + B D Aᵀ is formed, in each direction anew,
    and z only serves the gradient of T: for many rows (`_form`). Keeps z (n, r).
    """

    @staticmethod
    def forward(ctx, x, z, D, W, b, A, B, whole):
        ctx.own, ctx.whole = z is None, whole
        z = x @ A if z is None else z                                         # (n, r)
        ctx.save_for_backward(z, D, W, A, B)
        if whole:
            return F.linear(x, torch.addmm(W, B @ D, A.mT), b)
        return F.linear(x, W, b).addmm_(z @ D.mT, B.mT)                       # (n, out), added in place

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        z, D, W, A, B = ctx.saved_tensors
        gB, dx, dz = g @ B, None, None                                        # (n, r)
        if ctx.needs_input_grad[0] and ctx.whole:
            dx = g @ torch.addmm(W, B @ D, A.mT)                              # ∂L/∂x = g W
        elif ctx.needs_input_grad[0]:
            dx, dz = g @ W, gB @ D                                            # ∂L/∂x = g W0 + ∂L/∂z Aᵀ, ∂L/∂z = g B D
            dx, dz = (dx.addmm_(dz, A.mT), None) if ctx.own else (dx, dz)     # a shared z passes its own on
        return (dx, dz, gB.mT @ z if ctx.needs_input_grad[2] else None, None,
                g.sum(0) if ctx.needs_input_grad[4] else None, None, None, None)


def in_support(x: Tensor, z: Tensor | None, b: Tensor | None, D: Tensor, P: Tensor, _=None) -> Tensor:
    """Rows x + ((x − b) P) Dᵀ Pᵀ, P (d, r), D (r, r); z = xP where it is known. Added in one pass; autograd keeps z."""
    z = x @ P if z is None else z                                             # (n, r)
    return torch.addmm(x, (z if b is None else z - b @ P) @ D.mT, P.mT)


def in_blocks(x: Tensor, z: None, b: Tensor | None, D: Tensor, top: Tensor | None = None) -> Tensor:
    """Rows x + (x − b) Dᵀ, D block-diagonal (k, c, c); then, for GOFT, `top` (k, k) on every c-th coordinate.

    The blocks are strided views of x's columns, one batched product for all of them. Autograd keeps x (or x − b): no less
    would do, for ∂L/∂T_k = h_kᵀ x_k for any h. (bmm into a strided result saves a copy, but is then one call a block.)
    """
    d, c = x.shape[-1], D.shape[-1]
    if pad := D.shape[0] * c - d:                                             # GOFT takes any d: fill up the last block
        x, b = F.pad(x, (0, pad)), b if b is None else F.pad(b, (0, pad))
    u, whole = x if b is None else x - b, x.dtype in (torch.float32, torch.float64)
    blocks = u.unflatten(-1, (-1, c)).transpose(0, 1)                         # (k, n, c), a view
    y = torch.bmm(blocks, (D + _eye(D) if whole else D).mT).transpose(0, 1).flatten(1)
    y = y if whole else u + y                                                 # in half precision I + D would lose D's digits
    if top is not None:
        y[:, ::c] += y[:, ::c].clone() @ top.mT
    return (y if b is None else x + (y - u))[:, :d]                           # exact where T = I


def in_reflections(x: Tensor, z: None, b: Tensor | None, V: Tensor, K: Tensor) -> Tensor:
    """Rows x − ((x − b) V) Kᵀ Vᵀ: T = I − V K Vᵀ, V (d, k), K (k, k). (V learns, so autograd has to keep x.)"""
    return torch.addmm(x, ((x if b is None else x - b) @ V) @ K.mT, V.mT, alpha=-1)


# ---------------------------------------------------------------------------------------------------------
# 2. T − I of L layers at once, from stacked parameters (L, …)
# ---------------------------------------------------------------------------------------------------------

class Cayley(Function):
    """T − I = 2 Q (I − Q)⁻¹ of skew Q (…, b, b), polished if asked; its backward needs no solve.

    dT = 2 M dQ M with M = (I − Q)⁻¹ = I + (T − I)/2, so ∂L/∂Q = 2 Mᵀ G Mᵀ for G = ∂L/∂T: two products.
    """

    @staticmethod
    def forward(ctx, Q, polish):
        D = _solve(_eye(Q) - Q, 2 * Q)
        D = _polish(D) if polish else D
        ctx.save_for_backward(D)
        return D

    @staticmethod
    @once_differentiable
    def backward(ctx, G):
        N = 2 * _eye(G) + ctx.saved_tensors[0]                                # 2M
        return N.mT @ (G / 2) @ N.mT, None


def _eye(like: Tensor, n: int | None = None) -> Tensor:
    return torch.eye(n or like.shape[-1], dtype=like.dtype, device=like.device)


def _solve(A: Tensor, B: Tensor) -> Tensor:
    """B A⁻¹ (…, b, b); large ones one by one: on a CPU torch's batched LU hangs in MKL's threads (pytorch#142815, b ≥ 151)."""
    if A.device.type != "cpu" or A.shape[-1] <= 64:
        return torch.linalg.solve(A, B, left=False)
    pairs = zip(A.flatten(0, -3), B.flatten(0, -3))
    return torch.stack([torch.linalg.solve(a, b, left=False) for a, b in pairs]).view_as(B)


def _polish(D: Tensor) -> Tensor:
    """Two Newton–Schulz steps T ← T (I − ½(TᵀT − I)), which restore TᵀT = I; written in D = T − I."""
    for _ in range(2):
        E = D + D.mT + D.mT @ D
        D = D - (E + D @ E) / 2
    return D


def skew_blocks(g: Tensor, b: int, map: str, terms: int, bound: float | None, polish: bool = True) -> Tensor:
    """T − I (…, b, b) of generators g (…, b(b−1)/2): Q = U − Uᵀ, ‖Q‖_F ≤ bound, then the map."""
    i, j = torch.triu_indices(b, b, 1, device=g.device)
    U = g.new_zeros(*g.shape[:-1], b * b).scatter(-1, (i * b + j).expand_as(g), g).unflatten(-1, (b, b))   # row by row
    Q = U - U.mT
    if bound is not None:                                                     # Q ← Q min(1, bound / ‖Q‖_F)
        Q = Q * (bound * Q.square().sum((-2, -1), keepdim=True).clamp(min=bound ** 2).rsqrt())
    if map == "cayley":
        return Cayley.apply(Q, polish)
    if map == "expm":
        D = torch.linalg.matrix_exp(Q) - _eye(Q)
        return D + (_polish(D.detach()) - D.detach())                         # the polish's derivative is the identity
    D = flat = Q.flatten(0, -3)                                               # Cayley–Neumann: 2Q + 2Q² + … + Q^(terms−1)
    for _ in range(terms - 2):
        D = torch.baddbmm(flat, flat, D, beta=2)                              # D ← 2Q + Q D
    return D.view_as(Q) if terms > 2 else 2 * Q


def multiply_butterflies(D: Tensor) -> Tensor:
    """T_1 T_2 … T_m − I of BOFT's stages, D (L, m, k, b, b) → blocks (L, k b / c, c, c) with c = b 2^(m−1).

    Stage s joins half-blocks that lie 2^s half-blocks apart, so all m stages stay within c coordinates.
    """
    L, m, k, b, _ = D.shape
    c = b << m - 1
    y = _eye(D, c).expand(L, k * b // c, c, c)                                # rows e_i, to become the rows of Tᵀ
    for s in reversed(range(m)):
        half = y.unflatten(-1, (-1, 2, 2 ** s, b // 2)).transpose(-3, -2)     # (…, groups, 2^s, 2, b/2)
        stage = D[:, s].unflatten(1, (-1, c // b))                            # (L, k b / c, c / b, b, b)
        change = torch.einsum("lgrkb,lgkcb->lgrkc", half.flatten(-2).flatten(-3, -2), stage)
        y = y + change.unflatten(-1, (2, -1)).unflatten(-3, (-1, 2 ** s)).transpose(-3, -2).flatten(-4)
    return y.mT - _eye(D, c)


def multiply_givens(G: Tensor, r: int, c: int, first: int = 0) -> Tensor:
    """T − I of log2(c) stages of GOFT's tree on r coordinates: G − I (L, pairs, 2, 2) → blocks (L, ⌈r/c⌉, c, c).

    Stage s takes row pairs of coordinates 2j·2^s and (2j + 1)·2^s by (a, b) ↦ (a, b) G; `first` is stage 0's first
    pair. Pairs that reach beyond r are the identity.
    """
    k = -(-r // c)
    y, step = _eye(G, c).expand(len(G), k, c, c), 1                           # rows e_i, to become the rows of Tᵀ
    while step < c:
        pairs, slots = -(-r // step) // 2, k * c // (2 * step)
        stage = F.pad(G[:, first:first + pairs], (0, 0, 0, 0, 0, slots - pairs)).unflatten(1, (k, -1))
        seen = y.unflatten(-1, (-1, 2, step))                                 # offset 0 of each step turns, the rest wait
        turned = seen[..., 0] + torch.einsum("lgrpa,lgpab->lgrpb", seen[..., 0], stage)
        y = torch.cat([turned[..., None], seen[..., 1:]], -1).flatten(-3)
        first, step = first + pairs, 2 * step
    return y.mT - _eye(G, c)


def _skew(g, alpha=None, beta=None, gauge=None, *, b, map, terms, bound, dense, blocks, polish=True):
    """`Skew` with Rotation's vectors, diag(β/γ) T diag(αγ) − I: blocks (L, k, c, c), or with dense=True (L, r, r)."""
    D = skew_blocks(g, b, map, terms, bound, polish).expand(-1, -1, blocks, -1, -1)   # (L, m, k, b, b)
    D = multiply_butterflies(D) if D.shape[1] > 1 else D[:, 0]
    D = _block_diagonal(D)[:, None] if dense and D.shape[1] > 1 else D
    if alpha is not None or gauge is not None:
        one = D.new_ones(D.shape[:3])                                         # (L, k, c)
        alpha, beta, gauge = (one if v is None else v.view_as(one) for v in (alpha, beta, gauge))
        D = (beta / gauge)[..., None] * D * (alpha * gauge)[..., None, :]
        D.diagonal(dim1=-2, dim2=-1).add_(alpha * beta - 1)
    return (D[:, 0] if dense else D,)


def _givens(g, *, r, relaxed, dense):
    """`Givens`: (blocks (L, k, 32, 32), top (L, k, k)) with k = ⌈r/32⌉, or with dense=True (L, r, r)."""
    if not relaxed:
        c, s = -2 * torch.sin(g / 2) ** 2, torch.sin(g)                       # cos θ − 1 = −2 sin²(θ/2)
        g = torch.cat([c, -s, s, c], -1)
    G = g.unflatten(-1, (2, 2))                                               # (L, r − 1, 2, 2)
    if dense or r <= 32:
        D = multiply_givens(G, r, 1 << (r - 1).bit_length())
        return (D[:, 0, :r, :r] if dense else D,)
    k, below = -(-r // 32), sum(-(-r // step) // 2 for step in (1, 2, 4, 8, 16))   # pairs in the stages below the top
    return multiply_givens(G, r, 32), multiply_givens(G, k, 1 << (k - 1).bit_length(), below)[:, 0, :k, :k]


def _householder(u, *, dense):
    """`Householder`: (V (L, r, k), K (L, k, k)) with T = I − V K Vᵀ, or with dense=True T − I (L, r, r)."""
    v = u / torch.linalg.vector_norm(u, dim=-2, keepdim=True)
    a, c = v[..., 0::2], v[..., 1::2] - v[..., 0::2]                          # a pair (a, b) is carried as (a, b − a)
    V = torch.stack([a, c], -1).flatten(-2)
    h = (c * c).sum(-2) / 2                                                   # 1 − aᵀb, (L, k/2)
    half = torch.full_like(h, 0.5)
    pair = torch.stack([torch.stack([half, half - h], -1), torch.stack([-half, h], -1)], -2)   # (L, k/2, 2, 2)
    gram = torch.triu(V.mT @ V, 1) * (1 - _block_diagonal(torch.ones_like(pair)))
    K = gram + _block_diagonal(pair)                                          # S = ½ I + strictly upper VᵀV, in pairs
    K = _solve(K, _eye(K).expand_as(K))                                       # S⁻¹
    return (-(V @ K @ V.mT),) if dense else (V, K)


def _block_diagonal(D: Tensor) -> Tensor:
    """Blocks (L, k, c, c) → (L, k c, k c)."""
    return torch.einsum("lkij,km->lkimj", D, _eye(D, D.shape[1])).flatten(3).flatten(1, 2)


def _keep(t: Tensor) -> Tensor:
    """What a node saves, without its graph: a saved output that held its own node would never be freed. bench.py counts here."""
    return t.detach()


class Batch(Function):
    """Group.make of L layers' parameters, as one node of the graph that can be walked back repeatedly.

    The graph inside is kept: gradient accumulation needs no second build. A layer apart from the loss gets no gradient.
    """

    @staticmethod
    def forward(ctx, group, *parameters):
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_keep, _keep):   # a checkpoint's stay outside
            leaves = [torch.stack(p).detach().requires_grad_(any(q.requires_grad for q in p)) for p in group.by_name(parameters)]
            outputs = group.make(leaves)
        ctx.group, ctx.leaves, ctx.outputs = weakref.ref(group), leaves, outputs   # weak: the group holds what this node made
        ctx.set_materialize_grads(False)
        return tuple(out.detach()[i] for i in range(len(group.layers)) for out in outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        if (group := ctx.group()) is not None:
            group.used = True
        width = len(ctx.outputs)
        rows = [grads[i:i + width] for i in range(0, len(grads), width)]      # one row of gradients a layer
        stacked = [torch.stack([torch.zeros_like(out[0]) if h is None else h for h in each])
                   for out, each in zip(ctx.outputs, zip(*rows))]
        wanted = [leaf for leaf in ctx.leaves if leaf.requires_grad]
        found = iter(torch.autograd.grad(ctx.outputs, wanted, stacked, retain_graph=True))
        found = [next(found) if leaf.requires_grad else None for leaf in ctx.leaves]
        return None, *(None if g is None or all(h is None for h in row) else g[i]
                       for i, row in enumerate(rows) for g in found)


# ---------------------------------------------------------------------------------------------------------
# 3. The layers of a model that share one batch, and the cache
# ---------------------------------------------------------------------------------------------------------

class Group:
    """Layers whose T are built together, and what was last built.

    What is cached belongs to parameters as `_state` sees them; a layer that sees others has all built anew. An edit through
    `.data` leaves no trace, so on a CPU T's parameters are compared with copies of them; elsewhere, where that would be a
    sync, T is built anew for every forward pass without gradient. (One of W0 is not seen: call `fuse` again.)
    """

    built = seen = copies = slots = None
    used = with_grad = False

    def __init__(self, layers: list[nn.Module], apply, make, names: tuple[str, ...]):
        self.layers, self.apply, self.function, self.names = layers, apply, make, names
        self.handles, self.thin = [], {}                                      # of fuse; W0 P

    def __getstate__(self):                                                   # copies and pickles hold no cache
        kept = {k: v for k, v in self.__dict__.items() if k not in ("built", "seen", "copies", "used", "with_grad", "slots")}
        return kept | {"thin": {}}

    def parameters(self, layer: nn.Module) -> list[Tensor]:
        return [getattr(layer.rotation if name in VECTORS else layer.rotation.transform, name) for name in self.names]

    def by_name(self, parameters):                                            # layer after layer → name after name
        return [parameters[k::len(self.names)] for k in range(len(self.names))]

    def make(self, stacks: list[Tensor]) -> tuple[Tensor, ...]:
        """What `apply` needs of every layer, (L, …), in the parameters' dtype (float32 at least)."""
        first, narrow, options = stacks[0], torch.promote_types(stacks[0].dtype, torch.float32), {}
        wide, known = torch.float32 if first.device.type == "mps" else torch.float64, self.function.keywords
        if not is_compiling() and first.device.type == "cpu" and known.get("map") in ("cayley", "cayley_neumann"):
            # ‖Q‖ ≤ b max |g| ≤ 4 costs no digits, so no polish and no wider type; on a GPU, asking would be a sync
            if first.numel() == 0 or known["b"] * first.detach().abs().amax().item() <= 4:
                wide, options = narrow, dict(polish=False)
        with torch.autocast(first.device.type, enabled=False):
            first, *vectors = (s.to(wide) for s in stacks)
            return tuple(out.to(narrow) for out in self.function(first, **dict(zip(self.names[1:], vectors)), **options))

    def build(self) -> list[tuple[Tensor, ...]]:
        """One tuple a layer, connected to its parameters; under torch.compile a plain part of the graph."""
        parameters = [p for layer in self.layers for p in self.parameters(layer)]
        if is_compiling():
            return list(zip(*(out.unbind(0) for out in self.make([torch.stack(p) for p in self.by_name(parameters)]))))
        flat = Batch.apply(self, *parameters)
        width = len(flat) // len(self.layers)
        return [flat[i:i + width] for i in range(0, len(flat), width)]

    def get(self, layer: nn.Module) -> tuple[Tensor, ...]:
        """What was built for one layer, from the cache where that is valid."""
        index, grad = layer.fused_index, torch.is_grad_enabled()
        if is_compiling():                                                    # no cache: the root's hook, or the layer itself
            if self.slots is not None:
                return self.slots[index]
            return tuple(out[0] for out in self.make([p[None] for p in self.parameters(layer)]))
        if self.layers[index] is not layer:                                   # a shallow copy: its parameters are its own
            return Group([layer], self.apply, self.function, self.names).build()[0]
        parameters = self.parameters(layer)
        stepped = self.used and parameters[0].requires_grad and (not grad or parameters[0].grad is None) and not _in_backward()
        if not (self.built is not None and (self.with_grad or not grad) and not stepped
                and all(_same(p, seen) for p, seen in zip(parameters, self.seen[index]))
                and (self.copies is None or all(map(torch.equal, parameters, self.copies[index])))):
            self.built, self.with_grad, self.used = self.build(), grad, False
            every = [self.parameters(each) for each in self.layers]
            self.seen = [[_state(p) for p in own] for own in every]
            self.copies = [[p.detach().clone() for p in own] for own in every] if parameters[0].device.type == "cpu" else None
        return self.built[index]

    def constants(self, layer: nn.Module, dtype: torch.dtype, product: bool) -> tuple[Tensor, Tensor | None]:
        """P in `dtype`, and with product=True W0 P (side="input") or W0ᵀ P ("output"), made again when either changes."""
        P, W = layer.rotation.P, layer.base.weight if product else layer.rotation.P
        if is_compiling():
            return P.to(dtype), None
        seen, made = self.thin.get((layer, dtype, product), (None, None))
        if seen is None or not (_same(P, seen[0]) and _same(W, seen[1])):
            with torch.inference_mode(False), torch.no_grad():
                made = P.to(dtype), (W if layer.side == "input" else W.mT) @ P.to(dtype) if product else None
            self.thin[layer, dtype, product] = (_state(P), _state(W)), made
        return made

    def __call__(self, layer: nn.Module, x: Tensor) -> Tensor:
        """y (…, out) for x (…, in): what LOFTLinear computes, before its magnitude."""
        device, base, side, past = x.device.type, layer.base, layer.side, getattr(layer, "past", None)
        b = getattr(base, "bias", None)
        b = b() if callable(b) else b                                         # a method in torch.ao's quantised layers
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        parts, product, z = [t.to(dtype) for t in self.get(layer)], False, None
        if self.apply is in_support:
            product, whole = _form(layer, dtype, x.numel() // x.shape[-1])
            parts += self.constants(layer, dtype, product)
            z = layer.fused_share.project(layer, x, parts[1]) if layer.fused_share is not None and not is_compiling() else None
        if product:                                                           # y = x W0ᵀ + b + z Dᵀ Bᵀ
            D, P, WP = parts
            A, B = (P, WP) if side == "input" else (WP, P)
            rows = x.reshape(-1, x.shape[-1])
            return RotatedLinear.apply(rows, z, D, base.weight, b, A, B, whole).view(*x.shape[:-1], layer.out_features)
        if side == "input":                                                   # y = (x Rᵀ R_pastᵀ) W0ᵀ + b
            y = self.apply(x.reshape(-1, x.shape[-1]).to(dtype), z, None, *parts).view(x.shape)
            return base(y if past is None else past(y))
        y = base(x)                                                           # y = (x W0ᵀ) R_pastᵀ Rᵀ + b
        y = y if past is None else y + past.delta(y if b is None else y - b)
        return self.apply(y.reshape(-1, y.shape[-1]), None, b if b is None else b.to(y.dtype), *parts).view(y.shape)

    def before(self, module, args):
        if is_compiling():
            self.slots = self.build()
        elif self.copies is None and not torch.is_grad_enabled():
            self.built = None

    def after(self, module, args, output):
        self.slots = None


def _form(layer: nn.Module, dtype: torch.dtype, n: int) -> tuple[bool, bool]:
    """(whether `RotatedLinear` fits, whether with W whole): by counting products; a plain frozen layer that nobody listens to.

    Forward and backward, over r:  in_support 4 n d,  past W0 2 n (in + out),  W whole n (in + out) + 2 in out, where the
    last term counts twice, for a W made is also written and read. In half precision W0 + B D Aᵀ would lose D's digits.
    """
    base, i, o = layer.base, layer.in_features, layer.out_features
    fits = (type(base) is nn.Linear and getattr(layer, "past", None) is None and not is_compiling()
            and not base.weight.requires_grad and base.weight.dtype == dtype and "forward" not in base.__dict__
            and not (base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks))
    d = i if layer.side == "input" else o
    thin = 2 * n * min(i + o, 2 * d)
    whole = fits and dtype in (torch.float32, torch.float64) and n * (i + o) + 4 * i * o < thin
    return fits and (whole or i + o <= 2 * d), whole


VECTORS = ("alpha", "beta", "gauge")                                          # Rotation's; the other names are its transform's
_steps = [0]                                                                  # of all optimizers: fused ones leave no version
register_optimizer_step_post_hook(lambda *_: _steps.append(_steps.pop() + 1))


def _state(p: Tensor) -> tuple:
    """The tensor, and what changes when it is edited in place, stepped by an optimizer, or given other storage."""
    return (p, None if p.is_inference() else p._version, p.requires_grad, p.requires_grad and _steps[0],
            StorageWeakRef(p.untyped_storage()), p.data_ptr())                # weak: while it is held, no other storage has its id


def _same(p: Tensor, seen: tuple) -> bool:
    return p is seen[0] and not p.is_inference() and _state(p)[1:] == seen[1:]


def _in_backward() -> bool:
    """Whether autograd runs us: a checkpoint's recomputation, to which no optimizer has stepped."""
    return torch._C._current_graph_task_id() != -1


def _plan(layer: nn.Module):
    """(apply, make, names of the parameters) of an adapted layer; None where it stays eager."""
    T, dense = getattr(layer.rotation, "transform", None), getattr(layer.rotation, "P", None) is not None
    vectors = tuple(v for v in VECTORS if getattr(layer.rotation, v, None) is not None)
    kind, apply = type(T).__name__, in_support if dense else in_blocks
    if hasattr(layer, "_conv_forward"):                                       # rotates its kernel, not its rows
        return None
    if kind == "Skew" and T.map in ("cayley", "cayley_neumann", "expm") and (dense or T.b << len(T.generator) - 1 <= 256):
        make = partial(_skew, b=T.b, map=T.map, terms=T.terms, bound=T.bound, dense=dense, blocks=T.r // T.b)
        return apply, make, ("generator", *vectors)
    if kind == "Givens" and not vectors:
        return apply, partial(_givens, r=T.r, relaxed=T.relaxed, dense=dense), ("generator",)
    if kind == "Householder" and not vectors:
        return apply if dense else in_reflections, partial(_householder, dense=dense), ("u",)
    return None


def _adapted(model: nn.Module) -> list[nn.Module]:
    found = [m for m in model.modules() if hasattr(m, "rotation") and hasattr(m, "fused")]
    if not found:
        raise ValueError("the model is not adapted: call loft.adapt (or loft.load) first")
    return found


def fuse(model: nn.Module) -> nn.Module:
    """Switches every adapted layer of `model` to the fast path, in place; returns it. Same parameters, same results.

    Call it with the model on its device, before torch.compile. Layers without a fast twin stay as they are: LoRA; Conv2d;
    blocks and butterflies of more than 256 coordinates; PSOFT's vectors on a tree or on reflections. Second derivatives and
    torch.func's transforms are for the eager path. Fused layers know of each other: to copy or pickle one alone, `unfuse`
    first. Raises ValueError on a model that is not adapted.
    """
    unfuse(model)
    groups: dict = {}
    for layer in _adapted(model):
        if plan := _plan(layer):
            apply, make, names = plan
            group = Group([], apply, make, names)
            like = [(p.shape, p.dtype, p.device) for p in group.parameters(layer)]
            group = groups.setdefault((apply, make.func, *make.keywords.items(), names, *like), group)
            layer.fused, layer.fused_index = group, len(group.layers)
            group.layers.append(layer)
    for group in groups.values():
        group.handles = [model.register_forward_pre_hook(group.before), model.register_forward_hook(group.after)]
    return model


def unfuse(model: nn.Module) -> nn.Module:
    """Back to the eager path."""
    for layer in _adapted(model):
        _unhook(layer.fused)
        _unhook(getattr(layer, "fused_share", None))
        layer.fused = layer.fused_share = None
    return model


def _unhook(holder) -> None:
    for handle in () if holder is None else holder.handles:
        handle.remove()


class Shared:
    """z = x P of layers that read one input through one support: computed once, kept once, one gradient into x.

    Each layer may take it once; and what is left at either end of the parent's forward is dropped (its graph may be gone).
    """

    def __init__(self, layers: list[nn.Module], parent: nn.Module):
        self.layers, self.waiting, self.z, self.seen, self.supports, self.agree = layers, set(), None, None, None, False
        self.handles = [parent.register_forward_pre_hook(self.drop), parent.register_forward_hook(self.drop)]

    def drop(self, *_) -> None:
        if not is_compiling():
            self.waiting, self.z, self.seen = set(), None, None

    def __getstate__(self):                                                   # copies and pickles hold no activations
        return self.__dict__ | dict(waiting=set(), z=None, seen=None, supports=None)

    def project(self, layer: nn.Module, x: Tensor, P: Tensor) -> Tensor | None:
        """z (n, r), or None where it cannot be shared (supports that no longer agree): then each layer projects for itself."""
        if x.is_inference():                                                  # has no version: it may have changed
            return None
        supports = [each.rotation.P for each in self.layers]
        if self.supports is None or not all(map(_same, supports, self.supports)):
            self.agree, self.waiting = all(torch.equal(p, supports[0]) for p in supports), set()
            self.supports = [_state(p) for p in supports]
        if not self.agree:
            return None
        now = (x, x._version, x.requires_grad, torch.is_grad_enabled(), P.dtype)
        if not (layer in self.waiting and self.seen[0] is x and self.seen[1:] == now[1:]):
            self.seen, self.waiting, self.z = now, set(self.layers), x.reshape(-1, x.shape[-1]).to(P.dtype) @ P
        z = self.z
        self.waiting.remove(layer)
        if not self.waiting:                                                  # the last layer has it: hold nothing
            self.drop()
        return z


def share(model: nn.Module, groups) -> nn.Module:
    """Lets layers that read one input share z = x P: `kernels.share(model, [["q_proj", "k_proj", "v_proj"]])`.

    Sister layers of one parent module, of one support: adapt with one tensor for all, say principal(torch.cat([Wq, Wk, Wv]), r).
    An input that is another tensor (cross-attention's) is projected again; nothing changes under torch.compile; `fuse` undoes it.
    Raises ValueError: no module has such fused layers, or their supports differ.
    """
    fused = {m for m in _adapted(model) if m.fused is not None}
    for names in groups:
        families = [(m, [m._modules[n] for n in names]) for m in model.modules() if all(n in m._modules for n in names)]
        families = [(m, sisters) for m, sisters in families if fused.issuperset(sisters)]
        if not families:
            raise ValueError(f"no module has fused layers called {', '.join(names)}; names right? kernels.fuse called?")
        for parent, sisters in families:
            P = [m.rotation.P for m in sisters]
            if any(m.side != "input" or p is None or not torch.equal(p, P[0]) for m, p in zip(sisters, P)):
                raise ValueError(f"{', '.join(names)} have no common support on the input side; adapt them with one tensor")
            shared = Shared(sisters, parent)
            for m in sisters:
                _unhook(m.fused_share)
                m.fused_share = shared
    return model
