"""Your own model and data for train.py: --model and --data.

    train.py --model DIR --data FILE.txt                   a causal language model on a text
    train.py --model DIR --data FILE.jsonl (or .csv)       with text; prompt and response; or text and label: a classifier
    train.py --model DIR --data FILE.pt                    torch.save of dict(x=images, y=classes)

DIR is a folder that save_pretrained wrote, or a name that transformers knows.
"""
from __future__ import annotations

import csv
import io
import json
import re
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tasks import Batch, Task, chunks, classification, label, predicted, rows


def read(path: Path) -> list[dict[str, str]]:
    """The examples of a .txt (one text), .jsonl or .csv file: dicts with text; text, label; or prompt, response."""
    try:
        text = path.read_text("utf-8-sig")                                     # with or without a byte order mark
    except (OSError, UnicodeDecodeError) as e:
        raise SystemExit(f"{path}: {getattr(e, 'strerror', None) or 'is not UTF-8 text'}")
    if not text.strip():
        raise SystemExit(f"{path} is empty")
    if path.suffix == ".txt":
        return [{"text": text}]
    if path.suffix == ".jsonl":
        found = []
        for i, line in enumerate(text.split("\n"), 1):
            try:
                if line.strip():
                    found.append(dict(json.loads(line)))
            except (ValueError, TypeError):
                raise SystemExit(f"{path}, line {i}: not a JSON object: {line[:60]}")
    elif path.suffix == ".csv":
        csv.field_size_limit(2 ** 31 - 1)
        found = list(csv.DictReader(io.StringIO(text, newline="")))
    else:
        raise SystemExit(f"{path}: a .txt, .jsonl or .csv file is wanted (or .pt: images x and labels y)")
    wanted = (("prompt", "response"), ("text", "label"), ("text",))
    columns = next((w for w in wanted if found and set(w) <= found[0].keys()), None)
    if not columns:
        raise SystemExit(f"{path} has the columns {', '.join(map(str, found[0])) if found else '(no rows)'}; wanted: text, or text and label, "
                         "or prompt and response")
    for i, example in enumerate(found, 1):
        if missing := [c for c in columns if example.get(c) in (None, "")]:
            raise SystemExit(f"{path}, example {i}: no {missing[0]}")
    return [{c: str(example[c]) for c in columns} for example in found]


def pack(examples: list[tuple[list[int], list[int]]], length: int, alone: bool = False) -> Batch:
    """(ids, targets), one after another into rows of `length`: ids, targets and segments, each (rows, length) int64.

    An example begins a new row where it does not fit, or with `alone` (one longer than a row is cut into pieces). Segments number the
    examples of a row from 1, 0 is padding. The first target of a segment is -100: nothing precedes it.
    """
    pieces = [(ids[i:i + length], targets[i:i + length]) for ids, targets in examples for i in range(0, len(ids), length)]
    table, room = [], 0
    for ids, targets in pieces:
        if all(t == -100 for t in targets[1:]):                                # nothing to learn from: a prompt that fills a row
            continue
        if alone or len(ids) > room:
            table.append(([], [], []))
            room = length
        row, k = table[-1], table[-1][2][-1] + 1 if table[-1][2] else 1
        row[0].extend(ids), row[1].extend([-100, *targets[1:]]), row[2].extend([k] * len(ids))
        room -= len(ids)
    fill = (0, -100, 0)
    return tuple(torch.tensor([row[j] + [fill[j]] * (length - len(row[j])) for row in table], dtype=torch.long).reshape(-1, length)
                 for j in range(3))


def packed_logits(model: nn.Module, ids: Tensor, segments: Tensor) -> Tensor:
    """Of a causal language model of transformers: ids, segments (n, t) → (n, t, words); no example sees its neighbours in the row."""
    more = {}
    if (segments > 1).any():                                                   # else: plain causal attention (padding stands last)
        t = torch.arange(ids.shape[1], device=ids.device)
        same = (segments[:, :, None] == segments[:, None]) & (t[:, None] >= t)                       # (n, t, t)
        first = torch.where(segments == segments.roll(1, 1), 0, t).masked_fill(t == 0, 0).cummax(1).values
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        more = {"attention_mask": torch.zeros_like(same, dtype=dtype).masked_fill(~same, torch.finfo(dtype).min)[:, None],
                "position_ids": t - first}                                     # counted within each example
    return model(input_ids=ids, use_cache=False, **more).logits


