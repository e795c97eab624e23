"""The main job: adapt a pretrained transformer with LOFT, offline, in minutes.

    pip install torch && python train.py               # about 4 minutes on 2 CPU cores
    python train.py --task understanding --support skew,principal,random --seeds 3 --lr 3e-3,1e-2,3e-2
    python train.py --method psoft,oft,hra,lora --steps 400 --out runs/methods
    python train.py --compare supports                 # every support on every task, 5 seeds, tuned rates: the table in README
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
import functools
import gc
import json
import math
import os
import re
import statistics
import sys
import sysconfig
import time
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import loft
from loft import selectors

CONTEXT, BATCH, PRETRAIN_STEPS = 128, 16, 1200
METHODS = ("frozen", *loft.METHODS, "full")
SUPPORTS = (*selectors.KINDS, "allocated")                                     # allocated: skew, as many parameters in all, ranks by σ
# Learning rates by default, the best of README's grid. The rule: 1e-2 where the score is more than half of skew's, 3e-2 below.
RATES = {"random": 3e-2, "minor": 3e-2, "coordinate": 3e-2, "activation": 3e-2, "full": 1e-3, "all": 3e-3}


# ---------------------------------------------------------------------------------------------------------
# Data: the standard library's own text
# ---------------------------------------------------------------------------------------------------------

@functools.cache
def library() -> list[tuple[str, str, str, list[str]]]:
    """(part, top-level package, source, docstrings) of every module; part is train, tune or val, by the file's name."""
    root, modules = Path(sysconfig.get_paths()["stdlib"]), []
    skipped = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__", "pydoc_data"}
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for file in sorted(root.rglob("*.py")):
        path = file.relative_to(root)
        if skipped.intersection(path.parts):
            continue
        try:
            source = file.read_text("utf-8")
            docs = [ast.get_docstring(n) for n in ast.walk(ast.parse(source)) if isinstance(n, documented)]
        except (OSError, SyntaxError, ValueError):
            continue
        part = ("val", "tune", *["train"] * 8)[zlib.crc32(path.as_posix().encode()) % 10]
        modules.append((part, path.parts[0].removesuffix(".py"), source, [d for d in docs if d]))
    return modules


def as_bytes(texts) -> Tensor:
    """One (length,) uint8 tensor."""
    return torch.frombuffer(bytearray("\n\n".join(texts).encode()), dtype=torch.uint8)


@functools.cache
def prose() -> dict[str, Tensor]:
    """{train, val}: every tenth topic of the language reference, and the docstrings of val files, are held out."""
    from pydoc_data.topics import topics
    keys = sorted(topics)
    return {"train": as_bytes([topics[k] for i, k in enumerate(keys) if i % 10] + [d for part, _, _, docs in library() if part == "train" for d in docs]),
            "val": as_bytes([topics[k] for k in keys[::10]] + [d for part, _, _, docs in library() if part == "val" for d in docs])}


def windows(data: Tensor, start: Tensor) -> Tensor:
    """(len(start), CONTEXT + 1) int64 windows of `data`."""
    return data[start[:, None] + torch.arange(CONTEXT + 1)].long()


def random_windows(data: Tensor, generator: torch.Generator) -> Tensor:
    return windows(data, torch.randint(len(data) - CONTEXT, (BATCH,), generator=generator))


def even_windows(data: Tensor, n: int = 256) -> list[Tensor]:
    """n evenly spaced windows, in chunks of 64, to measure on."""
    return list(windows(data, torch.linspace(0, len(data) - CONTEXT - 1, n).long()).split(64))


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

    def features(self, tokens: Tensor) -> Tensor:                              # (n, t, d)
        return self.norm(self.blocks(self.token(tokens) + self.position.weight[:tokens.shape[1]]))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.features(tokens))


