"""What LOFT promises: the specification, in five parts.

    1. claims       one property each, over methods × sides × dtypes
    2. baselines    every method against d × d matrices, written from its paper; and against peft
    3. supports     where to rotate
    4. fused        kernels.py equals loft.py
    5. refusals     what is said, and that nothing has changed

    python -m pytest                     # peft and transformers are used where they are installed
"""
import copy
import hashlib
import itertools
import math
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings, strategies as st
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import loft

HERE = Path(__file__).parent
settings.register_profile("loft", max_examples=200, deadline=None, derandomize=True)
settings.load_profile("loft")

ORTHOGONAL = [t for t in loft.TRANSFORMS if t != "cayley_neumann"]        # it says its error
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.06, torch.float16: 8e-3}
sides, seeds = st.sampled_from(loft.SIDES), st.integers(0, 2 ** 20)
dtypes, sizes = st.sampled_from([*ROUNDING]), st.sampled_from([8, 16, 24])

CASES = {  # what adapt is given
    "loft": dict(rank=6), "psoft": dict(method="psoft", rank=5),
    "oft": dict(method="oft", block_size=4), "lora": dict(method="lora", rank=3),
    "coft": dict(method="oft", block_size=4, share=True, bound=0.3),
    "oft series": dict(method="oft", block_size=2, map="cayley_neumann", terms=4, magnitude=True),
    "boft": dict(method="boft", block_size=4, magnitude=True),
    "boft, three stages": dict(method="boft", block_size=2, stages=3),
    "goft": dict(method="goft"), "qgoft": dict(method="goft", relaxed=True),
    "hra": dict(method="hra", reflections=4),
    **{f"{t} in a support": dict(transform=t, rank=8, support="random", scale=t == "butterfly")
       for t in loft.TRANSFORMS},
}
each_case = pytest.mark.parametrize("case", CASES)
each_side = pytest.mark.parametrize("side", loft.SIDES)
ANY_SIZE = ("loft", "psoft", "lora", "goft", "qgoft", "hra")


def orthonormal(d, r, dtype=torch.float64):
    return torch.linalg.qr(torch.randn(d, r, dtype=torch.float64))[0].to(dtype)


def trained(module):
    return {n: p for n, p in module.named_parameters() if p.requires_grad}


def stir(module, scale=0.3):
    """Moves all that trains away from its start."""
    with torch.no_grad():
        for p in trained(module).values():
            p.add_(torch.randn_like(p) * scale)
    return module


def network(dtype=torch.float32):
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 16, bias=False), nn.Tanh(),
                         nn.Linear(16, 3)).to(dtype)


def pair(case, side="input", dtype=torch.float64, out=24, d=16, bias=True, seed=0, **more):
    """Two layers; the same, adapted, at the start; and inputs."""
    torch.manual_seed(seed)
    if case in ANY_SIZE:
        out, d = out + seed % 3, d + seed % 3
    base = nn.Sequential(nn.Linear(d, out, bias=bias), nn.Tanh(), nn.Linear(out, d)).to(dtype)
    side = "input" if case == "lora" else side
    model = loft.adapt(copy.deepcopy(base), ["0", "2"], side=side, seed=seed, **CASES[case], **more)
    return base, model, torch.randn(5, d, dtype=dtype)


def same(ours, theirs, tolerance=None):
    """Equal to rounding in their dtype, relative to the largest."""
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    tolerance = tolerance or ROUNDING[theirs.dtype]
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max() + 1e-30


def bits(model):
    """A model's modules, what trains, and every number."""
    state = {n: t.tolist() for n, t in model.state_dict().items() if not t.is_meta}
    return str(model), [*trained(model)], str(state)


# --------------------------------------------------------------------------------------------------
# 1. Claims

@pytest.mark.parametrize("transform", ORTHOGONAL)
@given(r=st.integers(2, 64), exponent=st.integers(-12, 8), seed=seeds,
       dtype=st.sampled_from([torch.float64, torch.float32]))
