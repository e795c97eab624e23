"""Your own model and data: LOFT in trl's SFTTrainer and in transformers' Trainer.

    python train.py --model FOLDER --data chats.jsonl --out runs/chat --export merged
    python train.py --model FOLDER --data notes.txt --packing --support lookahead --resume
    torchrun --nproc_per_node 4 train.py --model FOLDER --data reviews.csv --rank 16

--model              a folder that save_pretrained wrote, or a name on the hub
--data, --val        .jsonl, .json, .csv, .parquet or .txt; without --val a tenth is held out
--out, --resume      the folder of the run; go on from the last checkpoint in it
--patience           stop after so many evaluations without a smaller loss, as transformers'
                     EarlyStoppingCallback does; with --load_best_model_at_end True
--export             a folder for the merged model, which loads without LOFT
--method, --support, --rank, --side, --targets     as in loft.adapt and selectors.select;
                     --options takes the rest of adapt's as JSON: '{"transform": "expm"}'
--calibration        the number of examples that the support is chosen from
--lookahead          for --support lookahead: the steps of its path

Everything else belongs to trl's SFTConfig, which holds transformers' TrainingArguments, and means
what it means there: bf16, gradient_accumulation_steps, gradient_checkpointing, max_grad_norm,
lr_scheduler_type, packing, max_length (longer examples are cut), eval_strategy, save_steps,
load_best_model_at_end, …
--model_init_kwargs is JSON for from_pretrained: '{"quantization_config": {"load_in_4bit": true}}'
(of a classifier, with its head left whole: "llm_int8_skip_modules": ["classifier"]).
A causal model that does not fit one device is read in shards, by FSDP2: under torchrun, with
'{"distributed_config": {"fsdp_size": 4}}'. Its adapter is whole on every rank, and is merged by
one process that has room: the same command with --resume --export, without this setting.

The columns say what is learned:

    messages             every answer of the assistant, given all that precedes it in the chat
                         (or, with --assistant_only_loss, all at once: see trl on templates)
    prompt, completion   the completion (or response): two texts, or two lists of messages
    text, label          a classifier, by transformers' Trainer: labels are the model's own names
                         or numbers, or make a new head; it trains too; texts are cut at the
                         tokenizer's own limit
    image, label         the same of images: paths from the working folder, or bytes (of any
                         format that Pillow reads)
    text                 every token; a .txt file is read paragraph by paragraph

Checkpoints hold the adapter and the trainer's state, not the model; OUT/adapter.pt is what
loft.load takes.
"""
import json
import os
import resource
import time
from dataclasses import dataclass
from pathlib import Path

import torch

try:
    import datasets
    import transformers
    import trl
    from pyarrow import csv
except ImportError as e:
    raise SystemExit(f"--model needs {e.name}: pip install transformers trl datasets")

import loft
from loft import selectors

READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text", ".csv": "csv"}
COLUMNS = "messages", "prompt and completion", "image and label", "text and label", "text"


@dataclass
class Settings:
    """LOFT's own settings; what they mean stands at the top of the file."""
    model: str
    data: str
    val: str = ""
    out: str = "runs/own"
    resume: bool = False
    patience: int = 0
    export: str = ""
    method: str = "loft"
    support: str = None
    rank: int = None
    side: str = "input"
    targets: str = None
    options: json.loads = "{}"  # which the parser converts it by
    calibration: int = 64
    lookahead: int = 50


# --------------------------------------------------------------------------------------- data

