"""What train.py adapts: five small tasks that need no download.

Each is a pretrained model, batches of a new domain, splits to measure on, and the old domain, to
see what is forgotten:

    code           prose → source code. Stands for adapting a language model to a new domain
    understanding  which package is a docstring from. Stands for GLUE: real sentences, told apart
                   by words rather than meaning
    vision         a ViT that knows shapes → orientation, count, position, texture. Stands for
                   VTAB's structured group
    math           word problems of one step → of two, answered by generation. Stands for GSM8K,
                   without the language
    multilingual   English → three re-encodings of it, measured on unseen combinations too. Stands
                   for cross-lingual transfer

A batch is (x, y): inputs, and what to predict, −100 where nothing. The text is what every Python
carries: the language reference in pydoc_data.topics, docstrings and sources of the standard
library. All of it is deterministic on one version of Python.
"""
from __future__ import annotations

import ast
import functools
import itertools
import math
import random
import re
import sysconfig
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import torch
import torch.nn.functional as F
from torch import nn

CONTEXT = 128                                            # bytes that a model sees at once
TENTHS = ("val", "tune") + ("train",) * 8                # a split by tenths


def cross_entropy(model, batch):
    """Mean over predictions, in nats: model(x) → logits (…, classes), y (…)."""
    x, y = batch
    return F.cross_entropy(model(x).flatten(0, -2), y.flatten())


@dataclass
class Task:
    """A model, batches of a domain, and what to measure on it."""
    name: str
    model: nn.Module
    batch: Callable                                      # (generator, n) → n training examples
    splits: dict                                         # batches of tune, of val, of further ones
    old: Task | None = None                              # the domain of pretraining
    head: bool = False                                   # model.head is new: it trains too, and
    #                                                      model.body is what was pretrained
    loss_fn: Callable = cross_entropy                    # (model, batch) → mean loss, in nats
    measure: Callable = lambda model, batches: {}        # what else to report of val
    size: int = 16                                       # examples in a training batch
    steps: int = 0                                       # of pretraining, and its learning rate
    lr: float = 3e-3

    def to(self, device):
        """Moves the model and what it is measured on."""
        self.model.to(device)
        self.device = device
        self.splits = {name: [[t.to(device) for t in batch] for batch in batches]
                       for name, batches in self.splits.items()}
        return self

    def draw(self, generator):
        """A training batch, where the model is."""
        return [t.to(self.device) for t in self.batch(generator, self.size)]

    @torch.no_grad()
    def bits(self, model, split, most=None):
        """The loss in bits a prediction (of a byte, of a class), on the first `most` batches."""
        total = count = 0
        for x, y in self.splits[split][:most]:
            n = (y >= 0).sum().item()
            total += self.loss_fn(model, (x, y)).item() * n
            count += n
        return total / count / math.log(2)

    def kept(self, model, most=None):
        """Bits on the old domain: what is forgotten shows here."""
        return self.old.bits(model.body if self.head else model, "val", most)

    def measures(self, model):
        """What is reported beside bits: those of further splits, accuracies."""
        return self.measure(model, self.splits["val"]) | {
            name: self.bits(model, name) for name in self.splits.keys() - {"tune", "val"}}


# --------------------------------------------------------------------------------------------------
# Models

class Block(nn.Module):
    def __init__(self, d, causal):
        super().__init__()
        self.causal = causal
        self.norm1, self.qkv, self.proj = nn.LayerNorm(d), nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.norm2, self.up, self.down = nn.LayerNorm(d), nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x):                                # (n, t, d)
        # (n, t, 3d) → (n, 4, t, d/4) each, of four heads
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.proj(y.transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """A causal language model of bytes: x (n, t) → logits (n, t, 256)."""

    def __init__(self, out=256, d=128, causal=True):
        super().__init__()
        self.token, self.position = nn.Embedding(256, d), nn.Embedding(CONTEXT, d)
        self.blocks = nn.Sequential(*(Block(d, causal) for _ in range(4)))
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, out, bias=False)

    def features(self, x):                               # (n, t, d)
        return self.norm(self.blocks(self.token(x) + self.position.weight[:x.shape[1]]))

    def pool(self, x):                                   # (n, d): the mean, without padding (0)
        mask = (x != 0)[..., None]
        return (self.features(x) * mask).sum(1) / mask.sum(1)

    def forward(self, x):
        return self.head(self.features(x))


