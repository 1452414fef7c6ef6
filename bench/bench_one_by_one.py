"""What do biases cost that no layer's rule covers? Their modules run on each sample by itself.

    python -m bench.bench_one_by_one [--save]

Forward and backward of single modules with B samples, against plain autograd that trains the same biases: as converted
(one forward through torch.func.vmap where that runs the module), and with a loop over the samples. Correctness first:
per-sample gradients against runs of one sample.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import dp_bitfit_kernels as dpk
from bench import results
from bench.environment import environment
from bench.timing import interleave
from dp_bitfit_kernels.layers.one_by_one import OneByOneLayer


class First(nn.Module):
    """A module whose first output counts; [B, ...] -> [B, ...]."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        found = self.inner(x)
        return found[0] if isinstance(found, tuple) else found


def beit() -> tuple[nn.Module, Tensor]:
    import transformers
    from transformers.models.beit.modeling_beit import BeitLayer

    config = transformers.BeitConfig(hidden_size=192, num_attention_heads=3, intermediate_size=768)
    config._attn_implementation = "eager"
    return First(BeitLayer(config)), torch.randn(16, 197, 192)


def swin_v2() -> tuple[nn.Module, Tensor]:
    import transformers
    from transformers.models.swinv2.modeling_swinv2 import Swinv2Attention

    return First(Swinv2Attention(transformers.Swinv2Config(), 96, 3, 7)), torch.randn(64, 49, 96)


def mamba() -> tuple[nn.Module, Tensor]:
    import transformers
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    config = transformers.Mamba2Config(hidden_size=128, num_heads=4, head_dim=64, expand=2, n_groups=1, state_size=16)
    return First(Mamba2Mixer(config, 0)), torch.randn(16, 64, 128)


def experts() -> tuple[nn.Module, Tensor]:
    import transformers
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP

    config = transformers.GptOssConfig(
        hidden_size=128, intermediate_size=128, num_local_experts=8, num_experts_per_tok=2
    )
    config._experts_implementation = "eager"
    model = GptOssMLP(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return First(model), torch.randn(16, 32, 128)


def lstm() -> tuple[nn.Module, Tensor]:
    return First(nn.LSTM(128, 128, batch_first=True)), torch.randn(16, 64, 128)


CASES: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "BEiT layer, width 192, B = 16, T = 197": beit,
    "SwinV2 attention, width 96, 64 windows of 49": swin_v2,
    "Mamba2 mixer, width 128, B = 16, T = 64": mamba,
    "gpt-oss experts, 8 of width 128, B = 16, T = 32": experts,
    "LSTM, width 128, B = 16, T = 64": lstm,
}


def loss(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x)
    return (y * torch.linspace(-1.0, 1.0, y[0].numel()).view(y.shape[1:])).flatten(1).mean(1).sin().mean()


def private(model: nn.Module, x: Tensor) -> tuple[nn.Module, Any]:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    model, optimizer, _ = dpk.PrivacyEngine().make_private(
        module=model,
        optimizer=optimizer,
        data_loader=DataLoader(range(100 * len(x)), batch_size=len(x)),  # type: ignore[arg-type]
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
    )
    return model, optimizer


def stepper(model: nn.Module, x: Tensor, end: Callable[[], object]) -> Callable[[], None]:
    def step() -> None:
        loss(model, x).backward()
        end()

    return step


def looped(model: nn.Module) -> None:
    """Let its modules go through a loop over the samples."""
    for module in model.modules():
        if isinstance(module, OneByOneLayer):
            module.__dict__["calls"] = tuple(dataclasses.replace(call, at_once=False) for call in module.calls)


def measure(make: Callable[[], tuple[nn.Module, Tensor]], rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model, x = make()
    model.eval()
    plain = copy.deepcopy(model)
    dpk.convert_model(model, sample_batch=x)
    report = dpk.conversion_report(model)
    worst = dpk.check_model(model, x, loss).worst
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(name in report.trained)
    twin = copy.deepcopy(model)
    (model, optimizer), (twin, second) = private(model, x), private(twin, x)
    steps = {"plain": stepper(plain, x, plain.zero_grad), "ours": stepper(model, x, optimizer.step)}
    for _ in range(40):  # batches 1, 2, 4, ..., 32 are asked for their layout; the next is the 64th
        stepper(twin, x, second.step)()
        steps["ours"]()
    alone = [module for module in model.modules() if isinstance(module, OneByOneLayer)]
    at_once = {m.converted_from.__name__: all(call.at_once for call in m.calls) for m in alone}
    looped(twin)
    steps["looped"] = stepper(twin, x, second.step)
    samples = interleave(steps, rounds=rounds)
    return {
        "one by one": report.one_by_one,
        "at once": at_once,
        "check": worst,
        "plain_ms": 1e3 * samples.median("plain"),
        "ours": samples.ratio("ours", "plain").to_json(),
        "looped": samples.ratio("looped", "plain").to_json(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    recorded, found = environment(), {}
    for name, make in CASES.items():
        found[name] = row = measure(make, given.rounds)
        ours, loop = row["ours"], row["looped"]
        way = ", ".join(f"{kind} {'at once' if at_once else 'looped'}" for kind, at_once in row["at once"].items())
        print(f"{name:50s} plain {row['plain_ms']:7.1f} ms; ours {ours['value']:5.2f}, with loops {loop['value']:5.2f}")
        print(f"    interval {ours['low']:.2f} to {ours['high']:.2f}; check {row['check']:.1e}; {way}", flush=True)
    if given.save:
        results.write("one_by_one.json", {"bench": "one_by_one", "environment": recorded, "cases": found})


if __name__ == "__main__":
    main()
