"""What train.py's results say: one table over runs and seeds, what a support's score predicts, pictures.

A row is a line of results.jsonl: the settings of a cell, and what was measured of it.
"""
from __future__ import annotations

import json
import statistics
from pathlib import Path

import torch

NOT_A_SETTING = ("lr", "seed", "trainable", "score", "select_s", "select_mib", "before", "after", "tune", "kept_before", "kept_after",
                 "measures_before", "measures", "curve", "stopped", "ms_per_step", "peak_mib", "orthogonality_error")


def complete(rows: list[dict], path) -> list[dict]:
    """The rows that a table can hold; a file may be another version's."""
    good = [row for row in rows if isinstance(row, dict) and row.keys() >= {"task", "method", "support", "size", "seed", "steps", *NOT_A_SETTING}]
    if len(good) < len(rows):
        print(f"{path}: {len(rows) - len(good)} of {len(rows)} lines left out, which are no results of this version")
    return good


def groups(rows: list[dict]) -> list[list[dict]]:
    """The rows of each cell, all seeds, at its learning rate with the lowest loss on the tune split, over seeds that all rates ran."""
    found: dict = {}
    for row in rows:
        key = json.dumps({k: v for k, v in row.items() if k not in NOT_A_SETTING}, sort_keys=True)
        found.setdefault(key, {}).setdefault(row["lr"], {})[row["seed"]] = row     # the same cell twice: the later one
    best = []
    for by_lr in found.values():
        common = set.intersection(*map(set, by_lr.values()))
        tune = lambda by_seed: statistics.fmean(row["tune"] for seed, row in by_seed.items() if seed in (common or by_seed))
        best.append(list(min(by_lr.values(), key=tune).values()))
    return best


def aligned(head: tuple, lines: list[tuple], left: int) -> str:
    widths = [max(map(len, column)) for column in zip(head, *lines)]
    return "\n".join("  ".join(c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths))).rstrip()
                     for line in (head, *lines))


def mean(group: list[dict], *key: str) -> float:
    get = lambda row: row[key[0]] if len(key) == 1 else row[key[0]][key[1]]
    return statistics.fmean(get(r) for r in group)


def table(rows: list[dict]) -> str:
    """One line per method, support and size: means over the seeds, and the standard deviation of the loss after."""
    extra, lines = list(dict.fromkeys(k for row in rows for k in row["measures"])), []
    named = lambda *values: tuple(f"{v:.3f}" if isinstance(v, float) else "" for v in values)
    found = groups(rows)
    differ = [k for k in found[0][0] if k not in (*NOT_A_SETTING, "task", "method", "support", "size")
              and len({json.dumps(g[0].get(k)) for g in found}) > 1]           # settings in which runs differ
    for group in found:
        row, error = group[0], max(r["orthogonality_error"] or 0 for r in group)
        spread = f"{statistics.stdev(r['after'] for r in group):.3f} ({len(group)})" if len(group) > 1 else ""
        old = mean(group, "kept_after") if row["kept_after"] is not None else None
        lines.append((row["method"], row["support"] or "", str(row["size"] or ""), f"{row['lr']:g}" if row["lr"] else "",
                      *(str(row.get(k, "")) for k in differ), f"{row['trainable']:,}", *named(mean(group, "after")), spread,
                      *(named(mean(group, "measures", k))[0] for k in extra), *named(old), f"{mean(group, 'ms_per_step'):.1f}",
                      f"{mean(group, 'peak_mib'):.0f}", f"{error:.0e}" if error else ""))
    row = rows[0]
    before = ("before", *[""] * (3 + len(differ)), "", *named(row["before"]), "", *named(*(row["measures_before"][k] for k in extra), row["kept_before"]),
              "", "", "")
    head = ("method", "support", "size", "lr", *differ, "trainable", "bits", "± (seeds)", *extra, "old", "ms/step", "peak MiB", "orth. error")
    return aligned(head, [before, *lines], 2)


