"""Adapts pretrained networks with LOFT, and with its peers beside it: offline, in minutes.

    python train.py                                     prose → code, in 5 minutes on 2 cores
    python train.py --task vision,math --seeds 3        the other tasks: lab/tasks.py
    python train.py --support skew,skew-plain,lookahead --lr 3e-3,1e-2
    python train.py --resume runs/NAME                  goes on where it was stopped
    python train.py --model NAME --data FILE            your own: lab/own.py
    python -m lab.study                                 the evidence: tables and pictures

A cell is a task × method × support × size × learning rate × seed. It adapts a copy of the task's
pretrained model, trains the adapter, measures it on the new domain and the old, and becomes a line
of runs/NAME/results.jsonl. Its adapter, settings.json and table.txt stand beside that.

The support of `loft` is one of selectors.py's, in the basis that suits Adam; with "-plain" as it is
spanned. "lookahead" is the skew support of the gradients along a short provisional path, whose steps
are taken off those of training.
"""
from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import sys
import time
import warnings
import zlib
from pathlib import Path

warnings.filterwarnings("ignore", message="Failed to initialize NumPy")  # before torch: not needed

import torch
from torch import nn

import loft
from lab import tasks
from loft import selectors

METHODS = ("frozen", *loft.METHODS, "full")
SUPPORTS = [kind + basis for kind in (*selectors.KINDS, "lookahead") for basis in ("", "-plain")]
SHOWN = "random,principal,skew,lookahead"                # what loft is shown with by default
SIZE = {"oft": "block_size", "boft": "block_size", "hra": "reflections"}         # of others: rank
RATES = {"random": 3e-2, "minor": 3e-2, "coordinate": 3e-2, "oft": 3e-2, "hra": 3e-2, "lora": 3e-2,
         "full": 3e-3}                                   # of others: 1e-2


# --------------------------------------------------------------------------------------------------
# Settings

def listed(kind, valid=None):
    """argparse's type of a list with commas: words out of `valid`, or positive numbers."""
    def parse(text):
        values = [kind(word) for word in text.split(",")]
        for value in values:
            if value not in valid if valid else not 0 < value < math.inf:
                wanted = f"one of {', '.join(valid)}" if valid else "a positive number"
                raise argparse.ArgumentTypeError(f"{value!r} is not {wanted}")
        return values
    return parse


