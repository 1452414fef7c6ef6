"""Which model classes of transformers are covered, and are their per-sample gradients right?

    python -m bench.model_census [--classes Bert,GPT2] [--jobs 2] [--save]

Each class is built twice, in a process of its own with a time limit. On the meta device, with its default
configuration: where do its biases go (layers, one sample at a time, none, refused and why)? And small on the CPU, with
the first inputs of a list that it accepts: `check_model` compares per-sample gradients with runs of one sample at a
time. Where it refuses, or finds more than 1e-5, plain autograd is asked how far its gradient of the batch is from the
mean of its samples' own: a model that mixes samples (contrastive outputs) or draws random masks has no per-sample
gradients. A class that cannot be built or run so is listed with the reason. No weights are needed.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import multiprocessing
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

import dp_bitfit_kernels as dpk
from bench import results
from bench.environment import environment
from bench.small_configs import inputs_of, shrink
from dp_bitfit_kernels._nested import tensors_in

SECONDS = 60
TOLERANCE = 1e-5
RAN = ("right", "inexact", "refused", "failed", "no gradient of a bias", "no per-sample gradients")
MIXED = 1e-3  # of the largest gradient: more than this no arithmetic explains


def classes() -> dict[str, Any]:
    """Every model class that transformers exports, by name."""
    import transformers

    found = {}
    for name in dir(transformers):
        if name.endswith(("Config", "Tokenizer", "TokenizerFast", "Processor", "ImageProcessor", "ImageProcessorFast")):
            continue
        if name.startswith(("TF", "Flax", "Auto", "_")) or name.endswith("PreTrainedModel"):
            continue
        try:
            kind = getattr(transformers, name)
        except (ImportError, RuntimeError, AttributeError):  # needs a library that is not installed
            continue
        if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel) and kind.config_class is not None:
            found[name] = kind
    return found


def static(kind: Any) -> dict[str, Any]:
    """How the biases of the default configuration are covered."""
    with torch.device("meta"):
        model = kind(kind.config_class())
    return coverage(model)


def coverage(model: nn.Module) -> dict[str, Any]:
    """Where the biases of a model go."""
    biases = sum(1 for name, _ in model.named_parameters() if "bias" in name.rpartition(".")[2])
    try:
        dpk.convert_model(model)
    except dpk.ConversionError as error:
        if "nothing to train" in str(error):
            return {"status": "no biases", "named bias": biases}
        return {"status": "refused", "why": str(error)[:300]}
    report = dpk.conversion_report(model)
    reasons = Counter(why for why in report.frozen.values() if why != "not a bias")
    return {
        "status": "one sample at a time" if report.one_by_one else "by layers",
        "trained": len(report.trained),
        "percent": report.percent,
        "one by one": sorted(set(report.one_by_one.values())),
        "excluded": dict(reasons),
    }


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    size = next(iter(batch.values())).shape[0]
    outputs = [t for t in tensors_in(model(**batch)) if t.is_floating_point() and t.dim() > 1 and t.shape[0] == size]
    value = torch.zeros(())
    for output in outputs:
        if output.requires_grad or not torch.is_grad_enabled():
            weights = torch.randn(output.shape[1:], generator=torch.Generator().manual_seed(2))
            value = value + (output.float().nan_to_num(0.0, 0.0, 0.0) * weights).flatten(1).mean(1).sin().mean()
    return value


def dynamic(kind: Any) -> dict[str, Any]:
    """Whether a small model of the class has the per-sample gradients of its samples."""
    torch.manual_seed(0)
    try:
        model = kind(shrink(kind.config_class()))
    except Exception as error:  # noqa: BLE001  whatever a foreign constructor raises is the reason listed
        return {"status": "not built", "why": f"{type(error).__name__}: {error}"[:200]}
    if sum(p.numel() for p in model.parameters()) > 60e6:
        return {"status": "not run", "why": f"{sum(p.numel() for p in model.parameters()):,} parameters when small"}
    model.eval()
    why = ""
    for batch in inputs_of(model):
        try:
            with torch.no_grad():
                value = loss(model, batch)
        except Exception as error:  # noqa: BLE001  as above
            why = why or f"{type(error).__name__}: {error}"[:200]  # of the likeliest inputs
            continue
        if bool(value.isfinite()) and abs(float(value)) > 1e-12:
            return checked(model, batch)
    return {"status": "not run", "why": why or "no inputs are known for it, or its outputs are all zero"}


def plain_fault(model: nn.Module, batch: dict[str, Tensor]) -> float | None:
    """How far plain autograd's bias gradients of the batch are from the means of its samples' own, as a part of the
    largest; None where no gradient reaches a bias."""
    biases = [p for name, p in model.named_parameters() if "bias" in name.rpartition(".")[2]]
    size = next(iter(batch.values())).shape[0]

    def gradients(rows: slice) -> list[Tensor]:
        value = loss(model, {name: tensor[rows] for name, tensor in batch.items()})
        found = torch.autograd.grad(value, biases, allow_unused=True) if value.requires_grad else [None] * len(biases)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(biases, found, strict=True)]

    whole = gradients(slice(0, size))
    alone = [gradients(slice(i, i + 1)) for i in range(size)]
    largest = max((float(g.abs().max()) for g in whole), default=0.0)
    if largest == 0.0:
        return None
    means = [torch.stack(rows).mean(0) for rows in zip(*alone, strict=True)]
    return max(float((a - b).abs().max()) for a, b in zip(whole, means, strict=True)) / largest


def checked(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Any]:
    inputs = {name: list(tensor.shape) for name, tensor in batch.items()}
    plain = copy.deepcopy(model)
    try:
        dpk.convert_model(model, sample_batch=batch)
        report = dpk.conversion_report(model)
        check = dpk.check_model(model, batch, loss)
    except dpk.DPBiTFiTError as error:
        if "nothing to train" in str(error):
            return {"status": "no biases", "why": str(error)[:300], "inputs": inputs}
        fault = plain_fault(plain, batch)
        status = "refused"
        if fault is None:
            status = "no gradient of a bias"
        elif not fault <= MIXED:
            status = "no per-sample gradients"
        return {"status": status, "why": str(error)[:300], "plain autograd": fault, "inputs": inputs}
    except Exception as error:  # noqa: BLE001  ours to mend
        return {"status": "failed", "why": f"{type(error).__name__}: {error}"[:300], "inputs": inputs}
    right = check.worst <= TOLERANCE
    return {
        "status": "right" if right else "inexact",
        "worst": check.worst,
        **({} if right else {"plain autograd": plain_fault(plain, batch)}),
        "trained": len(report.trained),
        "silent": len(check.silent),
        "one by one": sorted(set(report.one_by_one.values())),
        "inputs": inputs,
    }


def _job(kind: Any, pipe: Any) -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    try:
        found["static"] = static(kind)
    except Exception as error:  # noqa: BLE001  as above
        found["static"] = {"status": "not built", "why": f"{type(error).__name__}: {error}"[:200]}
    pipe.send(found)
    found["dynamic"] = dynamic(kind)
    pipe.send(found)


def census_of(name: str, kind: Any) -> dict[str, Any]:
    """Both questions, in a forked process."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_job, args=(kind, sender))
    process.start()
    sender.close()
    found: dict[str, Any] = {}
    end = time.monotonic() + SECONDS
    try:
        while "dynamic" not in found and receiver.poll(max(0.0, end - time.monotonic())):
            found = receiver.recv()
    except EOFError:
        found.setdefault("dynamic", {"status": "failed", "why": "the process died"})
    finally:
        process.kill()
        process.join()
        receiver.close()
    found.setdefault("static", {"status": "not built", "why": f"more than {SECONDS} s"})
    found.setdefault("dynamic", {"status": "not run", "why": f"more than {SECONDS} s"})
    return found


