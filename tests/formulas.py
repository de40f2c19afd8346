"""Every objective's loss as its paper writes it, of a head's own weights, in plain torch: nothing of the library's.

A formula takes (objective, weights, given) and returns the loss, and what the next stage is told where that is not the
label. Gradients stop where the paper stops them, so that autograd of a formula is what the stage should descend by.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from families import CLASSES, VOCABULARY, ByHand
from torch import Tensor, nn
from torch.nn import functional as F

Weights = Mapping[str, Tensor]
Told = Tensor | None


@dataclass(frozen=True)
class Given:
    """What the head of a stage has.

    features: maps (N, C, H, W) or tokens (N, T, D); mask: (N, T), True where a token counts; labels: (N,)
    entered:  what the model was given; depth: 0 at the first hidden stage, 1 at the last
    told:     by the last head before this one that tells anything, a vector per row
    model:    the user's own, block by block; criterion: (scores, labels) -> the task's loss
    """

    features: Tensor
    mask: Tensor | None
    labels: Tensor
    entered: Tensor
    depth: float
    told: Told
    model: ByHand
    criterion: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy


Formula = Callable[[Any, Weights, Given], tuple[Tensor, Told]]


# What several of them are made of


def under(prefix: str, weights: Weights) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def normalised(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Batch normalisation of (R, D) from its definition."""
    mean = rows.mean(0)
    return (rows - mean) / ((rows - mean) ** 2).mean(0).add(1e-5).sqrt() * weight + bias


def layers(weights: Weights, rows: Tensor, activation: Callable[[Tensor], Tensor] = torch.relu) -> Tensor:
    """Layers numbered in a sequence: matrices, batch normalisations, and activations where a number has no weights."""
    if "weight" in weights:  # one layer alone
        weights = {f"0.{name}": value for name, value in weights.items()}
    numbers = sorted({int(name.split(".")[0]) for name in weights})
    for number in range(numbers[-1] + 1 if numbers else 0):
        if number not in numbers:
            rows = activation(rows)
            continue
        weight, bias = weights[f"{number}.weight"], weights[f"{number}.bias"]
        rows = rows @ weight.T + bias if weight.ndim == 2 else normalised(rows, weight, bias)
    return rows


def pooled(features: Tensor, mask: Tensor | None, cells: int = 2) -> Tensor:
    """Maps: means over 2x2 cells; tokens: the mean of those that count."""
    if features.ndim == 4:
        return F.adaptive_avg_pool2d(features, min(cells, *features.shape[2:])).flatten(1)
    return torch.stack([row[keep].mean(0) for row, keep in zip(features, kept(features, mask), strict=True)])


def kept(features: Tensor, mask: Tensor | None) -> Tensor:
    return torch.ones(features.shape[:2], dtype=torch.bool) if mask is None else mask


def convolved(weight: Tensor, features: Tensor, mask: Tensor | None, stride: int = 1) -> Tensor:
    """Maps (N, C, H, W) or tokens (N, T, D) behind a convolution of width 3 or 1, in the form that they came in."""
    padding = weight.shape[-1] // 2
    if features.ndim == 4:
        return F.conv2d(features, weight, stride=stride, padding=padding)
    tokens = features * kept(features, mask).unsqueeze(2)
    return F.conv1d(tokens.movedim(2, 1), weight, padding=padding).movedim(1, 2)


def block(weights: Weights, features: Tensor, mask: Tensor | None, stride: int = 1) -> Tensor:
    """Convolution, batch normalisation by the positions that count, ReLU."""
    maps = convolved(weights["conv.weight"], features, mask, stride)
    if maps.ndim == 4:
        rows = normalised(maps.movedim(1, -1).flatten(0, 2), weights["norm.weight"], weights["norm.bias"]).relu()
        return rows.reshape(*maps.movedim(1, -1).shape).movedim(-1, 1)
    found, counts = torch.zeros_like(maps), kept(maps, mask)
    return found.masked_scatter(
        counts.unsqueeze(2), normalised(maps[counts], weights["norm.weight"], weights["norm.bias"]).relu()
    )


def cosines(rows: Tensor) -> Tensor:
    """(N, N), of the rows, each less its own mean."""
    centred = rows - rows.mean(1, keepdim=True)
    return torch.stack([F.cosine_similarity(row.expand_as(centred), centred) for row in centred])


def dissimilarity(rows: Tensor, labels: Tensor) -> Tensor:
    """How far the cosines are from those of the one-hot labels."""
    return (cosines(rows) - cosines(F.one_hot(labels, CLASSES).to(rows.dtype))).square().mean()


# The objectives


