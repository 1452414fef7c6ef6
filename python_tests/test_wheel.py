"""The wheel that `make wheel` built, installed where there is nothing but torch and numpy."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [*ROOT.glob("dp_bitfit_kernels/**/*.py"), *ROOT.glob("csrc/**/*.*")]
NEWEST = max((file.stat().st_mtime for file in SOURCES), default=0.0)
WHEELS = [w for w in (ROOT / "dist").glob("dp_bitfit_kernels-*.whl") if w.stat().st_mtime > NEWEST]

pytestmark = pytest.mark.skipif(not WHEELS, reason="no wheel of these sources was built: make wheel")


def needed(name: str, found: set[str]) -> set[str]:
    """A distribution and all that it requires, by name."""
    if name not in found:
        found.add(name)
        for text in importlib.metadata.requires(name) or []:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                needed(requirement.name, found)
    return found


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a new environment that holds the wheel, torch, numpy and what these require; no pip."""
    folder = tmp_path_factory.mktemp("empty")
    venv.create(folder, with_pip=False)
    (packages,) = folder.glob("lib/python*/site-packages")
    for name in needed("torch", needed("numpy", set())):
        for file in importlib.metadata.files(name) or []:
            top = file.parts[0]
            source = Path(str(importlib.metadata.distribution(name).locate_file(top)))
            if top not in ("..", "__pycache__") and not (packages / top).exists():
                (packages / top).symlink_to(source)
    install = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(packages), str(WHEELS[-1])]
    subprocess.run([sys.executable, *install], check=True)
    return folder / "bin" / "python"


def run(environment: Path, *arguments: str) -> str:
    done = subprocess.run(
        [environment, "-I", *arguments], cwd=environment.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_holds_the_package_and_its_compiled_modules_only() -> None:
    names = zipfile.ZipFile(WHEELS[-1]).namelist()
    assert re.search(r"-cp310-abi3-linux_\w+\.whl$", WHEELS[-1].name)
    assert "dp_bitfit_kernels/_C.abi3.so" in names
    foreign = [n for n in names if not n.startswith(("dp_bitfit_kernels/", "dp_bitfit_kernels-"))]
    assert not foreign
    assert not [n for n in names if n.endswith((".cpp", ".cu", ".h", ".cuh", ".o")) or "test" in n or "internals" in n]


def test_nothing_but_torch_and_numpy_is_needed(environment: Path) -> None:
    out = run(environment, "-m", "dp_bitfit_kernels.cli", "doctor")
    assert re.search(r"native on cpu +ok", out)
    for absent in ("triton", "dp-accounting", "safetensors", "transformers"):
        assert re.search(rf"{absent} +not installed", out), absent


def test_trains_privately_there_and_names_what_epsilon_needs(environment: Path) -> None:
    program = """
import torch, torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset
import dp_bitfit_kernels as dpk
from dp_bitfit_kernels import backends
assert "site-packages" in dpk.__file__
assert backends.select("auto", "cpu").name == "native"
x, y = torch.randn(64, 5), torch.randint(0, 2, (64,))
model = dpk.convert_model(torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)))
engine = dpk.PrivacyEngine()
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
model, optimizer, loader = engine.make_private(
    module=model, optimizer=optimizer, data_loader=DataLoader(TensorDataset(x, y), batch_size=16),
    noise_multiplier=1.0, max_grad_norm=1.0, max_physical_batch_size=8, pad_physical_batches=True)
step = dpk.capture_step(optimizer, lambda a, b: F.cross_entropy(model(a), b))
released = sum(step(a, b) for _ in range(2) for a, b in loader)
assert released == 8 and all(torch.isfinite(p).all() for p in model.parameters())
try:
    engine.get_epsilon(1e-5)
except dpk.AccountingError as error:
    print(error)
"""
    assert "dp-accounting" in run(environment, "-c", program)
