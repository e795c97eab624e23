"""Adapt a pretrained network with LOFT, and with its peers beside it, offline, in minutes.

    pip install torch && python train.py                       # prose → code, 3 to 5 minutes on 2 CPU cores
    python train.py --task vision                              # or understanding, math, multilingual: see tasks.py
    python train.py --support skew,principal --rank 8,32 --seeds 3 --lr 1e-3,3e-3 --out runs/grid      # a sweep
    python train.py --resume runs/grid                         # goes on where it was stopped, bit for bit
    python train.py --model DIR --data FILE.jsonl              # your own (needs transformers)
    torchrun --nproc_per_node=2 train.py                       # the same result on several devices
    python train.py --report runs/* --plot                     # one table over runs and seeds
    python train.py --compare methods                          # LOFT and its peers on every task, 3 seeds, tuned rates
    python train.py --help

A run is a grid of cells: task × method × support × rank × rate × seed. A cell adapts a copy of the task's pretrained model,
measures it before and after, on the new domain and the old, and becomes a line of runs/NAME/results.jsonl. Beside it:
settings.json, metrics.jsonl (a line an evaluation), table.txt, and the adapter of every cell.
"""
from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import hashlib
import importlib.util
import io
import itertools
import json
import math
import os
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.nn                                                    # before there is a group: its functions would keep that alive as a default
from torch import nn

import loft
import tasks
from loft import kernels, selectors
from own import own
from report import complete, plot, show
from tasks import TASKS, Task, to

METHODS = ("frozen", *loft.METHODS, "full")
SUPPORTS = (*selectors.KINDS, "allocated")                                     # allocated: skew, as many parameters in all, ranks by σ
# Learning rates by default, the best of README's grids: 1e-2 where a support's score is more than half of skew's, 3e-2 below.
RATES = {"random": 3e-2, "minor": 3e-2, "coordinate": 3e-2, "oft": 3e-2, "hra": 3e-2, "lora": 3e-2, "full": 3e-3}
NOT_OF_A_CELL = {"out", "resume", "report", "plot", "compare", "task", "method", "support", "rank", "budget", "lr", "seeds", "seed",
                 "device", "save_every", "export", "grid"}                     # every other setting is part of what a cell is


# ---------------------------------------------------------------------------------------------------------
# Files that survive anything, and several devices
# ---------------------------------------------------------------------------------------------------------

def write(path: Path, data: bytes) -> None:
    """All of it or nothing; on several devices, the first one writes."""
    if rank() == 0:
        loft._write(path, data)


def dump(value) -> bytes:
    torch.save(value, buffer := io.BytesIO())
    return buffer.getvalue()


def append(path: Path, row: dict) -> None:
    if rank() == 0:
        with open(path, "a") as file:
            file.write(json.dumps(row) + "\n")


def read_rows(path: Path, mend: bool = False) -> list[dict]:
    """The lines of a .jsonl file but for a last one that a kill cut short; `mend` takes that off the file too."""
    text = path.read_text() if path.exists() else ""
    whole = text[:text.rfind("\n") + 1]
    if mend and whole != text:
        write(path, whole.encode())
    try:
        return [json.loads(line) for line in whole.splitlines()]
    except ValueError as e:
        raise SystemExit(f"{path} is damaged: {e}")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def of_all(value: torch.Tensor, device) -> list[torch.Tensor]:
    """The value on every device, in the order of ranks."""
    values = [torch.empty_like(value, device=device) for _ in range(world())]
    dist.all_gather(values, value.to(device)) if world() > 1 else values[0].copy_(value)
    return [v.cpu() for v in values]


def wrap(model: nn.Module, args, everything: bool) -> nn.Module:
    """What training calls: the model itself, under DDP, or with its frozen weights in shards (FSDP2)."""
    if world() == 1:
        return model
    if not args.shard:                                                         # full fine-tuning may have weights that are unused
        return nn.parallel.DistributedDataParallel(model, broadcast_buffers=False, find_unused_parameters=everything)
    from torch.distributed.fsdp import fully_shard
    adapter = {p for p in model.parameters() if p.requires_grad}               # small: a whole copy on every device
    for p in adapter:
        p.data = p.data.to(args.device)
    for module in [m for holder in model.modules() if isinstance(holder, nn.ModuleList) for m in holder]:
        fully_shard(module, ignored_params=adapter)
    return fully_shard(model, ignored_params=adapter)


# ---------------------------------------------------------------------------------------------------------
# Loop
# ---------------------------------------------------------------------------------------------------------