class Classifier(nn.Module):
    """The transformer's features, averaged over the bytes that are not padding (0), into classes: (n, t) → (n, classes)."""

    def __init__(self, body: Transformer, classes: int):
        super().__init__()
        self.body, self.head = body, nn.Linear(body.norm.normalized_shape[0], classes)

    def forward(self, tokens: Tensor) -> Tensor:
        mask = (tokens != 0)[..., None]
        return self.head((self.body.features(tokens) * mask).sum(1) / mask.sum(1))


# ---------------------------------------------------------------------------------------------------------
# Tasks
# ---------------------------------------------------------------------------------------------------------

@dataclass
class Task:
    """A pretrained model, batches of a new domain, and what to measure. Losses are in bits (per byte, or per example)."""
    model: nn.Module
    batch: Callable[[torch.Generator], object]                                 # a random training batch
    loss_fn: Callable[[nn.Module, object], Tensor]                             # mean cross-entropy in nats
    splits: dict[str, list]                                                    # batches to measure on: tune, val
    kept: Callable[[nn.Module], float]                                         # loss on the old domain: what is forgotten
    trainable: str = ""                                                        # what trains beside the adapter, a regex
    extra: Callable[[nn.Module], dict[str, float]] = lambda model: {}          # further measures on val

    @torch.no_grad()
    def bits(self, model: nn.Module, split: str, most: int = 99) -> float:
        device = next(model.parameters()).device
        losses = [self.loss_fn(model, to(b, device)).item() for b in self.splits[split][:most]]
        return statistics.fmean(losses) / math.log(2)


def to(batch, device):
    return tuple(t.to(device) for t in batch) if isinstance(batch, tuple) else batch.to(device)


def next_byte(model: nn.Module, tokens: Tensor) -> Tensor:
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1).float(), tokens[:, 1:].flatten())


def label(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]).float(), batch[1])


def code(args) -> Task:
    """Prose → source code: the shift of domain that a language model is adapted to most often."""
    data = {part: as_bytes(source for p, _, source, _ in library() if p == part) for part in ("train", "tune", "val")}
    old = Task(None, None, next_byte, {"prose": even_windows(prose()["val"])}, None)
    return Task(pretrained(args), lambda g: random_windows(data["train"], g), next_byte,
                {part: even_windows(data[part]) for part in ("tune", "val")}, lambda model: old.bits(model, "prose"))