def positive(text):
    return listed(int)(text)[0]


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--task", type=listed(str, tasks.TASKS), default="code", help="any of " + ", ".join(tasks.TASKS))
    add("--method", type=listed(str, METHODS), default="frozen,loft,psoft,oft,lora,full",
        help="any of " + ", ".join(METHODS))
    add("--support", type=listed(str, SUPPORTS), default=SHOWN, help="of loft: any of lookahead, "
        + ", ".join(selectors.KINDS) + f", or one of them with -plain (default {SHOWN})")
    add("--lookahead", type=positive, help="steps of its path (default 50, a quarter at most)")
    add("--calibration", type=positive, default=8, help="batches that a support is chosen from")
    add("--rank", type=positive, help="of supports and lora, reflections of hra")
    add("--budget", type=positive, help="trainable parameters: every method takes its largest size "
        "within it (default: what lora has at rank 1)")
    add("--side", choices=loft.SIDES, default="input", help="of loft")
    add("--options", type=json.loads, default="{}", help='of loft.adapt: \'{"transform": "expm"}\'')
    add("--lr", type=listed(float), help="several are tried on the first seed; the one that is best "
        "on a split of its own goes on (default: one for each method and support)")
    add("--steps", type=positive, default=200, help="of training, lookahead's included")
    add("--seeds", type=positive, default=1, help="how many")
    add("--pretrain-steps", type=positive, help="on the old domain (default: the task's)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--threads", type=positive, default=torch.get_num_threads())
    add("--backend", choices=("eager", "fused"), default="fused", help="loft.py's lines or kernels.py's")
    add("--out", type=Path, help="folder of the results (default runs/ and the time)")
    add("--resume", type=Path, metavar="DIR", help="a run's folder: its settings, but for those given; "
        "cells that are finished are skipped")
    args = parser.parse_args(argv)
    if args.resume:
        try:
            before = json.loads((args.resume / "settings.json").read_text())["argv"]
        except (OSError, ValueError) as e:
            parser.error(f"--resume: {args.resume} is not the folder of a run: {e}")
        args = parser.parse_args(before + argv)
        args.out = args.resume
    elif args.out and (args.out / "results.jsonl").exists():
        parser.error(f"--out: {args.out} holds a run; --resume {args.out} goes on with it")
    if args.rank and args.budget:
        parser.error("--rank and --budget both set the size; give one")
    args.lookahead = args.lookahead or min(50, args.steps // 4)
    if args.lookahead >= args.steps:
        parser.error(f"--lookahead {args.lookahead} leaves nothing of --steps {args.steps}")
    args.out = args.out or Path("runs") / time.strftime("%Y%m%d-%H%M%S")
    return args


# --------------------------------------------------------------------------------------------------
# The loop

def fit(task, model, steps, lr, seed, label, watch=False):
    """Trains what requires grad by Adam: warm-up over a tenth of the steps, cosine decay to 0.

    Returns [(step, bits on tune, bits on the old domain)] at every tenth, where it is watched, and
    the median milliseconds of a step. FloatingPointError: names the step and the layer.
    """
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.Adam(trained.values(), lr, betas=(0.9, 0.99))
    generator, warm, curve, ms = torch.Generator().manual_seed(seed), max(1, steps // 10), [], []
    for step in range(1, steps + 1):
        start = time.perf_counter()
        decay = 0.5 + 0.5 * math.cos(math.pi * (step - 1) / steps)
        optimizer.param_groups[0]["lr"] = lr * min(step / warm, decay)
        model.train()
        loss = task.loss_fn(model, [t.to(task.device) for t in task.batch(generator, task.size)])
        loss.backward()
        broken = [n for n, p in trained.items() if p.grad is not None and not p.grad.isfinite().all()]
        if broken or not loss.isfinite():
            raise FloatingPointError(f"not finite at step {step}: the loss is {loss:g}, and the "
                                     f"gradient is not finite in {broken[:1]}; lower --lr")
        optimizer.step()
        optimizer.zero_grad()
        ms.append(1e3 * (time.perf_counter() - start))
        progress(label, step, steps, loss.item() / math.log(2), sum(ms) / step)
        if watch and (step % max(1, steps // 10) == 0 or step == steps):
            curve.append((step, task.bits(model, "tune", 2), task.kept(model, 2)))
    return curve, round(statistics.median(ms), 2)


def progress(label, step, steps, bits, ms):
    """One line that renews itself in a terminal; a line every quarter of the way in a file."""
    terminal, last = sys.stdout.isatty(), step == steps
    if terminal or last or step % math.ceil(steps / 4) == 0:
        print("\r\x1b[K" * terminal + f"{label}  step {step}/{steps}  {bits:.3f} bits  {1e3 / ms:.1f} "
              f"steps/s  {(steps - step) * ms / 1e3:.0f} s left", end="\n" * (last or not terminal),
              flush=True)


def prepare(name, args):
    """The task with its model where adaptation begins: pretrained on the old domain (or loaded from
    where that was done before), a new head trained alone. And what is measured there."""
    torch.manual_seed(0)
    task = tasks.TASKS[name]().to(args.device)
    old, steps = task.old.to(args.device), args.pretrain_steps or task.old.steps
    recipe = f"{Path(tasks.__file__).read_text('utf-8')} {sys.version_info[:2]} {steps}"
    cache = args.out.parent / f"pretrained-{old.name}-{zlib.crc32(recipe.encode()):08x}.pt"
    if cache.exists():
        print(f"{name}: pretrained weights from {cache}")
        old.model.load_state_dict(torch.load(cache, args.device, weights_only=True))
    else:
        fit(old, old.model, steps, old.lr, 0, f"{name}: pretraining on {old.name}")
        torch.save(old.model.state_dict(), cache.with_suffix(".tmp"))
        cache.with_suffix(".tmp").replace(cache)
    task.model.requires_grad_(False)
    if task.head:
        task.model.head.requires_grad_(True)
        fit(task, task.model, steps // 4, 1e-2, 0, f"{name}: the new head alone")
    start = dict(before=task.bits(task.model, "val"), kept_before=task.kept(task.model),
                 measures_before=task.measures(task.model))
    print(f"{name}: {start['before']:.3f} bits on the new domain, {start['kept_before']:.3f} on the old")
    return task, start


# --------------------------------------------------------------------------------------------------
# A cell: adapt, fit, measure

def lora_budget(task):
    """Parameters of lora at rank 1, its least."""
    return sum(sum(loft.shape(layer)) for layer in loft.target_layers(task.model).values())


def largest(task, method, budget, **options):
    """The largest size with which `method` trains at most `budget` parameters, by trying on layers
    of the same shapes. ValueError: its least is larger."""
    shapes, best = [loft.shape(layer) for layer in loft.target_layers(task.model).values()], None
    support = "random" if loft.METHODS[method][0] == "principal" else None       # as many, sooner
    for size in range(1, max(map(max, shapes)) + 1):
        layers = nn.ModuleList(nn.Linear(*shape) for shape in shapes)
        options[SIZE.get(method, "rank")] = size
        try:
            loft.adapt(layers, method=method, support=support, **options)
        except ValueError:                               # it has no such block, or reflections
            continue
        if trainable(layers) > budget:
            break
        best = size
    if best is None:
        raise ValueError(f"{method} has no size within {budget:,} parameters; give --budget or --rank")
    return best


def trainable(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def make_cell(task, method, support, args):
    """All that a result depends on but rate and seed; support None: the method's own."""
    if support is None and method in loft.METHODS:
        support = loft.METHODS[method][0]
        support = "principal-plain" if support == "principal" else support
    options = args.options | {"side": args.side} if method == "loft" else {}
    size = args.rank
    if method in ("frozen", "full", "goft") or size and method in ("oft", "boft"):
        size = None
    elif not size:
        size = largest(task, method, args.budget or lora_budget(task), **options)
    return dict(task=task.name, method=method, support=support, size=size, options=options,
                align=support in SUPPORTS and not support.endswith("-plain"),
                lookahead_steps=args.lookahead if "lookahead" in (support or "") else 0,
                steps=args.steps, calibration=args.calibration, pretrain_steps=args.pretrain_steps)


def choose(model, task, cell):
    """{layer: P} of the cell's support, and what choosing it took, and is worth at first order."""
    generator, size = torch.Generator().manual_seed(1000 + cell["seed"]), cell["size"]
    batches = [[t.to(task.device) for t in task.batch(generator, task.size)]
               for _ in range(cell["calibration"])]
    side, kind = cell["options"].get("side", "input"), cell["support"].removesuffix("-plain")
    ranks = {name: min(size, loft.shape(layer)[loft.SIDES.index(side)])
             for name, layer in loft.target_layers(model).items()}
    start, low = time.perf_counter(), peak_mib(task.device, reset=True)
    P = selectors.select(model, batches, task.loss_fn, ranks, "skew" if kind == "lookahead" else kind,
                         side=side, align=cell["align"], lookahead=cell["lookahead_steps"],
                         seed=cell["seed"])
    cost = dict(select_s=round(time.perf_counter() - start, 3),
                select_mib=round(peak_mib(task.device) - low, 1))
    worth = selectors.scores(model, batches, task.loss_fn, P, side=side)
    return P, cost | {"score": math.hypot(*worth.values()) / len(batches)}


def adapt(model, task, cell, backend):
    """Puts the cell's adapter on the model, in place; returns what its support took to choose."""
    method, size, P, cost = cell["method"], cell["size"], {}, {}
    if method in loft.METHODS:
        more = cell["options"] | ({SIZE.get(method, "rank"): size} if size else {})
        if cell["support"] in SUPPORTS:
            P, cost = choose(model, task, cell)
            if method != "lora":
                more = cell["options"] | {"support": P}
        loft.adapt(model, method=method, seed=cell["seed"], backend=backend, **more)
        if method == "lora":                             # a support begins its A
            for name, support in P.items():
                model.get_submodule(name).rotation.A.data.copy_(support.mT)
    else:
        model.requires_grad_(method == "full")
    if task.head:
        model.head.requires_grad_(True)
    return cost


def peak_mib(device, reset=False):
    """Peak memory since a reset, of the GPU's tensors, or on Linux of the process; elsewhere 0."""
    if device.startswith("cuda"):
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() / 2 ** 20
    if not Path("/proc/self/clear_refs").exists():
        return 0.0
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2 ** 10


def run(task, start, cell, args):
    """Adapts a copy of the task's model as the cell says, trains and measures it; returns its row."""
    words = [cell[k] for k in ("task", "method", "support", "size", "lr", "seed")]
    words[-1] = f"seed {words[-1]}"
    label = " ".join(str(word) for word in words if word is not None)
    model, curve, ms = copy.deepcopy(task.model), [], 0.0
    cost = adapt(model, task, cell, args.backend)
    peak_mib(args.device, reset=True)
    if cell["lr"]:
        steps = cell["steps"] - cell["lookahead_steps"]
        curve, ms = fit(task, model, steps, cell["lr"], cell["seed"], label, watch=True)
    row = cell | start | cost | dict(
        trainable=trainable(model), after=task.bits(model, "val"), tune=task.bits(model, "tune"),
        kept_after=task.kept(model), measures=task.measures(model), curve=curve, ms_per_step=ms,
        peak_mib=round(peak_mib(args.device), 1))
    if loft.layers(model):
        row["orthogonality_error"] = max(loft.orthogonality_error(model).values())
        row["adapter"] = f"{'-'.join(words[:3])}-{zlib.crc32(json.dumps(cell).encode()):08x}.pt"
        loft.save(model, args.out / row["adapter"])
    with open(args.out / "results.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")
    return row


def sweep(task, start, cell, args, rows):
    """Every rate on the first seed, and the one that is best on the tune split on the other seeds.

    Appends to `rows` what is not there yet; returns a line for each cell that failed."""
    rates, seeds, failed, tried = args.lr, args.seeds, [], {}
    if cell["method"] == "frozen" and not task.head:
        rates, seeds = [None], 1                         # nothing trains
    for seed in range(seeds):
        for lr in rates:
            wanted = cell | dict(lr=lr, seed=seed)
            row = next((row for row in rows if row.items() >= wanted.items()), None)
            try:
                ...
    return failed


# --------------------------------------------------------------------------------------------------
# Results
