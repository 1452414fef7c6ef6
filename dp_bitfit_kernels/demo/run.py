"""Pre-train on public glyphs, fine-tune the biases on private digits, compare, save, reload.

Every setting is fixed in the code (`outcome.Settings`). They were chosen on other splits and seeds than those reported;
that choice is not charged to the privacy budget because the data set of this demonstration is in truth public. With
data that are not, a search over settings spends budget as well.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

import dp_bitfit_kernels as dpk

from .digits import Digits, handwritten_digits
from .glyphs import glyph_set
from .network import GlyphNet, accuracy, pretrain
from .outcome import Outcome, Row, Settings
from .report import save_figure

BIASES_FILE = "digits_biases.safetensors"
FIGURE_FILE = "accuracy_against_epsilon.png"


def run_demo(settings: Settings, out: Path, *, quiet: bool = False) -> Outcome:
    """The whole demonstration. Writes the figure and the biases of the largest epsilon to the folder `out`."""
    start = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    base = _pretrained(settings, quiet)
    digits = handwritten_digits(settings.seed)
    delta = 1 / (2 * len(digits.images))
    before = Row("before fine-tuning", None, accuracy(base, *digits[2:]), time.perf_counter() - start)

    private = []
    saved, score = out / BIASES_FILE, 0.0
    for epsilon in sorted(settings.epsilons):
        model, row = _fine_tune_privately(base, digits, epsilon, delta, settings, saved, quiet)
        private.append(row)
        score = row.accuracy
    report = dpk.conversion_report(model)

    plain_all = [_fine_tune_plainly(base, digits, rate, settings, quiet) for rate in settings.plain_rates]
    plain = max(plain_all, key=lambda row: row.accuracy)

    fresh = GlyphNet(settings.channels, settings.hidden)
    fresh.load_state_dict(base.state_dict())
    statement = dpk.load_biases(fresh, saved)
    reloaded = accuracy(fresh, *digits[2:])
    if reloaded != score:
        raise AssertionError(f"the reloaded biases score {reloaded:.4f}, the network they came from {score:.4f}")

    gap = plain.accuracy - before.accuracy
    outcome = Outcome(
        settings=settings,
        delta=delta,
        trained=report.trained_elements,
        total=report.total,
        before=before,
        before_digits_only=accuracy(base, *digits[2:], classes=10),
        private=private,
        plain=plain,
        plain_all=plain_all,
        saved=saved,
        saved_statement=statement,
        reloaded=reloaded,
        figure=out / FIGURE_FILE,
        seconds=time.perf_counter() - start,
        closed=[(row.accuracy - before.accuracy) / gap if gap > 0 else 0.0 for row in private],
    )
    save_figure(outcome)
    return outcome


def _pretrained(settings: Settings, quiet: bool) -> GlyphNet:
    """The public model: glyphs, initial weights and order of training all follow from the seed."""
    images, labels = glyph_set(settings.glyphs, settings.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = GlyphNet(settings.channels, settings.hidden)
    generator = torch.Generator().manual_seed(settings.seed)
    steps = settings.pretrain_epochs * (len(images) // 128)
    with tqdm(total=steps, desc="pre-training on public glyphs", disable=quiet) as bar:
        pretrain(
            model, images, labels, epochs=settings.pretrain_epochs, generator=generator, on_step=lambda: bar.update()
        )
    return model


def _fine_tune_privately(
    base: GlyphNet, digits: Digits, epsilon: float, delta: float, settings: Settings, saved: Path, quiet: bool
) -> tuple[nn.Module, Row]:
    """DP-BiTFiT from `base` within `epsilon`; writes the biases to `saved`."""
    start = time.perf_counter()
    model, optimizer, loader = _prepared(base, digits, settings.private_rate, settings)
    engine = dpk.PrivacyEngine()
    model, optimizer, loader = engine.make_private_with_epsilon(
        module=model,
        optimizer=optimizer,
        data_loader=loader,
        target_epsilon=epsilon,
        target_delta=delta,
        epochs=settings.epochs,
        max_grad_norm=settings.max_grad_norm,
    )
    with tqdm(total=settings.epochs * len(loader), desc=f"DP-BiTFiT, epsilon {epsilon:g}", disable=quiet) as bar:

        def spent(step: int) -> None:
            bar.update()
            if step % len(loader) == 0 and not quiet:
                bar.set_postfix_str(f"epsilon spent {engine.get_epsilon(delta):.2f}")

        _train(model, optimizer, loader, settings.epochs, spent)
    spent_epsilon = engine.get_epsilon(delta)
    dpk.save_biases(model, saved, delta=delta)
    score = accuracy(model, *digits[2:])
    seconds = time.perf_counter() - start
    return model, Row(f"DP-BiTFiT, epsilon = {epsilon:g}", spent_epsilon, score, seconds, settings.private_rate)


def _fine_tune_plainly(base: GlyphNet, digits: Digits, rate: float, settings: Settings, quiet: bool) -> Row:
    """BiTFiT without privacy: the same layers, loss, optimizer, batch size and epochs, with no engine attached."""
    start = time.perf_counter()
    model, optimizer, loader = _prepared(base, digits, rate, settings)
    with tqdm(total=settings.epochs * len(loader), desc=f"BiTFiT without privacy, lr {rate:g}", disable=quiet) as bar:
        _train(model, optimizer, loader, settings.epochs, lambda step: bar.update())
    return Row("BiTFiT, no privacy", None, accuracy(model, *digits[2:]), time.perf_counter() - start, rate)


def _prepared(base: GlyphNet, digits: Digits, rate: float, settings: Settings) -> tuple[nn.Module, Any, Any]:
    """A converted copy of `base`, an optimizer over its biases, and the ordinary loader of the training images."""
    model = dpk.convert_model(copy.deepcopy(base))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=rate)
    data = TensorDataset(digits.images, digits.labels)
    loader: DataLoader[tuple[Tensor, ...]] = DataLoader(data, batch_size=settings.batch_size, shuffle=True)
    return model, optimizer, loader


def _train(model: nn.Module, optimizer: Any, loader: Any, epochs: int, on_step: Callable[[int], object]) -> None:
    """The user's own loop, the same with and without an engine; the learning rate falls linearly to zero."""
    steps = epochs * len(loader)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    model.train()
    step = 0
    for _ in range(epochs):
        for images, labels in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            schedule.step()
            step += 1
            on_step(step)