def understanding(args) -> Task:
    """Which of eight packages does a docstring belong to: text classification from a pretrained language model.

    Starts from a linear probe (the head trained alone); then head and adapter train together. A small stand-in for GLUE:
    real sentences, but short ones, and packages are told apart by words more than by meaning. (Pretraining has seen most of
    the text, never a label.)
    """
    texts = {d: package for _, package, _, docs in library() for d in docs if len(d) >= 40}   # each once, so in one part only
    classes = [package for package, _ in Counter(texts.values()).most_common(8)]

    def examples(*tenths):
        chosen = [(d.encode()[:CONTEXT], classes.index(package)) for d, package in texts.items()
                  if package in classes and zlib.crc32(d.encode()) % 10 in tenths]
        tokens = torch.zeros(len(chosen), CONTEXT, dtype=torch.long)
        for row, (text, _) in zip(tokens, chosen):
            row[:len(text)] = torch.tensor(list(text))
        return tokens, torch.tensor([y for _, y in chosen])

    data = {"train": examples(*range(7)), "tune": examples(7), "val": examples(8, 9)}
    balance = (1 / data["train"][1].bincount(minlength=8).clamp(min=1))[data["train"][1]]   # classes equally often

    def batch(generator):
        rows = torch.multinomial(balance, BATCH, replacement=True, generator=generator)
        return data["train"][0][rows], data["train"][1][rows]

    def extra(model):
        """Accuracy and macro-F1 on val."""
        predicted = torch.cat([model(x.to(args.device)).argmax(-1).cpu() for x, _ in task.splits["val"]])
        y = torch.cat([y for _, y in task.splits["val"]])
        hit = lambda c: ((predicted == c) & (y == c)).sum().item()
        f1 = [2 * hit(c) / max(1, (predicted == c).sum().item() + (y == c).sum().item()) for c in y.unique().tolist()]
        return {"accuracy": (predicted == y).float().mean().item(), "macro_f1": statistics.fmean(f1)}

    body = pretrained(args)
    old = even_windows(prose()["val"])
    kept = lambda model: Task(None, None, next_byte, {"prose": old}, None).bits(model.body, "prose")
    splits = {part: list(zip(x.split(64), y.split(64))) for part, (x, y) in data.items() if part != "train"}
    torch.manual_seed(0)
    task = Task(Classifier(body, 8).to(args.device), batch, label, splits, kept, r"^head\.", torch.no_grad()(extra))
    task.model.requires_grad_(False).head.requires_grad_(True)
    fit(task, task.model, max(1, args.pretrain_steps // 4), 1e-2, 0, args, "linear probe")
    return task


TASKS = {"code": code, "understanding": understanding}


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


def fit(task: Task, model: nn.Module, steps: int, lr: float, seed: int, args, name: str, refresh=None) -> tuple[float, list]:
    """Adam on the parameters that require grad, warm-up over a tenth of the steps, then cosine decay.

    Returns the median ms per step and the curve [(step, bits on part of val)], ten points where args.compare asks for it.
    """
    device, progress, times, curve = next(model.parameters()).device, Progress(name, steps), [], []
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr, betas=(0.9, 0.99))
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min((s + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * s / steps)))
    model.train()
    for step in range(1, steps + 1):
        began = time.perf_counter()
        with torch.autocast(device.type, args.dtype, enabled=args.dtype != torch.float32):
            loss = task.loss_fn(model, to(task.batch(generator), device))
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        value = loss.item()
        times.append(time.perf_counter() - began)
        if not math.isfinite(value):
            first = next((f" (first in {n})" for n, p in model.named_parameters() if not p.isfinite().all()), "")
            raise FloatingPointError(f"{name.strip()}: the loss is {value} at step {step}{first}; lower --lr")
        progress(step, value)
        if refresh and args.refresh and step % args.refresh == 0 and step < steps:
            refresh(model, optimizer)
        if args.compare and task.splits and step % max(1, steps // 10) == 0:
            model.eval()
            curve.append((step, task.bits(model, "val", 2)))
            model.train()
    model.eval()
    return statistics.median(times) * 1e3, curve


def pretrained(args) -> nn.Module:
    """The transformer after step 1, from the cache beside the results when it is there."""
    torch.manual_seed(0)
    model, text = Transformer().to(args.device), prose()["train"]
    key = zlib.crc32(bytes(text[::997].tolist()) + f"{CONTEXT} {BATCH} {args.pretrain_steps} {model}".encode())
    cache = args.out.parent / f"pretrained-{key:08x}.pt"
    if cache.exists():
        model.load_state_dict(torch.load(cache, map_location=args.device, weights_only=True))
        print(f"1. pretrained weights found in {cache}: skipping to step 2")
        return model.eval()
    print(f"1. pretraining {sum(p.numel() for p in model.parameters()):,} parameters on {len(text):,} bytes of prose")
    fit(Task(model, lambda g: random_windows(text, g), next_byte, {}, None), model, args.pretrain_steps, 3e-3, 0, args, "pretraining")
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


def run(name: str, task: Task, method: str, support: str | None, lr: float | None, seed: int, before, args, line: str) -> dict:
    """Adapts a copy of the task's model and measures it."""
    gc.collect()                                                               # the last row's model goes before memory is measured
    model = copy.deepcopy(task.model).eval()
    generator = torch.Generator().manual_seed(1000 + seed)
    calibration = [to(task.batch(generator), args.device) for _ in range(args.calibration)]

    def choose(model):
        """The supports of a fresh model, or new ones, at the same ranks, of an adapted one."""
        adapted = {n: layer.rotation.r for n, layer in loft.layers(model)}
        rank = adapted or dict.fromkeys(loft.target_layers(model), args.rank)
        data = (model, calibration, task.loss_fn)
        if support == "allocated" and not adapted:
            return selectors.within(*data, sum(r * (r - 1) // 2 for r in rank.values()), side=args.side, seed=seed)
        return selectors.select(*data, rank, "skew" if support == "allocated" else support, {n: model.get_submodule(n) for n in rank},
                                side=args.side, seed=seed)

    score, seconds, mib = None, 0.0, 0.0
    low = peak(args.device, reset=True)
    if method in ("full", "frozen"):
        model.requires_grad_(method == "full")
    else:
        P = support
        if support not in (None, "all"):
            began = time.perf_counter()
            P = choose(model)
            seconds, mib = time.perf_counter() - began, peak(args.device) - low
            score = math.hypot(*selectors.scores(model, calibration, task.loss_fn, P, side=args.side).values()) / args.calibration
        loft.adapt(model, method=method, support=P, transform=args.transform, side=args.side, seed=seed, backend=args.backend,
                   rank=args.rank if method in ("hra", "lora") else None, trainable=task.trainable or ())
    if method == "frozen" and task.trainable:
        for n, p in model.named_parameters():
            p.requires_grad_(re.search(task.trainable, n) is not None)
    peak(args.device, reset=True)
    refresh = (lambda model, optimizer: loft.refresh(model, choose(model), optimizer)) if support not in (None, "all") else None
    trains = any(p.requires_grad for p in model.parameters())
    ms, curve = fit(task, model, args.steps, lr, seed, args, line, refresh) if trains else (0.0, [])
    row = dict(task=name, method=method, support=support, rank=args.rank if support or method == "lora" else None, lr=lr, seed=seed,
               trainable=sum(p.numel() for p in model.parameters() if p.requires_grad), score=score, select_s=round(seconds, 3),
               select_mib=round(mib, 1), before=before["val"], after=task.bits(model, "val"), tune=task.bits(model, "tune"),
               kept_before=before["kept"], kept_after=task.kept(model), **task.extra(model), curve=curve, ms_per_step=round(ms, 2),
               peak_mib=round(peak(args.device), 1), orthogonality_error=None)
    if loft.layers(model):
        if method != "lora":
            row["orthogonality_error"] = max(loft.orthogonality_error(model).values())
        loft.save(model, args.out / f"{name}-{method}-{support}-lr{lr:g}-seed{seed}.pt")
    return row


def groups(rows: list[dict]) -> list[list[dict]]:
    """The rows of each (task, method, support), all seeds, at its learning rate with the lowest loss on the tune split."""
    found: dict = {}
    for row in rows:
        found.setdefault((row["task"], row["method"], row["support"]), {}).setdefault(row["lr"], []).append(row)
    first = lambda rs: min(rs, key=lambda r: r["seed"])["tune"]                # rates are tried on the first seed
    return [min(by_lr.values(), key=first) for by_lr in found.values()]


def aligned(head: tuple, lines: list[tuple], left: int) -> str:
    widths = [max(map(len, column)) for column in zip(head, *lines)]
    return "\n".join("  ".join(c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths)))
                     for line in (head, *lines))


def table(rows: list[dict]) -> str:
    """One line per method and support: mean over the seeds, and the standard deviation of the loss after."""
    head = ("method", "support", "lr", "trainable", "before", "after", "± (seeds)", "old after", "ms/step", "peak MiB", "orth. error")
    extra = [k for k in ("accuracy", "macro_f1") if k in rows[0]]
    lines = []
    for group in groups(rows):
        mean = lambda key: statistics.fmean(r[key] for r in group)
        row, error = group[0], max(r["orthogonality_error"] or 0 for r in group)
        spread = f"{statistics.stdev(r['after'] for r in group):.4f} ({len(group)})" if len(group) > 1 else ""
        lines.append((row["method"], row["support"] or "", f"{row['lr']:g}" if row["lr"] else "", f"{row['trainable']:,}",
                      f"{mean('before'):.4f}", f"{mean('after'):.4f}", spread, f"{mean('kept_after'):.4f}", f"{mean('ms_per_step'):.1f}",
                      f"{mean('peak_mib'):.0f}", f"{error:.0e}" if error else "", *(f"{mean(k):.3f}" for k in extra)))
    return aligned((*head, *extra), lines, 2)


def comparison(rows: list[dict]) -> str:
    """Does the first-order score predict what a support is worth? Losses, speed, cost, and the rank correlation."""
    lines, by_seed = [], {}
    chosen = [g for g in groups(rows) if g[0]["score"] is not None]
    goal = {r["seed"]: r["curve"][-1][1] for g in chosen if g[0]["support"] == "principal" for r in g if r["curve"]}
    for group in sorted(chosen, key=lambda g: -g[0]["score"]):
        reach = [next((step for step, loss in r["curve"] if loss <= goal[r["seed"]]), None) for r in group if r["seed"] in goal]
        steps = [s for s in reach if s is not None]
        mean = lambda key: statistics.fmean(r[key] for r in group)
        sd = statistics.stdev(r["after"] for r in group) if len(group) > 1 else 0.0
        lines.append((group[0]["support"], f"{group[0]['lr']:g}", f"{mean('score'):.3f}", f"{mean('after'):.4f}", f"{sd:.4f}",
                      f"{mean('before') - mean('after'):.4f}", f"{statistics.median(steps):.0f} ({len(steps)}/{len(reach)})" if steps else "never",
                      f"{mean('kept_after'):.3f}", f"{mean('select_s'):.2f}", f"{mean('select_mib'):.0f}"))
        for r in group:
            by_seed.setdefault(r["seed"], []).append((r["score"], r["before"] - r["after"]))
    head = ("support", "lr", "score", "after", "±", "decrease", "steps to principal's loss", "old after", "select s", "select MiB")
    rank = lambda values: torch.tensor(values).argsort().argsort().double()
    spearman = [torch.corrcoef(torch.stack([rank([s for s, _ in pairs]), rank([d for _, d in pairs])]))[0, 1].item()
                for pairs in by_seed.values() if len(pairs) > 2]
    words = (f"rank correlation of score and decrease over {len(chosen)} supports: {statistics.fmean(spearman):.2f} "
             f"({min(spearman):.2f} to {max(spearman):.2f} over {len(spearman)} seeds)" if spearman else "")
    return aligned(head, lines, 1) + "\n" + words


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
    supports = (*SUPPORTS, "all")
    positive = lambda t: n if (n := int(t)) > 0 else parser.error(f"{t} is not a positive number")
    add = parser.add_argument
    add("--task", type=one_of(*TASKS), help=f"any of {', '.join(TASKS)} (comma-separated; default code)")
    add("--compare", choices=("supports",), help="every support on every task: 5 seeds, rates tuned on the first, curves, rank correlation")
    add("--method", type=one_of(*METHODS), help=f"any of {', '.join(METHODS)} (comma-separated; default frozen,loft,full)")
    add("--support", type=one_of(*supports), help=f"any of {', '.join(supports)} (comma-separated; default: every one "
        "for loft, the paper's for the other methods)")
    add("--transform", choices=list(loft.TRANSFORMS), help="of loft; default: the method's")
    add("--side", choices=loft.SIDES, default="input")
    add("--backend", choices=("eager", "fused"), default="fused", help="loft.py's own lines, or their fast twins in kernels.py (default)")
    add("--rank", type=positive, default=16, help="dimensions of a support; reflections of hra (default 16)")
    add("--lr", type=lambda t: [float(v) for v in t.split(",")], help="one, or several: tried on the first seed, and the best "
        "on the tune split taken for the others (default: a rate for each support)")
    add("--steps", type=positive, default=200, help="adaptation steps (default 200)")
    add("--pretrain-steps", type=positive, default=PRETRAIN_STEPS)
    add("--refresh", type=positive, help="every so many steps, keep the rotation and choose a new support at the new point")
    add("--calibration", type=positive, default=8, help="batches that a support is chosen from (default 8)")
    add("--seed", type=int, default=0, help="the first seed: data order, calibration, random supports")
    add("--seeds", type=positive, help="how many seeds, --seed and up (default 1; 5 with --compare)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="bfloat16: autocast")
    add("--out", type=Path, help="folder of the results (default runs/ and the time)")
    args = parser.parse_args(argv)
    args.task = args.task or (list(TASKS) if args.compare else ["code"])
    args.method = args.method or (["loft"] if args.compare else ["frozen", "loft", "full"])
    args.seeds = args.seeds or (5 if args.compare else 1)
    args.lr = args.lr or ([1e-3, 3e-3, 1e-2, 3e-2] if args.compare else None)
    args.dtype = getattr(torch, args.dtype)
    try:
        args.device = torch.empty(0, device=args.device).device
    except (RuntimeError, AssertionError) as e:
        parser.error(f"--device {args.device}: {str(e).splitlines()[0]}")
    args.out = args.out or Path("runs") / time.strftime("%Y%m%d-%H%M%S")
    return args


def rows_of(args, name: str, task: Task, done: Callable[[dict], None], failed: list[str]) -> None:
    """Runs every method and support on one task; of several learning rates, the best on the first seed goes on."""
    before = dict(val=task.bits(task.model, "val"), kept=task.kept(task.model))
    print(f"2. {name}: {before['val']:.3f} bits on the new domain, {before['kept']:.3f} on the old, before adaptation")
    plan = [(method, support) for method in args.method for support in (
        (args.support or SUPPORTS) if method == "loft" else [None] if method in ("frozen", "full") else [loft.METHODS[method]["support"]])]
    for i, (method, support) in enumerate(plan, 1):
        still = method == "frozen" and not task.trainable
        rates = [None] if still else args.lr or [RATES.get(support or method, 1e-2)]
        tried: dict[float | None, float] = {}

        def attempt(lr, seed):
            line = f"[{name} {i}/{len(plan)}] {method} {support or ''}".ljust(32) + (f" lr {lr:g} seed {seed}" if lr else "")
            try:
                row = run(name, task, method, support, lr, seed, before, args, line)
            except FloatingPointError as e:                                    # the other rows go on
                failed.append(str(e))
                return print(f"\n{e}")
            done(row)
            if seed == args.seed:
                tried[lr] = row["tune"]
        for lr in rates:
            attempt(lr, args.seed)
        if tried and not still:
            for seed in range(args.seed + 1, args.seed + args.seeds):
                attempt(min(tried, key=tried.get), seed)


def main(argv=None) -> list[dict]:
    args = parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    settings = {k: str(v) if isinstance(v, (Path, torch.device, torch.dtype)) else v for k, v in vars(args).items()}
    settings |= dict(torch=torch.__version__, python=sys.version.split()[0], threads=torch.get_num_threads())
    (args.out / "settings.json").write_text(json.dumps(settings, indent=1) + "\n")
    rows, failed = [], []
    with open(args.out / "results.jsonl", "a") as file:
        def done(row):
            rows.append(row)
            file.write(json.dumps(row) + "\n")
            file.flush()
        try:
            for name in args.task:
                rows_of(args, name, TASKS[name](args), done, failed)
        except KeyboardInterrupt:
            print("\ninterrupted; what is finished:" if rows else "\ninterrupted before the first row was finished")
    seeds = f"seed {args.seed}" if args.seeds == 1 else f"seeds {args.seed} to {args.seed + args.seeds - 1}"
    for name in dict.fromkeys(row["task"] for row in rows):
        mine = [row for row in rows if row["task"] == name]
        print(f"\n{name}: bits on held-out data of the new domain (before, after) and of the old; {args.steps} steps, rank {args.rank}, "
              f"{seeds}, {args.device}, torch {torch.__version__}\n\n{table(mine)}")
        if args.compare:
            print("\n" + comparison(mine))
    print("".join(f"\nfailed: {line}" for line in failed) + f"\nwritten to {args.out}/")
    return rows


if __name__ == "__main__":
    main()