@example(r=512, exponent=6, dtype=torch.float64, seed=0)
def test_R_is_orthogonal_whatever_is_learned(transform, r, exponent, dtype, seed):
    """|RᵀR − I| ≤ 1e-12 in float64, 1e-5 in float32; and norms stay."""
    torch.manual_seed(seed)
    r += -r % 4 if transform in ("block", "butterfly") else 0
    base, x = nn.Linear(r + seed % 5, 1).to(dtype), torch.randn(4, r + seed % 5, dtype=dtype)
    layer = loft.adapt(base, support="random", rank=r, transform=transform)
    R = stir(layer, 10.0 ** exponent).rotation
    assert loft.orthogonality_error(layer)[""] <= ROUNDING[dtype]
    same(R(x).norm(dim=1), x.norm(dim=1))


def test_ten_thousand_steps_at_absurd_rates():
    """Nothing drifts, for nothing is accumulated."""
    torch.manual_seed(0)
    T, eye, target = loft.TRANSFORMS["cayley"](4), torch.eye(4), torch.randn(4, 4)
    for rate in (0.5, 1e4):
        optimizer = torch.optim.Adam(T.parameters(), rate)
        for _ in range(5_000):
            optimizer.zero_grad()
            (T(eye) - target).square().sum().backward()
            optimizer.step()
    D = T.double()(eye.double())
    assert T.theta.abs().max() > 100 and (D + D.mT + D.mT @ D).abs().max() <= 1e-12


def test_the_series_says_its_error():
    """Cayley–Neumann is off by O(‖Q‖^(terms−1)): less with more terms, bounded by `bound`."""
    def error(scale, **options):
        layer = loft.adapt(nn.Linear(16, 4), transform="cayley_neumann", **options)
        return loft.orthogonality_error(stir(layer, scale))[""]
    torch.manual_seed(0)
    errors = [error(0.02, bound=None, terms=t) for t in (3, 5, 7)]
    assert errors[0] > 10 * errors[1] > 100 * errors[2] and error(1e6) < 1


@each_case
@settings(max_examples=12)
@given(side=sides, dtype=dtypes, out=sizes, d=sizes, bias=st.booleans(), seed=seeds)
def test_exact_at_the_start_switched_off_and_merged(case, side, dtype, out, d, bias, seed):
    """To the last bit, and merged to the dtype's rounding; `merged` puts every bit back."""
    base, model, x = pair(case, side, dtype, out, d, bias, seed)
    before = base(x)
    assert torch.equal(model(x), before)
    y, state = stir(model)(x), bits(model)
    assert not torch.equal(y, before)
    with loft.disabled(model):
        assert torch.equal(model(x), before)
    with loft.merged(model):
        same(model(x), y)
    assert bits(model) == state
    same(loft.merge(model)(x), y)
    assert str(model) == str(base) and not trained(model)


@each_case
@settings(max_examples=12)
@given(side=sides, seed=seeds)
def test_what_a_rotation_keeps(case, side, seed):
    """Singular values of W0; on the input side W Wᵀ, on the output side WᵀW."""
    layer = stir(pair(case, side, seed=seed)[1], 2.0)[0]
    W, W0 = layer.weight, layer.base.weight
    if layer.rotation.orthogonal and layer.magnitude is None:
        same(torch.linalg.svdvals(W), torch.linalg.svdvals(W0))
        same(*((M @ M.mT if side == "input" else M.mT @ M) for M in (W, W0)))


@each_case
@each_side
def test_gradients(case, side):
    """And second ones, at the start as well."""
    _, model, x = pair(case, side)
    for model in (model, stir(copy.deepcopy(model))):
        names, values = zip(*trained(model).items())
        call = lambda x, *values: torch.func.functional_call(model, dict(zip(names, values)), (x,))
        for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
            check(call, (x.requires_grad_(), *values), fast_mode=True, atol=1e-4)


