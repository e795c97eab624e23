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
import io
import math
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import loft

HERE = Path(__file__).parent
settings.register_profile("loft", max_examples=200, deadline=None, derandomize=True)
settings.load_profile("loft")

ORTHOGONAL = [t for t in loft.TRANSFORMS if t != "cayley_neumann"]       # whose error has its own test
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.06, torch.float16: 8e-3}
sides, seeds, sizes = st.sampled_from(loft.SIDES), st.integers(0, 2 ** 20), st.sampled_from([8, 16, 24])
exact_dtypes = st.sampled_from([torch.float64, torch.float32])

CASES = {  # what adapt is given
    "loft": dict(rank=6), "loft bounded": dict(rank=6, bound=0.5, support="random"),
    "psoft": dict(method="psoft", rank=5), "lora": dict(method="lora", rank=3),
    "oft": dict(method="oft", block_size=4),
    "coft shared": dict(method="oft", block_size=4, share=True, bound=0.3),
    "oft series": dict(method="oft", block_size=2, map="cayley_neumann", terms=4, magnitude=True),
    "boft": dict(method="boft", block_size=4, magnitude=True),
    "boft, three stages": dict(method="boft", block_size=2, stages=3),
    "goft": dict(method="goft"), "qgoft": dict(method="goft", relaxed=True),
    "hra": dict(method="hra", reflections=4), "hra, many": dict(method="hra", reflections=12),
    **{f"{t} in a support": dict(transform=t, rank=8, support="random", scale=t == "butterfly")
       for t in loft.TRANSFORMS},
}
each_case = pytest.mark.parametrize("case", CASES)
ANY_SIZE = ("loft", "psoft", "lora", "goft", "qgoft", "hra", "hra, many")


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


def data(dtype=torch.float32, n=32):
    return torch.randn(n, 12, dtype=dtype), torch.randint(0, 3, (n,))


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def example(case, side="input", dtype=torch.float64, out=24, d=16, bias=True, seed=0, **more):
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
    """All of a model's state, and what trains."""
    return [(n, t.clone()) for n, t in model.state_dict().items()], list(trained(model)), str(model)


def assert_same_bits(model, before):
    (ours, *rest), (theirs, *others) = bits(model), before
    assert rest == others and all(a == b and torch.equal(s, t) for (a, s), (b, t) in zip(ours, theirs))


# --------------------------------------------------------------------------------------------------
# 1. Claims

def rotated_layer(d, r, transform, dtype, scale, **options):
    """A layer whose input is rotated in a random support, theta moved by about `scale`."""
    R = loft.Rotation(d, orthonormal(d, r, dtype), transform, dtype=dtype, **options)
    return loft.LOFTLinear(nn.Linear(d, 3).to(dtype).requires_grad_(False), stir(R, scale))


@pytest.mark.parametrize("transform", ORTHOGONAL)
@given(r=st.integers(2, 64), exponent=st.integers(-12, 8), dtype=exact_dtypes, seed=seeds)
def test_R_is_orthogonal_whatever_is_learned(transform, r, exponent, dtype, seed):
    """|RᵀR − I| ≤ 1e-12 in float64, 1e-5 in float32; norms stay, and so does all off the support."""
    torch.manual_seed(seed)
    r = r + -r % 4 if transform == "butterfly" else r
    layer = rotated_layer(r + seed % 5, r, transform, dtype, 10.0 ** exponent)
    R, x = layer.rotation, torch.randn(4, r + seed % 5, dtype=dtype)
    assert loft.orthogonality_error(layer)[""] <= ROUNDING[dtype]
    same(R(x).norm(dim=1), x.norm(dim=1))
    off = x - x @ R.P @ R.P.mT
    assert (R(off) - off).abs().max() <= 4 * ROUNDING[dtype]
    if dtype == torch.float64:                                           # and the measure is true
        dense = R(torch.eye(R.d, dtype=dtype))
        assert (dense.mT @ dense - torch.eye(R.d)).abs().max() <= 1e-12


