"""Where results live: bench/results/<machine>/<bench>.json, written whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"


def path(name: str, machine: str = "cpu") -> Path:
    """bench/results/<machine>/<name>, its folder made."""
    target = RESULTS / machine / name
    target.parent.mkdir(parents=True, exist_ok=True)
    return target


def write(name: str, content: dict[str, Any], machine: str = "cpu") -> Path:
    target = path(name, machine)
    handle, partial = tempfile.mkstemp(dir=target.parent, suffix=".json.part")
    with os.fdopen(handle, "w") as file:
        json.dump(content, file, indent=1, sort_keys=False)
        file.write("\n")
    os.chmod(partial, 0o644)
    os.replace(partial, target)
    return target
