"""What train.py, lab/tasks.py and lab/study.py promise: honest splits, equal budgets, runs that go
on where they were stopped, tables that say what results.jsonl says."""
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import loft
import train
from lab import study, tasks

ROOT = Path(train.__file__).parent
seeded = torch.Generator().manual_seed


def tiny():
    def batch(generator, n):
        x = torch.randn(n, 16, generator=generator)
        return x, x[:, :4].argmax(1)

    body = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
    model = nn.Sequential()
    model.body, model.head = body, nn.Linear(16, 4)
    splits = {name: [batch(seeded(len(name)), 64)] for name in ("tune", "other")}
    splits["val"] = [(-x, y) for x, y in splits["tune"]]         # what is good on one is bad here
    old = tasks.Task("old", body, batch, {"val": splits["other"]}, steps=8)
    return tasks.Task("tiny", model, batch, splits, old, head=True, size=8)


def column(rows, key):
    return [row[key] for row in rows]


@pytest.fixture
def run(monkeypatch, tmp_path):
    """run(settings) → rows of the tiny task, in an empty folder; run.cells are those that were not
    there yet, run.errors what the cells of a method raise."""
    def noted(model, task, cell):
        run.cells += [cell]
        if cell["method"] in run.errors:
            raise run.errors[cell["method"]]
        return adapt(model, task, cell)

    def run(settings):
        run.cells = []
        return train.main(f"--task tiny --steps 8 --out run {settings}".split())

    adapt, run.errors = train.adapt, {}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(tasks.TASKS, "tiny", tiny)
    monkeypatch.setattr(train, "adapt", noted)
    return run


# --------------------------------------------------------------------------------------------------
# Tasks

@pytest.mark.parametrize("name", tasks.TASKS)
def test_a_task_is_deterministic_and_its_splits_share_no_example(name):
    made = []
    for _ in range(2):
        torch.manual_seed(0)
        task = tasks.TASKS[name]()
        made += [[*task.batch(seeded(3), 500), *task.model.parameters()]]
    assert all(map(torch.equal, *made))
    tune, val, trained = ({tuple(row.flatten().tolist()) for x, *_ in batches for row in x}
                          for batches in (task.splits["tune"], task.splits["val"], made[:1]))
    assert tune and val and not tune & val and not trained & (tune | val)
    assert task.bits(task.model, "val", 1) > 1           # before it has learned
    assert all(share < 0.5 for share in task.measure(task.model, task.splits["val"][:1]).values())


def test_responses_are_what_is_predicted_and_right_answers_count():
    x, y = tasks.math_().splits["val"][0]
    texts = torch.cat([x, y[:, -1:].clamp(min=0)], 1)
    for row, target in zip(texts.tolist(), y.tolist()):
        _, response = bytes(row).decode().strip("\0").split(": ")
        assert bytes(byte for byte in target if byte > 0).decode() == response
        assert all(eval(term.replace("=", "==")) for term in response.split())

    texts[::2] = ord("\n")                               # every other response is empty
    said = nn.functional.one_hot(texts, 256)
    assert tasks.exact_match(lambda x: said[:, 1:x.shape[1] + 1], [(x, y)]) == {"exact_match": 0.5}


def test_images_show_what_their_labels_say():
    images, labels = tasks.scenes(seeded(0), 200)
    assert [len(column.unique()) for column in labels.T] == [8, 4, 9, 4]
    brightest = images.flatten(1).argmax(1)              # where others overlap it may be theirs
    cell = brightest // 32 // 10.5 * 3 + brightest % 32 // 10.5          # of 3 × 3
    assert (cell == labels[:, 2]).float().mean() > 0.9


def test_unseen_languages_combine_the_rules_that_are_seen_one_by_one():
    assert tasks.speak("bad cat", 1, 0, 0) == "bed cet"
    assert tasks.speak("bad cat", 0, 1, 1) == "cad pat"


