"""Adapts pretrained networks with LOFT, and with its peers beside it: offline, in minutes.

    python train.py                                     prose → code, within 5 minutes on 2 cores
    python train.py --task vision,math --seeds 3        the other tasks: lab/tasks.py
    python train.py --support skew,skew-plain,lookahead --lr 3e-3,1e-2
    python train.py --resume runs/NAME                  goes on where it was stopped
    python train.py --model NAME --data FILE            your own: lab/own.py
    python -m lab.study                                 the evidence: tables and pictures

A cell is a task × method × support × size × learning rate × seed. It adapts a copy of the task's
pretrained model, trains the adapter (fit), measures it on the new domain and the old, and becomes a
line of runs/NAME/results.jsonl. The adapters, settings.json and table.txt stand beside that.

The supports of loft are those of selectors.py, in the basis that suits Adam; with "-plain", as they
are spanned. Two begin with steps that are taken off those of training: "lookahead", the skew
support of the gradients along a short provisional path; and "narrow", which trains at twice the
rank (rate 5e-3), and goes on with the planes that have turned furthest.
"""
from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import sys
import time
import timeit
import warnings
import zlib
from pathlib import Path

warnings.filterwarnings("ignore", "Failed to initialize NumPy|rank|frozen")
# torch does without it; a rank that is odd, or large, is what a budget buys; a head trains later

import torch
from torch import nn

import loft
from lab import tasks
from loft import selectors

METHODS = ("frozen", *loft.METHODS, "full")
ALIGNED = (*selectors.KINDS, "lookahead", "narrow")
SUPPORTS = (*ALIGNED, *(f"{kind}-plain" for kind in ALIGNED[:-1]))
SHOWN = "principal,skew,narrow"                          # of loft, by default
OWN = {"psoft": "principal-plain", "frozen": None, "lora": None, "full": None}     # of others: all
SIZE = {"oft": "block_size", "boft": "block_size", "hra": "reflections"}         # of others a rank
RATES = dict.fromkeys(("random", "oft", "hra", "lora"), 3e-2)
RATES["full"] = 3e-3                                     # of other supports and methods 1e-2


# --------------------------------------------------------------------------------------------------
# Settings

def listed(kind, valid=None):
    """argparse's type of a list with commas: of words in `valid`, or of positive numbers."""
    def numbers(text):
        values = [kind(word) for word in text.split(",")]
        for value in values:
            if not (value in valid if valid else 0 < value < math.inf):
                raise argparse.ArgumentTypeError(
                    f"{value}; wanted: {', '.join(valid or ['positive numbers'])}")
        return values
    return numbers


def positive(text):
    return listed(int)(text)[0]


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--task", type=listed(str, tasks.TASKS), default="code",
        help=f"any of {', '.join(tasks.TASKS)}")
    add("--method", type=listed(str, METHODS), default="loft,psoft,lora",
        help=f"any of {', '.join(METHODS)}")
    add("--support", type=listed(str, SUPPORTS), default=SHOWN,
        help=f"of loft: any of {', '.join(SUPPORTS)} (default {SHOWN})")
    size = parser.add_mutually_exclusive_group().add_argument
    size("--rank", type=positive, help="of supports and lora, reflections of hra")
    size("--budget", type=positive, help="trainable parameters, of which every method takes as "
         "many as it can (default: what lora has at rank 1)")
    add("--options", type=json.loads, default="{}", help="of loft.adapt for loft, as JSON: "
        '{"side": "output", "transform": "expm"}')
    add("--lr", type=listed(float), help="several are tried on the first seed, and the one that is "
        "best on a split of its own goes on (default: one for each support and method)")
    add("--steps", type=positive, default=200, help="of training, lookahead's included (200)")
    add("--seeds", type=positive, default=1)
    add("--pretrain-steps", type=positive)
    add("--device", default="cpu")
    add("--threads", type=positive, help="default: one or all, whichever is faster now")
    add("--out", type=Path, default=Path("runs") / time.strftime("%Y%m%d-%H%M%S"),
        help="folder of the results (default runs/ and the time)")
    add("--resume", type=Path, metavar="DIR", help="a run's folder: goes on there, with its "
        "settings but for those given, without the cells that are finished")
    args = parser.parse_args(argv)
    if args.resume:
        settings = args.resume / "settings.json"
        if not settings.exists():
            parser.error(f"--resume: {settings} does not exist")
        argv = json.loads(settings.read_text())["argv"] + argv
        args = parser.parse_args([*argv, "--out", str(args.resume)])
    elif (args.out / "results.jsonl").exists():
        parser.error(f"--out: {args.out} holds a run; --resume {args.out} goes on with it")
    args.argv = argv
    return args