class Progress:
    """One updating line in a terminal, a plain line every quarter of the way when piped: loss, speed, time left."""

    def __init__(self, label: str, steps: int, done: int = 0):
        self.label, self.steps, self.done, self.start, self.last = label, steps, done, time.perf_counter(), 0.0
        self.terminal = sys.stdout.isatty()

    def __call__(self, step: int, loss: float):
        now = time.perf_counter()
        rate = (step - self.done) / (now - self.start)
        line = f"{self.label}  step {step}/{self.steps}  loss {loss:.3f}  {rate:.1f} steps/s  {(self.steps - step) / rate:.0f} s left"
        if self.terminal and (now - self.last > 0.1 or step == self.steps):
            self.last = now
            print(f"\r\x1b[K{line}", end="\n" if step == self.steps else "", flush=True)
        elif not self.terminal and (step % math.ceil(self.steps / 4) == 0 or step == self.steps):
            print(line, flush=True)


def fit(task: Task, model: nn.Module, steps: int, lr: float, seed: int, args, name: str, *, state: dict | None = None,
        keep=None, refresh=None, evaluate=None, everything: bool = False) -> dict:
    """Adam on the parameters that require grad: warm-up, cosine decay to 0, clipping, accumulation, early stop.

    A step takes task.batch(generator, args.batch), cuts it into accumulate × devices pieces, and weighs each by its
    predictions, so pieces and devices change the result by rounding only. `state` is what `keep` was given at some
    step: with it training goes on there, bit for bit. Returns the last state; its curve is [(step, evaluate(model))].
    """
    trained, parameters = wrap(model, args, everything), [p for p in model.parameters() if p.requires_grad]
    device = next(model.parameters()).device
    optimizer = torch.optim.Adam(parameters, lr, betas=(0.9, 0.99))
    warm = max(1, int(steps * args.warmup))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min((s + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * s / steps)))
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed * 1000 + rank())                                    # dropout
    state = state or dict(step=0, curve=[], ms=[], best=None)
    if state["step"]:
        if len(state["rng"]) != world():
            raise SystemExit(f"the checkpoint is of {len(state['rng'])} devices, not {world()}: start as many")
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        generator.set_state(state["generator"])
        torch.set_rng_state(state["rng"][rank()])
        if device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"][rank()])
    progress = Progress(name, steps, state["step"])
    to_train(model)
    for step in range(state["step"] + 1, steps + 1):
        began = time.perf_counter()
        batch, n = task.batch(generator, args.batch or task.size), args.accumulate * world()
        pieces = list(zip(*(t.tensor_split(n) for t in batch)))[rank()::world()]
        total, value = task.count(batch), torch.zeros((), device=device)
        for i, piece in enumerate(pieces):
            last = i == len(pieces) - 1
            with contextlib.nullcontext() if last or not hasattr(trained, "no_sync") else trained.no_sync():
                with torch.autocast(device.type, torch.bfloat16, enabled=args.autocast):
                    loss = task.loss_fn(trained, to(piece, device)) * (task.count(piece) / total)
                (loss * world()).backward()                                    # DDP takes the mean over the devices
            value += loss.detach()
        if world() > 1:
            dist.all_reduce(value)
            for p in parameters if args.shard else ():
                dist.all_reduce(p.grad)
                p.grad /= world()
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        value = value.item()
        if not (math.isfinite(value) and norm.isfinite()):
            first = next((n for n, p in model.named_parameters() if not p.isfinite().all()), None) or next(
                (n for n, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()), "the loss alone")
            raise FloatingPointError(f"{name.strip()}: the loss is {value}, the gradient's norm {norm:g} at step {step} (first in {first}); "
                                     "lower --lr, or set --clip")
        if args.clip:
            nn.utils.clip_grads_with_norm_(parameters, args.clip, norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        state["ms"].append((time.perf_counter() - began) * 1e3)
        progress(step, value)
        if refresh and args.refresh and step % args.refresh == 0 and step < steps:
            refresh(model, optimizer, step)
            parameters = [p for p in model.parameters() if p.requires_grad]    # new ones, which DDP has to learn of
            trained = wrap(model, args, everything)
        state["step"] = step
        if evaluate and (step % args.eval_every == 0 or step == steps):
            model.eval()
            state["curve"].append((step, tuned := evaluate(model, step, value, schedule.get_last_lr()[0])))
            to_train(model)
            if args.patience and (state["best"] is None or tuned < state["best"][0]):
                state["best"] = (tuned, step, weights(model))
            if args.patience and sum(s > state["best"][1] for s, _ in state["curve"]) >= args.patience:
                print(f"{name}  stopped early at step {step}: the best was step {state['best'][1]}")
                break
        if keep and (step % args.save_every == 0 and step < steps):
            cuda = of_all(torch.cuda.get_rng_state(), device) if device.type == "cuda" else []
            keep(state | dict(optimizer=optimizer.state_dict(), schedule=schedule.state_dict(), generator=generator.get_state(),
                              rng=of_all(torch.get_rng_state(), device), cuda_rng=cuda, weights=weights(model)))
    if state["best"]:
        restore(model, state["best"][2])
    model.eval()
    return state


def to_train(model: nn.Module) -> None:
    """model.train(), but the statistics of frozen batch norms stay as frozen as their weights."""
    model.train()
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and not any(p.requires_grad for p in m.parameters()):
            m.eval()


def weights(model: nn.Module) -> dict:
    """What training changes: the adapter with whatever else trains, as the bytes of its file, or every trainable weight and buffer."""
    if loft.layers(model):
        loft.save(model, buffer := io.BytesIO())
        return {"adapter": buffer.getvalue()}
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    return {"weights": {n: t.clone() for n, t in model.state_dict().items() if n not in frozen}}


def restore(model: nn.Module, saved: dict) -> None:
    """The inverse of `weights`, on the same model (or, of an adapter, on a plain one)."""
    if "adapter" in saved:
        loft.load(model, io.BytesIO(saved["adapter"]))
    with torch.no_grad():
        own = model.state_dict()
        for n, value in saved.get("weights", {}).items():
            own[n].copy_(value)


# ---------------------------------------------------------------------------------------------------------
# One cell of the grid, one row of the table
# ---------------------------------------------------------------------------------------------------------

def ready(task: Task, args) -> Task:
    """Brings the model to where adaptation begins: pretrained on the old domain (cached), a new head trained alone."""
    old = task.old
    if old and old.batch:
        steps = args.pretrain_steps or old.steps
        recipe = hashlib.sha256(f"{old.model}{steps}{sys.version_info[:2]}{Path(tasks.__file__).read_text()}".encode())
        cache = args.out.parent / f"pretrained-{old.name}-{recipe.hexdigest()[:12]}.pt"
        old.model.to(args.device)
        found = cache.exists()
        try:
            old.model.load_state_dict(torch.load(cache, map_location=args.device, weights_only=True)) if found else None
        except Exception as e:
            found = False
            print(f"{cache} is damaged, so once more: {e}")
        if found:
            print(f"1. {task.name}: pretrained weights found in {cache}")
        else:
            print(f"1. {task.name}: pretraining {sum(p.numel() for p in old.model.parameters()):,} parameters on {old.name}")
            partly = cache.with_suffix(".checkpoint")
            if state := torch.load(partly, map_location="cpu", weights_only=True) if partly.exists() else None:
                restore(old.model, state["weights"])
            fit(old, old.model, steps, old.lr, 0, plain(), "pretraining", state=state,
                keep=lambda s: write(partly, dump(s)), everything=True)
            write(cache, dump(old.model.state_dict()))
            partly.unlink(missing_ok=True)
    task.model.to("cpu" if args.shard else args.device).requires_grad_(False).eval()   # shards go to the devices one by one
    if task.probe and task.trainable:
        for n, p in task.model.named_parameters():
            p.requires_grad_(task.trains(n))
        fit(task, task.model, args.probe_steps or task.probe, 1e-2, 0, plain(), "linear probe")
    task.model.requires_grad_(False)
    if args.dtype:
        task.model.to(args.dtype)
    if args.checkpointing:
        for m in task.model.modules():
            if hasattr(m, "gradient_checkpointing_enable"):                    # transformers' own way
                m.gradient_checkpointing_enable({"use_reentrant": False})
                break
            if hasattr(m, "checkpointing"):
                m.checkpointing = True
    return task


def plain() -> argparse.Namespace:
    """The settings of pretraining and probe."""
    return argparse.Namespace(batch=None, accumulate=1, shard=False, warmup=0.1, clip=None, autocast=False, refresh=None, patience=None,
                              save_every=200)


def sizes(method: str, shapes: list[tuple[int, int]], budget: int) -> int | None:
    """The largest rank (block of oft and boft, reflections of hra) with which `method` trains at most `budget` parameters.

    shapes: (rotated dimension d, the other one) of every layer. ValueError where even the smallest takes more.
    """
    count = {"loft": lambda d, n, r: min(r, d) * (min(r, d) - 1) // 2, "psoft": lambda d, n, r: min(r, d) * (min(r, d) + 3) // 2,
             "lora": lambda d, n, r: r * (d + n), "hra": lambda d, n, k: k * d,
             "oft": lambda d, n, b: d * (b - 1) // 2, "boft": lambda d, n, b: 2 * d * (b - 1) // 2}
    if method not in count:
        return None                                                            # goft, full and frozen have no size
    divisor = math.gcd(*(d for d, _ in shapes))
    candidates = {"oft": [b for b in range(2, divisor + 1) if divisor % b == 0], "hra": range(2, 4096, 2), "lora": range(1, 4096),
                  "boft": [b for b in range(2, divisor + 1, 2) if divisor % (2 * b) == 0]}.get(method, range(2, 4096))   # two stages
    total = lambda size: sum(count[method](d, n, size) for d, n in shapes)
    good = [s for s in candidates if total(s) <= budget]
    if not good:
        least = f"its least is {total(candidates[0]):,}" if candidates else f"no block divides all dimensions (their greatest divisor is {divisor})"
        raise ValueError(f"{method} has no size of at most {budget:,} parameters: {least}; give --budget or --rank, or leave it out")
    return min(good, key=lambda s: (-total(s), s))


def targets(task: Task, args) -> dict[str, nn.Module]:
    """The layers to adapt: --targets, or every linear one but heads."""
    try:
        found = loft.target_layers(task.model, args.targets)
    except ValueError as e:
        raise SystemExit(f"--targets: {e}" if args.targets else str(e))
    head = lambda n, m: any(task.trains(f"{n}.{k}") for k, _ in m.named_parameters())
    return {n: m for n, m in found.items() if args.targets or not head(n, m)}


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


def stem(cell: dict) -> str:
    """The name of a cell's files."""
    size, lr = cell["size"] and f"r{cell['size']}", cell["lr"] and f"lr{cell['lr']:g}"
    return "-".join(str(v) for v in (cell["task"], cell["method"], cell["support"], size, lr, f"seed{cell['seed']}") if v)


def choose(model: nn.Module, task: Task, cell: dict, calibration: list, args, step: int = 0) -> dict[str, torch.Tensor]:
    """The cell's supports for a fresh model, or new ones, at the same ranks, for an adapted one."""
    support, side = cell["support"], cell["side"] if cell["method"] == "loft" else "input"
    adapted = {n: layer.rotation.r for n, layer in loft.layers(model)}
    ranks = adapted or {n: min(cell["size"], loft._shape(m)[loft.SIDES.index(side)]) for n, m in targets(task, args).items()}
    more = dict(targets=lambda n, m: n in ranks, side=side, seed=cell["seed"] + step)
    if support == "allocated" and not adapted:
        return selectors.within(model, calibration, task.loss_fn, sum(r * (r - 1) // 2 for r in ranks.values()),
                                max_rank=max(64, 2 * max(ranks.values())), **more)
    return selectors.select(model, calibration, task.loss_fn, ranks, "skew" if support == "allocated" else support, **more)


NOTHING_CHOSEN = dict(score=None, select_s=0.0, select_mib=0.0)


def adapt(model: nn.Module, task: Task, cell: dict, calibration: list, args) -> dict:
    """Puts the cell's adapter on the model. Returns what choosing its support cost, and what the choice is worth."""
    method, support, size, cost = cell["method"], cell["support"], cell["size"], NOTHING_CHOSEN
    more = dict(transform=cell["transform"], side=cell["side"]) if method == "loft" else {}
    if method in ("oft", "boft") and size:
        more["block_size"] = size
    elif method in ("hra", "lora"):
        more["rank"] = size
    if support not in (None, "all"):
        low, began = peak(args.device, reset=True), time.perf_counter()
        support = choose(model, task, cell, calibration, args)
        cost = dict(select_s=round(time.perf_counter() - began, 3), select_mib=round(peak(args.device) - low, 1))
        worth = selectors.scores(model, calibration, task.loss_fn, support, side=more.get("side", "input"))
        cost["score"] = math.hypot(*worth.values()) / args.calibration
    found = support if isinstance(support, dict) else targets(task, args)      # a support may leave layers out
    loft.adapt(model, lambda n, m: n in found, method=method, support=support, seed=cell["seed"], backend=args.backend,
               trainable=task.trainable or (), **more)
    return cost


def run(task: Task, cell: dict, before: dict, args, line: str) -> dict:
    """Adapts a copy of the task's model as the cell says, and measures it. Goes on from the cell's checkpoint, if there is one."""
    gc.collect()                                                               # the last cell's model goes before memory is measured
    method, seed, checkpoint = cell["method"], cell["seed"], args.out / f"{stem(cell)}.checkpoint"
    state = torch.load(checkpoint, map_location="cpu", weights_only=True) if checkpoint.exists() else None
    trains = lambda n: method == "full" or task.trains(n)
    shared = {id(p): p for n, p in task.model.named_parameters() if not trains(n) and not args.shard}  # what is frozen is not copied
    model = copy.deepcopy(task.model, shared)
    generator = torch.Generator().manual_seed(1000 + seed)
    draws = [task.batch(generator, args.batch or task.size) for _ in range(args.calibration)]
    calibration = [to(batch, next(model.parameters()).device) for batch in draws[rank()::world()]]
    lines = read_rows(args.out / "metrics.jsonl")                              # what came after the checkpoint comes again
    kept = [line for line in lines if line["cell"] != stem(cell) or state and line["step"] <= state["step"]]
    if len(kept) < len(lines):
        write(args.out / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in kept).encode())
    cost = state["cost"] if state else NOTHING_CHOSEN
    if state and "adapter" in state["weights"]:
        restore(model, state["weights"])
        kernels.fuse(model) if args.backend == "fused" else None
    elif method in loft.METHODS:
        cost = adapt(model, task, cell, calibration, args)
    else:
        if method == "full":                                                   # bf16 would round its steps away
            model.float()
        for n, p in model.named_parameters():
            p.requires_grad_(trains(n))
        restore(model, state["weights"]) if state else None
    peak(args.device, reset=True)
    if args.compile:
        model.compile()

    def evaluate(model, step, loss, lr):
        tuned = task.bits(model, "tune", args.eval_batches)
        append(args.out / "metrics.jsonl", dict(cell=stem(cell), step=step, loss=loss / math.log(2), tune=tuned, lr=lr))
        return tuned

    if cell["lr"]:
        state = fit(task, model, args.steps, cell["lr"], seed, args, line, state=state, evaluate=evaluate, everything=method == "full",
                    keep=lambda s: write(checkpoint, dump(s | dict(cost=cost))), refresh=cost["score"] is not None and (
                        lambda model, optimizer, step: loft.refresh(model, choose(model, task, cell, calibration, args, step), optimizer)))
    else:
        state = dict(step=0, curve=[], ms=[0.0])
    row = cell | cost | dict(
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad), before=before["val"], after=task.bits(model, "val"),
        tune=task.bits(model, "tune"), kept_before=before["kept"], kept_after=task.kept(model), measures_before=before["measures"],
        measures=measures(task, model), curve=state["curve"], stopped=state["step"], ms_per_step=round(statistics.median(state["ms"]), 2),
        peak_mib=round(peak(args.device), 1), orthogonality_error=None)
    if loft.layers(model):
        if method != "lora":
            row["orthogonality_error"] = max(loft.orthogonality_error(model).values())
        if rank() == 0:
            loft.save(model, args.out / f"{stem(cell)}.pt")
    if args.export and rank() == 0:
        folder = args.out / f"{stem(cell)}-merged"
        folder.mkdir(exist_ok=True)
        merged = loft.merge(model) if loft.layers(model) else model
        task.export(merged, folder) if task.export else write(folder / "model.pt", dump(merged.state_dict()))
    append(args.out / "results.jsonl", row)
    if rank() == 0:
        checkpoint.unlink(missing_ok=True)
    return row


def measures(task: Task, model: nn.Module) -> dict[str, float]:
    """What a task reports beside the loss: further splits, accuracies."""
    return {split: task.bits(model, split) for split in task.splits if split not in ("tune", "val")} | task.measure(model)


# ---------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------

def one_of(*valid: str):
    """argparse type: comma-separated values out of `valid`."""
    def parse(text: str) -> list[str]:
        for value in text.split(","):
            if value not in valid:
                raise argparse.ArgumentTypeError(f"{value!r} is not one of {', '.join(valid)}{loft._nearest(value, valid)}")
        return text.split(",")
    return parse


def number(least: float, most: float):
    """argparse type: a number from `least` to `most`."""
    def parse(text: str) -> float:
        with contextlib.suppress(ValueError):
            if least <= float(text) <= most:
                return float(text)
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from {least:g} to {most:g}")
    return parse


def several(kind):
    """argparse type: comma-separated positive numbers."""
    def parse(text: str) -> list:
        try:
            values = [kind(v) for v in text.split(",")]
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a comma-separated list of numbers")
        if min(values) <= 0 or not all(map(math.isfinite, values)):
            raise argparse.ArgumentTypeError(f"{text!r}: positive numbers are wanted")
        return values
    return parse


def positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what, how, loop, out = (parser.add_argument_group(t) for t in ("what to adapt", "how", "training", "results"))
    add = what.add_argument
    add("--task", type=one_of(*TASKS), help=f"any of {', '.join(TASKS)} (comma-separated; default code)")
    add("--model", help="a model of transformers: a folder or a name")
    add("--data", type=Path, help=".txt; .jsonl or .csv with text, prompt and response, or text and label; .pt with images x and classes y")
    add("--val", type=Path, help="the same to measure on (default: a tenth of --data)")
    add("--old", type=Path, help="a text of the old domain, to measure what is forgotten")
    add("--context", type=positive, help="tokens in a row (default 512, or what the model takes)")
    add = how.add_argument
    add("--method", type=one_of(*METHODS), help=f"any of {', '.join(METHODS)} (default frozen,loft,psoft,oft,lora,full)")
    add("--support", type=one_of(*SUPPORTS), help=f"of loft, any of {', '.join(SUPPORTS)} (default random,principal,gradient,skew)")
    add("--rank", type=several(int), help="of supports and lora, reflections of hra (oft and boft keep their blocks)")
    add("--budget", type=several(int), help="trainable parameters, instead of a rank: every method takes its largest size below "
        "(default: what LoRA has at rank 1, its least)")
    add("--transform", choices=list(loft.TRANSFORMS), help="of loft; default cayley")
    add("--side", choices=loft.SIDES, default="input", help="of loft")
    add("--targets", help="regex of the layers to adapt (default: all linear ones but heads)")
    add("--calibration", type=positive, default=8, help="batches that a support is chosen from (default 8)")
    add("--refresh", type=positive, help="of loft and psoft: every so many steps, keep the rotation and choose a new support at the new point")
    add("--backend", choices=("eager", "fused"), default="fused", help="loft.py's own lines, or their fast twins in kernels.py (default)")
    add = loop.add_argument
    add("--lr", type=several(float), help="several: tried on the first seed, and the best on the tune split goes on "
        "(default: one for each method and support)")
    add("--grid", action="store_true", help="every rate on every seed")
    add("--steps", type=positive, default=200, help="default 200")
    add("--batch", type=positive, help="examples in a step, over all devices (default: the task's)")
    add("--accumulate", type=positive, default=1, help="pieces of a batch that a device takes one after another")
    add("--warmup", type=number(0, 1), default=0.1, help="share of the steps, before a cosine decay (default 0.1)")
    add("--clip", type=number(1e-6, 1e6), help="largest norm of the gradient")
    add("--patience", type=positive, help="stop after so many evaluations on the tune split without gain; the best weights stay")
    add("--eval-every", type=positive, help="steps (default a tenth)")
    add("--eval-batches", type=positive, default=2, help="of the tune split, in an evaluation (default 2)")
    add("--seed", type=int, default=0, help="the first seed: data order, calibration, random supports, dropout")
    add("--seeds", type=positive, help="how many seeds, --seed and up (default 1)")
    add("--dtype", choices=("float32", "bfloat16"), help="of the model, a new head too; adapters stay in float32 (default: as it comes)")
    add("--autocast", action="store_true", help="compute in bfloat16 where it is safe")
    add("--checkpointing", action="store_true", help="activations are computed again in backward, not kept")
    add("--compile", action="store_true", help="torch.compile the model")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--shard", action="store_true", help="under torchrun: the frozen weights in shards (FSDP2), not a whole copy on each device")
    add("--pretrain-steps", type=positive, help="of the old domain (default: the task's)")
    add("--probe-steps", type=positive, help="that a new head is first trained alone (default: the task's)")
    add = out.add_argument
    add("--out", type=Path, help="folder of the results (default runs/ and the time)")
    add("--resume", nargs="?", const=True, metavar="DIR", help="go on with the run in DIR (or --out): its settings unless given, finished "
        "cells are skipped, the one in progress goes on at its last checkpoint")
    add("--save-every", type=positive, default=50, help="steps from checkpoint to checkpoint (default 50)")
    add("--export", action="store_true", help="also write the merged model, in the format it came in")
    add("--compare", choices=("supports", "methods"), help="README's tables: every support on code and understanding (rank 16, 5 seeds), or "
        "LOFT and its peers on every task (3 seeds); rates tuned on the first seed")
    add("--report", type=Path, nargs="+", metavar="DIR", help="no training: one table over the results of these runs")
    add("--plot", action="store_true", help="also draw curves, and loss against parameters (needs matplotlib)")
    return parser


def parse_args(argv: list[str]) -> argparse.Namespace:
    p = parser()
    args = p.parse_args(argv)
    if args.resume:
        args.out = args.out if args.resume is True else Path(args.resume)
        if not args.out or not (args.out / "settings.json").exists():
            p.error(f"--resume: {args.out or 'no folder given; --resume DIR'}{' holds no settings.json of a run' if args.out else ''}")
        try:
            given = [str(word) for word in json.loads((args.out / "settings.json").read_text())["argv"]]
        except (ValueError, KeyError, TypeError):
            p.error(f"--resume: {args.out / 'settings.json'} is not what a run writes")
        old, args, folder = p.parse_args(given), p.parse_args([*given, *argv]), args.out
        for key, value in vars(args).items():
            if key not in NOT_OF_A_CELL and value != getattr(old, key):
                p.error(f"--resume: --{key.replace('_', '-')} was {getattr(old, key)} there, not {value}; other settings belong in another --out")
        args.out = folder
    elif args.out and not args.report and ((args.out / "results.jsonl").exists() or any(args.out.glob("*.checkpoint"))):
        p.error(f"--out {args.out} holds a run: --resume {args.out} goes on with it, another --out begins one")
    if bool(args.model) != bool(args.data) or args.model and args.task:
        p.error("--model and --data go together, without --task")
    if stray := [k for k in ("val", "old", "context") if getattr(args, k) and not args.model]:
        p.error(f"--{stray[0]} goes with --model and --data")
    if args.shard and "full" in (args.method or ()):
        p.error("--shard is for adapters: it shards what is frozen, and --method full freezes nothing")
    if args.rank and args.budget:
        p.error("--rank and --budget both set the size; give one")
    if args.transform not in (None, "cayley", "cayley_neumann", "expm") and not args.rank:
        p.error(f"--transform {args.transform} needs --rank: a budget is counted for cayley, cayley_neumann and expm, r(r-1)/2")
    if args.dtype == "bfloat16" and "full" in (args.method or ()):
        p.error("--dtype bfloat16 rounds the weights that full fine-tuning trains; take --autocast")
    if args.shard and args.refresh:
        p.error("--shard goes without --refresh: a support is chosen from whole weights")
    if args.shard and args.export:
        p.error("--export puts the weights together that --shard takes apart; load the adapter on one device and merge there")
    compare = args.compare
    args.task = ["own"] if args.model else args.task or {"supports": ["code", "understanding"], "methods": list(TASKS)}.get(compare, ["code"])
    args.method = args.method or {"supports": ["frozen", "loft"], "methods": ["frozen", "loft", "psoft", "oft", "hra", "lora", "full"]}.get(compare) or [
        m for m in ("frozen", "loft", "psoft", "oft", "lora", "full") if not (m == "full" and (args.shard or args.dtype == "bfloat16"))]
    args.support = args.support or {"supports": list(SUPPORTS), "methods": ["principal", "skew"]}.get(
        compare, ["random", "principal", "gradient", "skew"])
    args.rank = args.rank or (None if args.budget or compare != "supports" else [16])
    args.seeds = args.seeds or {"supports": 5, "methods": 3}.get(compare, 1)
    args.lr = args.lr or {"supports": [1e-3, 3e-3, 1e-2, 3e-2], "methods": [1e-3, 3e-3, 1e-2, 3e-2, 1e-1]}.get(compare)
    if args.plot and not args.report and importlib.util.find_spec("matplotlib") is None:
        p.error("--plot needs the package matplotlib: pip install matplotlib")
    args.eval_every = args.eval_every or max(1, args.steps // 10)
    args.dtype = args.dtype and getattr(torch, args.dtype)
    if "RANK" in os.environ and not args.report:                               # started by torchrun
        dist.init_process_group("nccl" if args.device.startswith("cuda") else "gloo")
        args.device = f"cuda:{os.environ['LOCAL_RANK']}" if args.device == "cuda" else args.device
        if rank():
            sys.stdout = open(os.devnull, "w")
    pieces = args.accumulate * world()
    if args.calibration < world() or (args.batch or 8) < pieces:
        p.error(f"{pieces} pieces of a batch (--accumulate × devices) need --batch {pieces} or more, {world()} devices --calibration {world()}")
    try:
        args.device = torch.empty(0, device=args.device).device
    except (RuntimeError, AssertionError) as e:
        p.error(f"--device {args.device}: {str(e).splitlines()[0]}")
    if args.device.type == "cuda":
        torch.cuda.set_device(args.device)
    args.out = args.out or Path("runs") / time.strftime("%Y%m%d-%H%M%S")
    return args


def train(args, name: str, rows: list[dict], failed: list[str]) -> None:
    """Every cell of one task; of several learning rates, the best on the first seed goes on to the others."""
    torch.manual_seed(0)
    task = ready(own(args) if name == "own" else TASKS[name](args), args)
    model = task.model
    before = dict(val=task.bits(model, "val"), kept=task.kept(model), measures=measures(task, model))
    print(f"2. {name}: {before['val']:.3f} bits on the new domain" + (f", {before['kept']:.3f} on the old" if before["kept"] else "") + ", before adaptation")
    shapes = [loft._shape(m) for m in targets(task, args).values()]
    turned = [(d, n) if args.side == "input" else (n, d) for d, n in shapes]   # loft's rotated dimension first
    ranks = args.rank and [min(r, max(d for d, _ in turned)) for r in args.rank]   # a smaller layer takes its own dimension
    budgets = args.budget or [sum(map(sum, shapes))]
    settings = {k: str(v) if isinstance(v, (Path, torch.dtype)) else v for k, v in vars(args).items() if k not in NOT_OF_A_CELL}
    plan = []
    for method in args.method:
        supports = args.support if method == "loft" else [None] if method in ("frozen", "full") else [loft.METHODS[method]["support"]]
        try:
            wanted = [None] if method in ("frozen", "full", "goft") else ranks if ranks and method not in ("oft", "boft") else [
                None] if ranks else [sizes(method, turned if method == "loft" else shapes, b) for b in budgets]
        except ValueError as e:
            failed.append(str(e))
            print(f"\n{e}")
            continue
        plan += [dict(task=name, method=method, support=s, size=z) for s, z in itertools.product(supports, dict.fromkeys(wanted))]

    for i, base in enumerate(plan, 1):
        method, support = base["method"], base["support"]
        still = method == "frozen" and not task.trainable
        rates = [None] if still else args.lr or [RATES.get(support if method == "loft" else method, 1e-2)]
        tried: dict[float | None, float] = {}

        def attempt(lr, seed):
            cell = base | dict(lr=lr, seed=seed, **settings)
            line = f"[{name} {i}/{len(plan)}] {method} {support or ''} {base['size'] or ''}".ljust(36) + (f" lr {lr:g} seed {seed}" if lr else "")
            row = next((r for r in rows if all(r.get(k) == v for k, v in cell.items())), None)
            if row is None:
                try:
                    row = run(task, cell, before, args, line)
                except Exception as e:                                         # the other cells go on, unless devices would part
                    if world() > 1 and not isinstance(e, FloatingPointError):  # (NaN is one to all of them)
                        raise
                    failed.append(f"{line.strip()}: {type(e).__name__}: {e}")
                    return print(f"\n{failed[-1]}")
                rows.append(row)
            if seed == args.seed:
                tried[lr] = row["tune"]
        for lr in rates:
            attempt(lr, args.seed)
        for seed in range(args.seed + 1, args.seed + args.seeds) if tried and not still else ():
            for lr in rates if args.grid else [min(tried, key=tried.get)]:
                attempt(lr, seed)


def main(argv: list[str] | None = None) -> list[dict]:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    if args.report:
        rows = [row for folder in args.report if folder.is_dir() for row in complete(read_rows(folder / "results.jsonl"), folder)]
        if not rows:
            raise SystemExit(f"--report: no results.jsonl with a finished row in {', '.join(map(str, args.report))}")
        args.out = args.report[0].parent
        print(show(rows, bool(args.compare)))
        print(plot(rows, args.out / "plot.png") if args.plot else "")
        return rows
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise SystemExit(f"--out {args.out}: {e.strerror}")
    if not args.resume:
        about = dict(argv=argv, torch=torch.__version__, python=sys.version.split()[0], threads=torch.get_num_threads(), devices=world())
        write(args.out / "settings.json", json.dumps(about | {k: v for k, v in vars(args).items()}, indent=1, default=str).encode())
    rows, failed = read_rows(args.out / "results.jsonl", mend=True), []
    read_rows(args.out / "metrics.jsonl", mend=True)
    try:
        for name in args.task:
            train(args, name, rows, failed)
        stopped = False
    except KeyboardInterrupt:
        stopped = True
        print(f"\ninterrupted: python train.py --resume {args.out} goes on" + ("; what is finished:" if rows else ""))
    if rows:
        text = show(rows, args.compare == "supports")
        write(args.out / "table.txt", text.encode())
        print(f"\n{text}")
        print(plot(rows, args.out / "plot.png") if args.plot and rank() == 0 else "", end="")
    print("".join(f"\nfailed: {line}" for line in failed) + f"\nwritten to {args.out}/")
    if dist.is_initialized():
        gc.collect()                                                           # frees what holds the group: its threads must end before the interpreter
        dist.destroy_process_group()
        if args.shard:                                                         # DTensor's caches hold it for ever, and a thread of it may abort the end
            sys.stdout.flush()
            os._exit(130 if stopped else bool(failed))
    if failed or stopped:
        raise SystemExit(130 if stopped else 1)
    return rows


if __name__ == "__main__":
    main()
