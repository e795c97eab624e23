"""Fast twins of loft.py's rotations, equal to them in values and gradients up to rounding.

    loft.adapt(model, ..., backend="fused")      # or, on a model that is adapted already:
    kernels.fuse(model);  kernels.unfuse(model)

1. theta → T − I: the Cayley map's backward needs no solve, and a small Q only float32; butterflies
   are multiplied out into small dense blocks.
2. T − I of all layers of one shape is one batch, and one node of the graph. Without gradient (on a
   CPU) it is that of the last pass, if the parameters are what they were, number by number.
3. The batch is made when the model's forward begins, handed to the layers, taken back at its end.

So nothing that could be out of date is used. A layer that is called by itself, or again by a
checkpoint in backward, computes its own T. First derivatives only: second ones, and torch.func's
transforms, are for the eager layers.
"""
from __future__ import annotations

import sys

if __name__ == "kernels":
    # Not ours is wanted, but PyPI's package of that name (transformers looks for it), and this
    # folder stands first on sys.path: hand it over, if there is one. The rest is then never used.
    import os
    from importlib import machinery, util
    import loft
    here = os.path.dirname(os.path.realpath(__file__))
    elsewhere = [p for p in sys.path if os.path.realpath(p or os.getcwd()) != here]
    spec = machinery.PathFinder.find_spec(__name__, elsewhere)
    if spec is not None and spec.loader is not None:
        sys.modules[__name__] = util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[__name__])
else:
    loft = sys.modules[__package__]                      # the loft.py beside this file

import threading
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks
from torch.compiler import is_compiling


# --------------------------------------------------------------------------------------------------
# 1. theta → T − I

class Cayley(Function):
    """T − I = 2 Q (I − Q)⁻¹ of skew Q (…, b, b).

    With M = (I − Q)⁻¹ = I + (T − I)/2 its differential is 2 M dQ M: two products, no solve.
    """

    @staticmethod
    def forward(ctx, Q):
        D = solve(Q) if small(Q) else loft.polish(solve(loft.wide(Q))).to(Q.dtype)
        ctx.save_for_backward(D)
        return D

    @staticmethod
    @once_differentiable
    def backward(ctx, G):
        N = 2 * loft.eye(G) + ctx.saved_tensors[0]       # 2 M
        return N.mT @ (G / 2) @ N.mT                     # ∂L/∂Q = 2 Mᵀ (∂L/∂T) Mᵀ


def small(Q):
    """Whether float32 will do, on a CPU: `solve` is right to 2e-6 if ‖Q‖₂ ≤ ‖Q‖_∞ ≤ 16."""
    if is_compiling() or Q.device.type != "cpu" or Q.dtype != torch.float32:
        return False
    return Q.abs().sum(-1).amax().item() <= 16


def solve(Q):
    if Q.ndim > 2 and Q.shape[-1] > 64 and Q.device.type == "cpu":
        return torch.stack([solve(q) for q in Q])        # see loft.cayley
    return torch.linalg.solve_ex(loft.eye(Q) - Q, 2 * Q, left=False)[0]  # no wait for a GPU


def cayley(Q):
    return Cayley.apply(Q)