@pytest.mark.parametrize("transform", ORTHOGONAL)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_R_is_orthogonal_at_rank_512(transform, dtype):
    for scale in (1e-8, 1e6):
        layer = rotated_layer(512, 512, transform, dtype, scale)
        assert loft.orthogonality_error(layer)[""] <= ROUNDING[dtype]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_ten_thousand_steps_at_absurd_rates(dtype):
    """Nothing drifts, for nothing is accumulated."""
    torch.manual_seed(0)
    layer = rotated_layer(6, 4, "cayley", dtype, 0.3)
    optimizer, target = torch.optim.Adam(trained(layer).values(), 0.5), torch.randn(3, 6, dtype=dtype)
    for step in range(10_000):
        if step == 5_000:
            optimizer.param_groups[0]["lr"] = 1e4
        optimizer.zero_grad()
        (layer.weight - target).square().sum().backward()
        optimizer.step()
    assert layer.rotation.transform.theta.abs().max() > 100
    assert loft.orthogonality_error(layer)[""] <= ROUNDING[dtype]


def test_the_series_says_its_error():
    """Cayley–Neumann is orthogonal to O(‖Q‖^(terms−1)): less with more terms, bounded by `bound`."""
    torch.manual_seed(0)
    layer = partial(rotated_layer, 16, 16, "cayley_neumann", torch.float64)
    errors = [loft.orthogonality_error(layer(0.02, bound=None, terms=t))[""] for t in (3, 5, 9)]
    assert errors[0] > 10 * errors[1] > 100 * errors[2]
    assert loft.orthogonality_error(layer(1e6))[""] < 1


@each_case
@settings(max_examples=16)
@given(side=sides, dtype=st.sampled_from(list(ROUNDING)), out=sizes, d=sizes, bias=st.booleans(), seed=seeds)
def test_exact_at_the_start_switched_off_and_merged(case, side, dtype, out, d, bias, seed):
    """To the last bit, and merged to the dtype's rounding; `merged` puts every bit back."""
    base, model, x = example(case, side, dtype, out, d, bias, seed)
    before = base(x)
    assert torch.equal(model(x), before)
    y, state = stir(model)(x), bits(model)
    assert not torch.equal(y, before)
    with loft.disabled(model):
        assert torch.equal(model(x), before)
    with loft.merged(model):
        same(model(x), y)
    assert_same_bits(model, state)
    same(loft.merge(model)(x), y)
    assert str(model) == str(base) and not trained(model)


@each_case
@settings(max_examples=16)
@given(side=sides, out=sizes, d=sizes, seed=seeds)
def test_what_a_rotation_keeps(case, side, out, d, seed):
    """Singular values of W0; on the input side W Wᵀ, on the output side WᵀW."""
    model = stir(example(case, side, out=out, d=d, seed=seed)[1], 2.0)
    for _, layer in loft.layers(model):
        W, W0 = layer.weight, layer.base.weight
        if layer.orthogonal and layer.magnitude is None:
            same(torch.linalg.svdvals(W), torch.linalg.svdvals(W0))
            same(*((M @ M.mT if side == "input" else M.mT @ M) for M in (W, W0)))


@each_case
@pytest.mark.parametrize("side", loft.SIDES)
def test_gradients(case, side):
    _, model, x = example(case, side)
    names, values = zip(*trained(stir(model)).items())
    call = lambda x, *values: torch.func.functional_call(model, dict(zip(names, values)), (x,))
    torch.autograd.gradcheck(call, (x.requires_grad_(), *values), fast_mode=True)


@pytest.mark.parametrize("options", [
    dict(), dict(bound=0.5), dict(transform="cayley_neumann"), dict(transform="expm"), dict(transform="givens")])
def test_second_derivatives_at_the_start(options):
    R = loft.Rotation(5, orthonormal(5, 4), dtype=torch.float64, **options)
    call = lambda theta, x: torch.func.functional_call(R, {"transform.theta": theta}, (x,))
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(call, (R.transform.theta.detach().requires_grad_(), x), atol=1e-4)


