"""What train.py adapts: five small tasks that need no download. (own.py: your own model and data.)

Each task is a pretrained model, batches of a new domain, splits to measure on, and the old domain, to see what is forgotten:

    code            prose → source code. Stands for the shift of domain that a language model is adapted to most often
    understanding   which package does a docstring belong to. Stands for GLUE: real sentences, but told apart by words
    vision          a ViT that knows shapes → orientation, count, position, texture. Stands for VTAB's structured group
    math            word problems of one step → of two, answered by generation. Stands for GSM8K, without the language
    multilingual    English → three re-encodings of it, measured on unseen combinations. Stands for cross-lingual transfer

The text is what every Python carries: the language reference in pydoc_data.topics, docstrings and sources of the standard
library. Everything is deterministic on one Python version.
"""
from __future__ import annotations

import ast
import functools
import math
import random
import re
import statistics
import sysconfig
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

CONTEXT = 128
Batch = tuple[Tensor, ...]                                                     # tensors with the same first dimension


@dataclass
class Task:
    """A model, batches of a domain, and what to measure. Losses are in bits per prediction (a byte, token or example)."""
    name: str
    model: nn.Module
    batch: Callable[[torch.Generator, int], Batch]                             # so many random training examples
    loss_fn: Callable[[nn.Module, Batch], Tensor]                              # mean cross-entropy in nats
    splits: dict[str, list[Batch]]                                             # tune, val, and further ones to report
    old: Task | None = None                                                    # the domain of pretraining, for what is forgotten
    body: str = ""                                                             # where in the model the old domain's one stands
    trainable: str = ""                                                        # what trains beside the adapter, a regex
    measure: Callable[[nn.Module], dict[str, float]] = lambda model: {}        # further measures on val
    count: Callable[[Batch], int] = lambda batch: len(batch[0])                # predictions in a batch
    size: int = 16                                                             # examples in a training batch
    steps: int = 0                                                             # of pretraining, for an old domain, and its rate
    lr: float = 3e-3
    probe: int = 0                                                             # steps that a new head is first trained alone
    export: Callable[[nn.Module, Path], None] | None = None                    # writes the merged model in the format it came in

    @torch.no_grad()
    def bits(self, model: nn.Module, split: str, most: int | None = None) -> float:
        device, batches = next(model.parameters()).device, self.splits[split][:most]
        counts = [self.count(b) for b in batches]
        losses = [self.loss_fn(model, to(b, device)).item() * n for b, n in zip(batches, counts)]
        return sum(losses) / sum(counts) / math.log(2)

    def trains(self, name: str) -> bool:
        """Whether the parameter of that name trains beside the adapter."""
        return bool(self.trainable and re.search(self.trainable, name))

    def kept(self, model: nn.Module) -> float | None:
        return self.old and self.old.bits(model.get_submodule(self.body), "val")


def to(batch: Batch, device) -> Batch:
    return tuple(t.to(device) for t in batch)


# ---------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------

