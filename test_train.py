"""What train.py and tasks.py promise: runs that survive anything, one result on any number of devices, honest tables."""
import argparse
import csv
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import loft
import own
import tasks
import train
from tasks import Task

HERE = Path(__file__).resolve().parent
QUICK = ["--steps", "6", "--save-every", "2", "--eval-every", "2", "--calibration", "2"]


class Net(nn.Module):
    """Tiny, with dropout: what resumes must restore the random state too."""

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Dropout(dropout)) for _ in range(2)])
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def tiny(args, dropout: float = 0.0, trainable: str = r"^head\.") -> Task:
    g = torch.Generator().manual_seed(5)
    teacher = torch.randn(16, 4, generator=g)

    def batch(generator, n):
        x = torch.randn(n, 16, generator=generator)
        return x, (x @ teacher).argmax(1)
    splits = {"tune": [batch(g, 32)], "val": [batch(g, 32)]}
    return Task("tiny", Net(dropout), batch, tasks.label, splits, trainable=trainable,
                measure=lambda m: tasks.classification(m, splits["val"]), size=8)


def child(argv: list[str], die: str = "") -> None:
    """Run in a process of its own: train.py on the tiny task, which kills itself as `die` says."""
    torch.set_num_threads(1)
    train.TASKS["code"] = lambda args: tiny(args, dropout=0.2)
    replace, count = os.replace, 0

    def dying(source, target):
        nonlocal count
        count += str(target).endswith(".checkpoint")
        if die == "before" and count == 2:                                     # the second checkpoint is written, not yet in place
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)
        if die == "after" and count == 2:
            os.kill(os.getpid(), signal.SIGKILL)
    if die:
        os.replace = dying
    train.main(argv)


def start(code: str, *more: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *more, "-c", f"import test_train; {code}"] if not more else [sys.executable, *more],
                          cwd=HERE, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """run(argv, folder) → rows, on the tiny task."""
    monkeypatch.setitem(train.TASKS, "code", tiny)
    return lambda *argv, out="run": train.main([*QUICK, *argv, "--out", str(tmp_path / out)])


def shorten(monkeypatch, name: str) -> None:
    """The real task, measured on one chunk of each split."""
    make = tasks.TASKS[name]

    def short(args):
        task = make(args)
        task.splits.update({p: [tuple(t[:8] for t in b[0])] for p, b in task.splits.items()})
        task.old.splits.update(val=[tuple(t[:8] for t in task.old.splits["val"][0])])
        return task
    monkeypatch.setitem(train.TASKS, name, short)


MEASURED = ("before", "after", "tune", "score", "curve", "measures", "trainable", "orthogonality_error", "kept_after")


def same(row, other) -> bool:
    as_json = lambda r: json.loads(json.dumps({k: r[k] for k in MEASURED}))
    return as_json(row) == as_json(other)


# ---------------------------------------------------------------------------------------------------------
# Tasks
# ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", tasks.TASKS)
def test_a_task_is_deterministic_and_its_splits_share_no_example(name):
    torch.manual_seed(0)
    task, again = tasks.TASKS[name](None), tasks.TASKS[name](None)
    draw = lambda t: t.batch(torch.Generator().manual_seed(3), 4)
    for a, b in zip(draw(task), draw(again)):
        assert torch.equal(a, b) and len(a) == 4
    seen = {p: {tuple(row.flatten().tolist()) for batch in task.splits[p] for row in batch[0]} for p in ("tune", "val")}
    assert not seen["tune"] & seen["val"] and all(len(s) > 200 for s in seen.values())
    if task.trainable == "":                                                   # as language models: the old domain is the same model's
        assert task.model is task.old.model
    loss = task.loss_fn(task.model, draw(task))
    assert loss.ndim == 0 and loss.isfinite() and task.old.bits(task.model.get_submodule(task.body), "val", 1) > 0


def test_held_out_problems_are_not_trained_on_and_the_right_answers_count():
    task = tasks.math_(None)
    train_rows = {tuple(r.tolist()) for _ in range(3) for r in task.batch(torch.Generator().manual_seed(_), 5000)[0]}
    val = torch.cat([b[0] for b in task.splits["val"]])
    assert not train_rows & {tuple(r.tolist()) for r in val}
    for row in val[:50]:                                                       # the arithmetic is right, and a chain
        prompt, response = bytes(row[row != 0].tolist()).decode().split(": ")
        sums = response.split()
        assert all(eval(s.replace("=", "==")) for s in sums) and len(sums) == prompt.count(",") and len(sums) > 1
        assert all(b.startswith(a.split("=")[1] + "+") or b.startswith(a.split("=")[1] + "-") for a, b in zip(sums, sums[1:]))

    class Oracle(nn.Module):                                                   # knows the first half of the answers
        def __init__(self, known):
            super().__init__()
            self.known, self.p = known, nn.Parameter(torch.zeros(1))

        def forward(self, tokens):
            logits = torch.zeros(*tokens.shape, 256)
            for i, row in enumerate(tokens):
                end = bytes(row.tolist()).index(b": ") + 2
                match = (self.known[:, :end] == row[:end]).all(1).nonzero()
                answer = self.known[match[0, 0]] if len(match) else torch.full((len(val[0]),), ord("\n"))
                logits[i, torch.arange(tokens.shape[1] - 1), answer[1:tokens.shape[1]]] = 1
                logits[i, -1, answer[tokens.shape[1]] if tokens.shape[1] < len(val[0]) else 0] = 1
            return logits
    assert task.measure(Oracle(val[:256]))["exact_match"] == 0.5


