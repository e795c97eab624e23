"""Speed and memory of every method, ours beside peft's: the same layers, input, dtype and gradient for every row.

    python bench.py                                    # about 3 minutes on 2 CPU cores
    python bench.py --quick                            # a quarter of one
    python bench.py --profile                          # where a step's time goes, LOFT beside the frozen layers
    python bench.py --json rows.jsonl --plot cost.png  # a line a row; the cost against d, n and r as a figure

1. Two d × d linear layers, forward and backward, as a ratio to the same layers frozen. The implementations take
   turns in each repeat, so that a slow spell of the machine hits all of them; the ratio is that of one repeat, the
   median of all is shown, and the spread is half the distance between the quartiles. Parameters are touched between
   repeats, as an optimizer would: nothing that depends on them survives from one repeat to the next.
2. A whole training step (forward, backward, Adam) of a 12-layer transformer on a small batch.
3. What is paid once: selection of supports, adapting, merging, saving, loading.

`kept` is what autograd keeps for backward beyond weights and constants, `peak` the most memory a step needs on top of
what is there before it (CPU: resident memory, on Linux), `flops` the ratio to expect from counting products alone.
"""
from __future__ import annotations

import argparse
import copy
import ctypes
import importlib.util
import json
import os
import platform
import shutil
import statistics
import tempfile
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.benchmark import timer                                     # perf_counter, after the device has finished

import loft
from loft import kernels, selectors

warnings.filterwarnings("ignore", message=".*CUDA extension|Setting boft_n_butterfly_factor")   # said in BOFT's row instead
try:
    import peft
except ImportError:
    peft = None


# ---------------------------------------------------------------------------------------------------------
# The implementations: name → a function that adapts a fresh model in place, and the flops of its adapter
# ---------------------------------------------------------------------------------------------------------

# method: (arguments of loft.adapt, name of peft's config and its arguments, note); r is filled in where it is free
METHODS = {
    "loft": (dict(method="loft"), None, None),
    "psoft": (dict(method="psoft"), ("PsoftConfig", {}), None),
    "oft": (dict(method="oft", block_size=32), ("OFTConfig", dict(oft_block_size=32, use_cayley_neumann=False)), None),
    "oftv2": (dict(method="oft", block_size=32, map="cayley_neumann"), ("OFTConfig", dict(oft_block_size=32)), None),
    "boft": (dict(method="boft", block_size=8, stages=2), ("BOFTConfig", dict(boft_block_size=8, boft_n_butterfly_factor=2)),
             "peft without its CUDA extension takes 1 butterfly stage, whatever is asked, and its blocks are full matrices; ours takes 2"),
    "goft": (dict(method="goft"), None, None),
    "hra": (dict(method="hra"), ("HRAConfig", {}), None),
    "lora": (dict(method="lora"), ("LoraConfig", {}), None),
}
RANKS = dict(loft=64, psoft=64, hra=8, lora=16)


def ours(model: nn.Module, method: str, backend: str, r: int | None, targets) -> nn.Module:
    arguments = METHODS[method][0] | ({} if r is None else {"rank": r})
    if method in ("loft", "psoft"):
        arguments["support"] = "random"                                       # its cost is that of any support; no SVD to wait for
    loft.adapt(model, targets, backend="eager" if backend == "eager" else "fused", **arguments)
    return torch.compile(model, fullgraph=True) if backend == "fused+compile" else model


def theirs(model: nn.Module, method: str, backend: str, r: int | None, targets) -> nn.Module:
    name, arguments = METHODS[method][1]
    arguments = arguments | ({} if r is None else {"r": r}) | ({"psoft_svd": "lowrank"} if method == "psoft" else {})
    return peft.get_peft_model(model, getattr(peft, name)(target_modules=list(targets), **arguments))


def plain(model: nn.Module, method: str, backend: str, r: int | None, targets) -> nn.Module:
    for name, module in model.named_modules():
        if name in targets:
            module.requires_grad_(method == "full")
    return model