@each_side
def test_autograd_keeps_z_and_not_x(side):
    """Of all that has a row for each of x (n × d): z = xP (n × r), once."""
    layer, shapes = loft.adapt(nn.Linear(40, 40), rank=8, side=side), []
    keep = lambda t: shapes.append(t.shape) or t
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        layer(torch.randn(99, 40, requires_grad=True))
    assert [tuple(s) for s in shapes if 99 in s] == [(99, 8)]


@each_case
@each_side
def test_saved_and_loaded(case, side, tmp_path):
    """Every bit, into a plain model and, in place, an adapted one; nothing random is disturbed."""
    base, model, x = pair(case, side, torch.float32, trainable=["2.bias"])
    stir(model)
    path, state = tmp_path / "new" / "a.pt", torch.get_rng_state()
    other = loft.adapt(copy.deepcopy(base), ["0", "2"], side=model[0].side, seed=1, **CASES[case])
    held = trained(other)
    loft.save(model, path)
    for again in (loft.load(base, path), loft.load(other, path)):
        assert bits(again) == bits(model)
        same(again(x), model(x))
    assert all(trained(other)[n] is p for n, p in held.items())          # an optimizer goes on
    assert torch.equal(torch.get_rng_state(), state) and os.listdir(path.parent) == ["a.pt"]


def test_an_interrupted_save_leaves_the_older_file(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")
    model, path = pair("loft")[1], tmp_path / "a.pt"
    loft.save(model, path)
    before = path.read_bytes()
    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        loft.save(stir(model), path)
    assert path.read_bytes() == before


def inside(model):
    model[0], model[2] = checkpoint_wrapper(model[0]), torch.compile(model[2])
    return model


WRAPPERS = dict(none=lambda model: model, inside=inside, module=nn.DataParallel,
                compiled=torch.compile, averaged=torch.optim.swa_utils.AveragedModel)


@pytest.mark.parametrize("saved", WRAPPERS)
@pytest.mark.parametrize("loaded", WRAPPERS)
def test_a_wrapper_is_no_part_of_a_name(saved, loaded, tmp_path):
    a, b = tmp_path / "a.pt", tmp_path / "b.pt"
    base, model, _ = pair("psoft", trainable=["2.bias"])
    loft.save(WRAPPERS[saved](stir(model)), a)
    again = loft.load(WRAPPERS[loaded](base), a)
    loft.save(again, b)
    assert a.read_bytes() == b.read_bytes() and len(trained(loft.merge(again))) == 1


@each_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_copies_casts_and_autocast(case, dtype):
    """A model cast after adapt is rounded; what is learned stays float32 or becomes wider."""
    _, model, x = pair(case, dtype=torch.float32)
    y = stir(model)(x)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert bits(again) == bits(model)
        same(again(x), y)
    with torch.autocast("cpu", torch.bfloat16):
        rounded, W = model(x), model[0].weight
    assert rounded.dtype == torch.bfloat16
    same(rounded.float(), y, 0.06)
    same(W, model[0].weight, 0.02 if case == "lora" else None)           # T is not rounded
    cast = model.to(dtype)(x.to(dtype))
    assert {p.dtype for p in trained(model).values()} == {torch.promote_types(dtype, torch.float32)}
    assert model[0].base.weight.dtype == dtype == cast.dtype
    same(cast.float(), y, 0.06)


class Conv1D(nn.Module):
    """As in GPT-2: a linear layer that keeps its weight as (in, out)."""

    def __init__(self, linear):
        super().__init__()
        self.nf, self.bias = linear.out_features, linear.bias
        self.weight = nn.Parameter(linear.weight.detach().mT)

    def forward(self, x):
        return x @ self.weight + self.bias


class Int8Linear(nn.Module):
    """A quantised layer as people write them: int8 numbers, a scale, no weight to look at."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias, self.scale = linear.bias, linear.weight.detach().abs().max() / 127
        self.register_buffer("int8", (linear.weight.detach() / self.scale).round().to(torch.int8))

    def forward(self, x):
        return F.linear(x, self.int8 * self.scale, self.bias)


@each_case
@each_side
def test_layers_that_keep_their_weight_otherwise(case, side, tmp_path):
    """Conv1D, transposed, merges; a quantised one is rotated on its activations."""
    base, dense, x = pair(case, side, torch.float32)
    loft.save(stir(dense), tmp_path / "a.pt")
    conv, int8 = (nn.Sequential(kind(base[0]), nn.Tanh(), kind(base[2]))
                  for kind in (Conv1D, Int8Linear))
    for model in (conv, int8):
        loft.load(model, tmp_path / "a.pt")
    same(conv(x), dense(x))
    same(int8(x), dense(x), 0.05)
    int8(x).tanh().sum().backward()
    assert all(p.grad is not None for p in trained(int8).values())
    same(loft.merge(conv)[0].weight, loft.merge(dense)[0].weight.mT)


def test_a_weight_that_is_read_and_not_called():
    """By nn.MultiheadAttention, and by encoder layers' fast path: both see the rotated one."""
    torch.manual_seed(0)
    layer, x = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval(), torch.randn(2, 5, 16)
    before = layer(x)
    y = stir(loft.adapt(layer, "linear|out_proj", rank=4))(x)
    y.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in trained(layer).values())
    with torch.no_grad():
        same(layer(x), y)
    assert (y - before).abs().max() > 1e-3
    same(loft.merge(layer)(x), y)