def test_images_show_what_their_labels_say():
    one = lambda **k: tasks.draw(**(dict(shape=torch.tensor([2]), angle=torch.tensor([0.0]), size=torch.tensor([0.3]), centre=torch.zeros(1, 2)) | k))
    assert not torch.equal(one(), one(angle=torch.tensor([math.pi / 4])))
    torch.testing.assert_close(one(angle=torch.tensor([math.pi / 2])), one().rot90(-1, (1, 2)))
    assert len({tuple(tasks.draw(torch.tensor([s]), torch.zeros(1), torch.ones(1), torch.zeros(1, 2)).flatten().tolist()) for s in range(5)}) == 5
    task = tasks.vision(None)
    images, labels = task.batch(torch.Generator().manual_seed(0), 200)
    cells = F.avg_pool2d(images[:, None], 8, 4, 2)                             # the bright object is where the label says
    x, y = labels[:, 2] % 3, labels[:, 2] // 3
    at = lambda i, j: images[torch.arange(200)[:, None, None], (5 + 10 * j)[:, None, None] + torch.arange(-3, 5)[:, None],
                             (5 + 10 * i)[:, None, None] + torch.arange(-3, 5)].amax((1, 2))
    assert (at(x, y) > 1.15).all() and cells.isfinite().all()
    assert [int(c.max()) + 1 for c in labels.T] == [8, 4, 9, 4] and (labels.min(0).values == 0).all()


def test_unseen_languages_combine_rules_that_are_seen_one_by_one():
    task = tasks.multilingual(None)
    text = lambda split: [bytes(r.tolist()).decode("utf-8", "replace") for b in task.splits[split] for r in b[0]]
    assert len(text("unseen")) == 256 and not set(text("unseen")) & set(text("val"))
    share = lambda texts, letters: sum(t.count(c) for t in texts for c in letters) / sum(map(len, texts))
    english = [tasks.prose()["val"]]
    assert share(english, "e") > 1.3 * share(text("unseen"), "e")              # e → i in most of them


# ---------------------------------------------------------------------------------------------------------
# Cells, budgets, tables
# ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("shapes, budget", [([(32, 96), (32, 32), (128, 32)], 1500), ([(24, 96), (96, 24)], 999)])
@pytest.mark.parametrize("method", [m for m in loft.METHODS if m != "goft"])
def test_a_size_is_the_largest_within_the_budget(method, shapes, budget):
    build = lambda: nn.Sequential(*[nn.Linear(d, n) for d, n in shapes])
    size = train.sizes(method, shapes, budget)

    def parameters(size):
        options = {"block_size": size} if method in ("oft", "boft") else {}
        rank = {str(i): min(size, d) for i, (d, _) in enumerate(shapes)} if method in ("loft", "psoft") else size
        model = loft.adapt(build(), ".", method=method, rank=None if options else rank, **options)
        return sum(p.numel() for p in model.parameters() if p.requires_grad)
    divisor = math.gcd(*(d for d, _ in shapes))
    more = {"oft": next((b for b in range(size + 1, divisor + 1) if divisor % b == 0), None), "hra": size + 2,
            "boft": next((b for b in range(size + 1, divisor + 1) if b % 2 == 0 and divisor % (2 * b) == 0), None)}.get(method, size + 1)
    assert parameters(size) <= budget and (more is None or budget < parameters(more))


def test_a_budget_below_the_least_size_is_refused():
    with pytest.raises(ValueError, match="lora has no size of at most 10 parameters: its least is 64"):
        train.sizes("lora", [(32, 32)], 10)
    with pytest.raises(ValueError, match="no block divides"):
        train.sizes("oft", [(32, 32), (15, 8)], 1000)


def test_a_grid_runs_once_and_its_rates_are_tried_on_the_first_seed(quick, tmp_path, capsys):
    grid = ["--method", "frozen,loft,lora", "--support", "random,skew", "--rank", "2,4", "--seeds", "2", "--lr", "1e-3,1e-2"]
    rows = quick(*grid)
    assert len(rows) == 2 * 1 + (2 * 2 + 2) * 3 + 1                            # the head of frozen trains: it has rates too
    lines = (tmp_path / "run/results.jsonl").read_text().splitlines()
    assert len(lines) == len(rows)
    capsys.readouterr()
    again = train.main(["--resume", str(tmp_path / "run")])                    # nothing is left to do
    assert "step" not in capsys.readouterr().out.split("2. code")[1].split("ms/step")[0].replace("6 steps", "")
    assert [json.dumps(r) for r in again] == lines == (tmp_path / "run/results.jsonl").read_text().splitlines()
    more = train.main(["--resume", str(tmp_path / "run"), "--rank", "2,4,8"])  # a larger grid: the new cells only
    assert len(more) == len(rows) + 3 * 3
    with pytest.raises(SystemExit):
        train.main(["--resume", str(tmp_path / "run"), "--clip", "1"])
    assert "--clip was None there" in capsys.readouterr().err
    every = quick("--method", "lora", "--rank", "2", "--seeds", "2", "--lr", "1e-3,1e-2", "--grid", out="every")
    assert {(r["lr"], r["seed"]) for r in every} == {(1e-3, 0), (1e-2, 0), (1e-3, 1), (1e-2, 1)}


SHORT = ["--pretrain-steps", "2", "--probe-steps", "1", "--steps", "2", "--calibration", "1", "--batch", "4", "--support", "skew,principal"]