def read(path):
    """The examples of a file, which has the columns of one entry of COLUMNS."""
    suffix = Path(path).suffix
    if suffix not in READERS or not os.path.getsize(path):
        raise ValueError(f"{path}: wanted is a file that is not empty, one of {', '.join(READERS)}")
    if suffix == ".csv":  # strictly: pandas would shift the columns of a ragged row
        data = datasets.Dataset(csv.read_csv(
            path, parse_options=csv.ParseOptions(newlines_in_values=True)))
    else:
        more = {"sample_by": "paragraph"} if suffix == ".txt" else {}
        data = datasets.load_dataset(READERS[suffix], data_files=path, split="train", **more)
    # response: another name of completion
    data = data.rename_columns({name: name.strip().replace("response", "completion")
                                for name in data.column_names})
    for kind in COLUMNS:
        columns = kind.split(" and ")
        if {*columns} <= {*data.column_names}:
            break
    else:
        raise ValueError(f"{path} has {data.column_names}; wanted are {', or '.join(COLUMNS)}")
    if "image" in columns:
        data = data.cast_column("image", datasets.Image("RGB"))
    for column in columns:  # images are decoded here, before any training
        for number, value in enumerate(data[column], 1):
            if value is None:
                raise ValueError(f"example {number} of {path} has no {column}")
    return data


def answers(chats):
    """Every answer of every chat as a completion of what precedes it: right in any template."""
    rows = [{**chat, "prompt": chat["messages"][:i], "completion": [message]} for chat in chats
            for i, message in enumerate(chat["messages"]) if i and message["role"] == "assistant"]
    if not rows:
        raise ValueError("no assistant answers in its messages")
    return datasets.Dataset.from_list(rows)


# ------------------------------------------------------------------------------------ trainers

class AdapterTrainer(transformers.Trainer):
    """transformers', whose checkpoints hold the adapter instead of the whole model."""

    def _save(self, folder):
        if self.args.should_save:
            loft.save(self.model, f"{folder}/adapter.pt")

    def _load_from_checkpoint(self, folder=None):
        loft.load(self.model, f"{folder or self.state.best_model_checkpoint}/adapter.pt")

    _load_best_model = _load_from_checkpoint


class CausalTrainer(AdapterTrainer, trl.SFTTrainer):
    """trl's, for a causal language model."""


def classifier(name, config, options, processor, image, parts):
    """A classifier of images or texts, and its data, encoded by the processor whenever it is used.

    Labels are the names in the model's own configuration, or the numbers; failing that, new names.
    """
    labels = [*map(str, sorted({label for part in parts for label in part["label"]}))]
    names = config.id2label
    if not {*labels} <= {*map(str, names), *names.values()}:
        names = config.id2label = dict(enumerate(labels))
    config.label2id = {label: i for i, label in names.items()}
    place = {str(i): i for i in names} | config.label2id
    if image:
        auto = transformers.AutoModelForImageClassification
    else:
        auto = transformers.AutoModelForSequenceClassification
        processor.pad_token = processor.pad_token or processor.eos_token
        config.pad_token_id = processor.pad_token_id
    model = auto.from_pretrained(name, config=config, ignore_mismatched_sizes=True, **options)

    def encode(batch):
        inputs = processor(batch["image"]) if image else processor(batch["text"], truncation=True)
        return {**inputs, "labels": [place[str(label)] for label in batch["label"]]}

    return model, [part.with_transform(encode) for part in parts]


def build(settings, args):
    """The trainer of a model that is not adapted yet, and a regex of the parameters of its head."""
    name, data, options = settings.model, read(settings.data), args.model_init_kwargs or {}
    parts = (data, read(settings.val)) if settings.val else data.train_test_split(0.1).values()
    config = transformers.AutoConfig.from_pretrained(name)  # first: its errors are the clearest
    image = "image" in data.column_names
    reader = transformers.AutoImageProcessor if image else transformers.AutoTokenizer
    processor = reader.from_pretrained(name)
    if "label" in data.column_names:
        model, parts = classifier(name, config, options, processor, image, parts)
        kind = AdapterTrainer
        # whatever their prefix, CLIP and its like keep their body in vision_model
        head = rf"^(?!({model.base_model_prefix}|vision_model)\.)|\.pooler\."
        args.remove_unused_columns = False  # what is encoded in use has none of the model's yet
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(name, **options)
        kind = CausalTrainer
        head = ()
        if "messages" in data.column_names and not args.assistant_only_loss:
            parts = map(answers, parts)
    # what Trainer asks of a quantised model: that it has adapters
    model._hf_peft_config_loaded = hasattr(model, "is_quantized")
    if settings.export and model._hf_peft_config_loaded or "distributed_config" in options and (
            settings.export or head):
        raise ValueError("a quantised model cannot be merged; nor one in shards, or train a head")
    # Trainer would not save the optimizer of a model in shards; that of an adapter is whole
    only, args.save_only_model = args.save_only_model, True
    trainer = kind(model, args, None, *parts, processor)  # None: with the collator of its own
    args.save_only_model = only
    if trainer.is_fsdp_enabled:
        raise ValueError("FSDP is asked for in --model_init_kwargs: see lab/own.py")
    if settings.patience:
        if settings.patience < 0 or not args.load_best_model_at_end:
            raise ValueError(f"--patience {settings.patience}: give a positive number, and "
                             "--load_best_model_at_end True")
        trainer.add_callback(transformers.EarlyStoppingCallback(settings.patience))
    return trainer, head