class ViT(Transformer):
    """A vision transformer on patches of 8 × 8: x (n, 32, 32) → logits (n, out)."""

    def __init__(self, out):
        super().__init__(out, causal=False)
        self.token = nn.Linear(64, 128)
        nn.init.normal_(self.position.weight, std=0.02)

    def pool(self, x):                                   # (n, d)
        patches = x.unfold(1, 8, 8).unfold(2, 8, 8).flatten(3).flatten(1, 2)
        return self.features(patches).mean(1)            # (n, 16, 64) → (n, 16, d) → (n, d)

    def forward(self, x):
        return self.head(self.pool(x))


class Classifier(nn.Module):
    """A new head on a pretrained body: x → a tuple of logits (n, classes), one an attribute."""

    def __init__(self, body, *classes):
        super().__init__()
        self.body, self.head, self.classes = body, nn.Linear(128, sum(classes)), classes

    def forward(self, x):
        return self.head(self.body.pool(x)).split(self.classes, 1)


def attributes(model, batch):
    """The cross-entropies of a `Classifier`, summed over its attributes, y (n, attributes)."""
    x, y = batch
    return sum(map(F.cross_entropy, model(x), y.T))


@torch.no_grad()
def accuracy(model, batches):
    """The mean over a `Classifier`'s attributes."""
    right = [torch.stack([logits.argmax(1) for logits in model(x)], 1) == y for x, y in batches]
    return {"accuracy": torch.cat(right).float().mean().item()}


# --------------------------------------------------------------------------------------------------
# Batches

def chunks(x, y):
    """Batches of 64, to measure on."""
    return list(zip(x.split(64), y.split(64)))


def rows(x, y, weight=None):
    """Draws rows at random, in proportion to `weight`."""
    def batch(generator, n):
        i = (torch.randint(len(x), (n,), generator=generator) if weight is None else
             torch.multinomial(weight, n, replacement=True, generator=generator))
        return x[i], y[i]
    return batch


def padded(texts):
    """(len(texts), longest) bytes as int64, padded with 0."""
    return nn.utils.rnn.pad_sequence([torch.tensor(list(text)) for text in texts], True)


def windows(places):
    """Each byte of a window from the ones before it; places: (text as bytes, start) each."""
    tokens = torch.tensor([list(text[i:i + CONTEXT + 1]) for text, i in places])
    return tokens[:, :-1], tokens[:, 1:]


def random_windows(*texts):
    """Draws windows, each from any of the texts."""
    data = [text.encode() for text in texts]

    def batch(generator, n):
        start = torch.rand(n, generator=generator)
        which = torch.randint(len(data), (n,), generator=generator)
        return windows((data[w], int(s * (len(data[w]) - CONTEXT))) for w, s in zip(which, start))
    return batch


def even_windows(*texts):
    """256 evenly spaced windows in all, in chunks."""
    places = []
    for text in texts:
        data = text.encode()
        starts = torch.linspace(0, len(data) - CONTEXT - 1, 256 // len(texts)).long()
        places += [(data, i) for i in starts]
    return chunks(*windows(places))


# --------------------------------------------------------------------------------------------------
# Tasks on text: the standard library's own

@functools.cache
def library():
    """(part, top-level package, source, docstrings) of every module; the file's name decides on the
    part."""
    root, modules = Path(sysconfig.get_paths()["stdlib"]), []
    skipped = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3",
               "pydoc_data"}
    documented = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
    for file in sorted(root.rglob("*.py")):
        path = file.relative_to(root)
        if skipped.intersection(path.parts):
            continue
        try:
            source = file.read_text("utf-8")
            docs = [doc for node in ast.walk(ast.parse(source)) if isinstance(node, documented)
                    and (doc := ast.get_docstring(node))]
        except (SyntaxError, ValueError):
            continue
        modules.append((TENTHS[zlib.crc32(path.as_posix().encode()) % 10],
                        path.parts[0].removesuffix(".py"), source, docs))
    return modules


def parts(texts):
    """{"train", "tune", "val": the texts of that part, as one}, of (part, text)."""
    return {part: "\n\n".join(text for p, text in texts if p == part) for part in TENTHS}


@functools.cache
def prose():
    """The language reference, a tenth of its topics held out, and docstrings, of held-out files."""
    from pydoc_data.topics import topics
    texts = [(TENTHS[i % 10], topics[topic]) for i, topic in enumerate(sorted(topics))]
    return parts(texts + [(part, text) for part, _, _, docs in library() for text in docs])


