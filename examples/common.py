"""What the examples share: their flags, the private (or plain) training loop, its log, checkpoints and result."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

import dp_bitfit_kernels as dpk


def add_training_flags(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """The flags of every example. `defaults` overrides the default of a flag by its name."""
    flag = parser.add_argument
    flag("--method", choices=("bitfit", "head-only"), default="bitfit", help="what is trained beside the head")
    flag("--non-private", action="store_true", help="same layers, no clipping, no noise: the reference to compare with")
    flag("--epsilon", type=float, default=8.0, help="target epsilon (default 8)")
    flag("--delta", type=float, help="target delta (default 1/(2n))")
    flag("--epochs", type=int, default=3, help="expected passes over the training set")
    flag("--batch-size", type=int, default=1024, help="expected size of a Poisson draw, or plain batch size")
    flag("--max-physical-batch-size", type=int, default=64, help="records held in memory at once")
    flag("--lr", type=float, default=2e-3, help="peak learning rate of the biases")
    flag("--warmup", type=float, default=0.1, help="share of the run in which rates rise; then they fall linearly to 0")
    flag("--head-lr", type=float, help="learning rate of the head (default: that of the biases)")
    flag("--max-grad-norm", type=float, default=1.0)
    flag("--clipping", default="automatic", choices=("automatic", "flat", "per_layer"))
    flag("--biases", choices=("all", "informative"), default="all", help="all, or those that get a gradient at all")
    flag("--memory", choices=("exact", "compact", "off"), default="exact", help="what is kept for the backward pass")
    flag("--limit", type=int, help="use only so many training records, drawn with --seed")
    flag("--seed", type=int, default=0, help="of the subset and of a plain run's shuffling; private noise has no seed")
    flag("--threads", type=int, help="CPU threads")
    flag("--output", type=Path, required=True, help="folder for the log, checkpoints, biases and result")
    flag("--resume", action="store_true", help="go on from the folder's checkpoint, if there is one")
    flag("--checkpoint-every", type=int, default=5, help="releases between checkpoints")
    parser.set_defaults(**defaults)


def convert(model: nn.Module, args: argparse.Namespace, head: str, sample: Any) -> list[dict[str, Any]]:
    """Freeze all but the biases and the head; returns the optimizer's parameter groups.

    `sample`: inputs of one forward. A bias that it never reaches (an unused pooler) would only receive noise.
    """
    if args.seed is not None:
        torch.manual_seed(args.seed)
    biases: Any = args.biases if args.method == "bitfit" else ()
    dpk.convert_model(model, biases=biases, train_modules=(head,), sample_batch=sample, memory=args.memory)
    print(dpk.conversion_report(model))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    in_head = [name for name in trained if name.startswith(head + ".")]  # in order: checkpoints number parameters
    groups = [
        {"params": [p for name, p in trained.items() if name not in in_head], "lr": args.lr},
        {"params": [trained[name] for name in in_head], "lr": args.head_lr or args.lr},
    ]
    return [group for group in groups if group["params"]]


class BucketBatches(Sampler[list[int]]):
    """Shuffled batches of neighbours: of similar length where the data set is sorted by length. Not private."""

    def __init__(self, n: int, batch_size: int, seed: int):
        self.n, self.batch_size, self.generator = n, batch_size, torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return -(-self.n // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(self.n, generator=self.generator)
        pools = [pool.sort().values for pool in order.split(50 * self.batch_size)]
        batches = [batch.tolist() for pool in pools for batch in pool.split(self.batch_size)]
        yield from (batches[i] for i in torch.randperm(len(batches), generator=self.generator).tolist())


class RunFolder:
    """The files of one run: log.jsonl, checkpoint.pt, history.jsonl, biases.safetensors, result.json."""

    def __init__(self, path: Path, resume: bool):
        self.path = path
        self.checkpoint, self.history = path / "checkpoint.pt", path / "history.jsonl"
        self.biases, self.result = path / "biases.safetensors", path / "result.json"
        self.resuming = resume and self.checkpoint.exists()
        if not self.resuming and self.history.exists():
            raise SystemExit(f"{path} holds the privacy history of another run: pass --resume, or another --output")
        path.mkdir(parents=True, exist_ok=True)

    def log(self, **fields: Any) -> None:
        with open(self.path / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(fields) + "\n")

    def seconds_before(self) -> float:
        """Training time of the runs that this one resumes."""
        log = self.path / "log.jsonl"
        lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() and self.resuming else []
        return float(max((line.get("seconds", 0.0) for line in lines), default=0.0))


def train(
    args: argparse.Namespace,
    model: nn.Module,
    groups: list[dict[str, Any]],
    data: Dataset[Any],
    collate: Callable[[list[Any]], Any],
    loss_of: Callable[[Any], Tensor],
    evaluate: Callable[[], float],
) -> dict[str, Any]:
    """Fine-tune, evaluate after each epoch, save biases and result. `loss_of(batch)` is the mean loss of a batch.

    A private run neither shows nor logs its training loss: that number is computed from private records without noise.
    """
    n = len(data)  # type: ignore[arg-type]
    folder, delta = RunFolder(args.output, args.resume), args.delta or 1 / (2 * n)
    optimizer: Any = torch.optim.AdamW(groups, weight_decay=0.0)
    engine, loader, done = None, None, 0
    if args.non_private:
        loader = DataLoader(data, batch_sampler=BucketBatches(n, args.batch_size, args.seed), collate_fn=collate)
    else:
        engine = dpk.PrivacyEngine(history=str(folder.history))
        model, optimizer, loader = engine.make_private_with_epsilon(
            module=model,
            optimizer=optimizer,
            data_loader=DataLoader(data, batch_size=args.batch_size, collate_fn=collate),
            target_epsilon=args.epsilon,
            target_delta=delta,
            epochs=args.epochs,
            max_grad_norm=args.max_grad_norm,
            clipping=args.clipping,
            max_physical_batch_size=args.max_physical_batch_size,
        )
    total = args.epochs * len(loader)
    warmup = max(1, round(args.warmup * total))
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda release: min((release + 1) / warmup, max(0.0, 1 - release / total))
    )
    if folder.resuming:
        done = _load(folder, model, optimizer, scheduler, engine)
    before, start = folder.seconds_before(), time.perf_counter()
    accuracy = evaluate()
    folder.log(event="resume" if done else "start", releases=done, accuracy=accuracy, seconds=before)
    print(f"{n} training records, {total} releases, {done} done; accuracy {accuracy:.4f}")
    bar = tqdm(total=total, initial=done, desc="releases")
    for epoch in range(done // len(loader), args.epochs):
        model.train()
        for batch in loader:
            optimizer.zero_grad()
            loss_of(batch).backward()
            if optimizer.step() is False:  # a physical batch that does not end its draw
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # it cannot see that the wrapped optimizer stepped
                scheduler.step()
            done += 1
            bar.update()
            if engine is not None and done % args.checkpoint_every == 0:
                engine.save_checkpoint(str(folder.checkpoint), scheduler=scheduler)
                spent = {"epsilon": engine.get_epsilon(delta), "seconds": before + time.perf_counter() - start}
                bar.set_postfix(epsilon=f"{spent['epsilon']:.2f}")
                folder.log(event="checkpoint", releases=done, **spent)
        accuracy = evaluate()
        _save(folder, model, optimizer, scheduler, engine, done)
        seconds = before + time.perf_counter() - start
        folder.log(event="epoch", epoch=epoch + 1, releases=done, accuracy=accuracy, seconds=seconds)
        bar.write(f"epoch {epoch + 1}: accuracy {accuracy:.4f} after {seconds:.0f} s")
    bar.close()
    dpk.save_biases(model, str(folder.biases))
    result = {
        "accuracy": accuracy,
        "method": args.method,
        "private": engine is not None,
        "epsilon": engine.get_epsilon(delta) if engine is not None else None,
        "delta": delta if engine is not None else None,
        "noise_multiplier": optimizer.noise_multiplier if engine is not None else None,
        "records": n,
        "releases": done,
        "trained_elements": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "seconds": round(before + time.perf_counter() - start, 1),
        "command": shlex.join(["python", *sys.argv]),
        "flags": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        "environment": environment(),
    }
    folder.result.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({k: result[k] for k in ("accuracy", "epsilon", "delta", "noise_multiplier", "seconds")}))
    return result


def _save(folder: RunFolder, model: nn.Module, optimizer: Any, scheduler: Any, engine: Any, done: int) -> None:
    if engine is not None:
        engine.save_checkpoint(str(folder.checkpoint), scheduler=scheduler)
        return
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
    torch.save({**state, "done": done}, folder.checkpoint)


def _load(folder: RunFolder, model: nn.Module, optimizer: Any, scheduler: Any, engine: Any) -> int:
    """Releases done. A private run goes on inside its epoch; a plain one at the start of it."""
    if engine is not None:
        return int(engine.load_checkpoint(str(folder.checkpoint), scheduler=scheduler)["releases"])
    state = torch.load(folder.checkpoint, weights_only=True)
    for name, target in (("model", model), ("optimizer", optimizer), ("scheduler", scheduler)):
        target.load_state_dict(state[name])
    return int(state["done"])


def accuracy_of(model: nn.Module, batches: Sequence[tuple[Any, Tensor]], logits: Callable[[Any], Tensor]) -> float:
    """Share of `batches` (inputs, labels) that the model classifies rightly."""
    training = model.training
    model.eval()
    with torch.no_grad():
        right = sum(int((logits(inputs).argmax(-1) == labels).sum()) for inputs, labels in batches)
    model.train(training)
    return right / sum(len(labels) for _, labels in batches)


def environment() -> dict[str, Any]:
    cpu = platform.processor()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            cpu = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), cpu)
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
