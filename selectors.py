"""Supports: where a rotation W0 (I + P (T − I) Pᵀ) should act.

With G = ∂L/∂W (out × in) and R = exp(P A Pᵀ), A skew, the loss moves to first order by

    dL = ⟨PᵀSP, A⟩_F,     S = skew(W0ᵀG) = ½ (W0ᵀG − GᵀW0)   (in × in)      (arXiv 2605.11872)

so of all that G says only S counts. (On the output side, R W0: the same of W0ᵀ and Gᵀ.) Three
questions decide how well a support learns:

1. Which planes? ‖PᵀSP‖_F, the **score** of P, is the steepest decrease per unit ‖A‖_F. S has the
   eigenvalues ±iσ_j, a plane each, and the best P of even rank is the r/2 planes of largest σ:
   kind="skew".
2. Whose gradient? G at W0 knows where descent starts, not where it goes. lookahead=N sums S along
   N steps of a provisional adaptation, which is thrown away afterwards. Or nothing is: train for a
   while at twice the rank, and `narrow` keeps the planes that have turned furthest.
3. Which basis? P V gives the same rotations for every orthogonal V (r × r), but Adam scales each
   entry of the generator by itself, which is right where entries are uncorrelated. `align` takes
   for V the eigenbasis of C = Σ_b MᵀM, M = PᵀS_bP, over small pieces b of the data: Shampoo's
   preconditioner, so that Adam on the new generator is SOAP (arXiv 2409.11321).

    from loft import selectors
    P = selectors.skew(W0, G, r=32)                              # tensors in, P (in, r) out
    P = selectors.select(model, batches, loss_fn, rank=32)       # {layer: P}, aligned
    P = selectors.select(model, batches, loss_fn, rank=32, lookahead=50)
    P = selectors.within(model, batches, loss_fn, budget=20_000) # ranks where planes are strong
    loft.adapt(model, support=P)
    selectors.narrow(model, batches, loss_fn, rank=16)           # after some steps of training
"""
from __future__ import annotations

import contextlib
import itertools
import sys
import warnings
from functools import partial

if __name__ == "selectors":
    # asyncio or subprocess want the standard library's module of this name, and find this folder
    # first on sys.path: hand theirs over. What follows is then defined, and never used.
    import os
    from importlib import machinery, util
    Function = object
    spec = machinery.PathFinder.find_spec(__name__, [os.path.dirname(os.__file__)])
    sys.modules[__name__] = util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[__name__])
else:
    import torch
    from torch.autograd import Function
    from torch.utils import _pytree

    from . import (SIDES, SUPPORTS, adapted, at_least_float32, beside, floating, matches, matrix,
                   naming, one_of, plain_parameters, principal, random, replace, require, shape,
                   skew as filled, target_layers, wrap)


# --------------------------------------------------------------------------------------------------
# Supports as functions of tensors: W and G (out, in) → P (in, r) with orthonormal columns. loft.py
# has random(W, r) and principal(W, r). For the output side pass transposes.

def gradient(W, G, r):
    """Top r right singular vectors of G: what G looks at, not where W0 sends it (see `paired`)."""
    return principal(G, r)


def activation(X, r):
    """Top r principal directions (uncentred) of the inputs X (n, in), or of XᵀX (in, in)."""
    return principal(X, r)


def paired(W, G, r):
    """Basis of [v_1, W0ᵀu_1, v_2, W0ᵀu_2, …], (u, σ, v) the top r/2 singular triplets of G.

    For a rank-one G = σ u vᵀ the plane span{v, W0ᵀu} is the best there is; v alone scores 0.
    """
    return pairs(full(W), full(G).mT, None, r)


def skew(W, G, r):
    """The support of largest score, the r/2 strongest planes: ‖PᵀSP‖_F² = 2 Σ_{j ≤ r/2} σ_j².

    Of an odd r the last direction is in no plane, and of no use to first order.
    """
    return planes(skew_part(full(W).mT @ full(G)), r)[0]