def comparison(rows: list[dict]) -> str:
    """Does the first-order score predict what a support is worth? Losses, speed, cost, and the rank correlation."""
    lines, by_seed = [], {}
    chosen = [g for g in groups(rows) if g[0]["score"] is not None and g[0]["method"] == "loft"]
    goal = {r["seed"]: r["curve"][-1][1] for g in chosen if g[0]["support"] == "principal" for r in g if r["curve"]}
    for group in sorted(chosen, key=lambda g: -g[0]["score"]):
        reach = [next((step for step, loss in r["curve"] if loss <= goal[r["seed"]]), None) for r in group if r["seed"] in goal]
        steps = [s for s in reach if s is not None]
        sd = statistics.stdev(r["after"] for r in group) if len(group) > 1 else 0.0
        lines.append((group[0]["support"], f"{group[0]['lr']:g}", f"{mean(group, 'score'):.3f}", f"{mean(group, 'after'):.4f}", f"{sd:.4f}",
                      f"{mean(group, 'before') - mean(group, 'after'):.4f}", f"{statistics.median(steps):.0f} ({len(steps)}/{len(reach)})" if steps
                      else "never", f"{mean(group, 'kept_after'):.3f}" if group[0]["kept_after"] is not None else "",
                      f"{mean(group, 'select_s'):.2f}", f"{mean(group, 'select_mib'):.0f}"))
        for r in group:
            by_seed.setdefault(r["seed"], []).append((r["score"], r["before"] - r["after"]))
    head = ("support", "lr", "score", "after", "±", "decrease", "steps to principal's loss", "old", "select s", "select MiB")
    order = lambda values: torch.tensor(values).argsort().argsort().double()
    spearman = [torch.corrcoef(torch.stack([order([s for s, _ in pairs]), order([d for _, d in pairs])]))[0, 1].item()
                for pairs in by_seed.values() if len(pairs) > 2]
    words = (f"rank correlation of score and decrease over {len(chosen)} supports: {statistics.fmean(spearman):.2f} "
             f"({min(spearman):.2f} to {max(spearman):.2f} over {len(spearman)} seeds)" if spearman else "")
    return aligned(head, lines, 1) + "\n" + words


def about(row: dict) -> str:
    """What a row can be compared within: its task, and of your own, the model and data."""
    return " ".join(str(row[k]) for k in ("task", "model", "data") if row.get(k))


def show(rows: list[dict], compare: bool = False) -> str:
    """The tables of all tasks."""
    parts = []
    for name in dict.fromkeys(map(about, rows)):
        mine = [row for row in rows if about(row) == name]
        seeds = sorted({row["seed"] for row in mine})
        parts.append(f"{name}: bits on held-out data of the new domain and of the old; {'/'.join(sorted({str(r['steps']) for r in mine}))} steps, "
                     f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}, torch {torch.__version__}\n\n{table(mine)}")
        if compare and any(r["score"] is not None for r in mine):
            parts.append(comparison(mine))
    return "\n\n".join(parts)


def plot(rows: list[dict], path: Path) -> str:
    """A row of pictures a task: the loss on the tune split against steps, and the loss after against trainable parameters."""
    try:
        import matplotlib
    except ImportError:
        return "--plot needs the package matplotlib: pip install matplotlib"
    matplotlib.use("Agg")
    from matplotlib import pyplot
    tasks = list(dict.fromkeys(map(about, rows)))
    figure, axes = pyplot.subplots(len(tasks), 2, figsize=(12, 4 * len(tasks)), squeeze=False, layout="constrained")
    for name, (left, right) in zip(tasks, axes):
        for i, group in enumerate(groups([row for row in rows if about(row) == name])):
            row, label = group[0], " ".join(str(v) for v in (group[0]["method"], group[0]["support"], group[0]["size"]) if v)
            losses, colour = [r["after"] for r in group], f"C{i % 10}"
            if row["curve"]:
                points = list(zip(*(r["curve"] for r in group)))
                left.plot([p[0][0] for p in points], [statistics.fmean(loss for _, loss in p) for p in points], colour, label=label)
            right.errorbar(max(row["trainable"], 1), statistics.fmean(losses), statistics.stdev(losses) if len(losses) > 1 else None,
                           fmt="o", color=colour, capsize=3)
            right.annotate(label, (max(row["trainable"], 1), statistics.fmean(losses)), textcoords="offset points", xytext=(5, 3), fontsize=7)
        left.set(title=name, xlabel="step", ylabel="bits (tune)")
        right.set(title="efficiency", xlabel="trainable parameters", ylabel="bits (val)", xscale="log")
        left.legend(fontsize=7)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return f"plot: {path}"
