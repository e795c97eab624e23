"""The main job: adapt a pretrained transformer with LOFT, offline, in minutes.

    pip install torch && python train.py               # about 4 minutes on 2 CPU cores
    python train.py --support skew,principal,random --seeds 3 --lr 1e-3,3e-3,1e-2
    python train.py --method psoft,oft,hra --steps 400 --out runs/methods
    python train.py --help

1. pretrains a small byte-level causal transformer on English prose that every Python carries (the language
   reference in pydoc_data.topics and the docstrings of the standard library), and caches its weights;
2. adapts it to another domain, the source code of the standard library (files split into train, tune and
   validation), with LOFT under each support, beside no adaptation (floor) and full fine-tuning (ceiling);
3. prints one table, and writes runs/NAME/: settings.json, results.jsonl (a line a row), and the adapters.
"""
from __future__ import annotations

import argparse
import ast
import copy
import json
import math
import os
import statistics
import sys
import sysconfig
import time
import zlib
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import loft
from loft import selectors

CONTEXT, BATCH, PRETRAIN_STEPS = 128, 16, 1200
METHODS = ("frozen", *loft.METHODS, "full")
# Learning rates by default, the best of README's grid: supports of low score want, and bear, a higher one.
RATES = {"random": 3e-2, "minor": 3e-2, "coordinate": 3e-2, "full": 1e-3, "all": 3e-3}


# ---------------------------------------------------------------------------------------------------------
# Data: bytes of the standard library, (length,) uint8 tensors
# ---------------------------------------------------------------------------------------------------------

