"""What LOFT promises: the specification, in five parts.

    1. claims       one property each, over methods × sides × dtypes
    2. baselines    every method against d × d matrices, written from its paper; and against peft
    3. supports     where to rotate
    4. fused        kernels.py equals loft.py
    5. refusals     what is said, and that nothing has changed

    python -m pytest                     # peft and transformers are used where they are installed
"""
import contextlib
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
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings, strategies as st
from torch import nn
from torch._dynamo.utils import counters
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (CheckpointImpl,
                                                                         checkpoint_wrapper)
from torch.func import functional_call
from torch.utils.checkpoint import CheckpointError, checkpoint

import loft
from loft import kernels, selectors

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


def orthonormal(d, r):
    return torch.linalg.qr(torch.randn(d, r, dtype=torch.float64))[0]


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
       dtype=st.sampled_from([torch.float64, torch.float32]),
       backend=st.sampled_from(["eager", "fused"]))
@example(r=512, exponent=6, dtype=torch.float64, seed=0, backend="fused")
def test_R_is_orthogonal_whatever_is_learned(transform, r, exponent, dtype, seed, backend):
    """|RᵀR − I| ≤ 1e-12 in float64, 1e-5 in float32; and norms stay."""
    torch.manual_seed(seed)
    r += -r % 4 if transform in ("block", "butterfly") else 0
    base, x = nn.Linear(r + seed % 5, 1).to(dtype), torch.randn(4, r + seed % 5, dtype=dtype)
    layer = loft.adapt(base, support="random", rank=r, transform=transform, backend=backend)
    R = stir(layer, 10.0 ** exponent).rotation
    assert loft.orthogonality_error(layer)[""] <= ROUNDING[dtype]
    same(R(x).norm(dim=1), x.norm(dim=1))


def test_ten_thousand_steps_at_an_absurd_rate():
    """Nothing drifts, for nothing is accumulated."""
    torch.manual_seed(0)
    layer, (x, y) = loft.adapt(nn.Linear(4, 4).double()), torch.randn(2, 4, 4).double()
    optimizer = torch.optim.Adam(trained(layer).values(), 1e4)
    for _ in range(10_000):
        optimizer.zero_grad()
        (layer(x) - y).square().sum().backward()
        optimizer.step()
    assert layer.rotation.transform.theta.abs().max() > 100
    assert loft.orthogonality_error(layer)[""] <= 1e-12


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
def test_second_derivatives(case, side):
    """Second ones, at the start as well; first ones are compared with the papers' formulas."""
    _, model, x = pair(case, side)
    for model in (model, stir(copy.deepcopy(model))):
        names, values = zip(*trained(model).items())
        call = lambda x, *values: functional_call(model, dict(zip(names, values)), (x,))
        inputs = x.requires_grad_(), *values
        torch.autograd.gradgradcheck(call, inputs, fast_mode=True, atol=1e-4)


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


