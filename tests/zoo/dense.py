"""Networks whose output is as large as their input: segmentation, pyramids, generators, upscaling."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.entry import Entry, floats, images


def block(inputs: int, outputs: int, norm: bool = True) -> nn.Sequential:
    middle = [nn.BatchNorm2d(outputs)] if norm else []
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), *middle, nn.ReLU(inplace=True))


class UNet(nn.Module):
    """Three levels down and up, with skips that cross everything between."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([block(3, 8), block(8, 16), block(16, 24)])
        self.bottom = nn.Sequential(block(24, 32), nn.Dropout2d(0.1), block(32, 32))
        self.widen = nn.ModuleList(nn.ConvTranspose2d(a, b, 2, 2) for a, b in ((32, 24), (24, 16), (16, 8)))
        self.up = nn.ModuleList([block(48, 24), block(32, 16), block(16, 8)])
        self.out = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for layer in self.down:
            x = layer(x)
            skips.append(x)
            x = F.max_pool2d(x, 2)
        x = self.bottom(x)
        for widen, layer, skip in zip(self.widen, self.up, reversed(skips), strict=True):
            x = layer(torch.cat([skip, widen(x)], 1))
        logits: Tensor = self.out(x)
        return logits


class Pyramid(nn.Module):
    """Features of three sizes, each with classes and boxes: lists of tensors come out."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = block(3, 8)
        self.levels = nn.ModuleList(
            nn.Sequential(nn.MaxPool2d(2), block(a, b), block(b, b)) for a, b in ((8, 16), (16, 24), (24, 32))
        )
        self.lateral = nn.ModuleList(nn.Conv2d(width, 12, 1) for width in (16, 24, 32))
        self.smooth = nn.ModuleList(nn.Conv2d(12, 12, 3, padding=1) for _ in range(3))
        self.classes, self.boxes = nn.Conv2d(12, 3, 3, padding=1), nn.Conv2d(12, 4, 3, padding=1)

    def forward(self, x: Tensor) -> dict[str, list[Tensor]]:
        x, found = self.stem(x), []
        for level in self.levels:
            x = level(x)
            found.append(x)
        tops = [lateral(f) for lateral, f in zip(self.lateral, found, strict=True)]
        for i in (1, 0):
            tops[i] = tops[i] + F.interpolate(tops[i + 1], size=tops[i].shape[-2:], mode="nearest")
        smooth = [layer(t) for layer, t in zip(self.smooth, tops, strict=True)]
        return {"classes": [self.classes(s) for s in smooth], "boxes": [self.boxes(s).exp() for s in smooth]}


class Upscaler(nn.Module):
    """Residual blocks, two pixel shuffles, and the bicubic image added."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, 12, 3, padding=1)
        self.body = nn.ModuleList(
            nn.Sequential(nn.Conv2d(12, 12, 3, padding=1), nn.PReLU(12), nn.Conv2d(12, 12, 3, padding=1))
            for _ in range(4)
        )
        self.tail = nn.Sequential(nn.Conv2d(12, 48, 3, padding=1), nn.PixelShuffle(2), nn.Conv2d(12, 3, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        h = first = self.head(x)
        for layer in self.body:
            h = h + 0.1 * layer(h)
        image: Tensor = self.tail(h + first)
        return image + F.interpolate(x, scale_factor=2.0, mode="bicubic", align_corners=False)


class Hourglass(nn.Module):
    """Recursive: an hourglass holds a smaller one; intermediate predictions are fed back."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.skip, self.before, self.after = block(width, width), block(width, width), block(width, width)
        self.inner: nn.Module = Hourglass(width, depth - 1) if depth > 1 else block(width, width)

    def forward(self, x: Tensor) -> Tensor:
        low = self.after(self.inner(self.before(F.avg_pool2d(x, 2))))
        out: Tensor = self.skip(x) + F.interpolate(low, scale_factor=2)
        return out


class Pose(nn.Module):
    """Two hourglasses; both predictions come out."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = block(3, 8)
        self.glasses = nn.ModuleList(Hourglass(8, 2) for _ in range(2))
        self.maps = nn.ModuleList(nn.Conv2d(8, 5, 1) for _ in range(2))
        self.back = nn.Conv2d(5, 8, 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        first = self.stem(x)
        a = self.maps[0](self.glasses[0](first))
        return [a, self.maps[1](self.glasses[1](first + self.back(a)))]


class Generator(nn.Module):
    """Noise to images, as in DCGAN."""

    def __init__(self) -> None:
        super().__init__()
        widths = ((32, 24), (24, 16), (16, 8))
        self.project = nn.Linear(10, 32 * 4 * 4)
        self.layers = nn.Sequential(
            *(
                nn.Sequential(nn.ConvTranspose2d(a, b, 4, 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU(True))
                for a, b in widths
            ),
            nn.Conv2d(8, 3, 3, padding=1),
            nn.Tanh(),
        )

    def forward(self, z: Tensor) -> Tensor:
        image: Tensor = self.layers(self.project(z).view(-1, 32, 4, 4))
        return image


class Critic(nn.Module):
    """A Wasserstein critic with spectral norms: one number per image."""

    def __init__(self) -> None:
        super().__init__()
        norm = nn.utils.parametrizations.spectral_norm
        widths = ((3, 8), (8, 16), (16, 24))
        self.layers = nn.Sequential(
            *(nn.Sequential(norm(nn.Conv2d(a, b, 4, 2, 1)), nn.LeakyReLU(0.2, inplace=True)) for a, b in widths)
        )
        self.score = norm(nn.Linear(24 * 16, 1))

    def forward(self, x: Tensor) -> Tensor:
        score: Tensor = self.score(self.layers(x).flatten(1))
        return score


class Autoencoder(nn.Module):
    """Variational: a sample drawn in the middle; image, mean and log-variance come out."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Sequential(nn.Conv2d(3, 8, 4, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 4, 2, 1), nn.ReLU())
        self.moments = nn.Linear(16 * 64, 12)
        self.decode = nn.Sequential(nn.Linear(6, 16 * 64), nn.Unflatten(1, (16, 8, 8)), nn.ReLU())
        self.image = nn.Sequential(
            nn.ConvTranspose2d(16, 8, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(8, 3, 4, 2, 1), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_variance = self.moments(self.encode(x).flatten(1)).chunk(2, dim=1)
        z = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        return self.image(self.decode(z)), mean, log_variance


class Quantised(nn.Module):
    """Vector quantisation with a straight-through gradient; the code book's loss comes out with the image."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Sequential(block(3, 8), nn.MaxPool2d(2), block(8, 8))
        self.book = nn.Embedding(16, 8)
        self.decode = nn.Sequential(block(8, 8), nn.Upsample(scale_factor=2), nn.Conv2d(8, 3, 3, padding=1))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.encode(x).permute(0, 2, 3, 1)
        nearest = (h.unsqueeze(-2) - self.book.weight).square().sum(-1).argmin(-1)
        code = self.book(nearest)
        loss = (code - h.detach()).square().mean((1, 2, 3)) + 0.25 * (h - code.detach()).square().mean((1, 2, 3))
        z = (h + (code - h).detach()).permute(0, 3, 1, 2)
        return {"image": self.decode(z), "commitment": loss, "codes": nearest}


class Diffusion(nn.Module):
    """A denoiser: time steps embedded by sines, scale and shift in every block."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 16))
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(4))
        self.norms = nn.ModuleList(nn.GroupNorm(2, 8) for _ in range(4))
        self.shifts = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))
        self.out = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        rates = torch.exp(torch.arange(4, device=x.device) * -1.0)
        angles = t.unsqueeze(1) * rates
        time = self.time(torch.cat([angles.sin(), angles.cos()], 1))
        x = self.stem(x)
        for conv, norm, shift in zip(self.convs, self.norms, self.shifts, strict=True):
            scale, offset = shift(time)[:, :, None, None].chunk(2, 1)
            x = x + F.silu(conv(norm(x) * (1 + scale) + offset))
        noise: Tensor = self.out(x)
        return noise


def _noisy(rows: int) -> tuple[Tensor, Tensor]:
    return (*images(8)(rows), torch.arange(rows) * 10.0)


def entries() -> list[Entry]:
    makers = {
        "unet": (UNet, images(16)),
        "pyramid": (Pyramid, images(16)),
        "upscaler": (Upscaler, images(8)),
        "pose": (Pose, images(16)),
        "generator": (Generator, floats(10)),
        "critic": (Critic, images(32)),
        "autoencoder": (Autoencoder, images(32)),
        "quantised": (Quantised, images(8)),
        "diffusion": (Diffusion, _noisy),
    }
    quick = ("upscaler", "generator", "autoencoder", "quantised", "critic")
    return [
        Entry(f"dense/{name}", "dense", partial(make), inputs, quick=name in quick)
        for name, (make, inputs) in makers.items()
    ]