def contrast(rows: Tensor, labels: Tensor, temperature: float, normalisation: str) -> Tensor:
    """SCPL: equation 2; what the code computes; algorithm 1."""
    z, number = F.normalize(rows), len(labels)
    per_anchor, sizes = [], []
    for i in range(number):
        others = [j for j in range(number) if j != i]
        positives = [p for p in others if labels[p] == labels[i]]
        below = torch.stack([torch.exp(z[i] @ z[j] / temperature) for j in others]).sum() if others else None
        terms = [torch.log(torch.exp(z[i] @ z[p] / temperature) / below) for p in positives]
        per_anchor.append(-sum(terms, rows.new_zeros(())))
        sizes.append(len(positives))
    if normalisation == "code":
        return sum(s / (size + 1) for s, size in zip(per_anchor, sizes, strict=True)) / number
    if normalisation == "eq2":
        return sum((s / size for s, size in zip(per_anchor, sizes, strict=True) if size), rows.new_zeros(()))
    return sum(per_anchor) / number / sum(size + 1 for size in sizes)


def supcon(objective: Any, weights: Weights, given: Given) -> tuple[Tensor, Told]:
    rows = layers(under("projector.", weights), pooled(given.features, given.mask))
    return contrast(rows, given.labels, objective.temperature, objective.normalisation), None


def deinforeg(objective: Any, weights: Weights, given: Given) -> tuple[Tensor, Told]:
    """The paper's three terms as the code takes them, of rows of length 1; the cross-entropy by its mode."""
    rows, projector = pooled(given.features, given.mask), under("projector.", weights)
    activation = torch.relu if projector else torch.tanh  # as the code has it for images, and for tokens
    embedded = layers(projector, rows)
    n = F.normalize(embedded)
    c, (number, width) = n - n.mean(0), n.shape
    v = torch.relu(1 - (c.var(0) + 1e-7).sqrt()).mean() / number
    squares = (c.T @ c / number) ** 2
    covariance = (squares.sum() - squares.diagonal().sum()) / width
    classifier = under("classifier.", weights)
    if objective.ce == "merge":
        logits = layers(classifier, embedded, activation)
    elif objective.ce == "paper":
        logits = layers(classifier, layers(projector, rows.detach()), activation)
    else:
        own, rest = under("0.", classifier), {k: w for k, w in classifier.items() if not k.startswith("0.")}
        shifted = {f"{int(name.split('.')[0]) - 1}.{name.split('.')[1]}": w for name, w in rest.items()}
        logits = layers(shifted, layers(own, rows.detach()), activation)
    loss = v + dissimilarity(n, given.labels) + covariance + objective.alpha * F.cross_entropy(logits, given.labels)
    return loss, None


def early_exit(objective: Any, weights: Weights, given: Given) -> tuple[Tensor, Told]:
    logits = layers(under("classifier.", weights), pooled(given.features, given.mask))
    return F.cross_entropy(logits, given.labels), None