def flops(method: str, i: int, o: int, r: int | None, n: int) -> float:
    """Multiplications per row of a linear layer (o, i) and its adapter, forward and backward, n rows; frozen: 2 i o.

    Full: 3 i o. A support: the cheapest of kernels.py's three forms, and three r × r products. Blocks of c: 3 c i. LoRA and
    reflections: six thin products.
    """
    r = r or 0
    blocks = dict(oft=32, oftv2=32, boft=16, goft=32)
    return 2 * i * o + {"frozen": 0, "full": i * o, "lora": 3 * r * (i + o), "hra": 6 * r * i}.get(
        method, 3 * blocks[method] * i if method in blocks else r * min(4 * i, 2 * (i + o), i + o + 2 * i * o / n) + 3 * r * r)


# ---------------------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------------------

class Step:
    """One implementation of two layers: step() runs forward and backward once, as an optimizer loop would."""

    def __init__(self, impl: str, method: str, backend: str, r: int | None, d: int, n: int, args):
        torch.manual_seed(0)
        make = dict(loft=ours, peft=theirs, torch=plain)[impl]
        base = nn.Sequential(nn.Linear(d, d), nn.Linear(d, d)).to(args.device, args.dtype).requires_grad_(False)
        self.model = make(base, method, backend, r, ["0", "1"])
        self.x = torch.randn(n, d, device=args.device, dtype=args.dtype, requires_grad=True)
        self.g = torch.randn(n, d, device=args.device, dtype=args.dtype)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.row = dict(impl=impl, method=method, backend=backend, d=d, n=n, r=r, dtype=str(args.dtype).removeprefix("torch."),
                        device=args.device, trainable=sum(p.numel() for p in self.parameters),
                        flops_ratio=flops(method, d, d, r, n) / flops("frozen", d, d, None, n))
        self.args, self.times = args, []
        if self.parameters:                                                   # away from T = I, where nothing is special
            with torch.no_grad():
                for p in self.parameters:
                    p.add_(torch.randn_like(p), alpha=1e-3)

    def step(self):
        with torch.no_grad():                                                 # as an optimizer does: no T outlives a step
            if self.parameters:
                torch._foreach_mul_(self.parameters, 1.0)
        for p in (self.x, *self.parameters):
            p.grad = None
        self.model(self.x).backward(self.g)

    def time(self) -> float:
        """Seconds of one step."""
        start = timer()
        self.step()
        return timer() - start

    def kept(self) -> float:
        """MiB that autograd keeps between forward and backward: storages beyond parameters, buffers and W0 P."""
        constants = [t for m in self.model.modules() if getattr(m, "fused", None) is not None
                     for _, made in m.fused.thin.values() for t in made if t is not None]
        fixed = {t.untyped_storage().data_ptr() for t in (*self.model.parameters(), *self.model.buffers(), *constants)}
        found, keep = {}, kernels._keep

        def pack(t: Tensor) -> Tensor:
            found[t.untyped_storage().data_ptr()] = t                         # held, so that no address is used twice
            return t.detach()

        kernels._keep = pack                                                  # what the batched T keeps inside counts too
        try:
            with torch.no_grad():
                torch._foreach_mul_(self.parameters, 1.0) if self.parameters else None
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                self.model(self.x)
        finally:
            kernels._keep = keep
        return sum(t.untyped_storage().nbytes() for p, t in found.items() if p not in fixed) / 2 ** 20

    def peak(self) -> float | None:
        for p in (self.x, *self.parameters):
            p.grad = None
        return peak(self.step, self.args.device)


