"""What train.py, lab/tasks.py and lab/study.py promise: honest splits, equal budgets, runs that go
on where they were stopped, tables that say what results.jsonl says."""
import math
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import lab
import loft
import train
from lab import study, tasks

seeded = torch.Generator().manual_seed


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.body(x))


def tiny():
    teacher = torch.randn(16, 4, generator=seeded(5))

    def batch(generator, n):
        x = torch.randn(n, 16, generator=generator)
        return x, (x @ teacher).argmax(1)

    model, names = Net(), ("tune", "val", "more")
    splits = {name: [batch(seeded(10 + i), 64)] for i, name in enumerate(names)}
    old = tasks.Task("old", model.body, batch, {"val": splits["more"]}, steps=8)
    return tasks.Task("tiny", model, batch, splits, old, head=True, size=8)


@pytest.fixture
def run(monkeypatch, tmp_path):
    """run(argv) → rows of the tiny task; run.cells are those that were not there yet, of which
    run.breaks (a method) raises run.error."""
    def noted(model, task, cell):
        run.cells.append((cell["method"], cell["support"], cell["seed"]))
        if cell["method"] == run.breaks:
            raise run.error
        return adapt(model, task, cell)

    def run(*argv, out="run", option="--out"):
        run.cells = []
        return train.main(["--task", "tiny", "--steps", "8", option, f"{tmp_path / out}", *argv])

    adapt, run.breaks = train.adapt, None
    monkeypatch.setitem(tasks.TASKS, "tiny", tiny)
    monkeypatch.setattr(train, "adapt", noted)
    return run


# --------------------------------------------------------------------------------------------------
# Tasks

@pytest.mark.parametrize("name", tasks.TASKS)
def test_a_task_is_deterministic_and_its_splits_share_no_example(name):
    def make():
        torch.manual_seed(0)
        task = tasks.TASKS[name]()
        return task, [*task.batch(seeded(3), 4), *task.model.parameters()]

    (task, mine), (_, again) = make(), make()
    assert all(map(torch.equal, mine, again))
    tune, val = ({tuple(row.flatten().tolist()) for x, _ in task.splits[split] for row in x}
                 for split in ("tune", "val"))
    assert not tune & val and len(tune) > 200 and len(val) > 200
    for each in (task, task.old):                        # so much is soon measured
        each.splits = {split: [(x[:4], y[:4])] for split, ((x, y), *_) in each.splits.items()}
    numbers = task.measures(task.model) | {"val": task.bits(task.model, "val")}
    assert all(map(math.isfinite, [*numbers.values(), task.kept(task.model)]))


def test_held_out_problems_are_not_trained_on_and_right_answers_count():
    task = tasks.math_()
    trained = task.batch(seeded(0), 20000)[0].tolist()
    x, y = task.splits["val"][0]
    assert not any(row in trained for row in x[:20].tolist())
    texts = torch.cat([x, y[:, -1:].clamp(min=0)], 1)
    for row, target in zip(texts.tolist(), y.tolist()):
        _, response = bytes(row).decode().strip("\0").split(": ")
        assert bytes(byte for byte in target if byte > 0).decode() == response
        (_, first), (then, _) = sums = [part.split("=") for part in response.split()]
        assert all(eval(term) == int(result) for term, result in sums) and then.startswith(first)

    def half_right(tokens):
        said = texts.masked_fill(torch.arange(len(texts))[:, None] % 2 == 0, ord("\n"))
        return nn.functional.one_hot(said[:, 1:tokens.shape[1] + 1], 256)

    assert tasks.exact_match(half_right, [(x, y)]) == {"exact_match": 0.5}