def library() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Prose {train, val} and code {train, tune, val}. Files are split by name; docstrings follow their file."""
    from pydoc_data.topics import topics
    root = Path(sysconfig.get_paths()["stdlib"])
    prose, code = {"train": [], "val": []}, {"train": [], "tune": [], "val": []}
    for i, key in enumerate(sorted(topics)):
        prose["val" if i % 10 == 0 else "train"].append(topics[key])
    skipped = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__", "pydoc_data"}
    for file in sorted(root.rglob("*.py")):
        if skipped.intersection(file.relative_to(root).parts):
            continue
        try:
            source = file.read_text("utf-8")
            tree = ast.parse(source)
        except (OSError, SyntaxError, ValueError):
            continue
        part = ("val", "tune", *["train"] * 8)[zlib.crc32(file.relative_to(root).as_posix().encode()) % 10]
        code[part].append(source)
        if part != "tune":
            documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
            docs = [ast.get_docstring(n) for n in ast.walk(tree) if isinstance(n, documented)]
            prose[part].append("\n\n".join(d for d in docs if d))
    return tuple({k: torch.frombuffer(bytearray("\n\n".join(v).encode()), dtype=torch.uint8) for k, v in split.items()}
                 for split in (prose, code))


def batch(data: Tensor, generator: torch.Generator, device) -> Tensor:
    """Random windows (BATCH, CONTEXT + 1), int64."""
    start = torch.randint(len(data) - CONTEXT, (BATCH, 1), generator=generator)
    return data[start + torch.arange(CONTEXT + 1)].long().to(device)


# ---------------------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------------------

class Block(nn.Module):
    def __init__(self, d: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.qkv, self.proj = nn.LayerNorm(d), nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.norm2, self.up, self.down = nn.LayerNorm(d), nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x: Tensor) -> Tensor:                                    # (n, t, d)
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (n, heads, t, d/heads)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2)
        x = x + self.proj(attended)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Byte-level causal transformer: tokens (n, t) → logits (n, t, 256)."""

    def __init__(self, d: int = 128, depth: int = 4, heads: int = 4):
        super().__init__()
        self.token, self.position = nn.Embedding(256, d), nn.Embedding(CONTEXT, d)
        self.blocks = nn.Sequential(*[Block(d, heads) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, 256, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.position.weight[:tokens.shape[1]]
        return self.head(self.norm(self.blocks(x)))


def loss_fn(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean next-byte cross-entropy in nats."""
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1).float(), tokens[:, 1:].flatten())


@torch.no_grad()
def bits(model: nn.Module, data: Tensor, windows: int = 256) -> float:
    """Bits per byte over evenly spaced windows of `data`."""
    device = next(model.parameters()).device
    start = torch.linspace(0, len(data) - CONTEXT - 1, windows).long()[:, None]
    tokens = data[start + torch.arange(CONTEXT + 1)].long()
    return statistics.fmean(loss_fn(model, t.to(device)).item() for t in tokens.split(64)) / math.log(2)


# ---------------------------------------------------------------------------------------------------------
# Loop
# ---------------------------------------------------------------------------------------------------------

class Progress:
    """One updating line in a terminal, a plain line every tenth of the way when piped: loss, speed, time left."""

    def __init__(self, label: str, steps: int):
        self.label, self.steps, self.start, self.last = label, steps, time.perf_counter(), 0.0
        self.terminal = sys.stdout.isatty()

    def __call__(self, step: int, loss: float):
        now = time.perf_counter()
        rate = step / (now - self.start)
        line = f"{self.label}  step {step}/{self.steps}  loss {loss:.3f}  {rate:.1f} steps/s  {(self.steps - step) / rate:.0f} s left"
        if self.terminal and (now - self.last > 0.1 or step == self.steps):
            self.last = now
            print(f"\r\x1b[K{line}", end="\n" if step == self.steps else "", flush=True)
        elif not self.terminal and (step % math.ceil(self.steps / 4) == 0 or step == self.steps):
            print(line, flush=True)


def fit(model: nn.Module, data: Tensor, steps: int, lr: float, seed: int, args, label: str) -> float:
    """Adam on the parameters that require grad, warm-up over a tenth of the steps and cosine decay. Returns median ms per step."""
    device, progress, times = next(model.parameters()).device, Progress(label, steps), []
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr, betas=(0.9, 0.99))
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min((s + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * s / steps)))
    model.train()
    for step in range(1, steps + 1):
        began = time.perf_counter()
        with torch.autocast(device.type, args.dtype, enabled=args.dtype != torch.float32):
            loss = loss_fn(model, batch(data, generator, device))
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        value = loss.item()
        times.append(time.perf_counter() - began)
        if not math.isfinite(value):
            raise FloatingPointError(f"{label}: the loss is {value} at step {step}; lower --lr")
        progress(step, value)
    model.eval()
    return statistics.median(times) * 1e3


def pretrain(prose: dict[str, Tensor], args) -> nn.Module:
    """Step 1, from the cache beside the results when it is there."""
    torch.manual_seed(0)
    model = Transformer().to(args.device)
    key = zlib.crc32(bytes(prose["train"][::997].tolist()) + f"{CONTEXT} {BATCH} {args.pretrain_steps} {model}".encode())
    cache = args.out.parent / f"pretrained-{key:08x}.pt"
    if cache.exists():
        model.load_state_dict(torch.load(cache, map_location=args.device, weights_only=True))
        print(f"1. pretrained weights found in {cache}: skipping to step 2")
        return model
    print(f"1. pretraining {sum(p.numel() for p in model.parameters()):,} parameters on {len(prose['train']):,} bytes of prose")
    fit(model, prose["train"], args.pretrain_steps, 3e-3, 0, args, "pretraining")
    torch.save(model.state_dict(), temporary := cache.with_suffix(".tmp"))
    os.replace(temporary, cache)
    return model


# ---------------------------------------------------------------------------------------------------------
# One row of the table
# ---------------------------------------------------------------------------------------------------------

def peak(device, reset: bool = False) -> float:
    """Peak memory in MiB since the last reset: of the GPU's tensors, or of the whole process on Linux (else since its start)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats() if reset else None
        return torch.cuda.max_memory_allocated() / 2 ** 20
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 2 ** 10
    except (OSError, IndexError):
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (20 if sys.platform == "darwin" else 10)


def run(base: nn.Module, prose, code, method: str, support: str | None, lr: float | None, seed: int, before, args, label) -> dict:
    """Adapts a copy of `base` and measures it."""
    model = copy.deepcopy(base).eval()
    peak(args.device, reset=True)
    began, score = time.perf_counter(), None
    if method == "full":
        model.requires_grad_(True)
    elif method == "frozen":
        model.requires_grad_(False)
    else:
        P = support
        if support not in (None, "all"):
            generator = torch.Generator().manual_seed(1000 + seed)
            calibration = [batch(code["train"], generator, args.device) for _ in range(args.calibration)]
            found = loft.target_layers(model)
            P = selectors.select(model, calibration, loss_fn, args.rank, support, found, side=args.side, seed=seed)
            G = selectors.moments(model, calibration, loss_fn, found)
            turn = (lambda X: X.mT) if args.side == "output" else (lambda X: X)
            score = math.hypot(*(selectors.score(turn(m.weight), turn(G[n]), P[n]) for n, m in found.items())) / args.calibration
        loft.adapt(model, method=method, support=P, transform=args.transform, side=args.side, seed=seed,
                   rank=args.rank if method in ("hra", "lora") else None)
    chosen = time.perf_counter() - began
    ms = fit(model, code["train"], args.steps, lr, seed, args, label) if lr else 0.0
    memory = peak(args.device)
    row = dict(method=method, support=support, rank=args.rank if support else None, lr=lr, seed=seed,
               trainable=sum(p.numel() for p in model.parameters() if p.requires_grad), score=score,
               select_s=round(chosen, 3), before=before["val"], after=bits(model, code["val"]),
               tune=bits(model, code["tune"]), prose_before=before["prose"], prose_after=bits(model, prose["val"]),
               ms_per_step=round(ms, 2), peak_mib=round(memory, 1), orthogonality_error=None)
    if loft.layers(model):
        row["orthogonality_error"] = max(loft.orthogonality_error(model).values())
        loft.save(model, args.out / f"{method}-{support}-lr{lr:g}-seed{seed}.pt")
    return row


def table(rows: list[dict]) -> str:
    """One line per method and support, at the learning rate with the lowest mean loss on the tune split."""
    head = ("method", "support", "lr", "trainable", "before", "after", "± (seeds)", "prose after", "ms/step", "peak MiB", "orth. error")
    groups: dict = {}
    for row in rows:
        groups.setdefault((row["method"], row["support"]), {}).setdefault(row["lr"], []).append(row)
    lines = []
    for (method, support), by_lr in groups.items():
        best = min(by_lr.values(), key=lambda rs: statistics.fmean(r["tune"] for r in rs))
        mean = lambda key: statistics.fmean(r[key] for r in best)
        spread = f"{statistics.stdev(r['after'] for r in best):.4f} ({len(best)})" if len(best) > 1 else ""
        error = max((r["orthogonality_error"] or 0 for r in best))
        lines.append((method, support or "", f"{best[0]['lr']:g}" if best[0]["lr"] else "", f"{best[0]['trainable']:,}",
                      f"{mean('before'):.4f}", f"{mean('after'):.4f}", spread, f"{mean('prose_after'):.4f}",
                      f"{mean('ms_per_step'):.1f}", f"{mean('peak_mib'):.0f}", f"{error:.0e}" if error else ""))
    widths = [max(map(len, column)) for column in zip(head, *lines)]
    left = lambda i: i < 2
    return "\n".join("  ".join(c.ljust(w) if left(i) else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths)))
                     for line in (head, *lines))


# ---------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------

def one_of(*valid: str):
    """argparse type: comma-separated values out of `valid`."""
    def parse(text: str) -> list[str]:
        for value in text.split(","):
            if value not in valid:
                raise argparse.ArgumentTypeError(f"{value!r} is not one of {', '.join(valid)}")
        return text.split(",")
    return parse


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    supports = (*selectors.KINDS, "all")
    positive = lambda t: n if (n := int(t)) > 0 else parser.error(f"{t} is not a positive number")
    add = parser.add_argument
    add("--method", type=one_of(*METHODS), default=["frozen", "loft", "full"], help=f"any of {', '.join(METHODS)} (comma-separated)")
    add("--support", type=one_of(*supports), help=f"any of {', '.join(supports)} (comma-separated; default: every one "
        "for loft, the paper's for the other methods)")
    add("--transform", choices=list(loft.TRANSFORMS), help="of loft; default: the method's")
    add("--side", choices=loft.SIDES, default="input")
    add("--rank", type=positive, default=16, help="dimensions of a support; reflections of hra (default 16)")
    add("--lr", type=lambda t: [float(v) for v in t.split(",")], help="one, or several to choose from on the tune split "
        "(default: a rate for each support)")
    add("--steps", type=positive, default=200, help="adaptation steps (default 200)")
    add("--pretrain-steps", type=positive, default=PRETRAIN_STEPS)
    add("--calibration", type=positive, default=8, help="batches that a support is chosen from (default 8)")
    add("--seed", type=int, default=0, help="the first seed: data order, calibration, random supports")
    add("--seeds", type=positive, default=1, help="how many seeds, --seed and up")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="bfloat16: autocast")
    add("--out", type=Path, help="folder of the results (default runs/ and the time)")
    args = parser.parse_args(argv)
    args.dtype = getattr(torch, args.dtype)
    try:
        args.device = torch.empty(0, device=args.device).device
    except (RuntimeError, AssertionError) as e:
        parser.error(f"--device {args.device}: {str(e).splitlines()[0]}")
    args.out = args.out or Path("runs") / time.strftime("%Y%m%d-%H%M%S")
    return args