def peak(run, device: str) -> float | None:
    """MiB that run() needs on top of what is there before it."""
    if device.startswith("cuda"):
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2 ** 20
    try:
        read = lambda what: int(Path("/proc/self/status").read_text().split(what)[1].split()[0]) / 2 ** 10
        ctypes.CDLL(None).malloc_trim(0)                                      # what was freed is given back, to be seen when used again
        Path("/proc/self/clear_refs").write_text("5")                         # VmHWM := VmRSS
        before = read("VmRSS:")
        run()
        return max(read("VmHWM:") - before, 0.0)
    except (OSError, IndexError, AttributeError):
        return None


def interleave(steps: list[Step], seconds: float, most: int = 50) -> None:
    """Rounds in which every implementation has its turn, until the time is up; one that needs seconds has one turn."""
    for s in steps:
        if "compile" in s.row["backend"]:
            s.step()                                                          # compiles
        start = timer()
        s.peaks = [s.peak()]
        s.warm = timer() - start
        s.times = [s.warm] if s.warm > 2 else []
    fast = statistics.median(s.warm for s in steps)
    start, rounds = timer(), 0
    while rounds < 3 or rounds < most and timer() - start < seconds:
        for s in steps:
            if s.warm <= 2 and (rounds < 3 or s.warm < 6 * fast):
                s.times.append(s.time())
        rounds += 1


def finish(steps: list[Step]) -> list[dict]:
    """The rows: ratios of the same repeat to the first implementation, which is the frozen one, their median and spread."""
    for s in steps:
        ratios = [t / f for t, f in zip(s.times, steps[0].times)]
        low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        peaks = s.peaks if s.warm > 2 else [s.peak() for _ in range(3)]
        s.row |= dict(step_ms=statistics.median(s.times) * 1e3, ratio_to_frozen=statistics.median(ratios),
                      spread=(high - low) / 2, repeats=len(s.times), saved_mib=s.kept(),
                      peak_mib=None if None in peaks else statistics.median(peaks))
    return [s.row for s in steps]


def show(title: str, steps: list[Step]) -> list[dict]:
    """Prints the table, then ours against peft's, by the ratio of one repeat."""
    rows = finish(steps)
    print(f"\n{title}\n{'':31}{'r':>5}{'ms':>10}{'ratio':>8}{'±':>7}{'flops':>7}{'repeats':>9}{'kept MiB':>10}{'peak MiB':>10}"
          f"{'trainable':>12}")
    number = lambda v, width, form: "–".rjust(width) if v is None else format(v, f"{width}{form}")
    for row in rows:
        note = METHODS[row["method"]][2] if row["impl"] == "peft" else None
        print(f"{row['impl']:7}{row['method']:8}{row['backend']:16}" + number(row["r"], 5, "d") + number(row["step_ms"], 10, ".2f")
              + number(row["ratio_to_frozen"], 8, ".3f") + number(row["spread"], 7, ".3f") + number(row["flops_ratio"], 7, ".2f")
              + number(row["repeats"], 9, "d") + number(row["saved_mib"], 10, ".2f") + number(row["peak_mib"], 10, ".1f")
              + number(row["trainable"], 12, ",d") + (f"   {note}" if note else ""))
    for peer in (s for s in steps if s.row["impl"] == "peft"):
        for s in steps:
            if s.row["impl"] == "loft" and s.row["backend"] != "eager" and all(s.row[k] == peer.row[k] for k in ("method", "r")):
                faster, kept = statistics.median(p / t for p, t in zip(peer.times, s.times)), peer.row["saved_mib"]
                rank = "" if s.row["r"] is None else f" r = {s.row['r']}"
                print(f"  {s.row['method']}{rank}, {s.row['backend']}: {faster:.2f} × as fast as peft's"
                      + (f", keeps {100 * s.row['saved_mib'] / kept:.1f} % of its bytes" if kept else ""))
    print(flush=True)
    return rows


# ---------------------------------------------------------------------------------------------------------
# 1. Two layers
# ---------------------------------------------------------------------------------------------------------