def test_images_show_what_their_labels_say():
    images, labels = tasks.vision().batch(seeded(0), 200)
    assert [len(column.unique()) for column in labels.T] == [8, 4, 9, 4]
    for image, cell in zip(images, labels[:, 2].tolist()):
        row, column = 2 + 10 * (cell // 3), 2 + 10 * (cell % 3)
        assert image[row:row + 8, column:column + 8].max() > 1.15        # the bright object


def test_unseen_languages_combine_the_rules_that_are_seen_one_by_one():
    rules = (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1)
    said = [tasks.speak("bad cat", *rule) for rule in rules]
    assert said == ["bed cet", "pat cad", "cat bad", "ced pet"]


# --------------------------------------------------------------------------------------------------
# Runs

def test_a_run_from_settings_to_table(run, tmp_path, capsys):
    """Every method within one budget; a lookahead's steps are among its own."""
    rows = run("--method", ",".join(train.METHODS), "--support", "skew,skew-plain,lookahead")
    found = {(row["method"], row["support"]): row for row in rows}
    frozen, skew, plain, ahead, psoft, *_, lora, full = found.values()
    assert list(found)[:5] == [("frozen", None), ("loft", "skew"), ("loft", "skew-plain"),
                               ("loft", "lookahead"), ("psoft", "principal-plain")]
    assert [row["align"] for row in rows[1:5]] == [True, False, True, False]
    assert [row["lookahead_steps"] for row in rows] == [0, 0, 0, 2] + [0] * 7
    assert ahead["curve"][-1][0] == 6 and skew["curve"][-1][0] == 8
    assert max(row["trainable"] for row in rows[:-1]) == lora["trainable"] == 68 + 2 * 32
    out, folder = capsys.readouterr().out, tmp_path / "run"
    assert rows == train.read(folder)
    for row, line in zip(rows, (folder / "table.txt").read_text().splitlines()[2:], strict=True):
        assert line.startswith(row["method"]) and line in out
        for number in (row["after"], row["measures"]["more"], row["kept_after"]):
            assert f" {number:.3f} " in line
    task = tiny().to("cpu")
    task.old.model.load_state_dict(torch.load(*tmp_path.glob("pretrained-old-*.pt")))
    loft.load(task.model, folder / "tiny-loft-1.pt")
    assert task.bits(task.model, "val") == pytest.approx(skew["after"], rel=1e-5)


def test_rates_are_tried_on_the_first_seed_and_chosen_by_the_tune_split(run):
    rows = run("--method", "lora", "--lr", "1e-4,1e-2,1", "--seeds", "3")
    best = min(rows[:3], key=lambda row: row["tune"])["lr"]
    rates = [(row["lr"], row["seed"]) for row in rows]
    assert rates == [(1e-4, 0), (1e-2, 0), (1, 0), (best, 1), (best, 2)]


def test_a_run_goes_on_where_it_was_stopped(run, tmp_path, capsys):
    """After Ctrl-C, which prints what is finished, and with a line that was cut short."""
    argv = "--method loft,lora,full --support skew,random".split()
    whole, cells = run(*argv), run.cells
    capsys.readouterr()
    run.breaks, run.error = "lora", KeyboardInterrupt()
    with pytest.raises(SystemExit):
        run(*argv, out="cut")
    out, cut = capsys.readouterr().out, tmp_path / "cut"
    assert f"--resume {cut}" in out and re.search(r"\nloft +random ", out) and "\nlora" not in out
    with open(cut / "results.jsonl", "a") as file:
        file.write('\n{"task": "tiny", "method": "lo')
    run.breaks = None
    rows = run(out="cut", option="--resume")
    assert run.cells == cells[2:] and rows == train.read(cut)
    assert [row["after"] for row in rows] == [row["after"] for row in whole]
    run("--seeds", "2", out="cut", option="--resume")
    assert [seed for *_, seed in run.cells] == [1, 1, 1, 1]


def test_a_cell_that_fails_does_not_stop_the_others(run, capsys):
    run.breaks, run.error = "full", RuntimeError("as asked")
    with pytest.raises(SystemExit) as stop:
        run(*"--method lora,full,loft --support skew --lr 1e-2,1e30 --budget 40".split())
    *_, table, failures = capsys.readouterr().out.split("\n\n")
    assert stop.value.code == 1 and table.count("\nloft") == 1 and table.count("\n") == 2
    for message in ("lora lr 0.01 seed 0: .*no size has at most 40", "full lr 0.01 .*as asked",
                    r"skew lr 1e\+30 seed 0: .*step \d, .* the gradient of body"):
        assert re.search(message, failures)


@pytest.mark.parametrize("argv, message", [
    ("--method lroa", "lroa; wanted: frozen, loft"), ("--support best", "skew-plain"),
    ("--task x", "code, understanding"), ("--lr 0", "positive"), ("--lr nan", "positive"),
    ("--rank x", "--rank: invalid positive value: 'x'"), ("--steps -3", "-3; wanted"),
    ("--rank 2 --budget 9", "not allowed with"), ("--lookahead 8", "leaves nothing of --steps 8"),
    ("--options {", "--options"), ("--resume nowhere", "settings.json does not exist"),
    ("", "holds a run; --resume")])
def test_what_means_nothing_is_refused_in_one_line(argv, message, run, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "results.jsonl").touch()
    with pytest.raises(SystemExit):
        run(*argv.split())
    assert message in capsys.readouterr().err.splitlines()[-1] and not run.cells


def test_a_size_is_the_largest_within_the_budget():
    task = SimpleNamespace(model=tasks.Transformer())    # lora at rank 1 has 8,192 parameters
    for budget, sizes in (None, [32, 30, 4, 2, 2, 1]), (2 * 8192, [45, 43, 8, 4, 4, 2]):
        methods = ("loft", "psoft", "oft", "boft", "hra", "lora")
        assert [train.largest(task, method, budget) for method in methods] == sizes


def test_your_own_model_and_data_are_handed_over(monkeypatch):
    monkeypatch.setattr(lab, "own", SimpleNamespace(main=list), raising=False)
    assert train.main(["--data=x.csv", "--rank", "4"]) == ["--data=x.csv", "--rank", "4"]


@pytest.mark.parametrize("script", [["train.py"], ["-m", "lab.study"]])
def test_a_newcomer_sees_no_lines_but_ours(script):
    done = subprocess.run([sys.executable, *script, "--help"], cwd=Path(train.__file__).parent,
                          capture_output=True, text=True)
    assert done.returncode == 0 and "--seeds" in done.stdout and not done.stderr


# --------------------------------------------------------------------------------------------------
# The study

def row(method, seed, after, lr=1e-2, tune=1.0, size=1, curve=()):
    return dict(task="t", steps=9, method=method, support=None, size=size, options={}, seed=seed,
                lr=lr, lookahead_steps=0, pretrain_steps=None, trainable=size, tune=tune, after=after,
                kept_after=2.0, before=9.0, kept_before=1.0, measures={}, measures_before={},
                curve=curve or [[3, 4.0, 1.0], [6, 2.0, 2.0], [9, after, 3.0]])


def test_differences_are_paired_by_seed_at_the_rate_that_was_tuned():
    rows = [row("lora", 0, 9.9, lr=1e-1, tune=2.0), *(row("lora", i, 1 + i / 2) for i in range(3))]
    rows += [row("full", i, after) for i, after in ((2, 2.3), (0, 1.1), (1, 1.7), (3, 9.0))]
    rows += [row("lora", i, 7.0, size=4) for i in range(2)]
    *_, small, full, large = study.report(study.groups(rows), "lora").strip().split("\n")
    assert "| lora | 1 | 1 | 0.01 | 3 | 1.500 ± 0.500 (+0.000 ± 0.000) |" in small
    assert "(+0.200 ± 0.058)" in full and "7.000 ± 0.000 (+0.000" in large


def test_forgetting_is_read_where_both_have_come_to_the_same_loss():
    fast, slow = row("a", 0, 1.0), row("b", 0, 3.0, curve=[[4, 5.0, 5.0], [9, 3.0, 7.0]])
    assert study.forgotten(fast, slow) == 1.5 - 7.0 and study.forgotten(slow, fast) == 7.0 - 1.5
    assert study.at(9.0, fast["curve"]) == 1.0


def test_a_rate_is_better_than_both_its_neighbours(monkeypatch):
    def sweep(task, method, support, args, rows):
        rows.append({"lr": min(args.lr, key=lambda lr: abs(lr - 0.3))})
        tried.update(args.lr)

    tried = set()
    monkeypatch.setattr(train, "sweep", sweep)
    assert study.best_rate(None, "lora", None, SimpleNamespace()) == 0.3
    assert tried == {3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0}


def test_a_study_runs_once(run, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(study.ROWS, "some", ([("lora", None), ("loft", "lookahead")], (1, 2), 8, {}))
    argv, tables = f"{tmp_path} --tasks tiny --rows some --seeds 2 --against lora".split(), []
    for more in ([], [], ["--report"]):
        run.cells = []
        study.main(argv + more)
        tables.append(capsys.readouterr().out.split("### ")[1])
        assert bool(run.cells) == (len(tables) == 1) and tables[0] == tables[-1]
    for label in ("| lora |", "| loft lookahead |", "(+0.000 ± 0.000)"):
        assert tables[0].count(label) >= 2
    try:
        study.main([*argv, "--report", "--plot"])
        assert (tmp_path / "plot.png").stat().st_size > 5000
    except SystemExit as e:
        assert "pip install matplotlib" in str(e)