def predsim(objective: Any, weights: Weights, given: Given) -> tuple[Tensor, Told]:
    """Nokland and Eidnes: of maps the deviations over space are compared."""
    maps, mask = convolved(weights["similar.conv.weight"], given.features, given.mask), given.mask
    if maps.ndim == 4:
        rows = maps.flatten(2).std(2)
    else:
        rows = torch.stack([row[keep].std(0) for row, keep in zip(maps, kept(maps, mask), strict=True)])
    cells = math.isqrt(objective.width // given.features.shape[1])
    inputs = pooled(given.features, mask, cells)
    logits = inputs @ weights["predict.classifier.weight"].T + weights["predict.classifier.bias"]
    similar, predict = dissimilarity(rows, given.labels), F.cross_entropy(logits, given.labels)
    return (1 - objective.beta) * predict + objective.beta * similar, None


def dgl(objective: Any, weights: Weights, given: Given) -> tuple[Tensor, Told]:
    """Belilovsky and others: the auxiliary networks mlp-sr, mlp and cnn."""
    maps, mask = given.features, given.mask
    if objective.net == "mlp-sr" and maps.ndim == 4:
        maps = F.adaptive_avg_pool2d(maps, [math.ceil(size / 4) for size in maps.shape[2:]])
    for index in range({"mlp-sr": 3, "mlp": 0, "cnn": 2}[objective.net]):
        maps = block(under(f"neck.blocks.{index}.", weights), maps, mask)
    return F.cross_entropy(layers(under("classifier.", weights), pooled(maps, mask)), given.labels), None


def infonce(objective: Any, weights: Weights, given: Given) -> tuple[Tensor, Told]:
    """Greedy InfoMax: of each pair of positions at a distance the one predicts the other among all such others."""
    if given.features.ndim == 4:
        grid = [min(objective.grid, size) for size in given.features.shape[2:]]
        cells = F.adaptive_avg_pool2d(given.features, grid)
        columns = cells.permute(0, 3, 2, 1).flatten(0, 1)  # from the top down
        counts, skip = torch.ones(columns.shape[:2], dtype=torch.bool), min(objective.skip, grid[0] - 2)
    else:
        columns, counts, skip = given.features, kept(given.features, given.mask), 0
    length, losses = columns.shape[1], []
    for index, distance in enumerate(range(skip + 1, min(skip + 1 + objective.steps, length))):
        both = counts[:, : length - distance] & counts[:, distance:]
        here, there = columns[:, : length - distance][both], columns[:, distance:][both]
        scores = here @ (there @ weights[f"predict.{index}.weight"].T).T
        losses.append(-scores.log_softmax(1).diagonal().mean() if len(here) else scores.sum())
    return torch.stack(losses).mean(), None


def infopro(objective: Any, weights: Weights, given: Given) -> tuple[Tensor, Told]:
    """Reconstruction of what entered and a loss of the labels, weighted by depth."""
    l1, l2 = (a + given.depth * (b - a) for a, b in (objective.reconstruction, objective.comparison))
    task, mask = under("task.", weights) or weights, given.mask
    features = block(under("compare.neck.blocks.0.", task), given.features, mask, stride=2)
    behind = dataclasses.replace(given, features=features)
    compared, _ = FORMULAS[objective.task.name](objective.task, under("compare.head.", task), behind)
    if l1 == 0:
        return l2 * compared, None
    return l1 * reconstruction(under("rebuild.", weights), given) + l2 * compared, None


def reconstruction(weights: Weights, given: Given) -> Tensor:
    if given.features.ndim == 4:
        up = F.interpolate(given.features, given.entered.shape[2:], mode="bilinear")
        hidden = block(under("block.", weights), up, None)
        found = F.conv2d(hidden, weights["last.weight"], weights["last.bias"], padding=1)
        return (found - given.entered).square().mean()
    counts = kept(given.features, given.mask)
    logits = given.features[counts] @ weights["classifier.weight"].T + weights["classifier.bias"]
    assert logits.shape[1] == VOCABULARY
    return F.cross_entropy(logits, given.entered[counts])


def associated(objective: Any, weights: Weights, given: Given) -> tuple[Tensor, Told]:
    """Kao and Chen: the bridge meets the code, the decoder gives back what it was made of; row by row."""
    act = {"tanh": torch.tanh, "sigmoid": torch.sigmoid, "relu": torch.relu}[objective.activation]
    is_first = given.told is None
    known = F.one_hot(given.labels, CLASSES).double() if given.told is None else given.told.detach()
    code = act(known @ weights["encoder.weight"].T + weights["encoder.bias"])
    guessed = act(layers(under("bridge.", weights), pooled(given.features, given.mask), act))
    decoded = layers(under("decoder.", weights), code)
    if is_first and objective.reconstruction == "ce":
        autoencoder = F.cross_entropy(decoded, given.labels)
    else:
        autoencoder = F.mse_loss(act(decoded), known)
    return F.mse_loss(guessed, code.detach()) + autoencoder, code.detach()


class _Behind(nn.Module):
    """Some of a model's blocks and its output layers."""

    def __init__(self, model: ByHand, blocks: list[str]) -> None:
        super().__init__()
        self.model, self.by_hand, self.blocks = model.model, model, blocks

    def forward(self, h: Tensor, entered: Tensor) -> Tensor:
        for name in self.blocks:
            if name == "3" and "2" not in self.blocks and h.shape[2] == 8:  # block 2 would have halved the map
                h = F.avg_pool2d(h, 2)
            h = self.by_hand.block(name, h, entered)
        return self.by_hand.end(h, entered)


def downstream(objective: Any, weights: Weights, given: Given) -> tuple[Tensor, Told]:
    """AugLocal: the blocks that the head has weights for, and the output layers, with the head's weights in them."""
    owned = under("body.", weights)
    names = {"cnn": ("1", "2", "3"), "lstm": ("layers.0", "layers.1", "layers.2")}
    blocks = names.get(given.model.family, names["lstm"])
    chosen = [name for name in blocks if any(each.startswith(f"{name}.") for each in owned)]
    values = {f"model.{name}": value for name, value in owned.items()}
    head = _Behind(given.model, chosen)
    logits = torch.func.functional_call(head, values, (given.features, given.entered))
    return given.criterion(logits, given.labels), None


def loco(objective: Any, weights: Weights, given: Given) -> tuple[Tensor, Told]:
    """Xiong and others: any local loss; whom it trains is the plan's to say."""
    return FORMULAS[objective.local.name](objective.local, weights, given)


FORMULAS: dict[str, Formula] = {
    "supcon": supcon,
    "deinforeg": deinforeg,
    "early_exit": early_exit,
    "predsim": predsim,
    "dgl": dgl,
    "infonce": infonce,
    "infopro": infopro,
    "associated": associated,
    "loco": loco,
    "downstream": downstream,
}
"""By the objective's name; `auto` is one of them, and `bp` has no loss of its own."""
