"""Speed of every method, ours (fused and eager) beside peft's: same layers, input, dtype, gradient.

    python bench.py                        # about 3 minutes on 2 CPU cores
    python bench.py --json rows.jsonl      # a line a row
    python bench.py --eval                 # forward passes alone, without gradient

1. Two d × d linear layers, forward and backward, for n rows.
2. A training step (forward, backward, Adam) of a 12-layer transformer on a small batch.
3. What is paid once: choosing supports, merging.

In 1 and 2 the implementations take turns in each repeat, so that a slow spell of the machine hits
all of them. "ratio" is that to the frozen layers in the same repeat: the median, and ± half the
distance between the quartiles. "kept" is what autograd keeps for backward beyond weights and beyond
what is inside the one node that makes the fused layers' T, which does not grow with the rows. At
the end: what is wanted of two rows of one table, and whether it is so.
"""
from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import warnings
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import gelu, scaled_dot_product_attention
from torch.utils.benchmark import timer                  # the clock, once the device has finished

import loft
from loft import selectors

try:
    import peft
except ImportError:
    peft = None

METHODS = {  # name: arguments of loft.adapt; peft's configuration and its arguments
    "loft": (dict(rank=64, support="random"), None),     # a support's cost is that of any other
    "psoft": (dict(method="psoft", rank=64, support="random"),
              ("PsoftConfig", dict(r=64, psoft_svd="lowrank"))),
    "oft": (dict(method="oft", block_size=32),
            ("OFTConfig", dict(oft_block_size=32, use_cayley_neumann=False))),
    "oft series": (dict(method="oft", block_size=32, map="cayley_neumann"),
                   ("OFTConfig", dict(oft_block_size=32))),
    "boft": (dict(method="boft", block_size=8),          # peft's: one stage, without its extension
             ("BOFTConfig", dict(boft_block_size=8, boft_n_butterfly_factor=2))),
    "goft": (dict(method="goft"), None),
    "hra": (dict(method="hra", reflections=8), ("HRAConfig", dict(r=8))),
    "lora": (dict(method="lora", rank=16), ("LoraConfig", dict(r=16))),
}
FROZEN = ("torch", "frozen", "eager")
FUSED = ("loft", "loft", "fused")
AHEAD = "select skew, lookahead of 50 steps"
TARGETS = [  # d, n or any, a row, the row beside it, and the ratio of times wanted at most
    (512, None, FUSED, ("loft", "lora", "eager"), 1.03),
    (512, None, FUSED, ("peft", "lora", "eager"), 1.03),
    (512, None, ("loft", "loft", "fused, compiled"), ("loft", "lora", "eager, compiled"), 1.03),
    (512, None, ("loft", "loft", "eager"), FROZEN, 1.5),
    (512, None, ("loft", "psoft", "fused"), ("peft", "psoft", "eager"), 1 / 1.3),
    (256, 512, ("loft", "loft", AHEAD), ("loft", "loft", "50 training steps"), 1.15),
    (1024, 128, FUSED, FROZEN, 1.3),
    *((1024, 1024, ("loft", method, "fused"), ("peft", method, "eager"), most)
      for method, most in (("oft", 1), ("oft series", 1), ("boft", 1 / 3))),
    (4096, 256, ("loft", "hra", "eager"), ("peft", "hra", "eager"), 1 / 20),
]


class Block(nn.Module):
    """A pre-norm causal transformer block; q, k and v apart, as in most models of today."""

    def __init__(self, d, heads):
        super().__init__()
        self.heads, self.norm1, self.norm2 = heads, nn.LayerNorm(d), nn.LayerNorm(d)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(d, d) for _ in range(4))
        self.up_proj, self.down_proj = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x):                                # (batch, t, d)
        h = self.norm1(x)
        q, k, v = (p(h).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for p in (self.q_proj, self.k_proj, self.v_proj))
        h = scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2)
        x = x + self.o_proj(h)
        return x + self.down_proj(gelu(self.up_proj(self.norm2(x))))