# --------------------------------------------------------------------------------------------------
# Fit: the loop, and what comes before it

def fit(task, model, steps, lr, seed, label, whole=0):
    """Trains what requires grad by Adam: warm-up over a tenth of the steps, cosine decay to 0, or
    the first steps of such a schedule of `whole`.

    Returns the median milliseconds of a step, and [step, bits on tune, bits on the old domain] of
    every tenth, where there is one. FloatingPointError: names the step and the layer.
    """
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.Adam(trained.values(), lr, betas=(0.9, 0.99))
    generator, ms, curve, whole = torch.Generator().manual_seed(seed), [], [], whole or steps
    warm = max(1, whole // 10)
    for step in range(1, steps + 1):
        start = time.perf_counter()
        decay = (1 + math.cos(math.pi * (step - 1) / whole)) / 2
        optimizer.param_groups[0]["lr"] = lr * min(step / warm, decay)
        model.train()
        loss = task.loss_fn(model, task.draw(generator))
        loss.backward()
        for name, p in trained.items():
            if p.grad is not None and not p.grad.isfinite().all():
                raise FloatingPointError(f"step {step}, loss {loss:g}: the gradient of {name} is "
                                         "not finite; lower --lr")
        optimizer.step()
        optimizer.zero_grad()
        ms.append(1e3 * (time.perf_counter() - start))
        last, speed = step == steps, 1e3 * step / sum(ms)
        if last or sys.stdout.isatty():                  # one line; in a terminal it renews itself
            print(f"{label}  step {step}/{steps}  {loss / math.log(2):.3f} bits  {speed:.1f} "
                  f"steps/s  {(steps - step) / speed:.0f} s left ", end="\n" if last else "\r",
                  flush=True)
        if task.old and (last or step % warm == 0):
            curve.append([step, task.bits(model, "tune", 1), task.kept(model, 1)])
    return statistics.median(ms), curve


def prepare(name, args):
    """The task, with its model where adaptation begins: pretrained on the old domain (once, then
    read from a file), a new head trained alone. task.start is what is measured there."""
    torch.manual_seed(0)
    task = tasks.TASKS[name]().to(args.device)
    old, steps = task.old.to(args.device), args.pretrain_steps or task.old.steps
    recipe = f"{Path(tasks.__file__).read_text('utf-8')} {sys.version_info[:2]} {steps}"
    file = args.out.parent / f"pretrained-{old.name}-{zlib.crc32(recipe.encode()):08x}.pt"
    if not file.exists():
        fit(old, old.model, steps, old.lr, 0, f"{name}: pretraining on {old.name}")
        part = file.with_suffix(".tmp")
        torch.save(old.model.state_dict(), part)
        part.replace(file)
    old.model.load_state_dict(torch.load(file, args.device, weights_only=True))
    task.model.requires_grad_(False)
    if task.head:
        task.model.head.requires_grad_(True)
        fit(task, task.model, steps // 4, 1e-2, 0, f"{name}: the new head alone")
    task.start = dict(before=task.bits(task.model, "val"), kept_before=task.kept(task.model),
                      measures_before=task.measures(task.model))
    return task


# --------------------------------------------------------------------------------------------------
# A cell: adapt, fit, measure

def largest(task, method, budget, **options):
    """The largest size with which `method` trains at most `budget` parameters (default: those of
    lora at rank 1), found by trying, on layers of the same shapes. ValueError: there is none."""
    shapes = [loft.shape(layer) for layer in loft.target_layers(task.model).values()]
    best, budget = None, budget or sum(map(sum, shapes))
    if loft.METHODS[method]["support"] == "principal":
        options["support"] = "random"                    # as many parameters, and there sooner
    for size in range(1, max(map(max, shapes)) + 1):
        layers = nn.ModuleList(nn.Linear(*shape) for shape in shapes)
        options[SIZE.get(method, "rank")] = size
        try:
            loft.adapt(layers, method=method, **options)
        except ValueError:                               # there is no such block, or reflections
            continue
        if trainable(layers) > budget:
            break
        best = size
    if not best:
        raise ValueError(f"no size has at most {budget:,} parameters: --rank or --budget")
    return best


def trainable(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def make_cell(task, method, support, args):
    """All that a result depends on but rate and seed; support None: the method's own."""
    support = support or OWN.get(method, "all")
    options, size, ahead = args.options if method == "loft" else {}, args.rank, 0
    if support == "narrow":
        ahead = args.steps // 4
    elif support in ("lookahead", "lookahead-plain"):
        ahead = min(50, args.steps // 4)
    if method in ("frozen", "full", "goft") or size and method in ("oft", "boft"):
        size = None
    else:
        size = size or largest(task, method, args.budget, **options)
    return dict(task=task.name, method=method, support=support, size=size, options=options,
                align=support in ALIGNED, lookahead_steps=ahead, steps=args.steps,
                pretrain_steps=args.pretrain_steps)


def adapt(model, task, cell):
    """Puts the cell's adapter on the model, in place; returns what choosing its support took."""
    method, support, size, options, ahead, seed = (cell[k] for k in (
        "method", "support", "size", "options", "lookahead_steps", "seed"))
    P, cost = {}, {}
    wide = ahead if support == "narrow" else 0           # steps of training at twice the rank
    if support in SUPPORTS:
        kind = "skew" if ahead else support.removesuffix("-plain")
        generator = torch.Generator().manual_seed(1000 + seed)
        batches = [task.draw(generator) for _ in range(max(8, ahead - wide))]
        peak_mib()
        start = time.perf_counter()
        P = selectors.select(
            model, batches, task.loss_fn, 2 * size if wide else size, kind, align=cell["align"],
            side=options.get("side", "input"), seed=seed, lookahead=ahead - wide,
            trainable=r"^head\." if task.head else ())
        cost = dict(select_s=time.perf_counter() - start, select_mib=peak_mib())
    if method in loft.METHODS:
        if P and method != "lora":
            options = options | {"support": P}
        elif size:
            options = options | {SIZE.get(method, "rank"): size}
        loft.adapt(model, method=method, seed=seed, backend="fused", **options)
        for name in P if method == "lora" else ():       # a support is where its A begins
            model.get_submodule(name).rotation.A.data.copy_(P[name].mT)
    else:
        model.requires_grad_(method == "full")
    if task.head:
        model.head.requires_grad_(True)
    if wide:
        fit(task, model, wide, 5e-3, 500 + seed, "wide", cell["steps"])
        selectors.narrow(model, batches, task.loss_fn, size)
    return cost


def peak_mib():
    """Peak memory of this process since the last call, on Linux; elsewhere 0."""
    if not Path("/proc/self/clear_refs").exists():
        return 0.0
    peak = Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]
    Path("/proc/self/clear_refs").write_text("5")
    return int(peak) / 2 ** 10


def run(task, cell, args):
    """The row of a cell: one of args.rows, or measured on a copy of the task's model, and saved."""
    for row in args.rows:
        if row.items() >= cell.items():
            return row
    model = copy.deepcopy(task.model)
    cost = adapt(model, task, cell)
    ms, curve = fit(
        task, model, cell["steps"] - cell["lookahead_steps"], cell["lr"], cell["seed"],
        f"{task.name} {cell['method']} {cell['support'] or ''} {cell['size'] or ''} "
        f"lr {cell['lr']:g} seed {cell['seed']}")
    row = cell | task.start | cost | dict(
        ms_per_step=ms, curve=curve, peak_mib=peak_mib(), trainable=trainable(model),
        after=task.bits(model, "val"), tune=task.bits(model, "tune"), kept_after=task.kept(model),
        measures=task.measures(model), orthogonality_error=None)
    if loft.layers(model):
        row["orthogonality_error"] = max(loft.orthogonality_error(model).values(), default=None)
        loft.save(model, args.out / f"{task.name}-{cell['method']}-{len(args.rows)}.pt")
    with open(args.out / "results.jsonl", "a") as file:
        file.write(f"\n{json.dumps(row)}")               # one that a kill cuts short is left alone
    args.rows.append(row)
    return row


def sweep(task, method, support, args, rows):
    """Puts a cell's rows into `rows`, one a seed: every rate is tried on the first, and the best on
    the tune split goes on. What fails becomes a line of args.failed."""
    if method == "frozen" and not task.head:             # that is the line "before"
        return
    name = support.removesuffix("-plain") if support else method
    rates = args.lr or [RATES.get(name, 1e-2)]
    for seed in range(args.seeds):
        for lr in rates:
            try:
                cell = make_cell(task, method, support, args) | dict(lr=lr, seed=seed)
                rows.append(run(task, cell, args))
            except Exception as e:                       # the other cells go on
                args.failed.append(f"failed: {task.name} {name} lr {lr} seed {seed}: {e!r}")
                print(f"\n{args.failed[-1]}")
        if seed == 0 and rows:
            rows[:] = [min(rows, key=lambda row: row["tune"])]
            rates = [rows[0]["lr"]]


# --------------------------------------------------------------------------------------------------
# Results

def shown(values):
    """The mean over the seeds, ± the deviation."""
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread}"


def table(cells):
    """A task's results as text: a line a cell, which is given as its rows, one a seed."""
    cells = [rows for rows in cells if rows]
    first = cells[0][0]
    text = f"{first['task']:25}{'size':>5}{'lr':>7}{'ahead + steps':>15}{'trainable':>11}"
    for name in ("bits", *first["measures"], "old bits"):
        text += f"{name:>16}"
    text += f"{'ms/step':>9}{'choosing s':>12}{'peak MiB':>10}{'orth. error':>13}\n{'before':63}"
    for value in (first["before"], *first["measures_before"].values(), first["kept_before"]):
        text += f"{value:16.3f}"
    for rows in cells:
        row, ahead = rows[0], rows[0]["lookahead_steps"]
        text += (f"\n{row['method']:8}{row['support'] or '':17}{row['size'] or '':>5}{row['lr']:7g}"
                 f"{ahead:9} + {row['steps'] - ahead:3}{row['trainable']:11,}")
        for values in zip(*([r["after"], *r["measures"].values(), r["kept_after"]] for r in rows)):
            text += f"{shown(values):>16}"
        text += (f"{row['ms_per_step']:9.1f}{row.get('select_s', 0):12.1f}{row['peak_mib']:10.0f}"
                 f"{row['orthogonality_error'] or math.nan:13.0e}")
    return text


def read(folder):
    """The rows of a run: those of its lines that are whole."""
    lines = (folder / "results.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]


def fastest():
    """One thread or all: on a busy machine two that wait for each other are slower than one."""
    x, W, seconds = torch.randn(2048, 128), torch.randn(128, 512), {}
    for n in (torch.get_num_threads(), 1):
        torch.set_num_threads(n)
        seconds[n] = timeit.timeit(lambda: x @ W, number=100)
    return min(seconds, key=seconds.get)


def begin(args):
    """Makes the run's folder; args.rows are those finished there, args.failed what will fail."""
    torch.set_num_threads(args.threads or fastest())
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "results.jsonl").touch()
    about = vars(args) | dict(torch=torch.__version__, python=sys.version)
    (args.out / "settings.json").write_text(json.dumps(about, indent=1, default=str))
    args.rows, args.failed = read(args.out), []
    print(f"{args.out}/: {len(args.rows)} cells are finished; torch {torch.__version__}, "
          f"{args.device}, threads: {torch.get_num_threads()}")


def main(argv=None):
    """Runs what the settings name; returns the rows, as in results.jsonl."""
    argv = sys.argv[1:] if argv is None else argv
    if any(word.split("=")[0] in ("--model", "--data") for word in argv):
        from lab import own
        return own.main(argv)
    args = parse(argv)
    tables = {name: [] for name in args.task}
    begin(args)
    try:
        for name in args.task:
            task = prepare(name, args)
            for method in args.method:
                for support in args.support if method == "loft" else [None]:
                    tables[name].append([])
                    sweep(task, method, support, args, tables[name][-1])
    except KeyboardInterrupt:
        args.failed.append(f"interrupted: python train.py --resume {args.out} goes on")
    text = "\n\n".join(table(cells) for cells in tables.values() if any(cells))
    (args.out / "table.txt").write_text(text)
    print(f"\n{text}\n\nwritten to {args.out}/", *args.failed, sep="\n")
    if args.failed:
        raise SystemExit(1)
    return args.rows


if __name__ == "__main__":
    main()