class Float8Linear(nn.Linear):
    """A quantised layer: torch has no products for its weight."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features)
        self.bias, self.weight.data = linear.bias, linear.weight.detach().to(torch.float8_e5m2)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype), self.bias)


@each_case
@each_side
def test_layers_that_keep_their_weight_otherwise(case, side, tmp_path):
    """Conv1D, transposed, merges; quantised ones are rotated on their activations."""
    base, dense, x = pair(case, side, torch.float32)
    loft.save(stir(dense), tmp_path / "a.pt")
    conv, float8 = (nn.Sequential(kind(base[0]), nn.Tanh(), kind(base[2]))
                    for kind in (Conv1D, Float8Linear))
    for model in (conv, float8):
        loft.load(model, tmp_path / "a.pt")
    same(conv(x), dense(x))
    same(float8(x), dense(x), 0.3)
    float8(x).tanh().sum().backward()
    assert all(p.grad is not None for p in trained(float8).values())
    same(loft.merge(conv)[0].weight, loft.merge(dense)[0].weight.mT)


def test_a_weight_that_is_read_and_not_called(monkeypatch):
    """By nn.MultiheadAttention, and by encoder layers' fast path: both see the rotated one, which
    is not computed for its dtype."""
    torch.manual_seed(0)
    layer, x = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval(), torch.randn(2, 5, 16)
    before = layer(x)
    y = stir(loft.adapt(layer, "linear|out_proj", rank=4))(x)
    y.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in trained(layer).values())
    with torch.no_grad():
        same(layer(x), y)
        same(torch.export.export(layer, (x,), strict=False).module()(x), y)
        monkeypatch.setattr(loft.Rotation, "rotate", None)
        assert (y - before).abs().max() > 1e-3 and layer.linear1.weight.dtype == x.dtype
        monkeypatch.undo()
    same(loft.merge(layer)(x), y)


def test_a_checkpoint_is_not_switched_off_or_on_midway():
    """What was switched off in forward only would get the gradient of another function."""
    _, model, x = pair("loft")
    with loft.disabled(model):
        y = checkpoint(model, x.requires_grad_(), use_reentrant=False)
    with pytest.raises(CheckpointError):
        y.sum().backward()


SIZES = """
    0 pad_token_id
    1 bos_token_id
    2 eos_token_id num_hidden_layers encoder_layers decoder_layers num_layers num_decoder_layers
    4 num_attention_heads encoder_attention_heads decoder_attention_heads num_key_value_heads
    4 rotary_dim
    8 d_kv head_dim patch_size num_experts num_local_experts
    16 image_size
    32 hidden_size d_model n_embd embedding_size word_embed_proj_dim intermediate_size d_ff
    32 encoder_ffn_dim decoder_ffn_dim moe_intermediate_size shared_expert_intermediate_size
    64 vocab_size max_position_embeddings"""
SMALL = {name: int(n) for n, *names in map(str.split, SIZES.split("\n")[1:]) for name in names}


@pytest.mark.parametrize("kind", """
    albert bart beit bert biogpt bloom clip_text_model clip_vision_model codegen cohere deberta
    deberta-v2 deit dinov2 distilbert electra gemma gemma2 glm gpt2 gpt_neox gptj granite llama
    longt5 m2m_100 mbart mistral mixtral modernbert mpnet mt5 olmo2 opt phi phi3 qwen2 qwen2_moe
    qwen3 qwen3_moe roberta roformer siglip_vision_model smollm3 stablelm starcoder2 t5
    vit""".split())
def test_models_of_transformers(kind):
    """Exact at the start, reached by gradients, and merged, whatever the family."""
    hf = pytest.importorskip("transformers", reason="pip install transformers")
    torch.manual_seed(0)
    config = hf.CONFIG_MAPPING[kind](**SMALL)
    model = hf.AutoModel.from_config(config).requires_grad_(False).eval()
    tokens = torch.randint(3, 64, (2, 8))
    inputs = dict(input_ids=tokens)
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens
    if model.main_input_name == "pixel_values":
        inputs = dict(pixel_values=torch.randn(2, 3, 16, 16))
    before = model(**inputs)[0]
    loft.adapt(model, rank=4)
    assert torch.equal(model(**inputs)[0], before)
    wrong = loft.check(stir(model), inputs, lambda m, batch: m(**batch)[0].square().sum())
    y = model(**inputs)[0]
    assert all("pool" in n or "head" in n for n in wrong) and (y - before).abs().max() > 1e-3
    same(loft.merge(model)(**inputs)[0], y, 2e-6)


class Named(nn.Module):
    """A body, one layer of it in two places and one quantised; three heads, one of them tied."""

    def __init__(self):
        super().__init__()
        self.embed, self.fc, self.norm = nn.Embedding(12, 12), nn.Linear(12, 12), nn.Identity()
        self.again, self.norm.in_features = self.fc, 12
        gate_fc = Float8Linear(nn.Linear(12, 6))
        self.block = nn.ModuleDict(dict(fc=nn.Linear(12, 6), gate_fc=gate_fc))
        self.score, self.unembed, self.tied = nn.Linear(6, 2), nn.Linear(6, 12), nn.Linear(12, 12)
        self.tied.weight, self.experts = self.embed.weight, nn.Parameter(torch.zeros(2, 2, 2))

    def forward(self, tokens):
        return self.tied(self.again(torch.tanh(self.fc(self.embed(tokens)))))

    def get_output_embeddings(self):
        return self.unembed


BODY = ["fc", "block.fc", "block.gate_fc"]


@pytest.mark.parametrize("targets, expected", [
    (None, BODY), ("^fc|score", ["fc", "score"]), (["fc"], ["fc", "block.fc"]), ({"fc": 0}, ["fc"]),
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
    """A tied embedding stays as it was; one layer in two places stays one. What may be meant to
    train, heads and experts kept in three dimensions, is named."""
    with pytest.warns(UserWarning, match="frozen.* 22 of .* experts, score.weight, score.bias;"):
        model, tokens = loft.adapt(Named(), ["fc", "tied"], rank=4), torch.arange(12)
    stir(model)
    assert model.again is model.fc and loft.layers(model).keys() == {"fc", "block.fc", "tied"}
    embedding, y = model.embed.weight.clone(), model(tokens)
    loft.merge(model)
    assert model.again is model.fc and torch.equal(model.embed.weight, embedding)
    same(model(tokens), y)


def test_a_rank_larger_than_a_layer():
    with pytest.warns(UserWarning, match="rank=14 exceeds the dimension, which is taken, of 0$"):
        model = loft.adapt(network(), rank=14)
    assert [layer.rotation.r for layer in loft.layers(model).values()] == [12, 14, 14]


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


def python(cwd, *arguments):
    subprocess.run([sys.executable, *arguments], cwd=cwd, check=True, timeout=120)


def test_loft_alone(tmp_path):
    """Copied into an empty folder it runs, and works, on a bare layer too."""
    shutil.copy(HERE / "loft.py", tmp_path)
    python(tmp_path, "loft.py")
    python(tmp_path, "-c", """