def test_gpt2_of_transformers():
    """Conv1D, a tied head, gradients, the merge."""
    hf = pytest.importorskip("transformers", reason="pip install transformers")
    torch.manual_seed(0)
    config = hf.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32)
    model, tokens = hf.GPT2LMHeadModel(config).eval(), torch.randint(0, 64, (2, 16))
    before = model(tokens).logits
    loft.adapt(model, rank=8)
    assert torch.equal(model(tokens).logits, before) and len(loft.layers(model)) == 8
    assert not loft.check(stir(model), tokens, lambda m, tokens: m(tokens, labels=tokens).loss)
    y = model(tokens).logits
    same(loft.merge(model)(tokens).logits, y)


class Named(nn.Module):
    """A body, one layer of it in two places and one quantised; three heads, one of them tied."""

    def __init__(self):
        super().__init__()
        self.embed, self.fc, self.norm = nn.Embedding(12, 12), nn.Linear(12, 12), nn.Identity()
        self.again, self.norm.in_features = self.fc, 12
        self.block = nn.ModuleDict(dict(fc=nn.Linear(12, 6), gate_fc=Int8Linear(nn.Linear(12, 6))))
        self.score, self.unembed, self.tied = nn.Linear(6, 2), nn.Linear(6, 12), nn.Linear(12, 12)
        self.tied.weight = self.embed.weight

    def forward(self, tokens):
        return self.tied(self.again(torch.tanh(self.fc(self.embed(tokens)))))

    def get_output_embeddings(self):
        return self.unembed


BODY = ["fc", "block.fc", "block.gate_fc"]


@pytest.mark.parametrize("targets, expected", [
    (None, BODY), ("^fc|score", ["fc", "score"]), (["fc"], ["fc", "block.fc"]),
    (lambda n, m: m.out_features == 6, BODY[1:])])
def test_which_layers_are_adapted(targets, expected):
    """By default all but output heads; parts of a name are whole; a bare encoder has no head."""
    assert list(loft.target_layers(Named(), targets)) == expected
    assert len(loft.target_layers(network())) == 3


@pytest.mark.parametrize("trainable, expected", [
    ("", []), (["score"], ["score.weight", "score.bias"]), ("tied", ["embed.weight", "tied.bias"])])
def test_what_trains(trainable, expected):
    """The adapter, and what is named; a tied weight goes by either name."""
    model = loft.adapt(Named(), support={"fc": torch.eye(12)[:, :2]}, trainable=trainable)
    assert trained(model).keys() == {"fc.rotation.transform.theta", *expected}