# --------------------------------------------------------------------------------------------------
# Runs

def test_a_run_from_settings_to_table(run):
    """Every method within one budget; a lookahead's steps are among its own."""
    rows = run(f"--method {','.join(train.METHODS)} --support skew,skew-plain,lookahead,narrow")
    skew, plain, *ahead = rows[1:5]
    assert column(rows[:7], "support") == [
        None, "skew", "skew-plain", "lookahead", "narrow", "principal-plain", "all"]
    assert skew["align"] and not plain["align"]
    assert all(row["lookahead_steps"] == 2 and row["curve"][-1][0] == 6 for row in ahead)
    assert max(row["trainable"] for row in rows[:-1]) == rows[-2]["trainable"] == 68 + 2 * 32
    for row, line in zip(rows, Path("run/table.txt").read_text().splitlines()[2:], strict=True):
        assert line.startswith(row["method"])
        for number in (row["after"], row["measures"]["other"], row["kept_after"]):
            assert f" {number:.3f} " in line
    task = tiny()
    task.old.model.load_state_dict(torch.load(*Path().glob("pretrained-old-*.pt")))
    loft.load(task.model, "run/tiny-loft-1.pt")
    assert task.bits(task.model, "val") == pytest.approx(skew["after"], rel=1e-5)


def test_rates_are_tried_on_the_first_seed_and_chosen_by_the_tune_split(run):
    rows = run("--method lora --lr 1e-4,1e-2,1 --seeds 3")
    best = min(rows[:3], key=lambda row: row["tune"])["lr"]
    assert column(rows, "lr") == [1e-4, 1e-2, 1, best, best]
    assert column(rows, "seed") == [0, 0, 0, 1, 2]


def test_a_run_goes_on_where_it_was_stopped(run, capsys):
    """After Ctrl-C, which prints what is finished, and with a line that was cut short."""
    settings = "--method loft,lora,full --support skew,random"
    run.errors = {"lora": KeyboardInterrupt()}
    with pytest.raises(SystemExit):
        run(f"{settings} --out cut")
    out, run.errors = capsys.readouterr().out, {}
    assert re.search(r"(?s)\nloft +random .*--resume cut", out) and "\nlora" not in out
    with open("cut/results.jsonl", "a") as file:
        file.write('\n{"task": "tiny", "method": "lo')
    rows, cells = run("--resume cut"), run.cells
    whole = run(settings)
    assert cells == run.cells[2:] and rows == train.read(Path("cut"))
    assert column(rows, "after") == column(whole, "after")


def test_a_cell_that_fails_does_not_stop_the_others(run, capsys):
    run.errors = {"full": RuntimeError("as asked")}
    with pytest.raises(SystemExit) as stop:
        run("--method lora,full,psoft --lr 1e-2,1e30 --budget 40")
    *_, table, failures = capsys.readouterr().out.split("\n\n")
    assert stop.value.code == 1 and re.fullmatch(r"tiny .*\nbefore .*\npsoft .*", table)
    for message in ("lora lr 0.01 seed 0: .*no size has at most 40", "full lr 0.01 .*as asked",
                    r"psoft lr 1e\+30 seed 0: .*step \d, .* the gradient of body"):
        assert re.search(message, failures)


@pytest.mark.parametrize("settings, message", [
    ("--method lroa", "--method: lroa; wanted: frozen, loft"), ("--support best", "skew-plain"),
    ("--steps 0", "0; wanted"), ("--lr inf", "positive"), ("--rank 2 --budget 9", "not allowed"),
    ("--out .", "holds a run; --resume"),
    ("--resume nowhere", "settings.json does not exist")])
def test_what_means_nothing_is_refused_in_one_line(settings, message, run, capsys):
    Path("results.jsonl").touch()
    with pytest.raises(SystemExit):
        run(settings)
    assert message in capsys.readouterr().err.splitlines()[-1] and not run.cells