def test_the_main_job_end_to_end(monkeypatch, tmp_path, capsys):
    """A few steps of the default: cache, table, results, adapters that load; then Ctrl-C in the third cell, and on."""
    shorten(monkeypatch, "code")
    rows = train.main([*SHORT, "--out", str(tmp_path / "a")])
    assert [(r["method"], r["support"]) for r in rows] == [("frozen", None), ("loft", "skew"), ("loft", "principal"), ("psoft", "principal"),
                                                           ("oft", "all"), ("lora", None), ("full", None)]
    assert [json.dumps(r) for r in rows] == (tmp_path / "a/results.jsonl").read_text().splitlines()
    budget = rows[5]["trainable"]                                              # of LoRA at rank 1
    assert all(0.6 * budget < r["trainable"] <= budget for r in rows[1:6]) and rows[1]["score"] > rows[2]["score"]
    assert rows[0]["before"] == rows[0]["after"] and rows[1]["after"] != rows[1]["before"]
    loft.load(tasks.Transformer(), next((tmp_path / "a").glob("code-loft-skew*.pt")))
    lines = train.read_rows(tmp_path / "a/metrics.jsonl")
    assert {l["cell"] for l in lines} == {p.stem for p in (tmp_path / "a").glob("code-*.pt")} | {"code-full-lr0.003-seed0"}
    assert (tmp_path / "a/table.txt").read_text().strip() in capsys.readouterr().out

    real = train.run
    monkeypatch.setattr(train, "run", lambda *a: real(*a) if a[1]["support"] != "principal" else (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(SystemExit) as stop:
        train.main([*SHORT, "--out", str(tmp_path / "b")])
    assert stop.value.code == 130 and len(train.read_rows(tmp_path / "b/results.jsonl")) == 2
    assert "--resume" in (out := capsys.readouterr().out) and "weights found in" in out
    monkeypatch.setattr(train, "run", real)
    again = train.main(["--resume", str(tmp_path / "b")])
    assert all(map(same, rows, again)) and len(again) == 7


@pytest.mark.parametrize("name", ["understanding", "vision", "math", "multilingual"])
def test_the_other_tasks_end_to_end(name, monkeypatch, tmp_path, capsys):
    shorten(monkeypatch, name)
    rows = train.main([*SHORT, "--task", name, "--method", "loft", "--compare", "supports", "--seeds", "1", "--refresh", "1", "--rank", "4", "--out",
                       str(tmp_path / "a")])
    extra = {"understanding": "macro_f1", "vision": "orientation", "math": "exact_match", "multilingual": "unseen"}[name]
    assert len(rows) == 2 * 4 and all(extra in r["measures"] and math.isfinite(r["after"]) and r["kept_after"] > 0 for r in rows)
    out = capsys.readouterr().out
    assert extra in out and "steps to principal's loss" in out


def test_a_folder_with_results_is_not_written_over(quick, tmp_path, capsys):
    quick("--method", "frozen")
    with pytest.raises(SystemExit):
        quick("--method", "frozen")
    assert "--resume" in capsys.readouterr().err


@pytest.mark.parametrize("given, message", [
    ("--clip 0", "'0' is not a number from 1e-06"), ("--clip nan", "'nan' is not a number"), ("--warmup 2", "'2' is not a number from 0 to 1"),
    ("--steps -3", "'-3' is not a positive whole number"), ("--lr 0", "positive numbers are wanted"), ("--lr x", "not a comma-separated list"),
    ("--support skwe", "'skwe' is not one of .*; did you mean 'skew'"), ("--targets (", r"--targets: '\(' is not a regular expression"),
    ("--targets nothing", "match no linear layer; the model has 3"), ("--seeds 0", "'0' is not a positive whole number")])
def test_settings_that_mean_nothing_are_refused_in_one_line(given, message, quick, capsys):
    with pytest.raises(SystemExit) as stop:
        quick(*given.split())
    assert re.search(message, f"{stop.value.code} {capsys.readouterr().err}")


def test_runs_that_cannot_begin_say_so_in_one_line(quick, tmp_path, capsys):
    def refused(*argv, match):
        with pytest.raises(SystemExit) as stop:
            train.main([*QUICK, *argv])
        assert re.search(match, f"{stop.value.code} {capsys.readouterr().err}")
    (tmp_path / "file").write_text("")
    refused("--method", "frozen", "--out", str(tmp_path / "file" / "x"), match="--out .*: Not a directory")
    refused("--old", "x.txt", match="--old goes with --model and --data")
    for i, text in enumerate(("hello", "{}", '{"argv": 3}')):
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / "settings.json").write_text(text)
        refused("--resume", str(tmp_path / str(i)), match="settings.json is not what a run writes")


def test_a_report_leaves_out_what_is_no_result(quick, tmp_path, capsys):
    quick("--method", "frozen")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "results.jsonl").write_text('{"task": "code", "method": "lora"}\n[1]\n')
    rows = train.main(["--report", str(tmp_path / "other"), str(tmp_path / "run")])
    assert len(rows) == 1 and "other: 2 of 2 lines left out" in capsys.readouterr().out