def test_tied_weights_and_layers_in_two_places():
    """A tied embedding stays as it was; one layer in two places stays one."""
    model, tokens = stir(loft.adapt(Named(), ["fc", "tied"], rank=4)), torch.arange(12)
    assert model.again is model.fc and loft.layers(model).keys() == {"fc", "block.fc", "tied"}
    embedding, y = model.embed.weight.clone(), model(tokens)
    loft.merge(model)
    assert model.again is model.fc and torch.equal(model.embed.weight, embedding)
    same(model(tokens), y)


def test_a_rank_larger_than_a_layer():
    with pytest.warns(UserWarning, match="rank=14 exceeds the dimension, which is taken, of 0$"):
        model = loft.adapt(network(), rank=14)
    assert [layer.rotation.r for layer in loft.layers(model).values()] == [12, 14, 14]


def test_work_grows_linearly(tmp_path):
    """The calls that adapt, save, load and merge make."""
    def calls(n):
        model, count = nn.Sequential(*[nn.Linear(4, 4) for _ in range(n)]), itertools.count()
        other = copy.deepcopy(model)
        sys.setprofile(lambda *_: next(count))
        loft.save(loft.adapt(model, rank=2), tmp_path / "a.pt")
        loft.merge(loft.load(other, tmp_path / "a.pt"))
        sys.setprofile(None)
        return next(count)
    assert calls(200) < 2.2 * calls(100)


def test_check_says_what_is_wrong():
    """A weight is held from before, a gradient cut, one overflows, a support is stretched."""
    model = nn.ModuleDict({n: nn.Linear(12, 12) for n in ("good", "held", "cut", "far", "wide")})
    held = model.held.weight

    def loss(m, x):
        y = F.linear(m.wide(m.good(x)), held) + m.cut(x).detach()
        return (y + (m.far(x) * 1e38) ** 2).sum()

    stir(loft.adapt(model, rank=4)).wide.rotation.P.mul_(1.01)
    wrong = loft.check(model, torch.randn(5, 12), loss)
    words = dict(held="no gradient", cut="no gradient", far="not finite", wide="|RᵀR − I| = ")
    assert wrong.keys() == words.keys() and all(text in wrong[n] for n, text in words.items())


def test_regularizers():
    """HRA's is 0 for orthogonal u, and qGOFT's at the start; rotations have none."""
    hra, qgoft, plain = (pair(case)[1] for case in ("hra", "qgoft", "loft"))
    assert loft.regularizer(hra) > 7 and loft.regularizer(qgoft) == loft.regularizer(plain) == 0
    for layer in (hra[0], hra[2]):
        layer.rotation.transform.theta.data = 3 * orthonormal(layer.rotation.d, 4)
    assert loft.regularizer(hra) < 1e-20 < loft.regularizer(stir(qgoft))


@pytest.mark.parametrize("case", [c for c in CASES if not c.startswith("h")])
def test_weight_decay_pulls_to_W0(case):
    """What is learned is a difference from the identity (but reflections, whose R stays)."""
    model = stir(pair(case)[1])
    optimizer = torch.optim.AdamW(trained(model).values(), 0.1, weight_decay=1.0)
    for p in trained(model).values():
        p.grad = torch.zeros_like(p)
    for _ in range(200):
        optimizer.step()
    same(model[0].weight, model[0].base.weight, 1e-6)


def test_compiled_is_eager():
    """One graph, without breaks."""
    cases = ("boft", "coft", "householder in a support")
    model = nn.Sequential(*[stir(pair(c, dtype=torch.float32)[1]) for c in cases])
    x = torch.randn(5, 16)
    same(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))


def python(cwd, *arguments):
    subprocess.run([sys.executable, *arguments], cwd=cwd, check=True, timeout=120)


def test_loft_alone(tmp_path):
    """Copied into an empty folder it runs, and works, on a bare layer too."""
    shutil.copy(HERE / "loft.py", tmp_path)
    python(tmp_path, "loft.py")
    python(tmp_path, "-c", """
import loft, torch
layer = loft.adapt(torch.nn.Linear(8, 8), support="random", rank=4)
loft.save(layer, "a.pt")
loft.merge(loft.load(torch.nn.Linear(8, 8), "a.pt"))
""")