def test_a_size_is_the_largest_within_the_budget():
    task = tasks.english()                               # lora at rank 1 has 8,192 parameters
    sizes = [train.largest(task, method, 2 * 8192)
             for method in ("loft", "psoft", "oft", "boft", "hra", "lora")]
    assert sizes == [45, 43, 8, 4, 4, 2]


def test_a_newcomer_sees_no_lines_but_ours():
    for script in ("train.py", "-m lab.study"):
        out = subprocess.check_output([sys.executable, *script.split(), "--help"],
                                      stderr=subprocess.STDOUT, cwd=ROOT)
        assert out.startswith(b"usage: ")


# --------------------------------------------------------------------------------------------------
# The study

def row(method, seed, after, size=1):
    return dict.fromkeys(study.KEY) | dict(
        method=method, size=size, seed=seed, lr=1e-2, trainable=size, tune=1.0, after=after,
        kept_after=2.0, before=9.0, kept_before=1.0, measures={}, measures_before={},
        curve=[[3, 4.0, 1.0], [6, 2.0, 2.0], [9, after, 3.0]])


def test_differences_are_paired_by_seed_at_the_rate_that_was_tuned():
    rows = [row("lora", 0, 0.5) | dict(lr=1e-1, tune=2.0)]
    rows += [row("lora", i, 1 + i / 2) for i in range(3)]
    rows += [row("full", i, after) for i, after in ((2, 2.3), (0, 1.1), (1, 1.7), (3, 9.0))]
    rows += [row("lora", i, 7.0, size=4) for i in range(2)]
    *_, small, full, large = study.report(study.groups(rows), "lora").strip().split("\n")
    assert "| lora | 1 | 1 | 0.01 | 3 | 1.500 ± 0.500 (+0.000 ± 0.000) |" in small
    assert "(+0.200 ± 0.058)" in full and "7.000 ± 0.000 (+0.000" in large
    # at equal loss, by hand: 3 − 2.9 bits on the old domain, 3 − 2.6, 1.85 − 1.85
    assert "(+0.167 ± 0.120)" in full and study.at(9.0, rows[0]["curve"]) == 1.0


def test_a_rate_is_better_than_both_its_neighbours(monkeypatch):
    def sweep(task, method, support, args, rows):
        rows += [{"lr": min(args.lr, key=lambda lr: abs(lr - 0.3))}]

    monkeypatch.setattr(train, "sweep", sweep)
    assert study.best_rate(None, "lora", None, SimpleNamespace()) == 0.3


def test_a_study_runs_once(run, monkeypatch, capsys):
    monkeypatch.setitem(study.ROWS, "some", (
        [("lora", None), ("loft", "lookahead")], (1, 2), 8, {}))
    argv, tables = "study --tasks tiny --rows some --seeds 2 --against lora".split(), []
    for more in ([], [], ["--report"]):
        run.cells = []
        study.main(argv + more)
        tables += [capsys.readouterr().out.split("### ")[1]]
        assert bool(run.cells) == (len(tables) == 1) and tables[0] == tables[-1]
    for label in ("| lora |", "| loft lookahead |", "(+0.000 ± 0.000)"):
        assert tables[0].count(label) >= 2
    pytest.importorskip("matplotlib")
    study.main(argv + ["--report", "--plot", "study/plot.png"])
    assert Path("study/plot.png").stat().st_size > 5000


# --------------------------------------------------------------------------------------------------
# The lesson

def test_readme_and_the_lesson_show_what_happens(run, capsys):
    """Their blocks marked python, one after another; what one prints stands below it."""
    block, names = r"(?s)```python\n(.*?)```(?:\n```text\n(.*?)```)?", vars(tiny())
    names["batches"] = names["splits"]["tune"]           # model and loss_fn are there
    for file in ("README.md", "lab/LESSON.md"):
        for code, shown in re.findall(block, (ROOT / file).read_text("utf-8")):
            exec(code, names)
            assert capsys.readouterr().out == shown