def test_full_fine_tuning_of_a_bf16_model_trains_in_float32(monkeypatch, tmp_path):
    def halved(args):
        task = tiny(args)
        task.model.bfloat16()
        task.loss_fn = lambda model, batch: tasks.label(model, (batch[0].to(next(model.parameters()).dtype), batch[1]))
        task.measure = lambda model: {}
        return task
    monkeypatch.setitem(train.TASKS, "code", halved)
    row, = train.main([*QUICK, "--method", "full", "--lr", "1e-6", "--export", "--out", str(tmp_path / "run")])
    saved = torch.load(next((tmp_path / "run").glob("*-merged/model.pt")), weights_only=True)
    torch.manual_seed(0)                                                       # as train.py does before it makes a task
    start = halved(None).model.float().state_dict()
    assert all(t.dtype == torch.float32 for t in saved.values())
    assert all(0 < (saved[n] - start[n]).abs().max() < 1e-4 for n in saved)    # steps of 1e-6, which bf16 would swallow


def test_held_out_images_are_drawn_by_no_run():
    """torch's generator on a CPU takes the low 32 bits of a seed."""
    task = tasks.vision(None)
    batches = [b for split in ("tune", "val") for b in task.splits[split]] + task.old.splits["val"]
    for seed in (*range(10), *range(1000, 1010)):
        turn = task.batch(torch.Generator().manual_seed(seed), 64)[1]
        assert all(not torch.equal(b[1][:64], turn) for b in batches if b[1].ndim == 2)


def test_macro_f1_counts_classes_that_are_predicted_alone():
    logits = F.one_hot(torch.tensor([0, 2, 1, 2]), 3).float()
    model = nn.Linear(1, 1)
    found = tasks.classification(model, [(logits, torch.tensor([0, 0, 1, 1]))], lambda m, x: x)
    assert found == {"accuracy": 0.5, "macro_f1": pytest.approx((2 / 3 + 2 / 3 + 0) / 3)}


def test_one_cell_fails_and_the_others_go_on(quick, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        quick("--method", "loft,lora,full", "--support", "skew", "--rank", "2", "--lr", "1e-3,1e30", "--transform", "expm")
    assert stop.value.code == 1
    out, rows = capsys.readouterr().out, train.read_rows(tmp_path / "run/results.jsonl")
    assert {(r["method"], r["lr"]) for r in rows} >= {("loft", 1e-3), ("lora", 1e-3), ("full", 1e-3)}
    assert "failed" in out and "at step" in out and "first in" in out


def test_a_run_that_meets_nan_leaves_its_last_good_checkpoint(monkeypatch, tmp_path, capsys):
    def poisoned(args):
        task, steps = tiny(args), []

        def loss_fn(model, batch):
            if model.training:
                steps.append(0)
                if len(steps) == 5:                                            # an infinite gradient, in the second layer alone
                    next(p for n, p in model.named_parameters() if "layers.1" in n and p.requires_grad).register_hook(lambda g: g * math.inf)
            return tasks.label(model, batch)
        task.loss_fn = loss_fn
        return task
    monkeypatch.setitem(train.TASKS, "code", poisoned)
    with pytest.raises(SystemExit):
        train.main([*QUICK, "--method", "loft", "--support", "skew", "--rank", "4", "--out", str(tmp_path / "r")])
    assert "at step 5 (first in layers.1." in capsys.readouterr().out
    left, = (tmp_path / "r").glob("*.checkpoint")
    state = torch.load(left, weights_only=True)
    assert state["step"] == 4
    model = tiny(None).model
    train.restore(model, state["weights"])
    assert all(p.isfinite().all() for p in model.parameters()) and loft.layers(model)


def test_report_and_plot(quick, tmp_path, capsys):
    quick("--method", "loft", "--support", "skew", "--rank", "4", "--seeds", "2", out="a")
    quick("--method", "loft,full", "--support", "skew", "--rank", "4", "--seed", "2", out="b")
    quick("--method", "loft", "--support", "skew", "--rank", "4", "--clip", "0.1", out="c")
    capsys.readouterr()
    rows = train.main(["--report", str(tmp_path / "a"), str(tmp_path / "b"), str(tmp_path / "c"), str(tmp_path / "not there")])
    out = capsys.readouterr().out
    skew = [line.split() for line in out.splitlines() if "skew" in line]
    mean = sum(r["after"] for r in rows if r["method"] == "loft" and not r["clip"]) / 3
    assert len(rows) == 5 and len(skew) == 2 and "clip" in out                 # other settings are another line, and named
    assert f"{mean:.3f}" in out and "(3)" in out
    with pytest.raises(SystemExit, match="no results.jsonl"):
        train.main(["--report", str(tmp_path / "not there")])
    train.main(["--report", str(tmp_path / "a"), "--plot"])
    try:
        import matplotlib
        assert matplotlib and (tmp_path / "plot.png").stat().st_size > 5000
    except ImportError:
        assert "pip install matplotlib" in capsys.readouterr().out


def test_bad_flags_are_refused_by_name(capsys, tmp_path):
    for argv, word in ((["--rank", "0"], "positive"), (["--rank", "a"], "numbers"), (["--lr", "nan"], "positive"), (["--steps", "-1"], "positive"),
                       (["--method", "lroa"], "lora"), (["--support", "best"], "skew"), (["--task", "x"], "vision"), (["--model", "x"], "--data"),
                       (["--resume", str(tmp_path)], "settings.json"), (["--device", "abc"], "--device"),
                       (["--batch", "2", "--accumulate", "4"], "--batch 4"), (["--shard", "--method", "full"], "adapters"),
                       (["--rank", "4", "--budget", "99"], "give one"), (["--transform", "givens"], "needs --rank"), (["--shard", "--refresh", "5"], "without --refresh"),
                       (["--dtype", "bfloat16", "--method", "full"], "--autocast")):
        with pytest.raises(SystemExit):
            train.main(argv)
        assert word in capsys.readouterr().err, argv


# ---------------------------------------------------------------------------------------------------------
# The loop
# ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("method", ["loft", "full"])
@pytest.mark.parametrize("die", ["before", "after"])
def test_a_killed_run_goes_on_bit_for_bit(method, die, tmp_path):
    """kill −9 while the second checkpoint (step 4) is moved into place, or right after."""
    grid = [*QUICK, "--method", method, "--support", "skew", "--rank", "4", "--patience", "9", "--refresh", "3"]
    whole = start(f"test_train.child({[*grid, '--out', str(tmp_path / 'whole')]})")
    assert whole.returncode == 0, whole.stderr
    killed = start(f"test_train.child({[*grid, '--out', str(tmp_path / 'cut')]}, {die!r})")
    assert killed.returncode == -signal.SIGKILL and not (tmp_path / "cut/results.jsonl").exists()
    step = torch.load(next((tmp_path / "cut").glob("*.checkpoint")), weights_only=True)["step"]
    assert step == {"before": 2, "after": 4}[die]
    resumed = start(f"test_train.child(['--resume', {str(tmp_path / 'cut')!r}])")
    assert resumed.returncode == 0, resumed.stderr
    (a,), (b,) = (train.read_rows(tmp_path / name / "results.jsonl") for name in ("whole", "cut"))
    assert same(a, b)
    assert not list((tmp_path / "cut").glob("*.checkpoint"))
    files = [sorted((tmp_path / name).glob("*.pt")) for name in ("whole", "cut")]
    assert len(files[0]) == len(files[1]) == (method == "loft")
    for x, y in zip(*files):
        x, y = (loft.load(tiny(None).model, file).state_dict() for file in (x, y))
        assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x if "base" not in k)