def planes(S, r):
    """The strongest planes of a skew S (d, d) → basis (d, r), plane by plane, and their falling σ.

    iS is Hermitian with eigenvalues ±σ_j. For a unit eigenvector v of −σ, √2 Re v and √2 Im v are a
    basis of the plane, also where several σ are equal (singular vectors would tear planes apart).
    Of a large S inside the r + 16 directions that eight iterations find.
    """
    if len(S) > max(256, 4 * r + 64):
        Z = torch.svd_lowrank(S, r + 16, niter=8)[0]
        V, sigma = planes(Z.mT @ S @ Z, r)
        return Z @ V, sigma
    sigma, V = torch.linalg.eigh(1j * S)                     # −σ_1, −σ_2, …, σ_2, σ_1
    basis = torch.view_as_real(V).flatten(-2)                # Re v_1, Im v_1, Re v_2, …
    return torch.linalg.qr(basis[:, :r])[0], -sigma[:r // 2]


def score(W, G, P):
    """‖PᵀSP‖_F, from thin products: the norm of skew((W0 P)ᵀ(G P))."""
    return restricted(P, full(G), full(W)).norm().item()


def skew_part(M):
    return (M - M.mT) / 2


def restricted(P, x, g):
    """PᵀSP (r, r) of S = skew(gᵀx), or what rows x and g add to it."""
    P = P.to(x)
    return skew_part((g @ P).mT @ (x @ P))


def pairs(W, Y, Z, r):
    """`paired` from Y = GᵀZ (in, k), Z (out, k) orthonormal, or from Gᵀ itself (Z is None)."""
    V, _, Uh = torch.linalg.svd(Y, full_matrices=False)
    U = Uh.mT if Z is None else Z @ Uh.mT
    WtU = torch.nn.functional.normalize(W.mT @ U, dim=0)
    basis = torch.stack([V, WtU], -1).flatten(-2)[:, :r]     # v_1, W0ᵀu_1, v_2, …
    return principal(basis.mT, r)                            # orthonormal, and filled up to r


def full(X):
    """Detached, float32 or wider."""
    return X.detach().to(at_least_float32(X))


# --------------------------------------------------------------------------------------------------
# One mechanism over a model. Put a rotation on a layer; R = I will do. With x the rows that it
# turns and g the gradients of the rows that it returns, W0ᵀG = Σ gᵀx on either side: on the input
# side x is the layer's input and g = δW0 (δ: the gradients of its output), on the output side x is
# its output and g = δ. So S needs no weight, and S Z no product larger than rows times a thin Z.

class Look(Function):
    """The identity of u, whose backward pass calls see(ctx, ∂L/∂u), x being in ctx.saved_tensors.

    So x is kept as autograd keeps tensors: checkpoints drop it, a change in place is found. Of
    `leaf` no more is wanted than that it requires a gradient, where nothing else does.
    """

    @staticmethod
    def forward(ctx, u, x, see, leaf):
        ctx.see = see
        ctx.save_for_backward(x)
        return u.clone()

    @staticmethod
    def backward(ctx, g):
        ctx.see(ctx, g)
        return g, None, None, None


def watch(see, module, args, kwargs, y):
    """A forward hook, of a rotation or of a layer."""
    return Look.apply(y, turned(*args, **kwargs), see, torch.zeros((), requires_grad=True))


def turned(input, bias=None):
    """What a rotation called so turns: on the output side, all but the bias."""
    return input if bias is None else input - bias


def unturned(input, bias=None):
    """The forward of a rotation R = I."""
    return input


@contextlib.contextmanager
def rotated(model, layers, side, supports={}, trainable=()):
    """The model with a rotation on each of `layers`, in its support; R = I where there are none.

    All is frozen but the rotations and the parameters `trainable`, and in eval mode. Afterwards the
    model is as it was, whatever happens.
    """
    new, others = {}, plain_parameters(model)
    train = [others[n] for n in matches("trainable", trainable or (), others)]
    for n, layer in layers.items():
        with naming(n):
            P = supports.get(n, torch.eye(shape(layer)[SIDES.index(side)], 2))
            new[n] = wrap(layer, P, method="loft", side=side, magnitude=False)
        if n not in supports:
            new[n].rotation.forward = unturned
    with contextlib.ExitStack() as after:
        for p in model.parameters():
            after.callback(p.requires_grad_, p.requires_grad)
            after.callback(setattr, p, "grad", p.grad)
        for m in model.modules():
            after.callback(setattr, m, "training", m.training)
        after.callback(replace, model, {new[n]: layer for n, layer in layers.items()})
        model.requires_grad_(False).eval()
        for layer in layers.values():            # a quantised one may repack itself in eval mode
            layer.train(not floating(layer))
        for p in train:
            after.callback(p.data.copy_, p.detach().clone())
            p.requires_grad_().grad = None
        yield replace(model, {layer: new[n] for n, layer in layers.items()}), new


def gather(model, layers, batches, loss_fn, function, place="rotation", step=None, skip_nan=False):
    """{layer: Σ function(name, x, g)} over the rows (n, d) of all batches, float32 or wider.

    place="rotation": x and g as above; "layer": inputs x of a layer, gradients δ of its outputs.
    step() follows every backward pass. Summed over ranks too, where torch.distributed runs. A layer
    whose sum is zero is left out. ValueError: a loss or a sum that does not fit, no batches.
    """
    sums, count = {}, 0

    def see(name, ctx, g):
        with naming(name):
            rows = (full(t).reshape(-1, t.shape[-1]) for t in (*ctx.saved_tensors, g))
            sums[name] += function(name, *rows)

    require(not torch.is_inference_mode_enabled(), "supports need gradients: leave inference_mode")
    with contextlib.ExitStack() as after:
        for n, layer in layers.items():
            module = layer if place == "layer" else layer.rotation
            zeros = next(layer.rotation.parameters()).new_zeros
            sums[n] = function(n, *(zeros(0, d) for d in shape(module) or (module.d, module.d)))
            hook = partial(watch, partial(see, n))
            after.enter_context(module.register_forward_hook(hook, with_kwargs=True))
        after.callback(say, "")
        for count, batch in enumerate(batches, 1):
            with torch.enable_grad():
                backward(loss_fn(model, batch), count, skip_nan)
            if step is not None:
                step()
            say(f"choosing supports: batch {count}")
    require(count, "batches is empty: nothing to choose a support from")
    for n, total in sums.items():
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(total)
        require(total.isfinite().all(), f"layer {n!r}: its gradient (or input) is not finite")
    return {n: total for n, total in sums.items() if total.any()}


def backward(loss, count, skip_nan):
    scalar = torch.is_tensor(loss) and loss.numel() == 1
    require(scalar, f"loss_fn returned {getattr(loss, 'shape', loss)}, expected a scalar tensor")
    require(loss.requires_grad, "the loss does not depend on any target layer (or they are in a "
            "reentrant checkpoint, whose input has to require grad: take use_reentrant=False)")
    if skip_nan and loss.isnan():                            # the mean over a piece of padding
        return
    require(loss.isfinite(), f"the loss of calibration batch {count} is {loss.item()}")
    loss.backward()


def say(text):
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def S_times(Z, x, g):
    """What rows add to S Z."""
    return (g.mT @ (x @ Z) - x.mT @ (g @ Z)) / 2


# --------------------------------------------------------------------------------------------------
# Supports of a model

KINDS = ("random", "principal", "activation", "gradient", "paired", "skew")


class Sketch:
    """What the support of one layer is made of: a matrix H (d, ·), or H Z where H would be large.

    H is S, or Gᵀ (gradient, paired), or XᵀX (activation). Up to d = `dense` Z is I, and a pass over
    data gives H. Above, Z is thin, at first random; a pass gives H Z, the next one goes on from
    orth(H Z), and the last one counts. (Gᵀ maps from one space into another, so that G takes turns
    with it.)
    """

    def __init__(self, kind, layer, side, r, passes, dense):
        require(isinstance(r, int) and r >= 1, f"rank {r!r} must be an int ≥ 1")
        if r % 2 and kind == "skew":
            warnings.warn(f"rank {r} is odd: one of its directions is in no plane")
        d = shape(layer)[SIDES.index(side)]
        self.kind, self.layer, self.side, self.r, self.left = kind, layer, side, min(r, d), passes
        self.place = "layer" if kind in ("gradient", "paired") else "rotation"
        self.thin = d > dense and kind not in SUPPORTS
        self.Z, self.HZ, self.sigma = None, 0, ()
        if self.thin:
            W = self.weight()
            self.Z = random(W.mT if self.place == "layer" and passes % 2 else W, r + 16)

    def weight(self):
        """W0, float32 or wider; transposed for the output side; quantised: by what it does."""
        layer = self.layer
        if floating(layer):
            W = matrix(layer)
        else:
            device = [*layer.parameters(), *layer.buffers()][0].device
            x = torch.eye(layer.in_features, device=device, requires_grad=True)
            W = (layer(x) - layer(0 * x[:1])).mT
        return full(W if self.side == "input" else W.mT)

    @property
    def reached(self):
        return torch.is_tensor(self.HZ) or self.kind in SUPPORTS

    def next_pass(self):
        self.left -= 1
        if self.thin and self.reached:
            self.Z, self.HZ = torch.linalg.qr(self.HZ)[0], 0

    def product(self, x, g):
        """What rows add to H Z."""
        if self.kind == "activation":
            x = g = x[g.any(dim=1)]                          # a row with g = 0 is padding
        elif self.place == "rotation":
            return S_times(self.Z, x, g) if self.thin else g.mT @ x      # whose skew part is S
        elif (self.side == "output") != (self.thin and self.left % 2 == 1):
            x, g = g, x                                      # the other side, or G's turn: not both
        return x.mT @ (g if self.Z is None else g @ self.Z)

    def support(self):
        if self.kind in SUPPORTS:
            return SUPPORTS[self.kind](self.weight(), self.r)
        if self.kind == "paired":
            return pairs(self.weight(), self.HZ, self.Z, self.r)
        if self.kind in ("gradient", "activation"):
            return principal(self.HZ.mT, self.r)
        if self.Z is None:
            P, self.sigma = planes(skew_part(self.HZ), self.r)
            return P
        V, self.sigma = planes(self.Z.mT @ self.HZ, self.r)  # Rayleigh–Ritz
        return self.Z @ V


def measure(sketches, model, batches, loss_fn, passes, start, steps, lr, trainable):
    """Fills sketches, by passes over the batches or, with `steps`, along a path from `start`."""
    one, layers = next(iter(sketches.values())), {n: sketch.layer for n, sketch in sketches.items()}
    passes = passes if any(sketch.thin for sketch in sketches.values()) else 1
    require(not 0 < steps < passes, f"lookahead={steps} is less than passes={passes}")
    parts = [batches] * passes
    if steps:
        endless = itertools.chain.from_iterable(itertools.repeat(batches, steps))
        parts = [itertools.islice(endless, (steps + i) // passes) for i in range(passes)]
    with rotated(model, layers, one.side, start, trainable) as (model, sites):
        step = adam(model, lr, steps) if steps else None
        for i, part in enumerate(parts):
            for sketch in sketches.values():
                sketch.next_pass()
            unfinished = {n: sites[n] for n in sites if i == 0 or steps or sketches[n].thin}
            sums = gather(model, unfinished, part, loss_fn,
                          lambda n, x, g: sketches[n].product(x, g), one.place, step)
            for n, HZ in sums.items():
                sketches[n].HZ += HZ


def adam(model, lr, steps):
    """A step of Adam for all that trains, its rate rising over the first tenth of `steps`."""
    parameters, warm = [p for p in model.parameters() if p.requires_grad], max(1, steps // 10)
    optimizer = torch.optim.Adam(parameters, lr, (0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warm, total_iters=warm - 1)

    def step():
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return step


def select(model, batches, loss_fn, rank, kind="skew", targets=None, *, side="input", align=True,
           lookahead=0, lookahead_lr=1e-2, lookahead_support="principal", trainable=(),
           budget=None, passes=3, dense=1024, seed=0):
    """Chooses a support for every target layer → {layer: P}, for `loft.adapt(model, support=…)`.

    Args:
        batches: what loss_fn takes, any iterable (a one-shot iterator is kept in a list).
        loss_fn: (model, batch) → a scalar loss of any task. It may call model.train().
        rank: an int, or {layer: int}; a smaller layer takes its dimension. targets, side: as in
            `loft.adapt`. kind: one of `KINDS`. align: by one more pass (see `align`).
        lookahead: steps of a path that H is summed along; 0: H at W0. On it lookahead_support (a
            kind, of the same rank, aligned; or {layer: P}) is trained by Adam at lookahead_lr, on
            the batches in turn, in about the time of as many training steps, and with it the
            parameters `trainable` (a new head, say; named as in `loft.adapt`); nothing else is.
            Then all is put back.
        budget: see `within`. seed: the result is a function of it.
        passes: over the batches, where a rotated dimension is above `dense`; a path has as many
            parts. The other layers keep a sum of d × d, and take one.
    The model runs frozen and in eval mode, and is left as it was found, as are torch's random
    states. With bf16, autocast (inside loss_fn), checkpoints, layers called several times;
    quantised and adapted layers count as the layers that they are now. Layers that no gradient
    reaches are warned of and left out. ValueError: names the layer or setting that does not fit.
    """
    one_of("kind", kind, KINDS)
    one_of("side", side, SIDES)
    require(passes >= 2, f"passes={passes}: one to find a subspace and one to measure it, at least")
    require(lookahead >= 0, f"lookahead={lookahead} must not be negative")
    require(not lookahead or kind not in SUPPORTS, f"{kind} follows from W0: no lookahead")
    layers, sketches, supports = target_layers(model, targets), {}, {}
    batches = list(batches) if iter(batches) is batches else batches
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        for n, layer in layers.items():
            with naming(n):
                r = rank.get(n) if isinstance(rank, dict) else rank
                sketches[n] = Sketch(kind, layer, side, r, passes, dense)
        if kind not in SUPPORTS:
            start = lookahead_support if lookahead else {}
            if isinstance(start, str):
                start = select(model, batches, loss_fn, rank, start, layers, side=side, dense=dense,
                               seed=seed)
            measure(sketches, model, batches, loss_fn, passes, start, lookahead, lookahead_lr,
                    trainable)
        for n, sketch in sketches.items():
            with naming(n):
                if sketch.reached:
                    supports[n] = sketch.support()
        require(supports, "no gradient reaches a target layer")
        missing = [n for n in layers if n not in supports]
        if missing:
            warnings.warn(f"no gradient reached {', '.join(missing)}: no support chosen there")
        if budget is not None:
            ranks = spend({n: sketches[n].sigma for n in supports}, budget)
            supports = {n: supports[n][:, :r] for n, r in ranks.items()}
        return aligned(model, batches, loss_fn, supports, side=side) if align else supports


def within(model, batches, loss_fn, budget, targets=None, *, max_rank=64, **options):
    """Supports of kind "skew" whose ranks, up to max_rank, spend `budget` parameters on the planes
    that are strongest: Σ r(r−1)/2 ≤ budget, for dense transforms. Other layers are left out.

    Planes come strongest first, so a smaller rank needs no new selection. options: of `select`.
    """
    return select(model, batches, loss_fn, max_rank, "skew", targets, budget=budget, **options)


def spend(sigma, budget):
    """{layer: even rank} that collects the most Σ 2σ_j² for Σ r(r−1)/2 ≤ budget.

    A plane adds 2σ² and costs 2r + 1, r the rank so far. Taken by gain per parameter, which is the
    best possible up to the last plane, as gains fall and costs rise.
    """
    ranks, planes = dict.fromkeys(sigma, 0), []
    for n in sigma:
        planes += [(float(s) ** 2 / (4 * j + 1), 4 * j + 1, n) for j, s in enumerate(sigma[n])]
    for gain, cost, n in sorted(planes, reverse=True):
        if gain and cost == 2 * ranks[n] + 1 <= budget:      # too dear: a cheaper one may still fit
            ranks[n], budget = ranks[n] + 2, budget - cost
    require(any(ranks.values()), f"budget={budget} buys no plane: the first costs 1 parameter")
    return {n: r for n, r in ranks.items() if r}


# --------------------------------------------------------------------------------------------------
# Of given supports: the basis, the score

def align(model, batches, loss_fn, supports, *, side="input", pieces=32):
    """{layer: P V}, V the eigenbasis of C = Σ_b MᵀM, M = PᵀS_bP: the basis that suits Adam.

    A batch of tensors with one first dimension (in tuples, lists, dicts) is cut into pieces b of 8
    examples; another is a piece as it is. The first 32 `pieces` count; a layer called several times
    makes one of each call. For supports of any origin. The span stays, and all rotations in it; C
    becomes diagonal.
    """
    def gram(name, x, g):
        M = restricted(supports[name], x, g)
        return M.mT @ M

    examples = itertools.islice(itertools.chain.from_iterable(map(cut, batches)), pieces)
    with rotated(model, target_layers(model, supports), side) as (turning, sites):
        C = gather(turning, sites, examples, loss_fn, gram, skip_nan=True)
    V = {n: torch.linalg.eigh(total)[1].flip(-1) for n, total in C.items()}
    return {n: P.to(V[n]) @ V[n] if n in V else P for n, P in supports.items()}


aligned = align                                              # in `select`, align is a switch


def narrow(model, batches, loss_fn, rank):
    """Keeps, of rotations learned at a larger rank, the rank/2 planes that turn furthest, in place.

    A Cayley map turns each plane of its generator Q by 2 atan σ, independent of the others: what is
    kept stays what it is, and what is dropped turns back to W0. The new supports are aligned, with
    the gradients where the model is now. Parameters are new: make the optimizer anew, and train on.
    ValueError: names a layer that is not by the plain Cayley map of rank ≥ `rank`.
    """
    wide, Q, supports, new = adapted(model), {}, {}, {}
    for n, layer in wide.items():
        R, plain = layer.rotation, dict(method="loft", transform="cayley", scale=False,
                                        side=layer.side, magnitude=False)
        require(layer.settings == plain and rank <= R.r and layer.enabled,
                f"layer {n!r}: no plain Cayley map of a rank ≥ {rank} to narrow, but "
                f"{layer.settings}, rank {R.r}, on: {layer.enabled}")
        Q[n] = filled(R.transform.theta.detach()[0, 0], R.r)             # (R.r, R.r)
        supports[n] = R.P @ planes(Q[n], rank)[0]
    i, j = torch.triu_indices(rank, rank, 1)
    for n, P in align(model, batches, loss_fn, supports, side=layer.side).items():
        layer = wide[n]
        B = layer.rotation.P.mT @ P                                      # (R.r, rank)
        new[layer] = kept = wrap(layer.base, P, **layer.settings)
        kept.rotation.transform.theta.data[0, 0] = (B.mT @ Q[n] @ B)[i, j]
    model = replace(model, new)
    return beside("kernels").fuse(model) if layer.fused else model


def scores(model, batches, loss_fn, supports, *, side="input"):
    """{layer: ‖PᵀSP‖_F} of supports, S of the summed loss, in one pass of thin products."""
    with rotated(model, target_layers(model, supports), side) as (turning, sites):
        M = gather(turning, sites, batches, loss_fn,
                   lambda n, x, g: restricted(supports[n], x, g))
    return {n: M[n].norm().item() if n in M else 0.0 for n in supports}


def cut(batch, size=8):
    """The pieces of a batch, or the batch as its one piece."""
    leaves, tree = _pytree.tree_flatten(batch)
    lengths = {len(t) if torch.is_tensor(t) and t.ndim else None for t in leaves}
    if len(lengths) > 1 or None in lengths:
        return [batch]
    pieces = zip(*(t.split(size) for t in leaves))
    return [_pytree.tree_unflatten(piece, tree) for piece in pieces]


def demo():
    """Prints the score of supports beside the decrease that a small rotation in them buys."""
    shapes = (48, 64), (256, 64), (256, 48)
    W, x, y = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    loss = torch.func.grad_and_value(lambda W: (torch.tanh(x @ W.mT) - y).square().sum())
    G, before = loss(W)
    S = skew_part(W.mT @ G)
    print("support    score  measured decrease / ‖A‖")
    for name, P in dict(random=random(W, 8), principal=principal(W, 8), gradient=gradient(W, G, 8),
                        paired=paired(W, G, 8), skew=skew(W, G, 8)).items():
        A = -1e-6 * P.mT @ S @ P
        after = loss(W @ torch.linalg.matrix_exp(P @ A @ P.mT))[1]
        print(f"{name:9}{score(W, G, P):7.1f}{(before - after) / A.norm():12.1f}")