@pytest.mark.parametrize("package", ["", "vendored."])
def test_selectors_the_name(package, tmp_path):
    """`import selectors` is the standard library's, `from loft import selectors` ours."""
    folder = tmp_path / package[:-1]
    folder.mkdir(exist_ok=True)
    for file in ("loft.py", "selectors.py"):
        shutil.copy(HERE / file, folder)
    python(tmp_path, "-c", f"""
import asyncio, subprocess, selectors
assert hasattr(selectors, "DefaultSelector")
from {package}loft import selectors
assert hasattr(selectors, "skew") and not hasattr(selectors, "DefaultSelector")
""")


# --------------------------------------------------------------------------------------------------
# 2. Baselines: products of dense matrices, from the papers' formulas

def dense_map(q, b, map="cayley", bound=None, terms=5, **others):
    """T (b × b) of the skew Q whose strictly upper entries are q, row by row."""
    eye, upper = torch.eye(b, dtype=q.dtype), tuple(torch.triu_indices(b, b, 1))
    Q = torch.zeros_like(eye).index_put(upper, q)
    Q = Q - Q.mT
    if bound and Q.norm() > bound:
        Q = Q * bound / Q.norm()
    if map == "cayley":
        return (eye + Q) @ torch.linalg.inv(eye - Q)
    if map == "expm":
        return torch.linalg.matrix_exp(Q)
    return (eye + Q) @ sum(torch.linalg.matrix_power(Q, k) for k in range(terms - 1))


def embedded(r, index, block):
    """The identity (r × r) with `block` at rows and columns `index`."""
    E = torch.eye(r, dtype=block.dtype)[:, index]
    return E @ block @ E.mT + torch.diag(1 - E.sum(1))


