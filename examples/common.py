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
from dp_bitfit_kernels import _allocator

METHODS = ("bitfit", "head-only", "full", "lora", "lora+bitfit", "1+bitfit", "2+bitfit")
_SPENT = ("seconds", "cpu_seconds")


def add_training_flags(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """The flags of every example. `defaults` overrides the default of a flag by its name."""
    flag = parser.add_argument
    flag(
        "--method",
        choices=METHODS,
        default="bitfit",
        help="what is trained beside the head: biases, nothing, everything, peft's LoRA, LoRA and biases; "
        "1+bitfit: one of the epochs everything, the others biases",
    )
    flag("--non-private", action="store_true", help="same layers, no clipping, no noise: the reference to compare with")
    flag("--epsilon", type=float, default=8.0, help="target epsilon (default 8)")
    flag("--delta", type=float, help="target delta (default 1/(2n))")
    flag("--epochs", type=int, default=3, help="expected passes over the training set")
    flag("--batch-size", type=int, default=1024, help="expected size of a Poisson draw, or plain batch size")
    flag("--max-physical-batch-size", type=int, default=64, help="records held in memory at once")
    flag("--lr", type=float, default=2e-3, help="peak learning rate of the biases")
    flag("--warmup", type=float, default=0.1, help="share of the run in which rates rise; then they fall linearly to 0")
    flag("--head-lr", type=float, help="learning rate of the head (default: that of the biases)")
    flag("--full-lr", type=float, help="learning rate where everything is trained (default: a tenth of --lr)")
    flag("--lora-lr", type=float, help="learning rate of LoRA (default: that of the biases)")
    flag("--lora-rank", type=int, default=8, help="of LoRA's matrices")
    flag("--lora-targets", default="query,value", help="modules that get LoRA, by the ends of their names")
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
    flag("--measure-memory", action="store_true", help="first measure the peak of one step, on a made-up batch")
    parser.set_defaults(**defaults)


def full_epochs(args: argparse.Namespace) -> int:
    """X of X+BiTFiT, the epochs that train everything before the biases; 0 for every other method."""
    first = args.method.partition("+bitfit")[0]
    return int(first) if first.isdigit() else 0


def check_method(args: argparse.Namespace) -> None:
    """Say at once what would go wrong later, or be ignored."""
    everything = args.method == "full" or full_epochs(args)
    if full_epochs(args) >= args.epochs:
        raise SystemExit(
            f"--method {args.method} needs more epochs than --epochs {args.epochs}: the rest is for biases"
        )
    if full_epochs(args) and args.non_private:
        raise SystemExit(f"--method {args.method} is private only: the engine runs its phases")
    if args.biases != "all" and (everything or "bitfit" not in args.method):
        raise SystemExit(f"--biases {args.biases} is for --method bitfit and lora+bitfit, not {args.method}")


def convert(model: nn.Module, args: argparse.Namespace, head: str, sample: Any) -> list[dict[str, Any]]:
    """Freeze all but what the method trains; returns the optimizer's parameter groups, the head's last.

    `sample`: inputs of one forward. A bias that it never reaches (an unused pooler) would only receive noise.
    """
    check_method(args)
    if args.seed is not None:
        torch.manual_seed(args.seed)
    presets, biases = dpk.presets, {"biases": args.biases}
    everything = args.method == "full" or full_epochs(args) > 0
    if "lora" in args.method:
        add_lora(model, args)
        chosen = presets.lora(head) if args.method == "lora" else {**presets.lora_and_bitfit(head), **biases}
    elif everything:
        chosen = presets.full()
    else:
        chosen = (
            presets.linear_probe(head) if args.method == "head-only" else {**presets.bitfit_and_head(head), **biases}
        )
    dpk.convert_model(model, **chosen, sample_batch=sample, memory=args.memory)
    rates = {
        "rest": full_lr(args) if args.method == "full" else args.lr,
        "lora": args.lora_lr or args.lr,
        "head": args.head_lr or args.lr,
    }
    groups: dict[str, list[nn.Parameter]] = {name: [] for name in rates}
    for name, p in model.named_parameters():  # in order: checkpoints number parameters
        if p.requires_grad:
            groups["head" if name.startswith(head + ".") else "lora" if ".lora_" in name else "rest"].append(p)
    return [{"params": parameters, "lr": rates[name]} for name, parameters in groups.items() if parameters]


def full_lr(args: argparse.Namespace) -> float:
    """The paper's rule where none is given: weights want a tenth of the biases' learning rate."""
    return float(args.full_lr or args.lr / 10)


def add_lora(model: nn.Module, args: argparse.Namespace) -> None:
    """Put peft's low-rank pairs into the model, in place: its own class and the names of its head stay."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise SystemExit(f"--method {args.method} needs `pip install peft`") from None
    targets = args.lora_targets.split(",")
    inject_adapter_in_model(LoraConfig(r=args.lora_rank, lora_alpha=2 * args.lora_rank, target_modules=targets), model)


def peak_of_step(
    args: argparse.Namespace,
    make: Callable[[], tuple[nn.Module, list[dict[str, Any]]]],
    loss_of: Callable[[Any], Tensor],
) -> int | None:
    """Most bytes of tensors alive at an instant of one private step, everything included; None if not asked for.

    make: -> (converted model, parameter groups). loss_of: mean loss of that model on one physical batch, which is made
    up, so that this spends no epsilon. Of X+BiTFiT it is a step of the first phase, the larger one.
    """
    if not args.measure_memory or args.non_private:
        return None

    def build() -> Callable[[], object]:
        model, groups = make()
        _, optimizer, _ = dpk.PrivacyEngine().make_private(
            module=model,
            optimizer=torch.optim.AdamW(groups, weight_decay=0.0),
            data_loader=DataLoader(range(args.max_physical_batch_size), batch_size=args.max_physical_batch_size),  # type: ignore[arg-type]
            noise_multiplier=1.0,
            max_grad_norm=args.max_grad_norm,
            clipping=args.clipping,
            poisson_sampling=False,
        )

        def step() -> None:
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()

        return step

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # steps outside the private loader are charged at sample rate 1
        return _allocator.peak_bytes(build, warm_up=2).peak


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

    def spent_before(self) -> dict[str, float]:
        """Time of the runs that this one resumes."""
        log = self.path / "log.jsonl"
        lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() and self.resuming else []
        return {name: float(max((line.get(name, 0.0) for line in lines), default=0.0)) for name in _SPENT}


class Clock:
    """Seconds since it was made, on the wall and of this process, with those spent before."""

    def __init__(self, before: dict[str, float]):
        start = {"seconds": time.perf_counter(), "cpu_seconds": time.process_time()}
        self.offsets = {name: before[name] - start[name] for name in _SPENT}

    def read(self) -> dict[str, float]:
        now = {"seconds": time.perf_counter(), "cpu_seconds": time.process_time()}
        return {name: round(self.offsets[name] + now[name], 3) for name in _SPENT}


def train(
    args: argparse.Namespace,
    model: nn.Module,
    groups: list[dict[str, Any]],
    data: Dataset[Any],
    collate: Callable[[list[Any]], Any],
    loss_of: Callable[[Any], Tensor],
    evaluate: Callable[[], float],
    peak_bytes: int | None = None,
) -> dict[str, Any]:
    """Fine-tune, evaluate after each epoch, save biases and result. `loss_of(batch)` is the mean loss of a batch.

    A private run neither shows nor logs its training loss: that number is computed from private records without noise.
    """
    print(dpk.conversion_report(model))
    n = len(data)  # type: ignore[arg-type]
    folder, delta = RunFolder(args.output, args.resume), args.delta or 1 / (2 * n)
    optimizer: Any = torch.optim.AdamW(groups, weight_decay=0.0)
    engine, loader, done = None, None, 0
    if args.non_private:
        loader = DataLoader(data, batch_sampler=BucketBatches(n, args.batch_size, args.seed), collate_fn=collate)
    else:
        engine = dpk.PrivacyEngine(history=str(folder.history))
        first, head = full_epochs(args), {id(p) for p in groups[-1]["params"]}
        biases = ("biases", *(name for name, p in model.named_parameters() if id(p) in head))
        phases = [dpk.Phase("full", epochs=first), dpk.Phase(biases, epochs=args.epochs - first)] if first else None
        model, optimizer, loader = engine.make_private_with_epsilon(
            module=model,
            optimizer=optimizer,
            data_loader=DataLoader(data, batch_size=args.batch_size, collate_fn=collate),
            target_epsilon=args.epsilon,
            target_delta=delta,
            **({"phases": phases} if phases else {"epochs": args.epochs}),
            max_grad_norm=args.max_grad_norm,
            clipping=args.clipping,
            max_physical_batch_size=args.max_physical_batch_size,
        )
    total, per_epoch = args.epochs * len(loader), len(loader)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate_factors(args, len(groups), total, per_epoch))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if folder.resuming:
        done = _load(folder, model, optimizer, scheduler, engine)
    clock = Clock(folder.spent_before())
    accuracy = evaluate()
    folder.log(event="resume" if done else "start", releases=done, accuracy=accuracy, **clock.read())
    print(f"{n} training records, {total} releases, {done} done; accuracy {accuracy:.4f}")
    bar = tqdm(total=total, initial=done, desc="releases")
    for epoch in range(done // per_epoch, args.epochs):
        if engine is not None and engine.phase == 0 and epoch == full_epochs(args):
            engine.next_phase()
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
                epsilon = engine.get_epsilon(delta)
                bar.set_postfix(epsilon=f"{epsilon:.2f}")
                folder.log(event="checkpoint", releases=done, epsilon=epsilon, **clock.read())
        accuracy = evaluate()
        _save(folder, model, optimizer, scheduler, engine, done)
        spent = clock.read()
        folder.log(event="epoch", epoch=epoch + 1, releases=done, accuracy=accuracy, **spent)
        bar.write(f"epoch {epoch + 1}: accuracy {accuracy:.4f} after {spent['seconds']:.0f} s")
    bar.close()
    spent = clock.read()
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
        "trained_elements": trained,
        "phases": engine.privacy_statement(delta).get("phases") if engine is not None else None,
        **{name: round(value, 1) for name, value in spent.items()},
        "peak_bytes": peak_bytes,
        "command": shlex.join(["python", *sys.argv]),
        "flags": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        "environment": environment(),
    }
    folder.result.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({k: result[k] for k in ("accuracy", "epsilon", "delta", "noise_multiplier", "seconds")}))
    return result


def rate_factors(args: argparse.Namespace, groups: int, total: int, per_epoch: int) -> list[Callable[[int], float]]:
    """For each parameter group its rate by the release, as a part of the group's own: warm-up, then linear decay.

    One course over all phases. While everything is trained, what is not the head has the rate of weights.
    """
    warmup, until = max(1, round(args.warmup * total)), full_epochs(args) * per_epoch

    def course(release: int) -> float:
        return min((release + 1) / warmup, max(0.0, 1 - release / total))

    def with_phases(release: int) -> float:
        return course(release) * (full_lr(args) / args.lr if release < until else 1.0)

    return [with_phases if group < groups - 1 else course for group in range(groups)]


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
