"""The emoji model's training data: animal glyphs pasted on varied backgrounds, drawn on the fly.

Shapes: B pictures, S side in pixels. Pictures are float32 `[B, 3, S, S]` in [0, 1].

The glyphs are Noto Color Emoji (SIL Open Font License 1.1), their names the CLDR short names of
Unicode's `emoji-test.txt`; both come from the Debian packages `fonts-noto-color-emoji` and
`unicode-data`. Backgrounds vary for one name, so that a picture's JPEG size is not decided by its
prompt: that is what p(y|x, c) has to choose among.
"""

import math
import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from diffrl.errors import DiffRLError

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
NAMES = Path("/usr/share/unicode/emoji/emoji-test.txt")
SIZE = 64
ALIASES = {"ewe": "sheep", "chipmunk": "squirrel", "honeybee": "bee"}
"""Unicode's name to the name the simple-animal prompts use for the same glyph."""

_FONT_SIZE = 109  # the only size at which the font's bitmaps exist
_ATLAS_SIDE = 96  # of a stored glyph: half as large again as it is ever drawn, for clean resampling
_LINE = re.compile(r"^([0-9A-F ]+?)\s*;\s*fully-qualified\s*#\s*\S+\s+E[\d.]+\s+(.*)$")


def animal_names(names: Path = NAMES) -> dict[str, str]:
    """Return `{CLDR short name: characters}` of the subgroups that begin with `animal-`."""
    if not names.is_file():
        raise DiffRLError(f"{names}: no such file. Install Debian's 'unicode-data' or pass --names.")
    found: dict[str, str] = {}
    subgroup = ""
    for line in names.read_text(encoding="utf-8").splitlines():
        if line.startswith("# subgroup:"):
            subgroup = line.split(":", 1)[1].strip()
        elif subgroup.startswith("animal-") and (match := _LINE.match(line)):
            found[match[2]] = "".join(chr(int(code, 16)) for code in match[1].split())
    return found


def render_glyphs(characters: list[str], font: Path = FONT) -> Tensor:
    """Return the glyphs as premultiplied RGBA `[len(characters), 4, 96, 96]` in [0, 1]."""
    if not font.is_file():
        raise DiffRLError(
            f"{font}: no such file. Install Debian's 'fonts-noto-color-emoji' or pass --font."
        )
    face = ImageFont.truetype(str(font), _FONT_SIZE)
    glyphs = []
    for text in characters:
        canvas = Image.new("RGBA", (136, 136))
        ImageDraw.Draw(canvas).text((0, 4), text, font=face, embedded_color=True)
        rgba = torch.from_numpy(np.array(canvas)).permute(2, 0, 1).float() / 255
        rgba = torch.cat([rgba[:3] * rgba[3:], rgba[3:]])
        glyphs.append(F.interpolate(rgba[None], _ATLAS_SIDE, mode="area")[0])
    return torch.stack(glyphs)


def save_atlas(path: Path, font: Path = FONT, names: Path = NAMES) -> None:
    """Write every animal glyph and its name to one `.npz`, so that training needs neither package."""
    found = animal_names(names)
    glyphs = render_glyphs(list(found.values()), font)
    np.savez_compressed(path, names=np.array(list(found)), glyphs=(glyphs * 255).round().byte().numpy())


def load_atlas(path: Path) -> tuple[list[str], Tensor]:
    """Return the names and the premultiplied RGBA glyphs `[G, 4, 96, 96]` of a saved atlas."""
    with np.load(path) as atlas:
        return [str(name) for name in atlas["names"]], torch.from_numpy(atlas["glyphs"]).float() / 255


def second_names(names: list[str]) -> Tensor:
    """Return for each glyph its other caption's index: an alias, counted after the names, or its own."""
    other = torch.arange(len(names))
    for number, original in enumerate(ALIASES):
        other[names.index(original)] = len(names) + number
    return other