def layer_table(d: int, n: int, seconds: float, args, methods=tuple(METHODS), ranks=None, compiled=(), skip=()) -> list[dict]:
    wanted = [("torch", "frozen", "eager", None)]
    for m in methods:
        for r in (ranks or [RANKS.get(m)]):
            backends = ("eager",) if m == "lora" else ("eager", "fused")
            wanted += [("loft", m, backend, r) for backend in backends if backend not in skip]
            wanted += [("loft", m, "fused+compile", r)] if m in compiled else []
            wanted += [("peft", m, "eager", r)] if peft is not None and METHODS[m][1] and (m, d) not in skip else []
    wanted += [] if "full" in skip else [("torch", "full", "eager", None)]
    steps = [Step(impl, m, backend, r, d, n, args) for impl, m, backend, r in wanted]
    interleave(steps, seconds)
    return show(f"two {d} × {d} layers, n = {n} rows, forward + backward", steps)


def profile(d: int, n: int, args) -> None:
    """Where a step's time goes: the operations and shapes that take the most, frozen, then LOFT."""
    for impl, method, backend, r in (("torch", "frozen", "eager", None), ("loft", "loft", "fused", RANKS["loft"])):
        run = Step(impl, method, backend, r, d, n, args)
        run.step()
        with torch.profiler.profile(record_shapes=True) as seen:
            for _ in range(20):
                run.step()
        of = (lambda e: e.self_cpu_time_total / 20e3) if args.device == "cpu" else (lambda e: e.self_device_time_total / 20e3)
        events = sorted(seen.key_averages(group_by_input_shape=True), key=of, reverse=True)
        print(f"\n{method}, d = {d}, n = {n}: {sum(map(of, events)):.2f} ms a step" + (f", r = {r}" if r else ""))
        for e in events[:9]:
            print(f"{of(e):10.2f} ms {e.count // 20:4d} × {e.key:28}" + " ".join("×".join(map(str, s)) for s in e.input_shapes if len(s) > 1))


# ---------------------------------------------------------------------------------------------------------
# 2. A transformer, 3. what is paid once
# ---------------------------------------------------------------------------------------------------------

class Block(nn.Module):
    """Pre-norm causal transformer block, d wide; q, k and v apart, as in most models of today."""

    def __init__(self, d: int, heads: int):
        super().__init__()
        self.heads, self.norm1, self.norm2 = heads, nn.LayerNorm(d), nn.LayerNorm(d)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(d, d) for _ in range(4))
        self.up_proj, self.down_proj = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x: Tensor) -> Tensor:                                   # (batch, t, d)
        h = self.norm1(x)
        q, k, v = (p(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        x = x + self.o_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2))
        return x + self.down_proj(F.gelu(self.up_proj(self.norm2(x))))


PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]