def test_a_line_that_a_kill_cut_short_is_dropped(tmp_path):
    file = tmp_path / "results.jsonl"
    file.write_text('{"a": 1}\n{"a": 2}\n{"a": 3, "b')
    cut = file.read_text()
    assert train.read_rows(file) == [{"a": 1}, {"a": 2}] and file.read_text() == cut                   # a report only reads
    assert train.read_rows(file, mend=True) == [{"a": 1}, {"a": 2}]
    train.append(file, {"a": 4})
    assert train.read_rows(file) == [{"a": 1}, {"a": 2}, {"a": 4}]


@pytest.mark.parametrize("shard", [False, True])
def test_two_devices_give_the_result_of_one(shard, tmp_path):
    if shard and tuple(map(int, torch.__version__.split(".")[:2])) < (2, 7):
        pytest.skip("ignored_params of fully_shard came with torch 2.7")
    script = tmp_path / "script.py"
    script.write_text(f"import glob, sys; sys.path.insert(0, {str(HERE)!r})\nimport test_train, train\ntrain.TASKS['code'] = lambda args: test_train.tiny(args, trainable='')\n"
                      "train.main(sys.argv[1:])\n"                                # gloo's threads, when left, abort some interpreters at their end
                      "assert not [f for f in glob.glob('/proc/self/task/*/comm') if 'gloo' in open(f).read()]\n")
    grid = [*QUICK, "--method", "loft,lora" if shard else "loft,lora,full", "--support", "skew", "--rank", "4", "--accumulate", "2", "--clip", "1", *([] if shard else ["--refresh", "3"])]
    one = start("", str(script), *grid, "--out", str(tmp_path / "one"))
    two = start("", "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", str(script), *grid, *["--shard"] * shard, "--out", str(tmp_path / "two"))
    assert one.returncode == 0 and two.returncode == 0, one.stdout + one.stderr + two.stdout + two.stderr
    for a, b in zip(*(train.read_rows(tmp_path / name / "results.jsonl") for name in ("one", "two")), strict=True):
        assert a["method"] == b["method"] and a["trainable"] == b["trainable"]
        for key in ("after", "tune", "score"):
            assert a[key] == b[key] or a[key] == pytest.approx(b[key], rel=1e-4), (a["method"], key)
    loft.load(tiny(None).model, next((tmp_path / "two").glob("*loft*.pt")))


def test_pieces_of_a_batch_change_nothing_but_rounding(quick):
    grid = ["--method", "loft", "--support", "skew", "--rank", "4"]
    (whole,), (pieces,) = quick(*grid), quick(*grid, "--accumulate", "3", out="pieces")                # 8 rows in 3 pieces
    assert pieces["after"] == pytest.approx(whole["after"], rel=1e-5)


def test_pieces_are_weighed_by_their_predictions():
    """The mean over a batch's tokens, not the mean of its pieces' means."""
    torch.manual_seed(0)
    model, ids = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 9)), torch.randint(9, (4, 7))
    targets = ids.masked_fill(torch.arange(7) < torch.tensor([[1], [6], [5], [2]]), -100)
    task = Task("t", model, lambda g, n: (ids, targets), tasks.next_token, {}, count=lambda b: int((b[1][:, 1:] != -100).sum()))
    changes = []
    for accumulate in (1, 2, 4):
        copied = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 9))
        copied.load_state_dict(model.state_dict())
        args = train.plain()
        args.accumulate = accumulate
        train.fit(task, copied, 1, 1e-2, 0, args, "")
        changes.append(torch.cat([(p - q).flatten() for p, q in zip(copied.parameters(), model.parameters())]))
    torch.testing.assert_close(changes[1], changes[0])
    torch.testing.assert_close(changes[2], changes[0])