def diagonal(rotation, theta, scale=None):
    """T − I of L rotations like this one, as blocks on its diagonal (L, r/c, c, c), c = span(T).

    theta (L, m, r/b or 1, b(b−1)/2), scale (L, 2, r) or None. In theta's dtype.
    """
    T, c = rotation.transform, span(rotation.transform)
    with torch.autocast(theta.device.type, enabled=False):
        wide = loft.wide(theta) if T.map is loft.expm else theta
        D = T.compute(wide)[0].to(theta.dtype)           # (L, m, r/b or 1, b, b)
        if D.shape[1] == 1:
            D = D[:, 0].expand(-1, rotation.r // c, -1, -1)
        else:                                            # what the stages make of the identity
            rows = loft.eye(D.new_empty(c)).repeat(1, rotation.r // c)
            D = torch.stack([T.act(rows, stages) for stages in D])       # (L, c, r)
            D = D.unflatten(-1, (-1, c)).permute(0, 2, 3, 1)
        if scale is not None:                            # diag(1 + β) T diag(1 + α) − I
            a, b = scale.unflatten(-1, (-1, c)).unbind(1)       # (L, r/c, c)
            D = D + b[..., None] * D
            D = D + D * a[..., None, :] + torch.diag_embed(a + b + a * b)
    return D


def span(T):
    """How many neighbouring coordinates T mixes: b, or all that the stages of a butterfly reach."""
    return T.b * 2 ** (len(T.theta) - 1)


# --------------------------------------------------------------------------------------------------
# 2. Several rotations as one node

class Together(Function):
    """`diagonal` of rotations that differ in their parameters alone.

    A layer that the loss does not reach gets no gradient. What is kept inside stays, for a second
    walk back, and is hidden from a checkpoint around, which counts what is saved.
    """

    @staticmethod
    def forward(ctx, rotation, *parameters):
        with torch.enable_grad(), saved_tensors_hooks(Tensor.detach, Tensor.detach):
            ctx.stacks = [s.detach().requires_grad_() for s in stack(rotation, parameters)]
            ctx.D = diagonal(rotation, *ctx.stacks)
        ctx.set_materialize_grads(False)
        return ctx.D.detach().unbind(0)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        G = torch.stack([torch.zeros_like(ctx.D[0]) if g is None else g for g in grads])
        found = torch.autograd.grad(ctx.D, ctx.stacks, G, retain_graph=True)
        return None, *(None if g is None else own for all in found for g, own in zip(grads, all))


def stack(rotation, parameters):
    """Thetas of L rotations, then their scales if they have any → one or two stacks (L, …)."""
    L = len(parameters) // (1 if rotation.scale is None else 2)
    return [torch.stack(parameters[i:i + L]) for i in range(0, len(parameters), L)]


def together(rotations, thetas):
    """The blocks (r/c, c, c) of each."""
    parameters = [*thetas, *(R.scale for R in rotations if R.scale is not None)]
    learned = torch.is_grad_enabled() and any(p.requires_grad for p in parameters)
    if learned and not is_compiling():
        return Together.apply(rotations[0], *parameters)
    compute = diagonal if is_compiling() or thetas[0].device.type != "cpu" else remembered
    return compute(rotations[0], *stack(rotations[0], parameters)).unbind(0)


LAST = WeakKeyDictionary()                               # {rotation: (stacks, their T − I)}


def remembered(rotation, *stacks):
    """`diagonal` without gradient; again, if it had these values last time."""
    before, D = LAST.get(rotation, ((), None))
    if not before or not all(same(a, b) for a, b in zip(before, stacks)):
        with torch.inference_mode(False), torch.no_grad():
            D = diagonal(rotation, *stacks)
        LAST[rotation] = stacks, D
    return D


def same(a, b):
    return a.dtype == b.dtype and torch.equal(a, b)


# --------------------------------------------------------------------------------------------------
# 3. The twins, and what a forward pass hands to them

class FusedSkew(loft.Skew):
    """`Skew`, which gives a copy of theta to the rotation around it; hooks see it used here."""

    def forward(self, z=None):
        return self.theta.clone() if z is None else super().forward(z)


class FusedRotation(loft.Rotation):
    """`Rotation` by blocks of T − I: those handed out in this forward pass, or its own."""

    handed = None, None, None, None                      # theta, thread, with gradient, blocks

    def forward(self, x, bias=None):
        rows = x.reshape(-1, self.d)                     # (n, d)
        u = rows if bias is None else rows - bias.to(x.dtype)
        if self.P is not None:
            P = self.P.to(x.dtype)
            return torch.addmm(rows, self.in_support(u @ P), P.mT).view(x.shape)
        D = self.blocks().to(x.dtype)
        rows, u = (t.unflatten(-1, D.shape[:2]) for t in (rows, u))      # (n, d/c, c)
        return (rows + torch.bmm(u.transpose(0, 1), D.mT).transpose(0, 1)).reshape(x.shape)

    def in_support(self, z):
        return self.transform.by_blocks(z, self.blocks().to(z.dtype))

    def rotate(self, W, side):
        """W R or R W: where R is of blocks, block by block."""
        if side == "output" or self.P is not None:
            return super().rotate(W, side)
        D = self.blocks()
        with torch.autocast(W.device.type, enabled=False):
            W = W.to(D.dtype)
            return W + self.transform.by_blocks(W, D.mT)

    def blocks(self):
        """T − I on its diagonal (r/c, c, c)."""
        theta, owner, with_grad, D = self.handed
        fits = theta is self.transform.theta and owner == thread()
        if fits and with_grad >= torch.is_grad_enabled():
            return D
        return together([self], [self.transform()])[0]


def thread():
    return 0 if is_compiling() else threading.get_ident()


def hand_out(layers, model, args):
    """When the model's forward begins: T − I of all layers, in a batch for every shape."""
    groups = {}
    for layer in layers:
        R = layer.rotation
        if layer.enabled and type(R) is FusedRotation:
            theta = getattr(R.transform, "theta", None)
            if there(theta, 3) and (R.scale is None or there(R.scale, 2)):
                key = *R.config.items(), R.r, theta.shape, theta.dtype, theta.device
                groups.setdefault(key, []).append(R)
    for rotations in groups.values():
        thetas = [R.transform.theta for R in rotations]
        for R, theta, D in zip(rotations, thetas, together(rotations, thetas)):
            R.handed = theta, thread(), torch.is_grad_enabled(), D


def there(p, ndim):
    """Whether a parameter can be read from outside its module: not offloaded, nor sharded."""
    return type(p) is nn.Parameter and p.ndim == ndim and p.device.type != "meta"


def take_back(layers, model, args, output):
    """When it ends, or fails."""
    for layer in layers:
        if type(layer.rotation) is FusedRotation:
            layer.rotation.handed = FusedRotation.handed


def fuse(model):
    """Puts the fast twins in place; returns the model. Parameters and results stay the same.

    Call it on the module whose forward is called in training. Blocks and butterflies, of any map,
    have twins; trees, reflections and LoRA stay. ValueError: the model is not adapted.
    """
    unfuse(model)
    layers = list(loft.adapted(model).values())
    for layer in layers:
        R, T = layer.rotation, getattr(layer.rotation, "transform", None)
        if type(R) is loft.Rotation and type(T) is loft.Skew and span(T) <= max(T.b, 256):
            R.__class__, T.__class__, layer.fused = FusedRotation, FusedSkew, True
            T.map = cayley if T.map is loft.cayley else T.map
    model.register_forward_pre_hook(partial(hand_out, layers))
    model.register_forward_hook(partial(take_back, layers), always_call=True)
    return model


def unfuse(model):
    """Back to loft.py's own rotations; returns the model."""
    eager = {FusedRotation: loft.Rotation, FusedSkew: loft.Skew}
    for m in model.modules():
        if type(m) in eager:
            m.__class__ = eager[type(m)]
            m.__dict__.pop("handed", None)
        if isinstance(m, loft.Skew) and m.map is cayley:
            m.map = loft.cayley
        if isinstance(m, loft.LOFTLinear):
            m.fused = False
        for hooks in (m._forward_pre_hooks, m._forward_hooks):
            ours = [key for key, hook in hooks.items()
                    if getattr(hook, "func", None) in (hand_out, take_back)]
            for key in ours:
                del hooks[key]
                m._forward_hooks_always_called.pop(key, None)
    return model
