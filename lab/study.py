"""The evidence: methods and supports at equal parameters and equal compute, measured by train.py.

    python -m lab.study                                       all of it: days on two cores
    python -m lab.study --tasks code --rows main --seeds 2    a part; stop it, and start it again
    python -m lab.study runs/study --report --plot lab/results.png         tables, and a picture

--rows is one or more of ROWS below. In the tables, "after" is the loss on the new domain in bits,
"kept_after" on the old one; brackets hold differences from the row that --against names, on the
same seeds, ± their standard error; "at equal loss" is that of kept_after where both rows have come
to the same loss on the new domain.

Every cell's rate is tuned on a split of its own, on the first seed, until it is better than both of
its neighbours in a grid; the steps of a lookahead are among those of its row. Further options are
train.py's.
"""
from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import train  # first: it silences a warning of torch's
import loft
from lab.tasks import TASKS

GRID = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)


LOFT = [("loft", kind + basis) for kind in ("principal", "skew", "lookahead")
        for basis in ("", "-plain")]
BEST = [("loft", "narrow"), ("lora", None), ("psoft", None), LOFT[0]]
ROWS = {  # (method, support; None: its own), budgets as multiples of lora's least, steps, options
    "main": (BEST, (1,), 200, {}),
    "supports": (LOFT, (1,), 200, {}),
    "peers": ([(method, None) for method in ("frozen", "oft", "boft", "goft", "hra", "full")],
              (1,), 200, {}),
    # lora whose A begins in the gradient's singular vectors (as in LoRA-GA), in the inputs' (EVA)
    "starts": ([("lora", "gradient-plain"), ("lora", "activation-plain")], (1,), 200, {}),
    "budgets": (BEST, (2, 4), 200, {}),
    "long": (BEST, (1,), 1000, {}),
    "magnitude": (LOFT[:1], (1,), 1000, {"magnitude": True}),
    "output": (BEST[:1], (1,), 1000, {"side": "output"}),
}


def measure(task, names, seeds, args):
    """The rows of those names, of one task: the first seed finds the rate that the others take."""
    lora = sum(sum(loft.shape(layer)) for layer in loft.target_layers(task.model).values())
    for cells, budgets, steps, options in (ROWS[name] for name in names):
        args.steps, args.options = steps, options
        for budget in budgets:
            args.budget = budget * lora
            for method, support in cells:
                args.seeds, args.lr = seeds, [best_rate(task, method, support, args)]
                train.sweep(task, method, support, args, [])


def best_rate(task, method, support, args):
    """A rate of the grid that is better than both its neighbours, on the first seed."""
    best, last = 1e-2, None
    while best != last:
        last, i, rows = best, GRID.index(best), []
        args.seeds, args.lr = 1, GRID[max(0, i - 1):i + 2]
        train.sweep(task, method, support, args, rows)
        best = rows[0]["lr"] if rows else last
    return best


KEY = ("task", "steps", "method", "support", "size", "options", "lookahead_steps", "pretrain_steps")


def groups(rows):
    """[{seed: row}] of each cell, at the rate that is best on the tune split of seed 0."""
    cells = {}
    for row in rows:
        cell = cells.setdefault(json.dumps([row[k] for k in KEY]), {})
        cell[row["lr"], row["seed"]] = row | row["measures"]
    found = []
    for cell in cells.values():
        best = min((lr for lr, seed in cell if seed == 0), key=lambda lr: cell[lr, 0]["tune"])
        found.append({seed: row for (lr, seed), row in cell.items() if lr == best})
    return found


def paired(differences):
    """Their mean ± its standard error, in brackets."""
    if len(differences) < 2:
        return ""
    error = statistics.stdev(differences) / len(differences) ** 0.5
    return f" ({statistics.fmean(differences):+.3f} ± {error:.3f})"


def forgotten(ours, theirs):
    """The difference on the old domain where both have come to the same loss on the new one."""
    a, b = ours["curve"], theirs["curve"]
    level = max(a[-1][1], b[-1][1])
    return at(level, a) - at(level, b)