@pytest.mark.parametrize("side", loft.SIDES)
def test_autograd_keeps_z_and_not_x(side):
    """Beyond what the frozen layer keeps: z = xP (n × r), and r × r pieces of T."""
    n, d, r = 512, 256, 8
    layer = loft.adapt(nn.Linear(d, d), rank=r, support="random", side=side)
    fixed = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), *layer.buffers())}
    kept = {}

    def keep(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t
    x = torch.randn(n, d, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        layer(x)
    kept = sum(size for key, size in kept.items() if key not in fixed)
    assert 4 * n * r <= kept <= 4 * 1.1 * n * r + 8 * 10 * r * r


@each_case
@pytest.mark.parametrize("side", loft.SIDES)
def test_saved_and_loaded(case, side, tmp_path):
    """Every bit, into a plain model and in place into an adapted one; nothing random is disturbed."""
    base, model, x = example(case, side, torch.float32)
    path, state = tmp_path / "new" / "a.pt", torch.get_rng_state()
    other = loft.adapt(copy.deepcopy(base), ["0", "2"], side=model[0].side, seed=1, **CASES[case])
    held = trained(other)
    loft.save(model, path)
    assert torch.equal(torch.get_rng_state(), state) and os.listdir(path.parent) == ["a.pt"]
    model[2].base.bias.requires_grad_(True)
    loft.save(stir(model), path)
    for again in (loft.load(copy.deepcopy(base), path), loft.load(other, path)):
        assert_same_bits(again, bits(model))
        same(again(x), model(x))
    assert all(trained(other)[n] is p for n, p in held.items())


def test_training_goes_on_from_a_file(tmp_path):
    """An optimizer made before the adapter is loaded in place holds its parameters."""
    def train(model, optimizer):
        for _ in range(3):
            optimizer.zero_grad()
            model(x).tanh().sum().backward()
            optimizer.step()

    base, model, x = example("psoft")
    other = loft.adapt(copy.deepcopy(base), ["0", "2"], **CASES["psoft"])
    first, second = (torch.optim.Adam(trained(m).values(), 0.05) for m in (model, other))
    train(model, first)
    loft.save(model, tmp_path / "a.pt")
    loft.load(other, tmp_path / "a.pt")
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    train(model, first)
    train(other, second)
    same(other(x), model(x))


def test_an_interrupted_save_leaves_the_older_file(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")
    model, path = example("loft")[1], tmp_path / "a.pt"
    loft.save(model, path)
    before = path.read_bytes()
    for step in ("write_bytes", "replace"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
            patch.setattr(Path, step, fail)
            loft.save(stir(model), path)
        assert path.read_bytes() == before


def inside(model):
    model[0] = checkpoint_wrapper(model[0])
    model[2] = torch.compile(model[2])
    return model


WRAPPERS = {"none": lambda model: model, "module.": nn.DataParallel, "inside": inside,
            "averaged": torch.optim.swa_utils.AveragedModel, "_orig_mod.": torch.compile}


@pytest.mark.parametrize("saved", WRAPPERS)
@pytest.mark.parametrize("loaded", WRAPPERS)
def test_a_wrapper_is_no_part_of_a_name(saved, loaded, tmp_path):
    base, model, _ = example("psoft", trainable=["2.bias"])
    wrapped = WRAPPERS[saved](stir(model))
    loft.save(wrapped, tmp_path / "a.pt")
    again = loft.load(WRAPPERS[loaded](base), tmp_path / "a.pt")
    ours, theirs = loft.payload(again)["state"], loft.payload(wrapped)["state"]
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], t) for n, t in theirs.items())
    assert "2.bias" in ours and not trained(loft.merge(again)).keys() - {"2.bias"}


@each_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_copies_casts_and_autocast(case, dtype):
    """A model cast after adapt is rounded; what is learned keeps float32; T is never rounded."""
    _, model, x = example(case, dtype=torch.float32)
    y, factors = stir(model)(x), getattr(model[0].rotation, "transform", lambda z: z)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same_bits(again, bits(model))
        same(again(x), y)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == torch.bfloat16
        same(model(x).float(), y, ROUNDING[torch.bfloat16])
    cast = copy.deepcopy(model).to(dtype)
    assert {p.dtype for p in trained(cast).values()} == {torch.promote_types(dtype, torch.float32)}
    assert cast[0].base.weight.dtype == dtype == cast(x.to(dtype)).dtype
    same(cast(x.to(dtype)).float(), y, max(ROUNDING[dtype], 1e-5))