def test_patience_stops_and_keeps_the_best_weights(quick):
    row, = quick("--method", "loft", "--support", "skew", "--rank", "8", "--lr", "0.5", "--steps", "40", "--patience", "2", "--warmup", "0.02",
                 "--eval-batches", "99")
    assert row["stopped"] < 40 and row["stopped"] == row["curve"][-1][0]
    assert row["tune"] == pytest.approx(min(loss for _, loss in row["curve"]), rel=1e-6) and row["tune"] < row["curve"][-1][1]


@pytest.mark.parametrize("flags", [["--dtype", "bfloat16"], ["--autocast"], ["--checkpointing"], ["--backend", "eager"]], ids=lambda f: f[-1])
@pytest.mark.parametrize("name", ["code", "vision"])
def test_flags_of_the_loop_on_real_tasks(name, flags, monkeypatch, tmp_path):
    shorten(monkeypatch, name)
    common = ["--task", name, "--method", "loft", "--support", "skew", "--rank", "4", "--steps", "3", "--pretrain-steps", "1", "--probe-steps", "1",
              "--batch", "4", "--calibration", "1"]
    row, = train.main([*common, *flags, "--out", str(tmp_path / "a")])
    assert math.isfinite(row["after"]) and row["orthogonality_error"] <= 1e-5
    if flags[0] in ("--checkpointing", "--backend"):
        plain, = train.main([*common, "--out", str(tmp_path / "b")])
        assert row["after"] == pytest.approx(plain["after"], rel=1e-4)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_a_compiled_run_gives_the_same_result(quick):
    grid = ["--method", "loft", "--support", "skew", "--rank", "4", "--steps", "3"]
    (plain,), (compiled,) = quick(*grid), quick(*grid, "--compile", out="compiled")
    assert compiled["after"] == pytest.approx(plain["after"], rel=1e-4)


def test_a_killed_pretraining_goes_on(monkeypatch, tmp_path):
    """The weights are those of an unbroken one; the checkpoint goes when the cache is written."""
    def with_old(args):
        task = tiny(args, dropout=0.1)
        task.old = Task("old", task.model, task.batch, tasks.label, {"val": task.splits["val"]}, steps=7)
        return task
    monkeypatch.setitem(train.TASKS, "code", with_old)
    monkeypatch.setattr(train, "plain", lambda f=train.plain: argparse.Namespace(**vars(f()) | {"save_every": 3}))
    grid = [*QUICK, "--method", "frozen", "--out"]
    train.main([*grid, str(tmp_path / "a/run")])
    fit, steps = train.fit, []

    def broken(task, *args, **more):
        batch, task.batch = task.batch, lambda g, n: (steps.append(0), batch(g, n) if len(steps) <= 5 or len(steps) > 6 else 1 / 0)[1]
        return fit(task, *args, **more)
    monkeypatch.setattr(train, "fit", broken)
    with pytest.raises(ZeroDivisionError):
        train.main([*grid, str(tmp_path / "b/run")])
    assert list((tmp_path / "b").glob("pretrained-*.checkpoint"))
    monkeypatch.setattr(train, "fit", fit)
    train.main(["--resume", str(tmp_path / "b/run")])
    a, b = (torch.load(next((tmp_path / f).glob("pretrained-*.pt")), weights_only=True) for f in "ab")
    assert all(torch.equal(a[k], b[k]) for k in a) and not list((tmp_path / "b").glob("pretrained-*.checkpoint"))


def test_export_is_the_plain_model(quick, tmp_path):
    rows = quick("--method", "loft,lora,full", "--support", "skew", "--rank", "4", "--export", "--lr", "1e-2")
    for row in rows:
        file, = (tmp_path / "run").glob(f"code-{row['method']}*-merged/model.pt")
        model = Net()
        model.load_state_dict(torch.load(file, weights_only=True))
        assert tiny(None).bits(model.eval(), "val") == pytest.approx(row["after"], rel=1e-4)


# ---------------------------------------------------------------------------------------------------------
# Your own model and data: real transformers classes with small random weights
# ---------------------------------------------------------------------------------------------------------

def small(kind: str):
    transformers = pytest.importorskip("transformers")
    sizes = dict(vocab_size=384, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
                 max_position_embeddings=128)
    torch.manual_seed(0)
    if kind == "gpt2":
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=384, n_embd=32, n_layer=2, n_head=2, n_positions=128))
    if kind == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    if kind == "qwen":
        return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**sizes))
    if kind == "bert":
        del sizes["num_key_value_heads"]
        return transformers.BertForMaskedLM(transformers.BertConfig(**sizes))  # its classifier is new
    if kind == "roberta":
        del sizes["num_key_value_heads"]
        return transformers.RobertaForMaskedLM(transformers.RobertaConfig(**sizes, pad_token_id=1))
    if kind == "bloom":
        return transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=384, hidden_size=32, n_layer=2, n_head=2))
    return transformers.ViTForImageClassification(transformers.ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8, num_labels=7))


@pytest.fixture
def folder(tmp_path):
    """make(kind) → a folder as save_pretrained writes it."""
    def make(kind):
        model = small(kind)
        import tokenizers
        import transformers
        model.save_pretrained(tmp_path / kind)
        letters = {c: i for i, c in enumerate(["<end>", *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())])}
        bytewise = tokenizers.Tokenizer(tokenizers.models.BPE(letters, []))
        bytewise.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        transformers.PreTrainedTokenizerFast(tokenizer_object=bytewise, eos_token="<end>", pad_token="<end>").save_pretrained(tmp_path / kind)
        return tmp_path / kind
    return make