import loft, torch
layer = loft.adapt(torch.nn.Linear(8, 8), support="random", rank=4)
torch.nn.init.normal_(layer.rotation.transform.theta)
loft.save(layer, "a.pt")
again = loft.load(torch.nn.Linear(8, 8), "a.pt")
assert torch.equal(again.rotation.difference(), layer.rotation.difference())
loft.merge(again)
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

each_kind = pytest.mark.parametrize("kind", selectors.KINDS)


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def calibration(**options):
    """A model, three batches of eight examples, and `select` for them."""
    torch.manual_seed(0)
    model = network(torch.float64)
    batches = [[torch.randn(8, 12).double(), torch.randint(0, 3, (8,))] for _ in range(3)]
    return model, batches, partial(selectors.select, model, loss_fn=cross_entropy, **options)


def dense(model, batch, side):
    """W, G, S of the first layer by autograd; on the output side of the transposes."""
    W = model[0].weight
    G, = torch.autograd.grad(cross_entropy(model, batch), W)
    W, G = (W.detach(), G) if side == "input" else (W.detach().mT, G.mT)
    return W, G, selectors.skew_part(W.mT @ G)


def same_span(ours, theirs, tolerance=1e-7):
    assert (ours @ ours.mT - theirs @ theirs.mT).abs().max() < tolerance