class Training(Step):
    """step() is a whole training step: forward, backward, Adam. Every row also trains the input's offset (1, 1, d)."""

    def __init__(self, impl, method, backend, r, d, n, depth, args):
        torch.manual_seed(0)
        base = nn.Sequential(*[Block(d, d // 64) for _ in range(depth)]).to(args.device, args.dtype).requires_grad_(False)
        names = [name for name, m in base.named_modules() if isinstance(m, nn.Linear)]
        shapes = [(base.get_submodule(name).in_features, base.get_submodule(name).out_features) for name in names]
        if share := backend == "fused+share":                                 # one support for q, k, v of a block
            P = {name: selectors.random(base.get_submodule(name).weight, r) for name in names}
            P |= {name: P[name.replace("k_proj", "q_proj").replace("v_proj", "q_proj")] for name in names}
            self.model = kernels.share(loft.adapt(base, support=P, backend="fused"), [["q_proj", "k_proj", "v_proj"]])
        else:
            targets = names if impl != "peft" else PROJECTIONS
            self.model = dict(loft=ours, peft=theirs, torch=plain)[impl](base, method, backend, r, targets)
        self.offset = nn.Parameter(torch.zeros(1, 1, d, device=args.device, dtype=args.dtype))   # gradients reach the bottom
        self.x = torch.randn(1, n, d, device=args.device, dtype=args.dtype)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam([self.offset, *self.parameters], 1e-4)
        self.row = dict(impl=impl, method=method, backend="fused+share" if share else backend, d=d, n=n, r=r, layers=depth,
                        dtype=str(args.dtype).removeprefix("torch."), device=args.device,
                        flops_ratio=sum(flops(method, *s, r, n) for s in shapes) / sum(2 * i * o for i, o in shapes),
                        trainable=sum(p.numel() for p in self.parameters))
        self.args, self.times = args, []

    def step(self):
        self.optimizer.zero_grad()
        self.model(self.x + self.offset).square().mean().backward()
        self.optimizer.step()


def transformer_table(d: int, n: int, depth: int, seconds: float, args, compile: bool) -> list[dict]:
    wanted = [("torch", "frozen", "eager", None)]
    wanted += [("loft", "loft", backend, 64) for backend in ("eager", "fused", "fused+share")]
    wanted += [("loft", "loft", "fused+compile", 64)] if compile else []
    wanted += [("loft", "psoft", "fused", 64), ("loft", "lora", "eager", 16)]
    wanted += [("peft", "psoft", "eager", 64), ("peft", "lora", "eager", 16)] if peft is not None else []
    steps = [Training(impl, m, backend, r, d, n, depth, args) for impl, m, backend, r in wanted]
    interleave(steps, seconds)
    return show(f"whole training step of a {depth}-layer transformer, d = {d}, n = {n} tokens, {6 * depth} linear layers", steps)


def selection_table(d: int, r: int, args) -> list[dict]:
    """What choosing a support costs: one layer, thin products against the dense route; a model, against as many plain passes."""
    torch.manual_seed(0)
    decay = torch.arange(1, 257.0, device=args.device).reciprocal()[:, None]
    W, G = torch.randn(d, d, device=args.device) / d ** 0.5, torch.randn(d, 256, device=args.device) @ (decay * torch.randn(256, d, device=args.device))

    def dense():                                                              # S, then the top of SᵀS = −S²
        S = (W.mT @ G - G.mT @ W) / 2
        return torch.linalg.eigh(S.mT @ S)[1][:, -r:]

    model = nn.Sequential(*[Block(256, 4) for _ in range(4)]).to(args.device).requires_grad_(False)
    names = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    batches = [torch.randn(8, 128, 256, device=args.device, requires_grad=True) for _ in range(4)]
    loss = lambda model, x: (model(x) - x.flip(-1)).square().mean()

    def plain():
        for x in batches:
            loss(model, x).backward()

    def choose(exact):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                                   # of a flat spectrum: this is noise, not a task
            selectors.select(model, batches, loss, 32, targets=names, exact=exact)
    runs = {"thin": lambda: selectors.skew(W, G, r), "dense": dense, "plain": plain,
            "dense G": lambda: choose(None), "streaming": lambda: choose(False)}
    times: dict[str, list[float]] = {what: [] for what in runs}
    for _ in range(1 if args.quick else 3):
        for what, run in runs.items():
            if times[what][-1:] > [5.0]:                                      # once is enough
                continue
            start = timer()
            run()
            times[what].append(timer() - start)
    ms = {what: statistics.median(t) * 1e3 for what, t in times.items()}
    peaks = [peak(runs["thin"], args.device) for _ in range(3)]
    mib = None if None in peaks else statistics.median(peaks)
    print(f"\nchoosing a skew support\n{d} × {d} layer, r = {r}: thin products {ms['thin']:.0f} ms, dense route {ms['dense']:.0f} ms, "
          f"{ms['dense'] / ms['thin']:.1f} × as fast" + (f"; peak {mib:.0f} MiB = {mib * 2 ** 18 / d / r:.1f} × in × r floats" if mib else "")
          + f"\n{len(names)} layers of a 4-layer transformer, d = 256, r = 32, 4 batches of 1024 tokens: plain forward and backward {ms['plain']:.0f} ms; "
          f"dense G, 1 pass, {ms['dense G'] / ms['plain']:.2f} × that; streaming, 3 passes, {ms['streaming'] / 3 / ms['plain']:.2f} × a pass", flush=True)
    return [dict(impl="loft", method="loft", backend=f"select {what}", d=d if what in ("thin", "dense") else 256, n=None, r=r, dtype="float32",
                 device=args.device, step_ms=ms[what], ratio_to_frozen=None, saved_mib=None, peak_mib=mib if what == "thin" else None, trainable=None)
            for what in runs]


def once_table(d: int, depth: int, args) -> list[dict]:
    """Seconds for what is done once. Selection sees 4 batches of 128 tokens."""
    base = nn.Sequential(*[Block(d, d // 64) for _ in range(depth)]).to(args.device).requires_grad_(False)
    names = [name for name, m in base.named_modules() if isinstance(m, nn.Linear)]
    batches = [torch.randn(1, 128, d, device=args.device) for _ in range(4)]
    loss = lambda model, x: (model(x) - x.flip(-1)).square().mean()
    rows = []

    def row(what: str, function):
        start = timer()
        result = function()
        rows.append(dict(impl="loft", method="loft", backend=what, d=d, n=128, r=32, layers=depth, dtype="float32",
                         device=args.device, step_ms=(timer() - start) * 1e3, ratio_to_frozen=None, saved_mib=None,
                         peak_mib=None, trainable=None))
        print(f"{what:28}{rows[-1]['step_ms']:10.1f} ms")
        return result

    print(f"\npaid once, for {len(names)} layers of a {depth}-layer transformer, d = {d}, r = 32")
    for kind in ("principal", "gradient", "skew"):
        supports = row(f"select {kind}", lambda: selectors.select(base, batches, loss, 32, kind, names))
    model = row("adapt, supports given", lambda: loft.adapt(copy.deepcopy(base), support=supports))
    row("fuse", lambda: kernels.fuse(model))
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "adapter.pt")
        row("save", lambda: loft.save(model, path))
        row("load, into a plain model", lambda: loft.load(copy.deepcopy(base), path))
    row("merge", lambda: loft.merge(model))
    return rows


# ---------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------

def sweep(args) -> list[dict]:
    """Cost against r and n, one at a time: LOFT and PSOFT, ours and peft's. The tables before have the other d and n."""
    few = dict(methods=("loft", "psoft"), skip=("eager", "full"))
    rows = layer_table(1024, 1024, args.seconds / 2, args, ranks=(16, 64, 256), **few)
    rows += layer_table(1024, 4096, args.seconds / 2, args, **few)
    return rows


def growth(rows: list[dict]) -> None:
    """Seconds and counted products of every (d, n, r), fused LOFT, as multiples of those at the first: no cliff?"""
    rows = [r for r in rows if (r["impl"], r["method"], r["backend"]) == ("loft", "loft", "fused") and "layers" not in r]
    products, frozen = lambda row: row["flops_ratio"] * row["d"] ** 2 * row["n"], lambda row: row["step_ms"] / row["ratio_to_frozen"]
    print("\nfused LOFT, growth from d = {d}, n = {n}, r = {r}".format_map(rows[0]))
    for row in rows[1:]:
        time, count = row["step_ms"] / rows[0]["step_ms"], products(row) / products(rows[0])
        size = (row["d"] / rows[0]["d"]) ** 2 * row["n"] / rows[0]["n"]
        print("d = {d:4}, n = {n:4}, r = {r:3}:".format_map(row), f"time × {time:6.3f}, products × {count:6.3f}: {time / count:.2f}"
              f"; the frozen layers alone {frozen(row) / frozen(rows[0]) / size:.2f}")


def plot(rows: list[dict], path: str) -> None:
    """Ratio to the frozen layer against d, n and r, with the ratio that counting products predicts."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    rows = [r for r in rows if r["method"] in ("loft", "psoft") and "layers" not in r]
    rows = [r for r in rows if (r["impl"], r["backend"]) != ("loft", "eager")]
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), sharey=True, layout="constrained")
    for axis, key, fixed in zip(axes, "dnr", (dict(r=64), dict(d=1024, r=64), dict(d=1024, n=1024))):
        seen = {}
        for row in rows:
            if all(row[k] == v for k, v in fixed.items()) and (key != "d" or row["n"] in (256, 1024)):
                seen.setdefault((row["impl"], row["method"], row["backend"]), {})[row[key]] = row
        for label, points in seen.items():
            at = sorted(points)
            ratio, spread = ([points[v][k] for v in at] for k in ("ratio_to_frozen", "spread"))
            axis.errorbar(at, ratio, spread, marker="o", label=" ".join(label))
            if label == ("loft", "loft", "fused"):
                axis.plot(at, [points[v]["flops_ratio"] for v in at], "k:", label="counted products")
        axis.set(xscale="log", xlabel=key, title=", ".join(f"{k} = {v}" for k, v in fixed.items()))
        axis.set_xscale("log", base=2)
    axes[0].set_ylabel("time, ratio to the frozen layer")
    axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=150)
    print(f"figure: {path}")


def main(argv=None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write one object per row")
    parser.add_argument("--plot", metavar="FILE", help="draw cost against d, n and r (needs matplotlib)")
    parser.add_argument("--quick", action="store_true", help="fewer rows and repeats, no torch.compile: for CI")
    parser.add_argument("--profile", action="store_true", help="where a step's time goes instead, LOFT beside the frozen layers")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args(argv)
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install matplotlib")
    if args.threads < 1:
        parser.error(f"--threads {args.threads}: 1 or more are wanted")
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as e:
        parser.error(f"--device {args.device}: {str(e).splitlines()[0]}")
    args.dtype, args.seconds = getattr(torch, args.dtype), 0.5 if args.quick else 10.0
    torch.set_num_threads(args.threads)
    card = torch.cuda.get_device_name() if args.device.startswith("cuda") else platform.processor() or platform.machine()
    print(f"torch {torch.__version__}, {args.threads} threads, {args.dtype}, {args.device} ({card}), "
          + (f"peft {peft.__version__}" if peft else "peft is not installed, its rows are left out: pip install peft"))
    if args.profile:
        for n in (1024, 128):
            profile(1024, n, args)
        return []
    compile = not args.quick and (args.device != "cpu" or shutil.which("g++") is not None)
    if not compile and not args.quick:
        print("no C++ compiler: the rows fused+compile are left out")
    compiled, started = ("loft", "oft", "hra") if compile else (), timer()
    if args.quick:
        rows = layer_table(1024, 128, args.seconds, args) + transformer_table(256, 128, 4, args.seconds, args, False)
        rows += selection_table(2048, 64, args)
        rows += once_table(128, 2, args)
    else:
        rows = layer_table(1024, 1024, 2 * args.seconds, args, compiled=compiled)
        rows += layer_table(1024, 128, args.seconds, args)
        rows += layer_table(4096, 256, args.seconds, args, methods=("loft", "psoft", "oftv2", "hra", "lora"), skip=("full",))
        rows += sweep(args)
        growth(rows)
        rows += transformer_table(512, 128, 12, args.seconds, args, False)
        rows += selection_table(4096, 64, args)
        rows += once_table(256, 4, args)
    print(f"\n{timer() - started:.0f} s")
    if args.json:
        Path(args.json).write_text("".join(json.dumps(row) + "\n" for row in rows))
    if args.plot:
        plot(rows, args.plot)
    return rows


if __name__ == "__main__":
    main()
