"""lab/own.py on small random models of real classes, with tokenizers built here: no download."""
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"                     # before anything reads it
pytest.importorskip("trl")                             # which needs transformers and datasets
pytest.importorskip("PIL")

import tokenizers
import torch
import transformers
import trl

import loft
import train
from lab import own

SIZES = dict(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
             num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=96,
             image_size=16, patch_size=8, tie_word_embeddings=True)
TEMPLATE = ("{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>{% endfor %}"
            "{% if add_generation_prompt %}<s>assistant\n{% endif %}")
CHATS = [{"messages": [{"role": role, "content": f"the {role} says {i}"}
                       for role in ("user", "assistant") * 2]} for i in range(30)]
FILES = {
    "chats.jsonl": "\n".join(map(json.dumps, CHATS)), "notes.txt": "after one comes two\n\n" * 30,
    "pairs.json": json.dumps([{"prompt": "after one comes", "completion": " two"}] * 30),
    "reviews.csv": "text, label\n" + '"it is odd,\nor is it?",odd\n"even it is",even\n' * 15,
    "images.csv": "image,label\n" + "grey.pgm,even\nred.ppm,odd\n" * 15,
    "grey.pgm": "P2 9 9 255" + " 40" * 81, "red.ppm": "P3 9 9 255" + " 200 0 0" * 81,
    "missing.csv": "image,label\nno.png,odd\n", "gap.csv": "text,label\na,1\nb,",
    "shifted.csv": 'text,label\n"a,\nb",c,x\nd,e,f\n', "other.csv": "words,label\na,b\n",
    "broken.jsonl": '{"text": "a"}\n{"text": \n', "surrogate.jsonl": r'{"text": "\ud800"}',
    "silent.jsonl": '{"messages": [{"role": "user", "content": "a"}]}\n' * 20}
FAST = ("--rank 4 --calibration 32 --learning_rate 1e-2 --max_steps 8 --seed 3 --disable_tqdm True "
        "--per_device_train_batch_size 4")


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """The working folder: every model, with a tokenizer or image processor, and the data."""
    before = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("own"))
    torch.manual_seed(0)
    for name in ("llama", "qwen2", "mixtral", "gpt2", "bert", "vit"):
        kind = "SentencePiece" if name == "llama" else "ByteLevel"
        raw = getattr(tokenizers, f"{kind}BPETokenizer")()
        raw.train_from_iterator([str(CHATS)], vocab_size=300,
                                special_tokens=["<s>", "</s>", "<pad>", "<unk>"])
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=raw._tokenizer, eos_token="</s>", pad_token="<pad>",
            chat_template=TEMPLATE).save_pretrained(name)
        config = transformers.AutoConfig.for_model(name, **SIZES)
        transformers.AutoModel.from_config(config).save_pretrained(name)
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained("vit")
    for name, text in FILES.items():
        Path(name).write_text(text)
    yield
    os.chdir(before)


def command(model, data, out, more=""):
    return f"--model={model} --data={data} --out={out} {FAST} {more}".split()


def run(*what):
    train.main(command(*what))


def rows(model, data):
    """What a trainer has made of the data: rows of input_ids and labels."""
    args = trl.SFTConfig("runs", bf16=False, use_cpu=True)
    return own.build(own.Settings(model, data), args)[0].train_dataset


def learned(out):
    """Without signs: those of the vectors that span a support are arbitrary."""
    state = torch.load(f"{out}/adapter.pt")["state"]
    return {name: tensor.abs() for name, tensor in state.items()}


@pytest.mark.parametrize("model, data", [
    ("llama", "chats.jsonl"), ("qwen2", "pairs.json"), ("mixtral", "chats.jsonl"),
    ("gpt2", "notes.txt"), ("bert", "reviews.csv"), ("vit", "images.csv")])
def test_it_learns_and_exports_what_it_learned(model, data, capsys):
    out = f"{model}-{data}"
    run(model, data, out, f"--export {out}/merged")
    row = capsys.readouterr().out.splitlines()[-1].split()
    assert float(row[2]) < float(row[1])
    transformers.AutoProcessor.from_pretrained(f"{out}/merged")
    config = transformers.AutoConfig.from_pretrained(f"{out}/merged")
    auto = getattr(transformers, *config.architectures)
    merged, plain = (auto.from_pretrained(name, config=config) for name in (f"{out}/merged", model))
    x = torch.rand(2, 3, 16, 16) if model == "vit" else torch.arange(40)[None]
    here = loft.load(plain, f"{out}/adapter.pt")
    torch.testing.assert_close(merged(x).logits, here(x).logits, atol=1e-4, rtol=1e-4)
    if "Classification" in auto.__name__:
        assert config.id2label == {0: "even", 1: "odd"}


