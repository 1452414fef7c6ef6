"""Which models of timm are covered, and are their per-sample gradients right?

    python -m bench.timm_census [--modules beit,vgg] [--jobs 1] [--save]

The questions of ``bench.model_census``, of every entry point of timm: where its biases go, on the meta device. The
smallest model of each of timm's modules also runs on two random images of the size it is made for, in float64, since
untrained models amplify the rounding of float32. timm needs torchvision.
"""

from __future__ import annotations

import argparse
import json
import signal
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch

from bench import results
from bench.environment import environment
from bench.model_census import checked, coverage, summary

LARGEST = 60e6  # parameters of a model that is run
SECONDS = 100


def static(name: str) -> dict[str, Any]:
    """How the biases of one entry point are covered, and its number of parameters."""
    import timm

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    try:
        with torch.device("meta"):
            model = timm.create_model(name)
    except Exception as error:  # noqa: BLE001  whatever a foreign constructor raises is the reason listed
        return {"status": "not built", "why": f"{type(error).__name__}: {error}"[:200]}
    size = sum(p.numel() for p in model.parameters())
    return {**coverage(model), "parameters": size}


def dynamic(name: str) -> dict[str, Any]:
    """Whether it has the per-sample gradients of its samples."""
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(SECONDS)
    try:
        return _asked(name)
    except _TooLongError:
        return {"status": "not run", "why": f"more than {SECONDS} s"}
    finally:
        signal.alarm(0)


class _TooLongError(BaseException):
    pass


def _too_long(number: int, frame: Any) -> None:
    raise _TooLongError


def _asked(name: str) -> dict[str, Any]:
    import timm

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        model = timm.create_model(name, num_classes=10).double().eval()
        with torch.no_grad():  # heads and scales that start at zero let no gradient pass
            for parameter in model.parameters():
                if parameter.numel() and bool((parameter == parameter.flatten()[0]).all()):
                    parameter.add_(0.1 * torch.randn_like(parameter))
        batch = {"x": torch.randn(2, *model.default_cfg["input_size"], dtype=torch.float64)}
        with torch.no_grad():
            model(**batch)
    except Exception as error:  # noqa: BLE001  as above
        return {"status": "not run", "why": f"{type(error).__name__}: {error}"[:200]}
    return checked(model, batch)


def smallest(found: dict[str, dict[str, Any]], modules: dict[str, list[str]]) -> list[str]:
    """The smallest model of each module that is built and not too large to run."""
    chosen = []
    for names in modules.values():
        sizes = {name: found[name]["static"].get("parameters", float("inf")) for name in names}
        name = min(sizes, key=sizes.__getitem__)
        if sizes[name] <= LARGEST:
            chosen.append(name)
    return chosen


def main() -> None:
    import timm

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--modules", default="", help="modules of timm.models, by commas; all without it")
    parser.add_argument("--jobs", type=int, default=1, help="each may take 10 GB")
    parser.add_argument("--save", action="store_true", help="also into bench/results/cpu/census_timm.json")
    options = parser.parse_args()
    chosen = options.modules.split(",") if options.modules else timm.list_modules()
    modules = {module: timm.list_models(module=module) for module in chosen}
    names = [name for listed in modules.values() for name in listed]
    not_run = {"status": "not run", "why": "another model of its module is"}
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("fork")) as pool:
        rows = zip(names, pool.map(static, names), strict=True)
        found = {name: {"static": row, "dynamic": not_run} for name, row in rows}
        run = smallest(found, modules)
        for name, row in zip(run, pool.map(dynamic, run), strict=True):
            found[name]["dynamic"] = row
            print(f"{name:44}  {found[name]['static']['status']:22}  {str(row)[:140]}", flush=True)
    for name, row in found.items():
        if row["static"]["status"] in ("refused", "not built"):
            print(f"{name:44}  {row['static']}")
    print(json.dumps(summary(found), indent=1))
    print(Counter(kind for row in found.values() for kind in row["static"].get("one by one", [])))
    if options.save:
        results.write(
            "census_timm.json",
            {
                "environment": {**environment(), "timm": timm.__version__},
                "command": "python -m bench.timm_census --save",
                "summary": summary(found),
                "classes": found,
            },
        )


if __name__ == "__main__":
    main()