def packed_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy of a causal language model on a batch of `pack`."""
    ids, targets, segments = batch
    logits, targets = packed_logits(model, ids, segments), targets[:, 1:].flatten()
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets, reduction="sum") / (targets != -100).sum().clamp(min=1)


@torch.no_grad()
def takes_packing(model: nn.Module, name) -> bool:
    """Whether two examples in a row give what each gives alone (not where positions or masks are made inside: Bloom, Mamba).
    SystemExit for a model that sees what comes next."""
    ids = torch.arange(12)[None] % min(12, model.get_input_embeddings().num_embeddings)
    alone = lambda ids: packed_logits(model, ids, torch.ones_like(ids))
    tolerance = 1e-3 if next(model.parameters()).dtype == torch.float32 else 0.05
    close = lambda a, b: bool((a - b).abs().max() <= tolerance * b.abs().max())
    if not close(alone(ids)[:, :6], alone(ids[:, :6])):
        raise SystemExit(f"--model {name}: a {type(model).__name__} is no causal language model as it comes: a token sees the next ones")
    try:
        return close(packed_logits(model, ids, torch.tensor([[1] * 6 + [2] * 6]))[:, 6:], alone(ids[:, 6:]))
    except Exception:                                                          # it knows no such mask, or no positions
        return False


def text_logits(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """Of a sequence classifier of transformers: ids, mask (n, t), padded on the right → (n, classes)."""
    longest = int(mask.sum(1).max())
    return model(input_ids=ids[:, :longest], attention_mask=mask[:, :longest]).logits


def image_logits(model: nn.Module, images: Tensor) -> Tensor:
    """Of an image classifier of transformers: images (n, channels, h, w) → (n, classes)."""
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    return model(pixel_values=images.to(dtype)).logits


def first_line(e: Exception) -> str:
    return (str(e).strip().splitlines() or [type(e).__name__])[0]


def split(n: int, val: bool, path, shuffle: bool = True) -> tuple[list[int], list[int], list[int]]:
    """Which of n examples train, tune and measure: a tenth each for the last two, none to measure if `val` is there for it."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0)).tolist() if shuffle else list(range(n))   # a text: its end
    part = max(1, n // 10)
    if n < (2 if val else 3):
        raise SystemExit(f"{path} makes {n} examples: too few to keep some to tune and to measure on; give more, or a smaller --context")
    held, rest = ([], order) if val else (order[-part:], order[:-part])
    return rest[:-part], rest[-part:], held


def own(args) -> Task:
    """A model of transformers (a name, or a folder that save_pretrained wrote) on the examples of a file.

    Texts (packed), prompts with responses (packed, loss on the response), texts with labels, or a .pt file with images.
    """
    try:
        import transformers
    except ImportError:
        raise SystemExit("--model needs the package transformers: pip install transformers")

    def pretrained(kind: str, **more):
        try:
            return getattr(transformers, kind).from_pretrained(args.model, **more)
        except Exception as e:                                                 # of many kinds, from as many libraries
            raise SystemExit(f"--model {args.model}: {kind} cannot load it: {first_line(e)}")

    def classify(call, inputs: Batch, head: str, data: Batch, val: Batch | None, **more) -> Task:
        """The task of a classifier, after a look at whether the model takes such inputs."""
        try:
            with torch.no_grad():
                call(model, *(t[:1] for t in inputs))
        except Exception as e:
            raise SystemExit(f"--model {args.model} does not take {args.data}: {first_line(e)}")
        train, splits = parts(data, val)
        return Task("own", model, rows(*train), partial(label, call=call), splits, trainable=head, probe=100, size=8,
                    measure=lambda m: classification(m, splits["val"], call), **more)

    def classifier(kind: str, classes: int):
        """The model with as many classes, and a regex of its head: what was not in its files, by name or shape."""
        model, info = pretrained(kind, num_labels=classes, ignore_mismatched_sizes=True, output_loading_info=True)
        new = {*info["missing_keys"], *(k[0] if isinstance(k, tuple) else k for k in info.get("mismatched_keys", ()))}
        return model, "|".join([r"^(score|classifier|head)\b", *(f"^{re.escape(n)}$" for n in sorted(new))])

    def images(path):
        try:
            data = torch.load(path, weights_only=True)
            x, y = data["x"].float(), data["y"].long()
        except Exception as e:
            raise SystemExit(f"{path}: wanted is torch.save of dict(x=images (n, channels, h, w), y=classes (n,)): {str(e).splitlines()[0]}")
        if x.ndim != 4 or y.shape != x.shape[:1] or not x.numel() or int(y.min()) < 0:
            raise SystemExit(f"{path}: x is {tuple(x.shape)}, y {tuple(y.shape)}; wanted are (n, channels, h, w) and (n,), classes from 0")
        return x, y

    def parts(data: Batch, val: Batch | None) -> tuple[Batch, dict[str, list[Batch]]]:
        """(train, {tune, val}) of data that is one example a row."""
        train, tune, held = split(len(data[0]), val is not None, args.data)
        if int(data[-1].max()) < 1:
            raise SystemExit(f"{args.data} has one class only: there is nothing to tell apart")
        if val is not None and int(val[-1].max()) > int(data[-1].max()):
            raise SystemExit(f"{args.val} has the class {int(val[-1].max())}, which {args.data} has not")
        take = lambda rows: tuple(t[rows] for t in data)
        return take(train), {"tune": chunks(*take(tune), size=8), "val": chunks(*(take(held) if val is None else val), size=8)}

    if args.data.suffix == ".pt":
        data, val = images(args.data), images(args.val) if args.val else None
        model, head = classifier("AutoModelForImageClassification", int(data[1].max()) + 1)
        return classify(image_logits, data[:1], head, data, val, export=lambda m, path: m.save_pretrained(path))

    examples, held_out = read(args.data), read(args.val) if args.val else None
    tokenizer = pretrained("AutoTokenizer")
    if held_out and held_out[0].keys() != examples[0].keys():
        raise SystemExit(f"{args.val} has {', '.join(held_out[0])}, {args.data} has {', '.join(examples[0])}: they must be alike")

    def length() -> int:
        """Tokens in a row: what is asked for, within what the model takes (RoBERTa counts positions from its padding on)."""
        most = next((n for k in ("max_position_embeddings", "max_seq_len") if (n := getattr(model.config, k, None))), 512)
        tables = [m for m in model.modules() if isinstance(m, nn.Embedding) and m.num_embeddings == most and m.padding_idx is not None]
        return min(args.context or 512, tokenizer.model_max_length, most - (tables[0].padding_idx + 1 if tables else 0))

    def known(top: int) -> None:
        words = model.get_input_embeddings().num_embeddings
        if top < 0:
            raise SystemExit(f"--model {args.model}: its tokenizer makes nothing of {args.data} (are the tokenizer's files there?)")
        if top >= words:
            raise SystemExit(f"--model {args.model}: its tokenizer gives the token {top}, its embeddings hold {words}")

    def export(model, path):
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)

    if "label" in examples[0]:
        labels = sorted({e["label"] for e in examples})
        if unknown := {e["label"] for e in held_out or ()} - set(labels):
            raise SystemExit(f"{args.val} has the label {min(unknown)!r}, which {args.data} has not")
        model, head = classifier("AutoModelForSequenceClassification", len(labels))
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
        model.config.pad_token_id = tokenizer.pad_token_id
        model.config.id2label, model.config.label2id = dict(enumerate(labels)), {name: i for i, name in enumerate(labels)}
        tokenizer.padding_side, context = "right", length()

        def tensors(examples):
            got = tokenizer([e["text"] for e in examples], truncation=True, max_length=context, padding=True, return_tensors="pt")
            return got.input_ids, got.attention_mask, torch.tensor([labels.index(e["label"]) for e in examples])
        data = tensors(examples)
        known(int(data[0].max()) if data[0].numel() else -1)
        return classify(text_logits, data[:2], head, data, tensors(held_out) if held_out else None, export=export)

    model, end = pretrained("AutoModelForCausalLM"), [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    context, alone = length(), not takes_packing(model, args.model)
    if alone:
        print(f"a {type(model).__name__} is given one example a row: it does not keep several apart")

    def coded(e: dict) -> tuple[list[int], list[int]]:
        """ids and targets of an example, -100 in its prompt."""
        prompt = tokenizer(e["prompt"]).input_ids if "prompt" in e else []
        while prompt and end and prompt[-1] == end[0]:                         # some tokenizers end every text
            prompt.pop()
        answer = tokenizer(e.get("response") or e["text"], add_special_tokens="prompt" not in e).input_ids
        answer += end if answer[-1:] != end else []
        return prompt + answer, [-100] * len(prompt) + answer

    found = [coded(e) for e in examples]
    known(max(max(ids, default=-1) for ids, _ in found))
    if len(found) == 1:                                                        # one text: its rows are the examples
        found = [tuple(part[i:i + context] for part in found[0]) for i in range(0, len(found[0][0]), context)]
    train, tune, val = ([found[i] for i in part] for part in split(len(found), bool(held_out), args.data, shuffle=len(examples) > 1))
    val = [coded(e) for e in held_out] if held_out else val
    packed = {name: pack(part, context, alone) for name, part in (("train", train), ("tune", tune), ("val", val))}   # split first: no text is in two
    if empty := [name for name, part in packed.items() if not len(part[0])]:
        raise SystemExit(f"{args.data} leaves nothing to predict for {empty[0]}: give more examples, or a larger --context")
    splits = {name: chunks(*packed[name], size=8) for name in ("tune", "val")}
    old = args.old and Task("old", model, None, packed_loss, {"val": chunks(*pack([coded(e) for e in read(args.old)], context, alone), size=8)},
                            count=predicted)
    return Task("own", model, rows(*packed["train"]), packed_loss, splits, old, size=8, export=export, count=predicted)
