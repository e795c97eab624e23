"""lab/own.py on small random models of real classes, with a tokenizer built here: no download."""
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"                     # before anything reads it
pytest.importorskip("trl")                             # which needs transformers and datasets

import tokenizers
import torch
import transformers
import trl

import loft
import train
from lab import own

SIZES = dict(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
             num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=96)
TEMPLATE = ("{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>{% endfor %}"
            "{% if add_generation_prompt %}<s>assistant\n{% endif %}")
CHATS = [{"messages": [{"role": ("user", "assistant")[k % 2], "content": text} for k, text in
                       enumerate((f"from {i}", f"{i}, {i + 1}", "go on", f"{i + 2}, {i + 3}"))]}
         for i in range(30)]
PAIRS = [{"prompt": "after one comes", "completion": " two"}] * 30
FAST = ("--rank 4 --calibration 32 --learning_rate 1e-2 --max_steps 8 --seed 3 --disable_tqdm True "
        "--per_device_train_batch_size 4")


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """The working folder: every model with a byte-level tokenizer, and the data."""
    before = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("own"))
    raw = tokenizers.ByteLevelBPETokenizer()
    raw.train_from_iterator([json.dumps(CHATS)], 300, special_tokens=["<s>", "</s>", "<pad>"])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(raw.to_str()), eos_token="</s>",
        pad_token="<pad>", chat_template=TEMPLATE)
    torch.manual_seed(0)
    for name in ("llama", "qwen2", "mixtral", "gpt2", "bert"):
        config = transformers.AutoConfig.for_model(name, **SIZES)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(name)
        tokenizer.save_pretrained(name)
    Path("chats.jsonl").write_text("\n".join(map(json.dumps, CHATS)))
    Path("pairs.json").write_text(json.dumps(PAIRS))
    Path("reviews.csv").write_text(
        "text, label\n" + '"it is odd,\nor is it?",odd\n"even it is",even\n' * 15)
    Path("notes.txt").write_text("after one comes two\n\n" * 30)
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
    return torch.load(f"{out}/adapter.pt")["state"]


@pytest.mark.parametrize("model, data", [
    ("llama", "chats.jsonl"), ("qwen2", "pairs.json"), ("mixtral", "chats.jsonl"),
    ("gpt2", "notes.txt"), ("bert", "reviews.csv"), ("gpt2", "reviews.csv")])
def test_it_learns_and_exports_what_it_learned(model, data, capsys):
    out = f"{model}-{data}"
    run(model, data, out, f"--export {out}/merged")
    row = capsys.readouterr().out.splitlines()[-1].split()
    assert float(row[2]) < float(row[1]) and float(row[3]) < 1e-5, row
    classifies = data == "reviews.csv"
    auto = (transformers.AutoModelForSequenceClassification if classifies
            else transformers.AutoModelForCausalLM)
    merged = auto.from_pretrained(f"{out}/merged")
    here = loft.load(auto.from_pretrained(model, pad_token_id=2), f"{out}/adapter.pt")
    x = torch.arange(40).view(2, 20)
    torch.testing.assert_close(merged(x).logits, here(x).logits, atol=1e-4, rtol=1e-4)
    if classifies:
        assert merged.config.id2label == {0: "even", 1: "odd"}


def test_targets_are_the_tokens_of_each_answer_in_its_chat():
    tokenizer = transformers.AutoTokenizer.from_pretrained("llama")
    trained = rows("llama", "chats.jsonl")
    assert len(trained) == 2 * 27                      # two answers a chat, a tenth held out
    for row in trained:
        i, chat = len(row["prompt"]), row["messages"]
        ids = tokenizer.apply_chat_template(chat[:i + 1])["input_ids"]
        known = tokenizer.apply_chat_template(chat[:i], add_generation_prompt=True)["input_ids"]
        assert row["input_ids"] == ids
        assert row["labels"] == [-100] * len(known) + ids[len(known):]


@pytest.mark.parametrize("names, places", [
    (["odd", "even"], {"even": 1, "odd": 0}),          # the model's own names, in its order
    (["odd", "even", "prime"], {"0": 0, "2": 2}),      # numbers are places
    (["a", "b", "c"], {"9": 0, "16": 1})])             # a new head, in order
def test_labels_have_the_places_that_the_model_gives_them(names, places):
    config = transformers.BertConfig(**SIZES, id2label=dict(enumerate(names)))
    transformers.BertForSequenceClassification(config).save_pretrained("named")
    tokenizer = transformers.AutoTokenizer.from_pretrained("bert")
    tokenizer.save_pretrained("named")
    data = "".join(f"is {label},{label}\n" for label in places)
    Path("named.csv").write_text("text,label\n" + data * 15)
    for row in rows("named", "named.csv"):
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
    more = ("--save_steps 2 --max_steps 9 --gradient_accumulation_steps 2 --eval_strategy steps "
            "--eval_steps 3 --packing --max_length 96")
    words = command("gpt2", "chats.jsonl", "killed", more)
    assert subprocess.run([sys.executable, "-c", KILLED, *words]).returncode == -9
    Path("killed/checkpoint-2").rename("moved")
    train.main([*words, "--resume"])
    run("gpt2", "chats.jsonl", "whole", more)
    torch.testing.assert_close(learned("killed"), learned("whole"), atol=0, rtol=0)
    assert not Path("killed/checkpoint-2").exists()    # it went on, not once more from the start


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


@pytest.mark.parametrize("name, text, says", [
    ("shifted.csv", 'text,label\n"a,\nb",c,x\nd,e,f\n', 'got 3: "a, b",c,x'),
    ("other.csv", "words,label\na,b\n", "it has ['words', 'label']; wanted are messages, or"),
    ("gap.csv", "text,label\na,1\nb,\n", "example 2 has no label"),
    ("empty.csv", "", "not empty"),
    ("broken.jsonl", '{"text": "a"}\n{"text": \n', "JSON parse error"),
    ("silent.jsonl", '{"messages": [{"role": "user", "content": "a"}]}\n' * 20, "no assistant"),
    ("one.txt", "a single\nparagraph", "n_samples=1"),
    ("no.parquet", "text", "Parquet")])
def test_a_file_that_does_not_fit_is_one_line(name, text, says):
    Path(name).write_text(text)
    with pytest.raises(SystemExit) as end:
        run("llama", name, "refused")
    line = str(end.value)
    assert name in line and says in line and "\n" not in line and not Path("refused").exists()


@pytest.mark.parametrize("words, says", [
    ("--model nowhere", "--model nowhere"), ("--bogus 1", "--bogus"), ("--support best", "best"),
    ("--options {", "JSON")])
def test_a_setting_that_does_not_fit_is_one_line(words, says):
    with pytest.raises(SystemExit, match=rf"\A.*{says}.*\Z"):
        run("llama", "chats.jsonl", "refused", words)


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