class Composites:
    """Draws random composites of a fixed set of glyphs.

    Args:
        glyphs: premultiplied RGBA `[G, 4, 96, 96]`, on the device to draw on.
    """

    def __init__(self, glyphs: Tensor) -> None:
        self.glyphs = glyphs

    def draw(self, index: Tensor, generator: torch.Generator, *, tidy: bool = True) -> Tensor:
        """Return a picture `[B, 3, 64, 64]` in [0, 1] for each glyph index `[B]`.

        Args:
            tidy: backgrounds as the finished model draws them, or, if False, patterns of any angle and
                period, for the autoencoder and the first stage of the denoiser.
        """
        rgba = self._place(self.glyphs[index], generator)
        return rgba[:, :3] + (1 - rgba[:, 3:]) * _backgrounds(len(index), generator, tidy)

    def _place(self, rgba: Tensor, generator: torch.Generator) -> Tensor:
        """Scale by 0.6 to 1, shift within the picture, flip left-right half of the time."""
        count, device = len(rgba), rgba.device
        u = torch.rand(4, count, device=device, generator=generator)
        scale = 0.6 + 0.4 * u[0]
        flip = torch.where(u[1] < 0.5, -1.0, 1.0)
        shift = (1 - scale) * (2 * u[2:] - 1)
        theta = torch.zeros(count, 2, 3, device=device)
        theta[:, 0, 0], theta[:, 1, 1] = flip / scale, 1 / scale
        theta[:, 0, 2], theta[:, 1, 2] = -shift[0] * flip / scale, -shift[1] / scale
        grid = F.affine_grid(theta, [count, 4, SIZE, SIZE], align_corners=False)
        return F.grid_sample(rgba, grid, align_corners=False).clamp(0, 1)


def _backgrounds(count: int, generator: torch.Generator, tidy: bool) -> Tensor:
    """Return `[count, 3, 64, 64]`: white, plain, gradient, stripes, checks or dots, in two colours.

    Periods of 8 px and more, which a four-fold autoencoder can hold (at 4 to 13 px it blurs them, and
    the JPEG sizes with them). Tidy ones have angles in steps of 45 degrees and periods of 12, 16 or 24 px,
    so that a small denoiser draws them straight, and shares of the kinds that spread the JPEG size over
    its range: about 2.0 kB on plain grounds, 2.6 on upright stripes, 3.4 on the rest.
    """
    device = generator.device
    u = torch.rand(5, count, 1, 1, device=device, generator=generator)
    shares = (0.10, 0.15, 0.15, 0.30, 0.15, 0.15) if tidy else (1 / 6,) * 6
    kind = torch.bucketize(u[3], torch.tensor(shares, device=device).cumsum(0)).clamp(max=5)
    if tidy:
        angle = math.pi / 4 * (4 * u[0]).floor()
        period = torch.tensor([12.0, 16.0, 24.0], device=device)[(3 * u[1]).long()]
    else:
        angle, period = math.pi * u[0], 8 + 12 * u[1]
    axis = torch.arange(SIZE, device=device) - SIZE / 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    along = x * angle.cos() + y * angle.sin()
    across = y * angle.cos() - x * angle.sin()
    phase = 2 * math.pi * (along / period + u[2])
    phase_across = 2 * math.pi * (across / period + (u[4] if tidy else 0))
    edge = period / 4  # phase to pixels at a zero crossing, for edges one pixel soft
    patterns = (
        torch.zeros_like(along),
        torch.zeros_like(along),
        (0.5 + along / SIZE).clamp(0, 1),
        (0.5 + phase.sin() * edge).clamp(0, 1),
        (0.5 + phase.sin() * phase_across.sin() * edge).clamp(0, 1),
        (0.5 + (phase.cos() + phase_across.cos() - 0.8) * edge).clamp(0, 1),
    )
    mix = torch.zeros_like(along)
    for number, pattern in enumerate(patterns):
        mix = torch.where(kind == number, pattern, mix)
    first, second = _colours(count, generator, tidy)
    first = torch.where((kind == 0)[:, None], 1.0, first)
    return torch.lerp(first, second, mix[:, None])


def _colours(count: int, generator: torch.Generator, tidy: bool) -> tuple[Tensor, Tensor]:
    """Return two random colours in [0.2, 1], `[count, 3, 1, 1]` each; tidy ones differ clearly."""
    shape = (6 if tidy else 2, count, 3, 1, 1)
    colours = 0.2 + 0.8 * torch.rand(shape, device=generator.device, generator=generator)
    far = (colours - colours[0]).square().sum(2).argmax(0)  # of the candidates, the farthest
    return colours[0], colours[far, torch.arange(count, device=generator.device)[:, None, None]][:, 0, 0]


def worsen(images: Tensor, generator: torch.Generator) -> Tensor:
    """Blur and add noise at random strength, so that a judge looks at shapes, not at sharpness."""
    u = torch.rand(2, len(images), 1, 1, 1, device=images.device, generator=generator)
    blurred = F.interpolate(F.avg_pool2d(images, 2), images.shape[-1], mode="bilinear")
    noise = torch.randn(images.shape, device=images.device, generator=generator)
    return (torch.lerp(images, blurred, u[0]) + 0.08 * u[1] * noise).clamp(0, 1)