class Block(nn.Module):
    def __init__(self, d: int, heads: int, causal: bool):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.qkv, self.proj = nn.LayerNorm(d), nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.norm2, self.up, self.down = nn.LayerNorm(d), nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x: Tensor) -> Tensor:                                    # (n, t, d)
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (n, heads, t, d/heads)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(-2)
        x = x + self.proj(attended)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Byte-level causal transformer: tokens (n, t) → logits (n, t, 256)."""
    causal = True

    def __init__(self, d: int = 128, depth: int = 4, heads: int = 4, out: int = 256):
        super().__init__()
        self.token, self.position = nn.Embedding(256, d), nn.Embedding(CONTEXT, d)
        self.blocks = nn.ModuleList(Block(d, heads, self.causal) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, out, bias=False)
        self.checkpointing = False

    def features(self, tokens: Tensor) -> Tensor:                              # (n, t, d)
        x = self.token(tokens) + self.position.weight[:tokens.shape[1]]
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointing and self.training else block(x)
        return self.norm(x)

    def pool(self, tokens: Tensor) -> Tensor:                                  # (n, d): the mean over what is not padding (0)
        mask = (tokens != 0)[..., None]
        return (self.features(tokens) * mask).sum(1) / mask.sum(1)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.features(tokens))


class ViT(Transformer):
    """Vision transformer on 8 × 8 patches: images (n, 32, 32) → logits (n, out)."""
    causal = False

    def __init__(self, out: int):
        super().__init__(out=out)
        self.token = nn.Linear(64, 128)
        nn.init.normal_(self.position.weight, std=0.02)

    def features(self, images: Tensor) -> Tensor:                              # (n, 16, d)
        patches = images.unfold(1, 8, 8).unfold(2, 8, 8).flatten(3).flatten(1, 2)
        return super().features(patches.to(self.position.weight.dtype))

    def pool(self, images: Tensor) -> Tensor:                                  # (n, d)
        return self.features(images).mean(1)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.pool(images))


class Classifier(nn.Module):
    """A new head on the pooled features of a pretrained body."""

    def __init__(self, body: Transformer, classes: int):
        super().__init__()
        self.body, self.head = body, nn.Linear(body.norm.normalized_shape[0], classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body.pool(x))


def next_byte(model: nn.Module, batch: Batch) -> Tensor:
    """batch: tokens (n, t + 1)."""
    return F.cross_entropy(model(batch[0][:, :-1]).flatten(0, 1).float(), batch[0][:, 1:].flatten())


def label(model: nn.Module, batch: Batch, call=lambda model, x: model(x)) -> Tensor:
    """Of call(model, inputs …) → logits, on a batch of (inputs (n, …) …, classes (n,))."""
    return F.cross_entropy(call(model, *batch[:-1]).float(), batch[-1])


@torch.no_grad()
def classification(model: nn.Module, batches: list[Batch], call=lambda model, x: model(x)) -> dict[str, float]:
    """Accuracy and macro-F1 of call(model, inputs …) → logits, on batches of (inputs …, classes)."""
    device = next(model.parameters()).device
    predicted = torch.cat([call(model, *to(x, device)).argmax(-1).cpu() for *x, _ in batches])
    y = torch.cat([b[-1] for b in batches])
    hit = lambda c: ((predicted == c) & (y == c)).sum().item()
    f1 = [2 * hit(c) / max(1, (predicted == c).sum().item() + (y == c).sum().item()) for c in torch.cat([y, predicted]).unique().tolist()]
    return {"accuracy": (predicted == y).float().mean().item(), "macro_f1": statistics.fmean(f1)}


def chunks(*tensors: Tensor, size: int = 64) -> list[Batch]:
    return list(zip(*(t.split(size) for t in tensors)))


def rows(*tensors: Tensor, weight: Tensor | None = None) -> Callable[[torch.Generator, int], Batch]:
    """Draws random rows, in proportion to `weight`."""
    def batch(generator, n):
        i = (torch.randint(len(tensors[0]), (n,), generator=generator) if weight is None else
             torch.multinomial(weight, n, replacement=True, generator=generator))
        return tuple(t[i] for t in tensors)
    return batch


# ---------------------------------------------------------------------------------------------------------
# Tasks on text: the standard library's own
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


def as_bytes(text: str) -> Tensor:
    """(length,) uint8."""
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


@functools.cache
def prose() -> dict[str, str]:
    """{train, tune, val}: every tenth topic of the language reference is held out, and the docstrings of held-out files."""
    from pydoc_data.topics import topics
    part = lambda i: {0: "val", 1: "tune"}.get(i % 10, "train")
    texts = {p: [topics[k] for i, k in enumerate(sorted(topics)) if part(i) == p] for p in ("train", "tune", "val")}
    for p, _, _, docs in library():
        texts[p] += docs
    return {p: "\n\n".join(t) for p, t in texts.items()}


def windows(data: Tensor, start: Tensor) -> Batch:
    """(len(start), CONTEXT + 1) int64 windows of `data`."""
    return data[start[:, None] + torch.arange(CONTEXT + 1)].long(),


def random_windows(*data: Tensor) -> Callable[[torch.Generator, int], Batch]:
    """Draws windows, each from any of `data`."""
    def batch(generator, n):
        start = torch.rand(n, generator=generator)
        which = torch.randint(len(data), (n,), generator=generator).tolist()
        return torch.cat([windows(data[w], (s[None] * (len(data[w]) - CONTEXT)).long())[0] for w, s in zip(which, start)]),
    return batch


def even_windows(*data: Tensor, n: int = 256) -> list[Batch]:
    """n evenly spaced windows in all, in chunks of 64, to measure on."""
    even = [windows(d, torch.linspace(0, len(d) - CONTEXT - 1, n // len(data)).long())[0] for d in data]
    return chunks(torch.cat(even))


def english() -> Task:
    """The old domain of the tasks on text."""
    data = {part: as_bytes(text) for part, text in prose().items()}
    return Task("prose", Transformer(), random_windows(data["train"]), next_byte, {"val": even_windows(data["val"])}, steps=1200)


def code(args) -> Task:
    """Prose → source code."""
    data = {part: as_bytes("\n\n".join(source for p, _, source, _ in library() if p == part)) for part in ("train", "tune", "val")}
    old = english()
    return Task("code", old.model, random_windows(data["train"]), next_byte, {p: even_windows(data[p]) for p in ("tune", "val")}, old)


def understanding(args) -> Task:
    """Which of eight packages does a docstring belong to. Pretraining has seen most of the text, never a label."""
    texts = {d.encode()[:CONTEXT]: package for _, package, _, docs in library() for d in docs if len(d) >= 40}   # each in one part only
    classes = [package for package, _ in Counter(texts.values()).most_common(8)]

    def examples(*tenths):
        chosen = [(d, classes.index(package)) for d, package in texts.items() if package in classes and zlib.crc32(d) % 10 in tenths]
        return padded([text for text, _ in chosen], CONTEXT), torch.tensor([y for _, y in chosen])

    x, y = examples(*range(7))
    splits = {"tune": chunks(*examples(7)), "val": chunks(*examples(8, 9))}
    old, balance = english(), (1 / y.bincount(minlength=8).clamp(min=1))[y]    # classes are drawn equally often
    return Task("understanding", Classifier(old.model, 8), rows(x, y, weight=balance), label, splits, old, "body", r"^head\.",
                lambda model: classification(model, splits["val"]), probe=300)


def padded(texts: list[bytes], length: int) -> Tensor:
    """(len(texts), length) int64, padded with 0."""
    tokens = torch.zeros(len(texts), length, dtype=torch.long)
    for row, text in zip(tokens, texts):
        row[:len(text)] = torch.tensor(list(text))
    return tokens


def multilingual(args) -> Task:
    """English → three artificial languages, each one systematic rule; the unseen languages are the rules' combinations.

    As in the studies of cross-lingual transfer on re-encoded English ("fake languages"): what is shared can be controlled.
    """
    vowels = str.maketrans("aeiouAEIOU", "eiouaEIOUA")                         # a chain shift
    voicing = str.maketrans("bdgvzptkfsBDGVZPTKFS", "ptkfsbdgvzPTKFSBDGVZ")    # b ↔ p, d ↔ t, …
    rules = (lambda t: t.translate(vowels), lambda t: t.translate(voicing),
             lambda t: re.sub(r"[^.,:;!?()\n]+", lambda m: " ".join(reversed(m[0].split(" "))), t))   # words of a phrase, last first
    speak = lambda text, *which: as_bytes(functools.reduce(lambda t, i: rules[i](t), which, text))
    single, combined = [(0,), (1,), (2,)], [(0, 1), (0, 2), (1, 2), (0, 1, 2)]
    splits = {p: even_windows(*(speak(prose()[p], *w) for w in single)) for p in ("tune", "val")}
    splits["unseen"] = even_windows(*(speak(prose()["val"], *w) for w in combined))
    old = english()
    return Task("multilingual", old.model, random_windows(*(speak(prose()["train"], *w) for w in single)), next_byte, splits, old)


# ---------------------------------------------------------------------------------------------------------
# Tasks that are generated
# ---------------------------------------------------------------------------------------------------------

def math_(args) -> Task:
    """Word problems of one step → of two, worked out in the response; only the response is trained on.

    Measured by generation: exact_match is the share of val problems whose last number comes out right.
    """
    def problem(rng: random.Random, steps: int) -> tuple[str, str]:
        total = rng.randrange(20)
        prompt, response = f"Ann has {total}", []
        for _ in range(steps):
            before, total = total, rng.choice([n for n in range(20) if n != total])
            prompt += f", {'gets' if total > before else 'loses'} {abs(total - before)}"
            response.append(f"{before}{'+' if total > before else '-'}{abs(total - before)}={total}")
        return prompt + ": ", " ".join(response) + "\n"

    rng = random.Random(0)
    single = as_bytes("".join("".join(problem(rng, 1)) for _ in range(50_000)))
    old = Task("sums", Transformer(), random_windows(single[:-60_000]), next_byte, {"val": even_windows(single[-60_000:])}, steps=1500)

    problems = list({p: r for p, r in (problem(rng, 2) for _ in range(20_000))}.items())   # each prompt once
    length = max(len(p + r) for p, r in problems)
    tokens = padded([(p + r).encode() for p, r in problems], length)
    start, end = (torch.tensor([len(p) for p, _ in problems]), torch.tensor([len(p + r) for p, r in problems]))
    targets = tokens.masked_fill((torch.arange(length) < start[:, None]) | (torch.arange(length) >= end[:, None]), -100)

    @torch.no_grad()
    def measure(model: nn.Module) -> dict[str, float]:
        device, right, asked = next(model.parameters()).device, 0, 0
        answer = lambda text: re.findall(r"=(\d+)\n", bytes(text.tolist()).decode("latin-1"))[:1]
        for x, y in splits["val"]:
            n, asked = (y != -100).int().argmax(1), asked + len(x)             # where the response begins
            longest, said = int((y != -100).sum(1).max()), x.where(torch.arange(length) < n[:, None], 0).to(device)
            n, every = n.to(device), torch.arange(len(x), device=device)
            for _ in range(longest):                                           # greedy; a row waits at its newline
                said[every, n] = model(said[:, :int(n.max())])[every, n - 1].argmax(-1)
                n = (n + (said[every, n] != ord("\n"))).clamp(max=length - 1)
            right += sum(answer(ours) == answer(true) for ours, true in zip(said.cpu(), x))
        return {"exact_match": right / asked}

    splits = {"tune": chunks(tokens[:256], targets[:256]), "val": chunks(tokens[256:768], targets[256:768])}
    return Task("math", old.model, rows(tokens[768:], targets[768:]), next_token, splits, old, measure=measure, size=32, count=predicted)


def predicted(batch: Batch) -> int:
    """How many tokens of `next_token`'s batch are predicted, 1 at least."""
    return max(1, int((batch[1][:, 1:] != -100).sum()))