def run(names: dict[str, Any], jobs: int) -> Iterator[tuple[str, dict[str, Any]]]:
    with ThreadPoolExecutor(jobs) as pool:
        yield from zip(names, pool.map(lambda name: census_of(name, names[name]), names), strict=True)


def summary(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    kinds = {part: dict(Counter(entry[part]["status"] for entry in found.values())) for part in ("static", "dynamic")}
    built = Counter(kinds["static"])
    biased = built["by layers"] + built["one sample at a time"] + built["refused"]
    ran = Counter(kinds["dynamic"])
    with_rows = ran["right"] + ran["inexact"] + ran["refused"] + ran["failed"]
    return {
        **kinds,
        "classes": len(found),
        "covered, of those with biases": (biased - built["refused"]) / max(1, biased),
        "run": with_rows,
        "right, of those run": ran["right"] / max(1, with_rows),
    }


def _ran(row: dict[str, Any]) -> bool:
    return row["status"] in RAN or row.get("why", "").startswith(
        "more than"
    )  # which a busy machine may be to blame for


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--classes", default="", help="beginnings of names, by commas; all without it")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--save", action="store_true", help="also into bench/results/cpu/census.json")
    parser.add_argument("--again", action="store_true", help="only classes that ran before; the rows of others stay")
    options = parser.parse_args()
    logging.disable(logging.ERROR)
    chosen = tuple(options.classes.split(",")) if options.classes else ("",)
    names = {name: kind for name, kind in classes().items() if name.startswith(chosen)}
    found = {}
    if options.again:
        found = json.loads(results.path("census.json").read_text())["classes"]
        names = {name: names[name] for name in names if _ran(found[name]["dynamic"])}
    for name, entry in run(names, options.jobs):
        found[name] = entry
        dynamic_part = {k: v for k, v in entry["dynamic"].items() if k != "inputs"}
        print(f"{name:55s} {entry['static']['status']:22s} {dynamic_part}"[:230], flush=True)
    print(json.dumps(summary(found), indent=1))
    if options.save:
        results.write(
            "census.json",
            {
                "environment": environment(),
                "command": "python -m bench.model_census --save" + (", then --again --save" if options.again else ""),
                "summary": summary(found),
                "classes": found,
            },
        )


if __name__ == "__main__":
    main()
