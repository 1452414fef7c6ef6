"""The public data: digits and capitals rendered from the fonts of matplotlib, augmented; nothing is downloaded."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

IMAGE_SIZE = 16
CHARACTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"  # class k is character k, so a digit is its own class
_MASTER_SIZE = 32
_TEXT_FONTS = ("DejaVuSans*", "DejaVuSerif*", "STIXGeneral*", "cmb10*", "cmr10*", "cmss10*", "cmti10*", "cmtt10*")


def text_fonts() -> list[Path]:
    """Files of matplotlib's fonts that hold digits and capitals as ordinary text, not its symbol and display fonts."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    files = {file for pattern in _TEXT_FONTS for file in folder.glob(pattern + ".ttf") if "Display" not in file.name}
    return sorted(files)


def master_glyphs() -> tuple[torch.Tensor, torch.Tensor]:
    """Every character of every font once: images [fonts*36, 32, 32] in [0, 1], each filling its square, and labels."""
    images: list[np.ndarray] = []
    labels: list[int] = []
    for file in text_fonts():
        font = ImageFont.truetype(str(file), 4 * _MASTER_SIZE)
        for label, character in enumerate(CHARACTERS):
            canvas = Image.new("L", (8 * _MASTER_SIZE, 8 * _MASTER_SIZE))
            ImageDraw.Draw(canvas).text((_MASTER_SIZE, _MASTER_SIZE), character, fill=255, font=font)
            images.append(_fit(canvas))
            labels.append(label)
    return torch.from_numpy(np.stack(images)).float() / 255, torch.tensor(labels)


def _fit(canvas: Image.Image) -> np.ndarray:
    """Crop to the ink and scale it to fill the square, centred; characters keep their proportions."""
    ink = canvas.crop(canvas.getbbox())
    scale = (_MASTER_SIZE - 2) / max(ink.size)
    width, height = (max(1, round(side * scale)) for side in ink.size)
    square = Image.new("L", (_MASTER_SIZE, _MASTER_SIZE))
    square.paste(ink.resize((width, height)), ((_MASTER_SIZE - width) // 2, (_MASTER_SIZE - height) // 2))
    return np.asarray(square)


def augment(masters: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One random variant of each master: masters [n, 32, 32] -> images [n, 1, 16, 16].

    Turned by up to 12 degrees, sheared, stretched and moved a little, strokes thinned or thickened, ink faded.
    """
    count = len(masters)

    def uniform(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    images = masters[:, None]
    thick = F.max_pool2d(images, 3, stride=1, padding=1)
    thin = -F.max_pool2d(-images, 3, stride=1, padding=1)
    weight = uniform(-1, 1)[:, None, None, None]
    images = torch.where(weight > 0, torch.lerp(images, thick, weight), torch.lerp(images, thin, -weight * 0.6))

    turn, shear = uniform(-1, 1) * math.radians(12), uniform(-0.2, 0.2)
    width, height = uniform(0.8, 1.15), uniform(0.95, 1.15)
    cos, sin = turn.cos(), turn.sin()
    theta = torch.stack(
        [
            torch.stack([cos / width, (shear * cos - sin) / width, uniform(-0.12, 0.12)], dim=1),
            torch.stack([sin / height, (shear * sin + cos) / height, uniform(-0.08, 0.08)], dim=1),
        ],
        dim=1,
    )
    grid = F.affine_grid(theta, [count, 1, 2 * IMAGE_SIZE, 2 * IMAGE_SIZE], align_corners=False)
    images = F.grid_sample(images, grid, align_corners=False)
    return F.avg_pool2d(images, 2) * uniform(0.7, 1.0)[:, None, None, None]


def glyph_set(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`count` random variants of random glyphs: images [count, 1, 16, 16], labels [count]."""
    generator = torch.Generator().manual_seed(seed)
    masters, labels = master_glyphs()
    pick = torch.randint(len(masters), (count,), generator=generator)
    images = torch.cat([augment(masters[part], generator) for part in pick.split(1024)])
    return images, labels[pick]