def transformer(d, depth):
    return nn.Sequential(*(Block(d, d // 64) for _ in range(depth)))


class Step:
    """One row: an implementation of the layers of `base`, and what one step of it takes."""

    def __init__(self, row, base, n, d, adam, args):
        impl, method, backend = row
        torch.manual_seed(0)
        self.model = copy.deepcopy(base).to(args.device, args.dtype).requires_grad_(False)
        targets = [name for name, m in base.named_modules() if isinstance(m, nn.Linear)]
        if impl == "loft":
            loft.adapt(self.model, targets, backend=backend.split(",")[0], **METHODS[method][0])
        if impl == "peft":
            name, options = METHODS[method][1]
            config = getattr(peft, name)(target_modules=targets, **options)
            self.model = peft.get_peft_model(self.model, config)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        with torch.no_grad():                            # away from T = I, where nothing is special
            for p in self.parameters:
                p.add_(torch.randn_like(p), alpha=1e-3)
        if "compiled" in backend:
            self.model = torch.compile(self.model, fullgraph=True)
        self.x = torch.randn(1, n, d, device=args.device, dtype=args.dtype, requires_grad=True)
        self.g = torch.randn_like(self.x)
        self.adam = torch.optim.Adam(self.parameters, 1e-6) if adam and self.parameters else None
        self.times = []
        self.row = dict(impl=impl, method=method, backend=backend, d=d, n=n, eval=args.eval,
                        threads=args.threads, device=args.device,
                        dtype=str(args.dtype).removeprefix("torch."))

    def step(self):
        if self.row["eval"]:
            return torch.no_grad()(self.model)(self.x)
        for p in (self.x, *self.parameters):
            p.grad = None
        self.model(self.x).backward(self.g)
        if self.adam:
            self.adam.step()

    def kept(self):
        """MiB that autograd keeps between forward and backward, beyond parameters and buffers."""
        weights = {t.untyped_storage().data_ptr()
                   for t in (*self.model.parameters(), *self.model.buffers())}
        found = {}

        def pack(t):
            found[t.untyped_storage().data_ptr()] = t.untyped_storage()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = self.model(self.x)                       # held: no storage is freed and used again
        return sum(s.nbytes() for key, s in found.items() if key not in weights) / 2 ** 20, y


def table(title, base, d, n, seconds, args, methods=METHODS, adam=False):
    """Measures and prints one table; returns its rows."""
    names = [FROZEN]
    for method in methods:
        backends = ["eager"] if method in ("goft", "hra", "lora") else ["fused", "eager"]
        backends += [f"{backends[0]}, compiled"] * args.compile
        names += [("loft", method, backend) for backend in backends]
        names += [("peft", method, "eager")] if peft and METHODS[method][1] else []
    steps = [Step(name, base, n, d, adam, args) for name in names]
    for s in steps:
        s.step()                                         # compiles, and fills caches
    start = timer()
    while len(steps[0].times) < 3 or timer() - start < seconds:
        for s in steps:
            if not s.times or s.times[0] < 2:            # what needs seconds is measured once
                began = timer()
                s.step()
                s.times.append(timer() - began)
    print(f"\n{title}\n{'':37}{'ms':>10}{'ratio':>8}{'±':>8}{'kept MiB':>10}")
    for s in steps:
        ratios = [t / frozen for t, frozen in zip(s.times, steps[0].times)]
        low, ratio, high = statistics.quantiles(ratios * 2, n=4)
        s.row |= dict(step_ms=statistics.median(s.times) * 1e3, repeats=len(s.times), ratio=ratio,
                      spread=(high - low) / 2, kept_mib=s.kept()[0])
        print("{impl:6}{method:12}{backend:19}{step_ms:10.2f}{ratio:8.3f}{spread:8.3f}"
              "{kept_mib:10.2f}".format(**s.row), flush=True)
    return [s.row for s in steps]


def once(d, depth, args):
    """Milliseconds of what is done once. Selection sees 8 batches of 512 tokens."""
    model, rows = transformer(d, depth).to(args.device).requires_grad_(False), []
    batches = [torch.randn(1, 512, d, device=args.device) for _ in range(8)]
    steps = Step(("loft", "loft", "eager"), model, 512, d, True, args)
    steps.row["eval"] = False

    def loss(model, x):
        return (model(x) - x.flip(-1)).square().mean()

    def choose(kind, **options):
        return selectors.select(model, batches, loss, 64, kind, **options)

    def row(what, function):
        began = timer()
        result = function()
        ms = (timer() - began) * 1e3
        rows.append(steps.row | dict(backend=what, step_ms=ms, ratio=ms))
        print(f"{what:37}{ms:10.1f} ms", flush=True)
        return result

    print(f"\npaid once, for {6 * depth} layers of a {depth}-layer transformer, d = {d}, r = 64")
    row("8 plain passes, for comparison", lambda: [
        loss(model, x.clone().requires_grad_()).backward() for x in batches])
    P = row("select principal", lambda: choose("principal", align=False))
    row("align", lambda: selectors.align(model, batches, loss, P))
    row("select skew", lambda: choose("skew"))
    row(AHEAD, lambda: choose("skew", lookahead=50))
    row("50 training steps", lambda: [steps.step() for _ in range(50)])
    loft.adapt(model, support=P)
    row("merge", lambda: loft.merge(model))
    return rows


def verdicts(rows):
    """A line for each of TARGETS whose rows were measured."""
    print()
    for d, n, ours, theirs, most in TARGETS:
        found = {(r["impl"], r["method"], r["backend"]): r["ratio"] for r in rows
                 if r["d"] == d and n in (None, r["n"])}
        if ours in found and theirs in found:
            ratio = found[ours] / found[theirs]
            print(f"{'met' if ratio <= most else 'missed':8}{ratio:6.3f} (at most {most:5.3f})  "
                  f"d = {d}, n = {n or 'as above'}: {' '.join(ours)} / {' '.join(theirs)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--compile", action="store_true", help="also under torch.compile: minutes")
    parser.add_argument("--eval", action="store_true", help="forward alone, without gradient")
    parser.add_argument("--tokens", type=int, default=128, help="in a batch of the transformer")
    parser.add_argument("--json", metavar="FILE", help="write one object a row")
    args = parser.parse_args()
    args.dtype = getattr(torch, args.dtype)
    torch.set_num_threads(args.threads)
    if args.compile:
        torch._dynamo.config.cache_size_limit = 64       # of models that share a class
    warnings.filterwarnings("ignore", module="peft")     # of the extension that BOFT lacks
    warnings.filterwarnings("ignore", message=".*flat spectrum")         # noise is no task
    card = torch.cuda.get_device_name() if args.device.startswith("cuda") else platform.machine()
    peer = f"peft {peft.__version__}" if peft else "peft is not installed: its rows are left out"
    print(f"torch {torch.__version__}, {args.dtype}, {args.threads} threads, {args.device} {card}",
          peer, sep=", ")

    passes = "forward alone" if args.eval else "forward and backward"
    rows, began = [], timer()
    for d, n, seconds in (1024, 1024, 30), (1024, 128, 15), (4096, 256, 30):
        few = METHODS if d < 4096 else ("loft", "psoft", "oft series", "hra", "lora")
        layers = nn.Sequential(nn.Linear(d, d), nn.Linear(d, d))
        title = f"two {d} × {d} layers, {n} rows, {passes}"
        rows += table(title, layers, d, n, seconds, args, few)
    title = f"12-layer transformer, d = 512, {args.tokens} tokens, 72 layers, {passes}"
    title += "" if args.eval else ", Adam"
    rows += table(title, transformer(512, 12), 512, args.tokens, 40, args,
                  ("loft", "psoft", "lora"), adam=True)
    rows += once(256, 4, args)
    verdicts(rows)
    print(f"\n{timer() - began:.0f} s")
    if args.json:
        Path(args.json).write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