def dense_T(theta, r, transform, share=False, **options):
    T = torch.eye(r, dtype=theta.dtype)
    if transform == "householder":                       # HRA, eq. 2: H_1 H_2 …
        for u in theta.mT:
            T = T - 2 * T @ torch.outer(u, u) / (u @ u)
        return T
    if transform == "givens":                            # GOFT, eqs. 3 to 5: Tᵀ = P_1 P_2 …
        step, entries = 1, iter(theta)
        while step < r:
            for i in range(0, r - step, 2 * step):
                a = next(entries)
                c, s = a.cos(), a.sin()
                G = torch.cat([c, -s, s, c]) if len(a) == 1 else a + torch.eye(2).flatten()
                T = T @ embedded(r, [i, i + step], G.view(2, 2))
            step *= 2
        return T.mT
    b = round((1 + (1 + 8 * theta.shape[-1]) ** 0.5) / 2)
    for s, blocks in enumerate(theta):                   # OFT, BOFT: T_1 T_2 …, stage by stage
        for n in range(r // b):                          # whose block n joins half-blocks 2^s apart
            place = {i: (2 * i // b // 2 ** (s + 1), 2 * i // b % 2 ** s) for i in range(r)}
            index = [i for i in place if place[i] == divmod(n, 2 ** s)]
            T = T @ embedded(r, index, dense_map(blocks[0 if share else n], b, **options))
    return T


def dense_weight(layer):
    """diag(s) W0 R, or diag(s) R W0, with R = I + P (diag(β) T diag(α) − I) Pᵀ; LoRA's W0 + B A."""
    W, R, options = layer.base.weight, layer.rotation, layer.rotation.config
    if layer.method == "lora":
        return W + R.B @ R.A
    named = {"expm": dict(map="expm"), "cayley_neumann": dict(map="cayley_neumann", bound=0.9)}
    T = dense_T(R.transform.theta, R.r, **named.get(options["transform"], {}), **options)
    if R.scale is not None:
        T = torch.diag(1 + R.scale[1]) @ T @ torch.diag(1 + R.scale[0])
    P = torch.eye(R.d).double() if R.P is None else R.P
    dense = torch.eye(R.d) + P @ (T - torch.eye(R.r)) @ P.mT
    W = W @ dense if layer.side == "input" else dense @ W
    return W if layer.magnitude is None else torch.diag(1 + layer.magnitude.m) @ W


@each_case
@settings(max_examples=12)
@given(side=sides, out=sizes, d=sizes, bias=st.booleans(), seed=seeds)
def test_every_method_is_its_paper(case, side, out, d, bias, seed):
    """Output, gradients of x and of all that trains, and the merged weight, to 1e-10."""
    _, model, x = pair(case, side, out=out, d=d, bias=bias, seed=seed)
    layer, wanted = model[0], [x.requires_grad_(), *trained(stir(model, 0.4)[0]).values()]
    W = dense_weight(layer)
    ours, theirs = layer(x), F.linear(x, W, layer.base.bias)
    same(ours, theirs, 1e-10)
    for a, b in zip(*(torch.autograd.grad(y.sin().sum(), wanted) for y in (ours, theirs))):
        same(a, b, 1e-10)
    same(loft.merge(model)[0].weight, W, 1e-10)


@pytest.mark.parametrize("case, count", dict(
    loft=15, psoft=20, oft=24, coft=6, boft=48 + 24, goft=15, qgoft=60, hra=64, lora=120).items())
def test_numbers_of_parameters(case, count):
    """Those of README's table, for a layer of 16 inputs and 24 outputs."""
    assert sum(p.numel() for p in trained(pair(case)[1][0]).values()) == count


@pytest.mark.parametrize("kind, options", dict(
    OFT=dict(oft_block_size=8, use_cayley_neumann=False), BOFT=dict(boft_block_size=4),
    HRA=dict(r=4), Psoft=dict(r=6), Lora=dict(r=4, lora_alpha=16)).items())
def test_the_real_peft(kind, options, tmp_path):
    """Output and merged weight of an adapter that peft wrote."""
    peft = pytest.importorskip("peft", reason="pip install peft")
    from lab.peft_files import from_peft
    base, x = nn.Sequential(nn.Linear(16, 24)), torch.randn(5, 16)
    config = getattr(peft, f"{kind}Config")(target_modules=["0"], **options)
    theirs = stir(peft.get_peft_model(copy.deepcopy(base), config), 0.2).eval()
    theirs.save_pretrained(tmp_path)
    ours = from_peft(base, tmp_path)
    same(ours(x), theirs(x))
    same(loft.merge(ours)[0].weight, theirs.merge_and_unload()[0].weight)


# --------------------------------------------------------------------------------------------------
# 3. Supports


# --------------------------------------------------------------------------------------------------
# 4. Fused


# --------------------------------------------------------------------------------------------------
# 5. Refusals: (a model, a call of it and of a file, words that the error must hold)

def four(**more):
    return loft.adapt(network(), ["0", "2"], rank=4, **more)


def int8():
    return nn.Sequential(Int8Linear(nn.Linear(4, 4)))


def adapting(**more):
    return lambda model, path: loft.adapt(model, **more)


def using(context):
    return lambda model, path: context(model).__enter__()


EYE = torch.eye(12)[:, :4]
ADAPT = [
    (dict(method="lfot"), "unknown method 'lfot'; valid: loft, psoft"),
    (dict(transform="caley"), "layer '0': unknown transform 'caley'; valid: cayley"),
    (dict(side="left"), "unknown side 'left'; valid: input, output"),
    (dict(support="skew"), "layer '0': support='skew' is none of principal, random, all"),
    (dict(blok_size=4), "layer '0'"), (dict(rank=0), "layer '0': rank=0 must be"),
    (dict(rank=1), "layer '0': rank 1 leaves nothing"), (dict(targets=[]), "no layer to adapt"),
    (dict(targets=["0", "two"]), "targets: 'two' is in none"),
    (dict(trainable=["nothing"]), "trainable: 'nothing' is in none"),
    (dict(targets="0", support=EYE + 1), "layer '0': the support is not orthonormal"),
    (dict(targets="0", support=EYE[:5]), "layer '0': the support has shape (5, 4), expected (12,"),
    (dict(targets="0", support=EYE, rank=5), "rank=5, but a support given as tensors has its own"),
    (dict(support={"0": EYE, "one": EYE}), "supports of ['0', 'one'], not ['0']"),
    (dict(method="oft", rank=4), "layer '0': rank=4 means nothing to all coordinates"),
    (dict(method="oft", block_size=5), "layer '0': block_size=5, stages=1"),
    (dict(method="boft", block_size=4, stages=3), "has to divide 12"),
    (dict(bound=0.0), "bound=0.0 positive"), (dict(terms=1), "terms=1 must"),
    (dict(method="hra", reflections=3), "layer '0': reflections=3 must be even"),
    (dict(method="lora", side="output"), "layer '0': lora has no support and no side"),
    (dict(method="lora", scale=True), "layer '0'"),
]
REFUSALS = [
    *((network, adapting(**arguments), words) for arguments, words in ADAPT),
    (four, adapting(), "the model is adapted already: loft.merge it first"),
    *((network, call, "the model is not adapted") for call in (
        loft.save, using(loft.merge), using(loft.disabled))),
    (lambda: stir(four(), math.inf), using(loft.merged), "layer '0': its rotated weight is not"),
    (lambda: network().to("meta"), adapting(support="all"), "layer '0': it is on the meta device"),
    (int8, adapting(), "layer '0': its weight cannot be read; support='principal' needs it"),
    (lambda: loft.adapt(int8(), support="all"), using(loft.merge), "layer '0': no floating weight"),
    (lambda: network()[:2], loft.load, "layer '2': the model has no such linear layer"),
    (lambda: nn.Sequential(nn.Linear(13, 20), *network()[1:]), loft.load, "(12, 4), expected (13"),
    (lambda: loft.adapt(network(), "0", rank=4), loft.load, "in the file, {'0'"),
    (lambda: loft.adapt(network(), ["0", "2"], rank=6), loft.load, "'0.rotation.P' is"),
    *((partial(four, **more), loft.load, "in the file, {'0'") for more in (
        dict(side="output"), dict(method="psoft"), dict(transform="expm"), dict(magnitude=True))),
]


@pytest.mark.parametrize("build, call, words", REFUSALS)
def test_what_is_wrong_is_refused_and_nothing_changes(build, call, words, tmp_path):
    loft.save(four(), tmp_path / "a.pt")
    model = build()
    before, parts = bits(model), [*model.parameters(), *model.modules()]
    with pytest.raises((ValueError, TypeError), match=re.escape(words)):
        call(model, tmp_path / "a.pt")
    assert bits(model) == before
    assert all(a is b for a, b in zip(parts, [*model.parameters(), *model.modules()]))


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("it ran",)


def signed(data):
    return bytes(data) + hashlib.sha256(data).digest()


def test_damaged_and_foreign_files(tmp_path, monkeypatch):
    """300 files, changed or cut off, are refused; 300 under a right checksum harm nothing."""
    monkeypatch.chdir(tmp_path)
    model, rng, path = network(), random.Random(0), Path("a.pt")
    loft.save(four(), path)
    whole, before = path.read_bytes(), bits(model)
    for k in range(600):
        bad = bytearray(whole[:-32] if k % 4 else whole[:rng.randrange(1, len(whole))])
        bad[rng.randrange(len(bad))] ^= rng.randrange(1, 256)
        path.write_bytes(signed(bad) if k % 2 else bad + whole[-32:])
        fresh = copy.deepcopy(model)
        try:
            loft.load(fresh, path)
            assert k % 2
        except Exception as e:                           # under a right checksum, torch.load's
            assert bits(fresh) == before and (k % 2 or type(e) is ValueError)
    for content in (dict(format="loft", version=1), Bomb()):
        torch.save(content, path)
        path.write_bytes(signed(path.read_bytes()))
        with pytest.raises(Exception, match="of format 'loft', not 'loft 2'|Weights only"):
            loft.load(model, path)
    assert os.listdir() == ["a.pt"]