def english():
    """The old domain of the tasks on text."""
    return Task("prose", Transformer(), random_windows(prose()["train"]),
                {"val": even_windows(prose()["val"])}, steps=1200)


def code():
    """Prose → source code."""
    text, old = parts([(part, source) for part, _, source, _ in library()]), english()
    return Task("code", old.model, random_windows(text["train"]),
                {part: even_windows(text[part]) for part in ("tune", "val")}, old)


def understanding():
    """Which of eight packages is a docstring from. Pretraining has seen most of the text, never a
    label."""
    package = {doc.encode()[:CONTEXT]: name
               for _, name, _, docs in library() for doc in docs if len(doc) >= 40}
    classes = [name for name, _ in Counter(package.values()).most_common(8)]

    def examples(*tenths):
        chosen = [doc for doc, name in package.items()
                  if name in classes and zlib.crc32(doc) % 10 in tenths]
        return padded(chosen), torch.tensor([[classes.index(package[doc])] for doc in chosen])

    x, y = examples(*range(7))
    balance, old = (1 / y.flatten().bincount())[y.flatten()], english()  # classes equally often
    return Task("understanding", Classifier(old.model, 8), rows(x, y, balance),
                {"tune": chunks(*examples(7)), "val": chunks(*examples(8, 9))}, old, True,
                attributes, accuracy)


def multilingual():
    """English → three artificial languages, each of one systematic rule; the unseen ones combine
    the rules. After studies of cross-lingual transfer on re-encoded English ("fake languages"),
    where what is shared can be controlled."""
    def languages(part, *counts):                        # those of so many rules
        return [speak(prose()[part], *rules) for rules in itertools.product((1, 0), repeat=3)
                if sum(rules) in counts]

    splits = {part: even_windows(*languages(part, 1)) for part in ("tune", "val")}
    splits["unseen"] = even_windows(*languages("val", 2, 3))
    old = english()
    return Task("multilingual", old.model, random_windows(*languages("train", 1)), splits, old)


def speak(text, vowels, voicing, order):
    """English by any of three rules: a chain shift, b ↔ p and the like, phrases backwards."""
    if vowels:
        text = text.translate(str.maketrans("aeiouAEIOU", "eiouaEIOUA"))
    if voicing:
        text = text.translate(str.maketrans("bdgvzptkfsBDGVZPTKFS", "ptkfsbdgvzPTKFSBDGVZ"))
    if order:
        text = re.sub(r"[^.,:;!?()\n]+", lambda m: " ".join(m[0].split(" ")[::-1]), text)
    return text


# --------------------------------------------------------------------------------------------------
# Tasks that are generated

def problem(rng, steps):
    """("Ann has 3, gets 4: ", "3+4=7\\n") of so many steps; no number reaches 20."""
    total = rng.randrange(20)
    prompt, response = f"Ann has {total}", []
    for _ in range(steps):
        before, total = total, rng.choice([n for n in range(20) if n != total])
        verb, sign = ("gets", "+") if total > before else ("loses", "-")
        prompt += f", {verb} {abs(total - before)}"
        response.append(f"{before}{sign}{abs(total - before)}={total}")
    return prompt + ": ", " ".join(response) + "\n"


def math_():
    """Word problems of one step → of two, worked out in the response, which alone is trained on."""
    rng = random.Random(0)
    single = "".join("".join(problem(rng, 1)) for _ in range(50_000))
    old = Task("sums", Transformer(), random_windows(single[:-60_000]),
               {"val": even_windows(single[-60_000:])}, steps=1500)
    double = dict(problem(rng, 2) for _ in range(20_000))                # each prompt once
    tokens = padded([(prompt + response).encode() for prompt, response in double.items()])
    start = torch.tensor([[len(prompt)] for prompt in double])
    answered = (torch.arange(tokens.shape[1]) >= start) & (tokens > 0)
    x, y = tokens[:, :-1], tokens.where(answered, -100)[:, 1:]
    return Task("math", old.model, rows(x[768:], y[768:]),
                {"tune": chunks(x[:256], y[:256]), "val": chunks(x[256:768], y[256:768])}, old,
                measure=exact_match, size=32)