def data(path: Path, form: str, n: int = 40) -> Path:
    examples = {"prompt": [{"prompt": f"{i} plus {i}? ", "response": str(2 * i)} for i in range(n)],
                "text": [{"text": f"the number {i} and the number {i * i}. " * (1 + i % 3)} for i in range(n)],
                "label": [{"text": f"it is {w}", "label": "pos" if w in ("good", "fine") else "neg"} for w in ("good", "bad", "fine", "poor")] * (n // 4)}
    if path.suffix == ".txt":
        path.write_text(" ".join(e["text"] for e in examples["text"]))
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, examples[form])))
    else:
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, examples[form][0].keys())
            writer.writeheader()
            writer.writerows(examples[form])
    return path


@pytest.mark.parametrize("kind, name, form", [("llama", "d.jsonl", "prompt"), ("qwen", "d.txt", "text"), ("gpt2", "d.csv", "text"),
                                              ("gpt2", "d.csv", "label"), ("bert", "d.jsonl", "label")])
def test_your_own_model_and_data(kind, name, form, folder, tmp_path):
    model, file = folder(kind), data(tmp_path / name, form)
    import transformers
    rows = train.main(["--model", str(model), "--data", str(file), "--method", "frozen,loft,lora", "--support", "skew", "--rank", "4", "--lr", "1e-2",
                       "--steps", "4", "--probe-steps", "2", "--calibration", "2", "--context", "64", "--checkpointing", "--export",
                       "--old", str(data(tmp_path / "old.txt", "text")), "--out", str(tmp_path / "run")])
    assert all(math.isfinite(r["after"]) for r in rows) and rows[1]["after"] != rows[1]["before"]
    assert (rows[1]["kept_after"] is None) == (form == "label")
    merged, = (tmp_path / "run").glob("own-loft*-merged")
    auto = transformers.AutoModelForSequenceClassification if form == "label" else transformers.AutoModelForCausalLM
    plain, ids = auto.from_pretrained(merged).eval(), torch.arange(5, 25)[None]
    assert not loft.layers(plain) and "loft" not in str(type(plain))
    adapted = (auto.from_pretrained(model, num_labels=2) if form == "label" else auto.from_pretrained(model)).eval()
    loft.load(adapted, next((tmp_path / "run").glob("own-loft*.pt")))
    pad = {"attention_mask": torch.ones_like(ids)}
    torch.testing.assert_close(plain(input_ids=ids, **pad).logits, adapted(input_ids=ids, **pad).logits, rtol=1e-4, atol=1e-5)
    assert len({tuple(transformers.AutoTokenizer.from_pretrained(f)("a b").input_ids) for f in (model, merged)}) == 1


def test_no_text_is_both_trained_and_measured_on(folder, tmp_path):
    """Texts longer than a row: split before they are cut."""
    (tmp_path / "d.jsonl").write_text("\n".join(json.dumps({"text": chr(65 + i) * 100}) for i in range(20)))
    task = own.own(argparse.Namespace(model=str(folder("gpt2")), data=tmp_path / "d.jsonl", val=None, old=None, context=32))
    letters = lambda batches: {int(row[0]) for b in batches for row in b[0]}
    trained = letters([task.batch(torch.Generator().manual_seed(0), 500)])
    tune, val = letters(task.splits["tune"]), letters(task.splits["val"])
    assert (len(trained), len(tune), len(val)) == (16, 2, 2) and len(trained | tune | val) == 20


def test_your_own_images(folder, tmp_path):
    model = folder("vit")
    torch.save({"x": torch.randn(40, 3, 16, 16), "y": torch.arange(40) % 3}, tmp_path / "d.pt")
    row, = train.main(["--model", str(model), "--data", str(tmp_path / "d.pt"), "--method", "loft", "--support", "skew", "--rank", "4", "--steps", "3",
                       "--probe-steps", "2", "--calibration", "2", "--out", str(tmp_path / "run")])
    assert 0 <= row["measures"]["accuracy"] <= 1 and row["trainable"] > 3 * 32


@pytest.mark.parametrize("kind", ["llama", "qwen", "gpt2"])
def test_packed_examples_do_not_see_each_other(kind):
    """The loss of packed rows is the mean over the tokens of the examples alone."""
    model = small(kind).eval()
    g = torch.Generator().manual_seed(0)
    examples = []
    for n in (5, 9, 30, 12, 40, 3):
        ids = torch.randint(3, 300, (n,), generator=g).tolist()
        prompt = n // 3
        examples.append((ids, [-100] * prompt + ids[prompt:]))
    batch = own.pack(examples, 32)                                           # 40 is cut into 32 and 8
    assert len(batch[0]) < len(examples)
    total, count = 0.0, 0
    for ids, targets in [(i[k:k + 32], t[k:k + 32]) for i, t in examples for k in range(0, len(i), 32)]:
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
        total += F.cross_entropy(logits, torch.tensor(targets[1:]), reduction="sum").item()
        count += sum(t != -100 for t in targets[1:])
    assert own.packed_loss(model, batch).item() == pytest.approx(total / count, rel=1e-4)