def next_token(model: nn.Module, batch: Batch) -> Tensor:
    """batch: tokens (n, t), targets (n, t), -100 where nothing is to be predicted."""
    return F.cross_entropy(model(batch[0][:, :-1]).flatten(0, 1).float(), batch[1][:, 1:].flatten())


SHAPES = {                                                                     # local coordinates x, y in [-1, 1]; none is symmetric
    "wedge": lambda x, y: x.abs() < (1 - y) / 2,
    "half disc": lambda x, y: (x ** 2 + y ** 2 < 1) & (y > 0),
    "L": lambda x, y: (x < -0.3) | (y < -0.3),
    "T": lambda x, y: (y > 0.3) | (x.abs() < 0.3),
    "C": lambda x, y: (x ** 2 + y ** 2).sub(0.6).abs().lt(0.4) & ~((x > 0) & (y.abs() < 0.4)),
}


def draw(shape: Tensor, angle: Tensor, size: Tensor, centre: Tensor) -> Tensor:
    """(n, 32, 32) masks of one object an image: shape (n,) int, angle (n,), size (n,), centre (n, 2) in [-1, 1]."""
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, 32)] * 2, indexing="ij")
    x, y, c, s = x - centre[:, :1, None], y - centre[:, 1:, None], angle.cos()[:, None, None], angle.sin()[:, None, None]
    x, y = (c * x + s * y) / size[:, None, None], (c * y - s * x) / size[:, None, None]
    masks = torch.stack([f(x, y) for f in SHAPES.values()]) & (x.abs() < 1) & (y.abs() < 1)
    return masks[shape, torch.arange(len(shape))].float()