@torch.no_grad()
def exact_match(model, batches):
    """The share of problems whose last number comes out right when the response is generated."""
    right = []
    for x, y in batches:
        true = torch.cat([x, y[:, -1:].clamp(min=0)], 1)                 # (n, t + 1)
        every, place = (torch.arange(k, device=x.device) for k in true.shape)
        n = (y >= 0).int().argmax(1) + 1                                 # where responses begin
        said = true.where(place < n[:, None], 0)
        for _ in range((y >= 0).sum(1).max()):           # greedy; a row waits at its newline
            said[every, n] = model(said[:, :n.max()])[every, n - 1].argmax(-1)
            n = (n + (said[every, n] != ord("\n"))).clamp(max=len(place) - 1)
        right += [answer(ours) == answer(row) for ours, row in zip(said, true)]
    return {"exact_match": sum(right) / len(right)}


def answer(row):
    """The number at the end of the first line, in a list; or an empty one."""
    return re.findall(rb"=(\d+)\n", bytes(row.tolist()))[:1]


def vision():
    """A small ViT pretrained on the shape of one object on a plain ground → four other attributes
    of richer images."""
    old = Task("shapes", ViT(5), objects, {"val": held_out(objects, 3)}, size=64, steps=1200,
               lr=1e-3)
    return Task("vision", Classifier(old.model, 8, 4, 9, 4), scenes,
                {"tune": held_out(scenes, 1), "val": held_out(scenes, 2)}, old, True, attributes,
                accuracy, size=64)


def held_out(source, seed):
    """512 images of a seed that no run has (torch's generator on a CPU counts 32 bits)."""
    return chunks(*source(torch.Generator().manual_seed(2 ** 31 + seed), 512))


def objects(generator, n):
    """Images of one object, and its shape, 0 to 4 (n,)."""
    shape = torch.randint(5, (n,), generator=generator)
    turn, size, *centre = torch.rand(n, 4, generator=generator).T
    image = draw(shape, turn * 2 * math.pi, 0.4 + 0.3 * size, *(0.6 * c - 0.3 for c in centre))
    return image + 0.1 * torch.randn(n, 32, 32, generator=generator), shape


def scenes(generator, n):
    """Images of one to four objects on a texture; orientation (8), count (4), the bright object's
    position (9), texture (4) (n, 4)."""
    turn, count, texture = (torch.randint(k, (n,), generator=generator) for k in (8, 4, 4))
    cells = torch.rand(n, 9, generator=generator).argsort(1)             # the first of 3 × 3
    shape, image = torch.randint(5, (n,), generator=generator), torch.zeros(n, 32, 32)
    for k, cell in enumerate(cells.T[:4]):
        light = ((0.8 if k else 1.5) * (k <= count))[:, None, None]
        image += light * draw(shape, turn * math.pi / 4, torch.full((n,), 0.3),
                              (cell % 3 - 1) * 0.64, (cell // 3 - 1) * 0.64)
    stripes = (torch.arange(32) // 2 % 2).expand(32, 32)
    grounds = torch.stack([0 * stripes, stripes.T, stripes, stripes ^ stripes.T])
    image += 0.3 * grounds[texture] + 0.1 * torch.randn(n, 32, 32, generator=generator)
    return image, torch.stack([turn, count, cells[:, 0], texture], 1)


SHAPES = (                                               # x, y in [−1, 1]; none is symmetric
    lambda x, y: x.abs() < (1 - y) / 2,                                  # a wedge
    lambda x, y: (x ** 2 + y ** 2 < 1) & (y > 0),                        # half a disc
    lambda x, y: (x < -0.3) | (y < -0.3),                                # L
    lambda x, y: (y > 0.3) | (x.abs() < 0.3),                            # T
    lambda x, y: ((x ** 2 + y ** 2 - 0.6).abs() < 0.4) & ~((x > 0) & (y.abs() < 0.4)),   # C
)


def draw(shape, angle, size, x, y):
    """(n, 32, 32) masks of one object an image, at x, y in [−1, 1]; all arguments (n,)."""
    i = torch.linspace(-1, 1, 32)
    angle, size, x, y = (t[:, None, None] for t in (angle, size, x, y))
    c, s, x, y = angle.cos(), angle.sin(), i - x, i[:, None] - y         # (n, 1, 32), (n, 32, 1)
    x, y = (c * x + s * y) / size, (c * y - s * x) / size                # (n, 32, 32)
    masks = torch.stack([inside(x, y) for inside in SHAPES]) & (x.abs() < 1) & (y.abs() < 1)
    return masks[shape, torch.arange(len(shape))].float()


TASKS = {"code": code, "understanding": understanding, "vision": vision, "math": math_,
         "multilingual": multilingual}