@given(out=st.integers(2, 16), d=st.integers(2, 16), thin=st.integers(0, 16), seed=seeds)
def test_skew_has_the_largest_score(out, d, thin, seed):
    """√(2 Σ_{j ≤ r/2} σ_j²), and none exceeds it; G of any rank, or (0) equal σ."""
    torch.manual_seed(seed)
    W, G = torch.randn(out, d).double(), (torch.randn(out, thin) @ torch.randn(thin, d)).double()
    if thin == 0:
        W, U = torch.eye(d).double(), orthonormal(d, d)
        G = U[:, :d // 2] @ U[:, d // 2:][:, :d // 2].mT
    r, S, score = 1 + seed % min(W.shape), selectors.skew_part(W.mT @ G), {}
    best = torch.linalg.svdvals(S)[:r // 2 * 2].norm()
    for kind in set(selectors.KINDS) - {"activation"}:
        P = getattr(selectors, kind)(*([W] if kind in loft.SUPPORTS else [W, G]), r)
        same(P.mT @ P, torch.eye(r).double(), 1e-10)
        score[kind] = selectors.score(W, G, P)
    assert max(score.values()) - 1e-8 <= best <= score["skew"] + 1e-8
    if thin == 1 and r == 2:                             # G = u vᵀ: not v, but span{v, W0ᵀu}
        assert score["paired"] >= best - 1e-8 > selectors.score(W, G, selectors.gradient(W, G, 1))


@each_side
@each_kind
def test_a_selection_is_the_pure_function_of_the_true_gradient(kind, side):
    """From an iterator; by streaming; along a path that stays where it is. Then aligned: C = Σ MᵀM
    over pieces of 8 examples is diagonal. And the score is a slope: ‖∂loss/∂θ‖ of the adapted
    layer is √8 of it, for T − I = 2Q + O(Q²), Q = U − Uᵀ."""
    model, batches, choose = calibration(rank=2, kind=kind, side=side)
    found = choose(iter(batches), align=False)
    W, G, S = (torch.stack(each) for each in zip(*(dense(model, batch, side) for batch in batches)))
    W, G, (X, y) = W[0], G.sum(0), map(torch.cat, zip(*batches))
    tensors = [W, G] if kind != "activation" else [X if side == "input" else X @ W]
    streaming, at_rest = dict(dense=0, passes=8), dict(lookahead=24, lookahead_lr=0)
    if kind in loft.SUPPORTS:
        tensors, at_rest = [W], {}
    if kind != "random":
        same_span(found["0"], getattr(selectors, kind)(*tensors, 2))
    for options in (streaming, at_rest, streaming | at_rest):
        torch.seed()
        for n, P in choose(iter(batches), **options).items():
            same_span(P, found[n], 1e-5)

    A = selectors.align(model, [dict(enumerate((X, y)))], cross_entropy, found, side=side)["0"]
    M = A.mT @ S @ A
    C = (M.mT @ M).sum(0)
    same(C, torch.diag(C.diagonal()), 1e-9)
    same_span(A, found["0"])
    assert torch.equal(A, choose(batches)["0"])

    scores = selectors.scores(model, batches, cross_entropy, found, side=side)
    loft.adapt(model, support=found, side=side)
    sum(cross_entropy(model, batch) for batch in batches).backward()
    slope = model[0].rotation.transform.theta.grad.norm().item() / math.sqrt(8)
    assert scores["0"] == pytest.approx(slope) == selectors.score(W, G, found["0"])


def test_large_layers_are_seen_through_thin_products():
    """Where singular values of G fall as 1/j, about as real ones do: three passes are enough."""
    torch.manual_seed(0)
    layer, eye = nn.Linear(300, 120, bias=False).double(), torch.eye(300).double()
    G = orthonormal(120, 120) / torch.arange(1, 121) @ orthonormal(300, 120).mT
    best = torch.linalg.svdvals(selectors.skew_part(layer.weight.mT @ G))[:16].norm()
    P = selectors.select(layer, [0], lambda layer, _: (layer(eye) * G.mT).sum(), 16, dense=0)[""]
    for P in (P, selectors.skew(layer.weight, G, 16)):
        assert 0.995 * best <= selectors.score(layer.weight, G, P) <= best


def odd(model, batch, run=lambda layers, x: layers(x), autocast=False):
    """A loss with what real ones have: a step in place, a layer called twice, one never."""
    with torch.autocast("cpu", torch.bfloat16, autocast):
        x = run(model[:3], batch[0].float().requires_grad_())
        return F.cross_entropy(model[2](x.tanh()), batch[1])


@each_side
@pytest.mark.parametrize("options", [dict(), dict(dense=0), dict(lookahead=6), dict(kind="paired")])
def test_models_as_they_are(side, options):
    """Both kinds of checkpointing, autocast, bf16: the same support, by its score."""
    def score(model, **how):
        with pytest.warns(UserWarning, match="no gradient reached 3: no support chosen there"):
            P = selectors.select(model, batches, partial(odd, **how), 4, side=side, **options)
        return [*selectors.scores(model.float(), batches, odd, P, side=side).values()]

    model = nn.Sequential(*(nn.Linear(12, 12) for _ in range(4)))
    model[1], (_, batches, _) = nn.ReLU(inplace=True), calibration()
    right, roughly = (pytest.approx(score(model), error) for error in (1e-4, 0.05))
    assert score(model, run=partial(checkpoint, use_reentrant=False)) == right
    assert score(model, run=partial(checkpoint, use_reentrant=True)) == right
    assert score(model, autocast=True) == roughly
    assert score(model.bfloat16(), run=lambda layers, x: layers(x.bfloat16())) == roughly


@each_side
@each_kind
def test_a_layer_counts_as_what_it_does(kind, side):
    """An adapted one, a quantised one, Conv1D: as the plain one of that weight; padding not."""
    def choose(layer, *batch):
        model = nn.Sequential(layer, *rest)
        return selectors.select(model, [batch], cross_entropy, 4, kind, ["0"], side=side)["0"]

    model, ((x, y), *_), _ = calibration()
    (first, *rest), x = model.float(), x.float()
    adapted, float8 = stir(loft.adapt(copy.deepcopy(first), rank=4)), Float8Linear(first)
    same_span(choose(adapted, x, y), choose(loft.merge(copy.deepcopy(adapted)), x, y), 1e-3)
    first.weight.data = float8.weight.float()
    padded = torch.cat([x, 9 * x.roll(1, 1)]), torch.cat([y, 0 * y - 100])
    for layer, batch in ((float8, (x, y)), (Conv1D(first), (x, y)), (first, padded)):
        same_span(choose(layer, *batch), choose(first, x, y), 1e-3)


@each_side
def test_lookahead_is_S_summed_along_a_path(side):
    """Against the path with all its matrices: W_t = W0 R, S_t = skew(W0ᵀG_t), Adam."""
    path, batches, choose = calibration(rank=4, targets=["0"], side=side)
    P = choose(batches, kind="principal")["0"]
    found = choose(batches, lookahead=20, lookahead_lr=0.02, trainable="4.bias")["0"]
    R, W0, G = loft.Rotation(len(P), P, dtype=torch.float64), path[0].weight.detach(), 0
    optimizer = torch.optim.Adam([*R.parameters(), path[4].bias], betas=(0.9, 0.99))
    for t in range(20):
        optimizer.param_groups[0]["lr"] = 0.02 * min(1, (t + 1) / 2)
        optimizer.zero_grad()
        W = R.rotate(W0, side)
        path[0].weight = nn.Parameter(W)
        cross_entropy(path, batches[t % 3]).backward()
        W.backward(path[0].weight.grad)
        G = G + path[0].weight.grad
        optimizer.step()
    W, G = (W0, G) if side == "input" else (W0.mT, G.mT)
    same_span(found, selectors.skew(W, G, 4))


@each_side
def test_narrow_keeps_the_planes_that_turn_furthest(side):
    """As they are, in supports that are aligned; a rank that there is not is refused."""
    model, batches, _ = calibration()
    stir(loft.adapt(model, ["0", "2"], rank=8, side=side, backend="fused"))
    wide = copy.deepcopy(model[0].rotation)
    with pytest.raises(ValueError, match="layer '0': no plain Cayley map of a rank ≥ 10"):
        selectors.narrow(model, batches, cross_entropy, 10)
    selectors.narrow(model, batches, cross_entropy, 4)
    R = model[0].rotation
    same(R(R.P.mT), wide(R.P.mT), 1e-10)
    turned, kept = (torch.linalg.svdvals(each.difference()) for each in (wide, R))
    same(kept, turned[:4], 1e-10)                        # 2 sin(angle / 2)
    assert not loft.check(model, batches[0], cross_entropy)


@pytest.mark.parametrize("fails", [None, ValueError, KeyboardInterrupt])
def test_everything_is_left_as_it_was_found(fails):
    def loss_fn(model, batch):
        if next(calls) == 25 and fails:
            raise fails
        return cross_entropy(model, (batch[0] + torch.rand(()), batch[1]))

    def state():
        return (bits(model), torch.get_rng_state().tolist(), *map(id, model.parameters()),
                *((id(m), m.training, len(m._forward_hooks)) for m in model.modules()),
                *((id(p.grad), p.grad.tolist()) for p in model.parameters()))

    model, batches, choose = calibration(rank=4, lookahead=30, trainable="4")
    calls = itertools.count()
    cross_entropy(model, batches[0]).backward()
    model[2].eval().requires_grad_(False)
    before = state()
    with pytest.raises(fails) if fails else contextlib.nullcontext():
        choose(batches, loss_fn=loss_fn)
    assert state() == before


def test_a_budget_is_spent_where_planes_are_strongest():
    """A plane counts σ², and costs what it adds to r(r−1)/2; the strongest come first."""
    ranks = {1: dict(a=2), 6: dict(a=2, b=2), 7: dict(a=2, b=4), 12: dict(a=4, b=4)}
    assert ranks == {budget: selectors.spend(dict(a=[3, 1], b=[2, 2]), budget) for budget in ranks}
    model, batches, choose = calibration(rank=4, targets=["0"])
    found = selectors.within(model, batches, cross_entropy, 6, ["0"])
    same_span(found["0"], choose(batches)["0"])


@pytest.mark.parametrize("options, words", [
    (dict(batches=[]), "batches is empty"),
    (dict(loss_fn=lambda m, b: cross_entropy(m, b) * math.inf), "calibration batch 1 is inf"),
    (dict(loss_fn=lambda m, b: (m(b[0]), b[0].zero_())[0].sum()), "layer '0': .* inplace"),
    (dict(rank={"0": 4}), "layer '2': rank None must be an int"),
    (dict(kind="random", lookahead=9), "random follows from W0"),
    (dict(budget=0), "buys no plane"),
])
def test_what_does_not_fit_is_refused(options, words):
    model, batches, choose = calibration()
    before = bits(model)
    with pytest.raises((ValueError, RuntimeError), match=words):
        choose(**dict(batches=batches, rank=4) | options)
    assert bits(model) == before


TWO = """
import os, sys, torch
from loft import selectors
torch.set_num_threads(1)
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(12, 20), torch.nn.Tanh(), torch.nn.Linear(20, 16))
batches, store, rank = [torch.randn(8, 12) for _ in range(4)], sys.argv[1], int(sys.argv[2])
choose = lambda batches, kind, dense: selectors.select(
    model, batches, lambda model, x: model(x).logsumexp(1).square().sum(), 4, kind, dense=dense)
options = [("skew", 0), ("skew", 99), ("gradient", 99), ("activation", 0)]
alone = [choose(batches, *o) for o in options]
torch.distributed.init_process_group("gloo", "file://" + store, rank=rank, world_size=2)
for o, one in zip(options, alone):
    for n, P in choose(batches[rank::2], *o).items():
        torch.testing.assert_close(P.abs(), one[n].abs(), atol=1e-3, rtol=0)
os._exit(0)      # torch 2.6's destroy_process_group may wait for a thread that wants the GIL
"""


def test_two_processes_choose_what_one_does(tmp_path):
    """With torch.distributed, sums are over all ranks."""
    run = partial(python, HERE, "-c", TWO, tmp_path / "store")
    list(ThreadPoolExecutor(2).map(run, "01"))


@pytest.mark.parametrize("code", ["import torch, asyncio; asyncio.run(asyncio.sleep(0))", """
import selectors as standard, socketserver
from loft import selectors
assert hasattr(standard, "DefaultSelector") and not hasattr(standard, "skew")
assert hasattr(selectors, "skew")
"""])
def test_the_name_of_selectors(code, tmp_path):
    """`import selectors` is Python's, `loft.selectors` ours: -c, as a script, in a package."""
    python(HERE, "-c", code)
    for name in ("loft.py", "selectors.py", "kernels.py"):
        shutil.copy(HERE / name, tmp_path)
    (tmp_path / "script.py").write_text(code)
    python("/", tmp_path / "script.py")
    python(tmp_path.parent, "-c", code.replace("from loft", f"from {tmp_path.name}.loft"))


# --------------------------------------------------------------------------------------------------
# 4. Fused: kernels.py equals loft.py

def twins(case, side="input", dtype=torch.float64, scale=0.3, seed=0, bias=True):
    """One adapted model, fused and eager, away from its start; and inputs (2, 5, 16)."""
    torch.manual_seed(seed)
    eager = nn.Sequential(*(nn.Linear(i, o, bias) for i, o in ((16, 24), (24, 16), (16, 24))))
    side = "input" if case == "lora" else side
    stir(loft.adapt(eager.to(dtype), side=side, **CASES[case]), scale)
    return kernels.fuse(copy.deepcopy(eager)), eager, torch.randn(2, 5, 16).to(dtype)


def agree(fused, eager, x, call=lambda model, x: model(x)):
    """Outputs, gradients of x and of all that trains: equal, or None in both."""
    found = []
    for model in (fused, eager):
        model.zero_grad()
        leaf = x.clone().requires_grad_()
        y = call(model, leaf)
        y.backward(torch.arange(y.numel()).cos().view(y.shape).to(y.dtype))
        found.append([y, leaf.grad, *(p.grad for p in model.parameters())])
    for ours, theirs in zip(*found, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            same(ours, theirs, 2 * ROUNDING[y.dtype])    # both round


@each_case
@each_side
@settings(max_examples=12)
@given(dtype=dtypes, scale=st.sampled_from([0.0, 1e-3, 0.3, 1.0]), bias=st.booleans(), seed=seeds,
       leading=st.sampled_from([(), (2, 5), (300,)]))
def test_fused_equals_eager(case, side, dtype, scale, bias, seed, leading):
    """Values and gradients, in any shape and precision; at the start to the bit."""
    fused, eager, x = twins(case, side, dtype, scale, seed, bias)
    assert fused(x[:0]).shape == (0, 5, 24)
    if scale == 0:
        assert torch.equal(fused(x), eager(x))
    agree(fused, eager, torch.randn(*leading, 16).to(dtype))


@each_case
@pytest.mark.parametrize("kind", CheckpointImpl)
def test_fused_in_checkpoints(case, kind):
    """Around every layer, which computes its own T in backward; and around the model."""
    fused, eager, x = twins(case)
    for model in (fused, eager):
        for i in range(3):
            model[i] = checkpoint_wrapper(model[i], kind)
    agree(fused, eager, x)
    reentrant = kind is CheckpointImpl.REENTRANT
    agree(fused, eager, x, lambda model, x: checkpoint(model, x, use_reentrant=reentrant))


def accumulated(model, x):
    for k in range(2):
        y = model(x + k)
        y.sum().backward(retain_graph=True)
    return y


def doubled(model, x, *_):
    return functional_call(model, {n: 2 * p for n, p in trained(model).items()}, x)


def autocast(model, x):
    with torch.autocast("cpu", torch.bfloat16):
        return model.float()(x.float())


def midway(act, mode=torch.enable_grad):
    """act(model, x, what model[1] gave) in the middle of the model's forward."""
    def call(model, x):
        found = []
        hook = model[1].register_forward_hook(lambda m, _, y: found.append(act(model, x, y)))
        with mode():
            model(x)
        hook.remove()
        return found[0]
    return call


def halve(model):
    for p in model.parameters():
        p.data.mul_(0.5)


def edited(model, x, y):
    halve(model)
    return ThreadPoolExecutor(1).submit(model[2], x).result()


WAYS = {
    "accumulated": accumulated, "functional": doubled, "autocast": autocast,
    "one layer frozen": lambda model, x: (model[1].requires_grad_(False), model(x))[1],
    "by parts": lambda model, x: model[2](model[:2](x)),
    "its weight": lambda model, x: x @ model[0].weight.mT,
    "threads": lambda model, x: sum(ThreadPoolExecutor(3).map(model, [x] * 5)),
    "an early exit": midway(lambda model, x, y: y),
    "edited in another thread": midway(edited),
    "functional midway": midway(lambda model, x, y: doubled(model[2], x)),
    "gradients midway": midway(torch.enable_grad()(lambda model, x, y: model[2](x)), torch.no_grad),
}


@each_case
@pytest.mark.parametrize("way", WAYS)
def test_fused_however_it_is_called(case, way):
    agree(*twins(case), WAYS[way])


def replica(model):
    """What nn.DataParallel runs on another device: parameters are tensors, hooks are shared."""
    copies = {m: m._replicate_for_data_parallel() for m in model.modules()}
    for m, new in copies.items():
        new._modules = {key: copies[child] for key, child in m._modules.items()}
        for key, p in m._parameters.items():
            setattr(new, key, p if p is None else p * 1)
    return copies[model]


@each_case
def test_fused_copies(case):
    """They are models of their own, and can be unfused."""
    fused, eager, x = twins(case)
    agree(fused, eager, x, lambda model, x: replica(model)(x))
    for new in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        other = copy.deepcopy(eager)
        other.load_state_dict(stir(new).state_dict())
        agree(new, other, x)
        assert str(kernels.unfuse(new)) == str(other)
        assert not (new._forward_hooks or new._forward_pre_hooks)
        agree(new, other, x)
    agree(fused, eager, x)


def fails(model):
    hook = model[1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(torch.ones(16, dtype=torch.float64))
    hook.remove()


EDITS = [
    halve, fails, lambda model: model.float().double(),          # which has other storage
    lambda model: model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True),
    lambda model: torch.optim.AdamW(model.parameters(), 0.1, fused=True).step(),
    torch.inference_mode()(lambda model: model(torch.ones(16, dtype=torch.float64))),
]


@each_case
def test_fused_is_never_out_of_date(case):
    """Whatever was run, edited, or replaced: the whole model and its parts follow."""
    fused, eager, x = twins(case)
    for edit in EDITS:
        for model in (fused, eager):
            edit(model)
            halve(model)
        for _ in range(2):
            same(torch.no_grad()(fused)(x), eager(x))
        agree(fused, eager, x, WAYS["by parts"])
        agree(fused, eager, x)


def test_one_batch_for_every_shape(monkeypatch):
    """A forward pass; none if switched off, or without gradient if nothing has changed. A reentrant
    checkpoint's layers: again, in backward."""
    sizes, diagonal = [], kernels.diagonal
    monkeypatch.setattr(kernels, "diagonal", lambda R, theta, *scale: (
        sizes.append(len(theta)), diagonal(R, theta, *scale))[1])
    fused, _, x = twins("psoft")
    with loft.disabled(fused):
        fused(x)
    with torch.inference_mode():
        fused(x), fused(x)
    for i in range(3):
        fused[i] = checkpoint_wrapper(fused[i], CheckpointImpl.REENTRANT)
    fused(x.requires_grad_()).sum().backward()
    assert sizes == [3, 3, 1, 1, 1]
    kinds = [loft.adapt(nn.Linear(9, 9), transform=t) for t in ("expm", "cayley", "expm")]
    eager = stir(nn.Sequential(*kinds).double())
    agree(kernels.fuse(copy.deepcopy(eager)), eager, x[..., :9])
    assert sizes[5:] == [2, 1]


def test_parameters_that_come_when_their_module_is_called():
    """As offloading does it: elsewhere they are on the meta device."""
    fused, eager, x = twins("psoft")

    def fetch(module, args):
        module._parameters.update(module.home)

    def put_away(module, args, output):
        for key, p in module.home.items():
            module._parameters[key] = nn.Parameter(p.to("meta"))

    for m in fused.modules():
        m.home = {key: p for key, p in m._parameters.items() if p is not None}
        put_away(m, None, None)
        m.register_forward_pre_hook(fetch)
        m.register_forward_hook(put_away)
    same(fused(x), eager(x))


@pytest.mark.parametrize("case", ["psoft", "boft", "coft", "hra"])
@pytest.mark.parametrize("change", [kernels.fuse, kernels.unfuse])
def test_compiled(case, change):
    """One graph, which T is part of: none more for another batch size, or for other parameters."""
    torch._dynamo.reset()
    fused, eager, x = twins(case)
    compiled = torch.compile(change(fused), fullgraph=True, backend="aot_eager")
    for n in (4, 5, 6):
        agree(compiled, eager, torch.randn(n, 16, dtype=torch.float64))
        for model in (fused, eager):
            halve(model)
        count = count if n > 5 else counters["stats"]["unique_graphs"]
    assert counters["stats"]["unique_graphs"] == count


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", ["loft", "psoft", "oft", "boft"])
def test_a_step_on_a_GPU_does_not_wait(case):
    """For nothing on the host: no synchronisation, no copy to the device."""
    fused, _, x = twins(case, dtype=torch.float32)
    fused, x = fused.cuda(), x.cuda()
    fused(x).sum().backward()                            # libraries start
    with torch.profiler.profile() as profile:
        torch.cuda.set_sync_debug_mode("error")
        try:
            fused(x).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert not [e.name for e in profile.events() if "HtoD" in e.name]


def test_large_blocks_on_two_threads():
    """Where torch's batched LU hangs (pytorch#142815)."""
    code = """
import loft, torch
torch.set_num_threads(2)
for backend in ("eager", "fused"):
    model = torch.nn.Sequential(torch.nn.Linear(512, 512))
    loft.adapt(model, method="oft", block_size=256, backend=backend)
    torch.nn.init.normal_(model[0].rotation.transform.theta, std=0.01)
    model(torch.randn(4, 512)).sum().backward()
"""
    python(HERE, "-c", code)


def test_kernels_the_name(tmp_path):
    """`import kernels` is PyPI's package, where it is installed; ours is loft.kernels."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("from .sub import whose")
    (tmp_path / "kernels" / "sub.py").write_text("whose = 'theirs'")
    code = """
import sys
sys.path.insert(1, sys.argv[1])
import kernels
from loft import kernels as ours
assert getattr(kernels, "whose", "ours") == sys.argv[2] and ours.fuse.__module__ == "loft.kernels"
"""
    for path, whose in ((tmp_path, "theirs"), (".", "ours")):
        python(HERE, "-c", code, path, whose)


# --------------------------------------------------------------------------------------------------
# 5. Refusals: (a model, a call of it and of a file, words that the error must hold)

def four(**more):
    return loft.adapt(network(), ["0", "2"], rank=4, **more)


def off():
    model = four()
    model[0].enabled = False
    return model


def quantised():
    return nn.Sequential(Float8Linear(nn.Linear(4, 4)))


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
    (dict(targets="0", support=EYE + 1), "layer '0': the support is not orthonormal"),
    (dict(targets="0", support=EYE[:5]), "layer '0': the support has shape (5, 4), expected (12,"),
    (dict(targets="0", support=EYE, rank=5), "rank=5, but a support given as tensors has its own"),
    (dict(support={"0": EYE, "one": EYE}), "unknown layer 'one'; valid: 0, 2, 4"),
    (dict(method="oft", rank=4), "layer '0': rank=4 means nothing to all coordinates"),
    (dict(method="boft", block_size=4, stages=3), "layer '0': block_size=4, stages=3"),
    (dict(bound=0.0), "bound=0.0 positive"), (dict(terms=1), "terms=1 must"),
    (dict(method="hra", reflections=3), "layer '0': reflections=3 must be even"),
    (dict(method="lora", side="output"), "layer '0': lora has no support and no side"),
]
REFUSALS = [
    *((network, adapting(**arguments), words) for arguments, words in ADAPT),
    (four, adapting(), "the model is adapted already: loft.merge it first"),
    *((network, call, "the model is not adapted") for call in (
        loft.save, using(loft.merge), using(loft.disabled))),
    (lambda: stir(four(), math.inf), using(loft.merged), "layer '0': its rotated weight is not"),
    (lambda: network().to("meta"), adapting(support="all"), "layer '0': it is on the meta device"),
    (off, using(loft.merge), "layer '0' is switched off: leave `disabled` or `merged` first"),
    (quantised, adapting(), "layer '0': support='principal' is of the weight, which cannot be"),
    (lambda: loft.adapt(quantised(), support="all"), using(loft.merge),
     "layer '0': no floating weight"),
    (lambda: network()[:2], loft.load, "layer '2': the model has no such linear layer"),
    (lambda: nn.Sequential(nn.Linear(13, 20), *network()[1:]), loft.load, "(12, 4), expected (13"),
    (lambda: loft.adapt(network(), "0", rank=4), loft.load, "layer '2': {'transform': 'cayley'"),
    (lambda: loft.adapt(network(), ["0", "2"], rank=6), loft.load, "'0.rotation.P' is"),
    (partial(four, transform="expm"), loft.load, "layer '0': {'transform': 'cayley'"),
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