@pytest.mark.parametrize("kind", ["llama", "bloom"])
def test_a_model_that_knows_no_packing_gets_one_example_a_row(kind, folder, tmp_path):
    """Bloom makes positions and masks itself. Either way, the loss of a row is that of its examples alone."""
    file = data(tmp_path / "d.jsonl", "text")
    task = own.own(argparse.Namespace(model=str(folder(kind)), data=file, val=None, old=None, context=128))
    ids, targets, segments = task.batch(torch.Generator().manual_seed(0), 64)
    assert (segments.max() > 1) == (kind == "llama")
    with torch.no_grad():
        one = [F.cross_entropy(task.model(input_ids=ids[i:i + 1, s]).logits[0, :-1], ids[i, s][1:], reduction="none")
               for i in range(8) for k in range(1, int(segments[i].max()) + 1) for s in [segments[i] == k]]
        assert own.packed_loss(task.model, (ids[:8], targets[:8], segments[:8])).item() == pytest.approx(torch.cat(one).mean().item(), rel=1e-4)


def test_examples_as_files_have_them(tmp_path):
    """A byte order mark; line separators inside a JSON string; long and many-lined fields of a csv."""
    def read(name, text):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return own.read(tmp_path / name)
    assert read("a.jsonl", "\ufeff" + json.dumps({"text": "a\u2028b"}, ensure_ascii=False)) == [{"text": "a\u2028b"}]
    long = "x" * 200_000 + "\n\x0cy"
    assert read("a.csv", f'\ufefftext,label\n"{long}",z\n') == [{"text": long, "label": "z"}]


def test_models_that_do_not_fit_get_one_clear_line(folder, tmp_path):
    def refused(kind, file, match):
        with pytest.raises(SystemExit, match=match):
            train.main(["--model", str(tmp_path / kind), "--data", str(file), "--out", str(tmp_path / "run")])
    text, labels = data(tmp_path / "d.txt", "text"), data(tmp_path / "d.jsonl", "label")
    images = lambda *shape: torch.save({"x": torch.randn(10, *shape), "y": torch.arange(10) % 2}, tmp_path / "d.pt") or tmp_path / "d.pt"
    folder("bert"), folder("vit"), folder("gpt2")
    refused("bert", text, "a BertLMHeadModel is no causal language model as it comes")
    refused("vit", images(1, 16, 16), "vit does not take .*d.pt: .*channel")
    refused("vit", images(3, 24, 24), "vit does not take .*d.pt: .*24")
    torch.save({"x": torch.randn(0, 3, 16, 16), "y": torch.arange(0)}, tmp_path / "d.pt")
    refused("vit", tmp_path / "d.pt", r"x is \(0, 3, 16, 16\)")
    import transformers
    transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=60, n_embd=32, n_layer=1, n_head=2)).save_pretrained(tmp_path / "gpt2")
    for file in (text, labels):
        refused("gpt2", file, "its tokenizer gives the token [0-9]+, its embeddings hold 60")
    (tmp_path / "gpt2" / "model.safetensors").write_bytes(b"x" * 100)
    refused("gpt2", text, "AutoModelForCausalLM cannot load it")


def test_long_texts_are_cut_to_what_the_model_has_positions_for(folder, tmp_path):
    """RoBERTa's begin after its padding's: 128 in its table are 126. And a tokenizer without padding takes another token."""
    model = folder("roberta")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in settings.items() if k not in ("pad_token", "eos_token")}))
    (tmp_path / "d.jsonl").write_text("\n".join(json.dumps({"text": "word " * 60, "label": i % 2}) for i in range(12)))
    task = own.own(argparse.Namespace(model=str(model), data=tmp_path / "d.jsonl", val=None, old=None, context=None))
    assert task.splits["val"][0][0].shape[1] == 126
    assert math.isfinite(task.bits(task.model, "val"))


def test_data_that_cannot_be_used_gets_one_clear_line(folder, tmp_path):
    model = folder("gpt2")

    def refused(name, text, *more, match):
        path = tmp_path / name
        path.write_text(text) if text is not None else None
        with pytest.raises(SystemExit, match=match):
            train.main(["--model", str(model), "--data", str(path), *more, "--out", str(tmp_path / "run")])
    refused("none.txt", None, match="No such file")
    refused("empty.txt", " \n", match="is empty")
    refused("short.txt", "hello", match="too few")
    refused("a.csv", "body,tag\nx,y\n", match="columns body, tag; wanted: text")
    refused("a.jsonl", '{"text": "x"}\nnonsense\n', match="line 2: not a JSON object")
    refused("b.jsonl", '[1, 2]\n', match="line 1: not a JSON object")
    refused("c.jsonl", '{"prompt": "x", "response": "y"}\n{"prompt": "x"}\n', match="example 2: no response")
    refused("a.xml", "<a/>", match="jsonl")
    refused("d.pt", "no tensor", match="torch.save")
    data(tmp_path / "good.jsonl", "label")
    (tmp_path / "val.jsonl").write_text('{"text": "x", "label": "odd"}')
    refused("good.jsonl", None, "--val", str(tmp_path / "val.jsonl"), match="label 'odd'")
    refused("one.csv", "text,label\na,x\nb,x\nc,x\nd,x\n", match="one class only")
    (tmp_path / "lm.jsonl").write_text('{"text": "x"}')
    refused("good.jsonl", None, "--val", str(tmp_path / "lm.jsonl"), match="alike")
    with pytest.raises(SystemExit, match="cannot load"):
        train.main(["--model", str(tmp_path / "nowhere"), "--data", str(data(tmp_path / "g.txt", "text")), "--out", str(tmp_path / "run")])


def test_without_transformers_one_line_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SystemExit, match="pip install transformers"):
        train.main(["--model", "x", "--data", str(data(tmp_path / "g.txt", "text")), "--out", str(tmp_path / "run")])