def adapt(trainer, settings, head):
    """Adapts the trainer's model, in a support for its own data and loss."""
    common = {"side": settings.side, "seed": trainer.args.seed, "trainable": head}
    if settings.method == "loft":
        rows = trainer.train_dataset.shuffle().take(settings.calibration)
        batches, ahead = list(trainer.get_eval_dataloader(rows)), settings.support == "lookahead"
        settings.support = selectors.select(
            trainer.model, batches, trainer.compute_loss, settings.rank or 32,
            "skew" if ahead else settings.support or "skew", settings.targets,
            lookahead=ahead * settings.lookahead, **common)
        settings.rank = settings.targets = None  # the support says both
    loft.adapt(trainer.model, settings.targets, method=settings.method, rank=settings.rank,
               support=settings.support, **common, **settings.options)


# ------------------------------------------------------------------------------------ the run

def main(argv):
    """Chooses, trains, saves; what goes wrong before the training is said in one line."""
    parser = transformers.HfArgumentParser(
        (Settings, trl.SFTConfig), exit_on_error=False,
        usage="python train.py --model FOLDER --data FILE …: see --help, and lab/own.py")
    # rotations take a larger rate than weights; a model runs in its own dtype unless asked; a CPU
    # must be told of, or ranks train apart; the count of --patience goes on where it was
    parser.set_defaults(learning_rate=3e-3, bf16=False,
                        use_cpu=not torch.accelerator.is_available(),
                        restore_callback_states_from_checkpoint=True)
    datasets.logging.set_verbosity(50)
    try:
        settings, args = parser.parse_args_into_dataclasses(argv)
        args.output_dir, start = settings.out, time.time()
        transformers.set_seed(args.seed)
        trainer, head = build(settings, args)
        # the trainer's state is written last: a checkpoint that has it is whole
        newest = settings.resume and max(
            Path(settings.out).glob("checkpoint-*/trainer_state.json"), key=os.path.getmtime,
            default=None)
        if not newest:  # else the trainer loads its adapter
            adapt(trainer, settings, head)
    except Exception as e:  # of many kinds, from as many libraries
        message = " ".join(f"{e} {e.__cause__ or ''}".split())
        raise SystemExit(f"{type(e).__name__}: {message} [train.py {' '.join(argv)}]")
    # by train(): ranks train apart after an evaluate() before it
    args.eval_on_start = not newest
    trainer.train(newest and newest.parent)
    after = trainer.evaluate()
    trainer.save_model()
    if args.should_save:
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print("trainable  loss before   after  orth. error  seconds  peak MiB\n"
              f"{trainer.model.num_parameters(only_trainable=True):9,}"
              f"{trainer.state.log_history[0]['eval_loss']:13.4f}{after['eval_loss']:8.4f}"
              f"{max(loft.orthogonality_error(trainer.model).values(), default=torch.nan):13.0e}"
              f"{time.time() - start:9.0f}"
              f"{(torch.cuda.max_memory_allocated() or resident) / 2 ** 20:10.0f}")
        if settings.export:
            loft.merge(trainer.model).save_pretrained(settings.export)
            trainer.processing_class.save_pretrained(settings.export)
    trainer.model_wrapped = None  # DDP goes before its process group, or gloo's threads may hang
    trainer.accelerator.free_memory()
    trainer.accelerator.end_training()
