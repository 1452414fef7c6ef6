"""Everything that needs a GPU, in one command: build, tests on the device, kernel times, step times.

    make gpu-check                  with the machine's own python3, torch and Triton; no network, no virtual environment
    OUT=folder make gpu-check       results there, not in bench/results/<gpu>

Each part is a process of its own with a time limit, so that one may fail and the others still report. The result file
is written anew after every part; a summary is printed last. What a part needs and does not find it skips by name.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench import results  # noqa: E402
from bench.environment import environment  # noqa: E402


def _tests(*names: str, keep: str = "") -> list[str]:
    """Named, because collecting the other tests imports packages that a GPU machine may lack."""
    files = [f"python_tests/test_{name}.py" for name in names]
    return ["-m", "pytest", *files, "-m", "gpu", "-k", keep, "-q", "-p", "no:cacheprovider", "--maxfail=20"]


# name -> (seconds it may take, what it runs)
PARTS: dict[str, tuple[int, list[str]]] = {
    "build": (90, []),
    "tests": (150, _tests("ops", "gpu_step")),
    "weights": (120, _tests("gpu_weights")),
    "backward tests": (60, _tests("backward_ops", keep="native")),
    "kernels": (45, ["-m", "bench.bench_gpu_kernels"]),
    "backward kernels": (45, ["-m", "bench.bench_gpu_backward"]),
    "step": (150, ["-m", "bench.bench_gpu_step"]),
    # Compiles hundreds of variants: by --only, in a call of its own.
    "backward triton": (560, _tests("backward_ops", keep="triton")),
}
USUAL = list(PARTS)[:-1]


def build(limit: int) -> dict[str, Any]:
    """Compile _C and _C_cuda for this card into the checkout's package folder."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    folder = ROOT / "build" / "gpu-check"
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    configure = [
        *("cmake", "-S", str(ROOT), "-B", str(folder), *generator, f"-DPython_EXECUTABLE={sys.executable}"),
        f"-DCMAKE_CUDA_ARCHITECTURES={major}{minor}",
        f"-DDP_BITFIT_OUTPUT_DIRECTORY={ROOT / 'dp_bitfit_kernels'}",
    ]
    targets = ["--target", "_C", "_C_cuda"]
    begun = time.monotonic()
    for command in (configure, ["cmake", "--build", str(folder), "--parallel", *targets]):
        left = max(1.0, limit - (time.monotonic() - begun))
        done = subprocess.run(command, capture_output=True, text=True, timeout=left, check=False)
        if done.returncode:
            return {"passed": False, "output": (done.stdout + done.stderr)[-4000:]}
    return {"passed": True, "architecture": f"sm_{major}{minor}"}


def run_part(name: str, limit: int, command: list[str]) -> dict[str, Any]:
    begun = time.monotonic()
    try:
        result = build(limit) if name == "build" else _process(name, limit, command)
    except subprocess.TimeoutExpired:
        result = {"passed": False, "output": f"took longer than {limit} s"}
    except Exception as error:  # noqa: BLE001  the other parts must still run
        result = {"passed": False, "output": f"{type(error).__name__}: {error}"}
    return {**result, "seconds": round(time.monotonic() - begun, 1)}


def _process(name: str, limit: int, command: list[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report"
        tests = "pytest" in command
        extra = ["--junitxml" if tests else "--json", str(report)]
        done = subprocess.run(
            [sys.executable, *command, *extra], cwd=ROOT, capture_output=True, text=True, timeout=limit, check=False
        )
        found: dict[str, Any] = {"passed": done.returncode == 0}
        if report.exists():
            found |= _counts(report) if tests else json.loads(report.read_text())
        if done.returncode:
            found["output"] = (done.stdout + done.stderr)[-6000:]
        return found


def _counts(report: Path) -> dict[str, Any]:
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    skipped = {element.get("message") for element in suite.iter("skipped")}
    counts = {key: int(suite.get(key, "0")) for key in ("tests", "failures", "errors", "skipped")}
    return {**counts, "reasons_of_skips": sorted(str(reason) for reason in skipped)}


def summary(parts: dict[str, dict[str, Any]]) -> str:
    lines = ["", "gpu-check"]
    for name, part in parts.items():
        lines.append(f"  {name:16s} {'ok' if part['passed'] else 'FAILED':7s} {part['seconds']:6.1f} s")
        if "errors" in part:
            lines.append("    " + ", ".join(f"{key} {part[key]}" for key in ("tests", "failures", "errors", "skipped")))
        lines += [f"    {line}" for line in part.get("table", [])]
        if not part["passed"]:
            lines += [f"    | {line}" for line in str(part.get("output", "")).splitlines()[-15:]]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(USUAL), help=f"parts: {', '.join(PARTS)}")
    parser.add_argument("--out", type=Path, default=os.environ.get("OUT"), help="folder of the result file")
    given = parser.parse_args()
    try:
        import torch
    except ImportError:
        print("gpu-check: python3 has no torch", file=sys.stderr)
        return 1
    if not torch.cuda.is_available():
        print("gpu-check: torch finds no CUDA device", file=sys.stderr)
        return 1
    card = torch.cuda.get_device_name()
    content: dict[str, Any] = {"bench": "gpu-check", "gpu": card, "environment": environment(), "parts": {}}
    commit = str(content["environment"]["commit"] or "unknown")[:10]
    machine = re.sub(r"[^a-z0-9]+", "-", card.lower().replace("nvidia", "")).strip("-").split("-")[0]
    file = f"{datetime.now(timezone.utc):%Y-%m-%d-%H%M}-{commit}.json"
    for name in given.only.split(","):
        limit, command = PARTS[name]
        print(f"gpu-check: {name} (at most {limit} s)", flush=True)
        content["parts"][name] = run_part(name, limit, command)
        if given.out is not None:
            given.out.mkdir(parents=True, exist_ok=True)
            (given.out / file).write_text(json.dumps(content, indent=1) + "\n")
        else:
            results.write(file, content, machine)
    print(summary(content["parts"]))
    return 0 if all(part["passed"] for part in content["parts"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