def plan(args) -> list[tuple[str, str | None, float | None, int]]:
    """The rows to run: (method, support, learning rate, seed)."""
    todo = []
    for method in args.method:
        supports = ((args.support or selectors.KINDS) if method == "loft" else
                    [None] if method in ("frozen", "full") else [loft.METHODS[method]["support"]])
        for support in supports:
            rates = [None] if method == "frozen" else args.lr or [RATES.get(support or method, 1e-2)]
            seeds = range(args.seed, args.seed + (1 if method == "frozen" else args.seeds))
            todo += [(method, support, lr, seed) for lr in rates for seed in seeds]
    return todo


def main(argv=None) -> list[dict]:
    args = parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    settings = {k: str(v) if isinstance(v, (Path, torch.device, torch.dtype)) else v for k, v in vars(args).items()}
    settings |= dict(torch=torch.__version__, python=sys.version.split()[0], threads=torch.get_num_threads())
    (args.out / "settings.json").write_text(json.dumps(settings, indent=1) + "\n")

    rows, failed = [], []
    try:
        prose, code = library()
        base = pretrain(prose, args)
        before = dict(val=bits(base, code["val"]), prose=bits(base, prose["val"]))
        print(f"2. prose {before['prose']:.3f} bits per byte; adapting to {len(code['train']):,} bytes of code, {before['val']:.3f} before")
        todo = plan(args)
        with open(args.out / "results.jsonl", "a") as file:
            for i, (method, support, lr, seed) in enumerate(todo, 1):
                label = f"[{i}/{len(todo)}] {method} {support or ''}".ljust(26)
                try:
                    rows.append(run(base, prose, code, method, support, lr, seed, before, args, label))
                except FloatingPointError as e:                                # the other rows go on
                    failed.append(str(e))
                    print(f"\n{e}")
                    continue
                file.write(json.dumps(rows[-1]) + "\n")
                file.flush()
    except KeyboardInterrupt:
        print("\ninterrupted; what is finished:" if rows else "\ninterrupted before the first row was finished")
    if rows:
        seeds = f"seed {args.seed}" if args.seeds == 1 else f"seeds {args.seed} to {args.seed + args.seeds - 1}"
        print(f"\nbits per byte on held-out code (before, after) and on held-out prose; {args.steps} steps, rank {args.rank}, "
              f"{seeds}, {args.device}, torch {torch.__version__}\n\n{table(rows)}\n\n"
              + "".join(f"failed: {line}\n" for line in failed) + f"written to {args.out}/")
    return rows


if __name__ == "__main__":
    main()