def at(level, curve):
    """Bits on the old domain where those on the new one first fall to `level`."""
    for (_, high, before), (_, low, after) in zip(curve, curve[1:]):
        if low <= level < high:
            return before + (after - before) * (high - level) / (high - low)
    return curve[0][2]


def label(row):
    return f"{row['method']} {row['support'] or ''} {row['options'] or ''}".strip()


def report(found, against):
    """Markdown: a table of groups of one task and number of steps. In brackets the differences on
    the same seeds from the group of that label that has about as many parameters."""
    first = found[0][0]
    numbers = ["after", *first["measures"], "kept_after"]
    head = ["", "size", "trainable", "rate", "seeds", *numbers, "at equal loss", "choosing s",
            "MiB"]
    lines = [head, ["---"] * len(head)]
    peers = [group for group in found if label(group[0]) == against]
    for group in found:
        row = group[0]
        peer = min(peers, key=lambda peer: abs(peer[0]["trainable"] - row["trainable"]), default={})
        pairs = [(group[seed], peer[seed]) for seed in group.keys() & peer.keys()]
        line = [label(row), row["size"], row["trainable"], row["lr"], len(group)]
        for name in numbers:
            difference = paired([ours[name] - theirs[name] for ours, theirs in pairs])
            line.append(train.shown([row[name] for row in group.values()]) + difference)
        lines.append([*line, paired([forgotten(*pair) for pair in pairs]),
                      f"{row.get('select_s', 0):.1f}", f"{row.get('select_mib', 0):.0f}"])
    text = "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
    return (f"### {first['task']}, {first['steps']} steps\n\nBefore: {first['before']:.3f} bits, "
            f"{first['measures_before']}, {first['kept_before']:.3f} on the old.\n\n{text}\n")


def plot(found, path):
    """For each table: loss against steps, and loss against trainable parameters."""
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("--plot needs the package matplotlib: pip install matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(len(found), 2, figsize=(14, 5 * len(found)), squeeze=False,
                                   layout="constrained")
    for (left, right), groups in zip(axes, found):
        lines = {}
        for group in sorted(groups, key=lambda group: group[0]["trainable"]):
            row = group[0]
            steps, bits, _ = zip(*row["curve"])
            if label(row) not in lines:                  # of all sizes the smallest
                left.plot([row["lookahead_steps"] + step for step in steps], bits,
                          label=f"{label(row)} {row['size']}")
            loss = statistics.fmean(row["after"] for row in group.values())
            lines.setdefault(label(row), []).append((row["trainable"], loss))
        for name in lines:
            right.plot(*zip(*sorted(lines[name])), "o-", label=name)
        left.set_xlabel("step")
        right.set(xlabel="trainable parameters", xscale="log")
        for axis in (left, right):
            axis.set(title=row["task"], ylabel="bits")
            axis.legend()
    figure.savefig(path)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("folders", type=Path, nargs="*", default=[Path("runs/study")])
    add("--tasks", type=train.listed(str, TASKS), default=TASKS)
    add("--rows", type=train.listed(str, ROWS), default=ROWS)
    add("--seeds", type=train.positive, default=3)
    add("--report", action="store_true")
    add("--against", default="loft narrow", help="a row, as tables name it")
    add("--plot", metavar="FILE")
    study, rest = parser.parse_known_args(argv)
    if not study.report:
        args = train.parse(rest)
        args.out = study.folders[0]
        train.begin(args)
        for name in study.tasks:
            measure(train.prepare(name, args), study.rows, study.seeds, args)
    found = {}
    for group in groups([row for folder in study.folders for row in train.read(folder)]):
        found.setdefault((group[0]["task"], group[0]["steps"]), []).append(group)
    print(*(report(groups, study.against) for groups in found.values()), sep="\n")
    if study.plot:
        plot(found.values(), study.plot)


if __name__ == "__main__":
    main()