@pytest.mark.parametrize("name", ["llama", "qwen2"])   # SentencePiece, byte-level
def test_targets_are_the_tokens_of_each_answer_in_its_chat(name):
    tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    trained = rows(name, "chats.jsonl")
    assert len(trained) == 54                      # two answers a chat, a tenth held out
    for row in trained:
        i, chat = len(row["prompt"]), row["messages"]
        ids = tokenizer.apply_chat_template(chat[:i + 1])["input_ids"]
        known = tokenizer.apply_chat_template(chat[:i], add_generation_prompt=True)["input_ids"]
        assert row["input_ids"] == ids
        assert row["labels"] == [-100] * len(known) + ids[len(known):]


def test_labels_have_the_places_that_the_model_gives_them():
    """By its own names, in its order, or by number; what it does not know makes a new head."""
    places = {"even": 1, "odd": 0, "2": 2}
    config = transformers.AutoConfig.from_pretrained(
        "bert", id2label=dict(enumerate(["odd", "even", "prime"])))
    config.save_pretrained("bert")
    tokenizer = transformers.AutoTokenizer.from_pretrained("bert")
    data = "".join(f"is {label},{label}\n" for label in places)
    Path("named.csv").write_text("text,label\n" + data * 15)
    for row in rows("bert", "named.csv"):
        assert row["labels"] == places[tokenizer.decode(row["input_ids"]).removeprefix("is ")]


KILLED = f"""
import os, signal, sys
sys.path.insert(0, {os.path.dirname(train.__file__)!r})
import loft, train
save, files = loft.save, []
def saved(model, path):
    files.append(path)
    if len(files) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    save(model, path)
loft.save = saved
train.main(sys.argv[1:])
"""


def test_killed_and_resumed_is_uninterrupted():
    """A smaller loss counts as worse here: the best is the first, and two later the run ends."""
    more = ("--save_steps 2 --max_steps 20 --gradient_accumulation_steps 2 --eval_strategy steps "
            "--eval_steps 2 --packing --max_length 96 --load_best_model_at_end True --patience 2 "
            "--metric_for_best_model loss --greater_is_better True")
    words = command("gpt2", "chats.jsonl", "killed", more)
    assert subprocess.run([sys.executable, "-c", KILLED, *words]).returncode == -9
    time = os.stat("killed/checkpoint-2").st_mtime
    train.main([*words, "--resume"])
    assert os.stat("killed/checkpoint-2").st_mtime == time     # it went on, not from the start
    run("gpt2", "chats.jsonl", "whole", more)
    assert not Path("killed/checkpoint-8").exists()
    torch.testing.assert_close(learned("killed/checkpoint-6"), learned("whole/checkpoint-6"),
                               atol=0, rtol=0)


@pytest.mark.parametrize("base", [                     # whole, in shards
    "", '--model_init_kwargs {"distributed_config":{"fsdp_size":2}}'])
def test_two_processes_give_the_result_of_one(base):
    subprocess.check_call(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone",
         train.__file__,
         *command("llama", "chats.jsonl", "two", f"{base} --per_device_train_batch_size 2")],
        timeout=120)
    run("llama", "chats.jsonl", "one")
    torch.testing.assert_close(learned("one"), learned("two"), atol=1e-2, rtol=0)


@pytest.mark.parametrize("words, says", [
    ("--data shifted.csv", 'got 3: "a, b",c,x'),
    ("--data other.csv", "other.csv has ['words', 'label']; wanted are messages, or"),
    ("--data gap.csv", "example 2 of gap.csv has no label"), ("--data missing.csv", "no.png"),
    ("--data broken.jsonl", "JSON parse error"), ("--data surrogate.jsonl", "surrogate"),
    ("--data silent.jsonl", "no assistant"), ("--model nowhere/at/all", "nowhere/at/all"),
    ("--model .", "model_type"), ("--options {", "--options"),
    ("--patience 2", "--load_best_model_at_end True")])
def test_what_does_not_fit_is_one_line(words, says):
    with pytest.raises(SystemExit) as end:
        run("llama", "chats.jsonl", "refused", words)
    line = str(end.value).split(" [train.py")[0]
    assert says in line and "\n" not in line


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(SystemExit, match="--model needs trl: pip install transformers trl"):
        importlib.reload(own)


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_a_quantised_base_trains_and_is_not_merged(bits):
    pytest.importorskip("bitsandbytes")
    more = f'--model_init_kwargs {{"quantization_config":{{"{bits}":true}}}}'
    run("llama", "chats.jsonl", bits, more)
    with pytest.raises(SystemExit, match="a quantised model cannot be merged"):
        run("llama", "chats.jsonl", bits, f"{more} --export merged")