def vision(args) -> Task:
    """A small ViT pretrained on the shape of one object on a plain ground → four other attributes of richer images.

    The new images hold one to four objects on a texture: orientation (8), count (4), the bright one's position (9), texture (4).
    """
    def pick(most, n, generator):
        return torch.randint(most, (n,), generator=generator)

    def shapes(generator, n):
        shape, uniform = pick(5, n, generator), torch.rand(n, 4, generator=generator)
        image = draw(shape, uniform[:, 0] * 2 * math.pi, 0.4 + 0.3 * uniform[:, 1], uniform[:, 2:] * 0.6 - 0.3)
        return image + 0.1 * torch.randn(n, 32, 32, generator=generator), shape

    def scenes(generator, n):
        turn, count, texture = pick(8, n, generator), 1 + pick(4, n, generator), pick(4, n, generator)
        cells = torch.rand(n, 9, generator=generator).argsort(1)               # the first `count` cells of a 3 × 3 grid are taken
        shape, image = pick(5, n, generator), torch.zeros(n, 32, 32)
        for k in range(4):
            centre = torch.stack([cells[:, k] % 3 - 1, cells[:, k] // 3 - 1], 1) * 0.64
            mask = draw(shape, turn * math.pi / 4, torch.full((n,), 0.3), centre)
            image += mask * ((1.5 if k == 0 else 0.8) * (k < count))[:, None, None]
        i, j = torch.meshgrid(torch.arange(32) // 2 % 2, torch.arange(32) // 2 % 2, indexing="ij")
        ground = torch.stack([torch.zeros(32, 32), i, j, i ^ j])[texture]      # plain, stripes, checkers
        image += 0.3 * ground + 0.1 * torch.randn(n, 32, 32, generator=generator)
        return image, torch.stack([turn, count - 1, cells[:, 0], texture], 1)

    attributes = {"orientation": 8, "count": 4, "position": 9, "texture": 4}

    def loss_fn(model, batch):                                                 # the sum over the attributes
        return sum(F.cross_entropy(logits.float(), y) for logits, y in zip(model(batch[0]).split([*attributes.values()], 1), batch[1].T))

    @torch.no_grad()
    def measure(model):
        device, y = next(model.parameters()).device, torch.cat([y for _, y in splits["val"]])
        logits = torch.cat([model(x.to(device)).cpu() for x, _ in splits["val"]]).split([*attributes.values()], 1)
        right = {name: (l.argmax(1) == t).float().mean().item() for name, l, t in zip(attributes, logits, y.T)}
        return {"accuracy": statistics.fmean(right.values()), **right}

    held_out = lambda source, seed: chunks(*source(torch.Generator().manual_seed(2 ** 31 + seed), 512))   # seeds that no run has (32 bits count)
    splits = {"tune": held_out(scenes, 1), "val": held_out(scenes, 2)}
    old = Task("shapes", ViT(5), shapes, label, {"val": held_out(shapes, 3)}, size=64, steps=1200, lr=1e-3)
    return Task("vision", Classifier(old.model, 25), scenes, loss_fn, splits, old, "body", r"^head\.", measure, size=64, probe=300)


TASKS = {"code": code, "understanding": understanding, "vision": vision, "math": math_, "multilingual": multilingual}
