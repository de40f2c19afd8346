"""Networks on graphs, sets and points, and several inputs at once."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.entry import Entry, floats, generator


class GraphConvolution(nn.Module):
    """(N, V, 6) features and (N, V, V) adjacency."""

    def __init__(self) -> None:
        super().__init__()
        widths = (6, 12, 12, 12, 12)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))
        self.out = nn.Linear(12, 3)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        links = adjacency + torch.eye(adjacency.shape[-1], device=x.device)
        scale = links.sum(-1).rsqrt()
        links = scale.unsqueeze(-1) * links * scale.unsqueeze(-2)
        for layer in self.layers:
            x = F.relu(torch.bmm(links, layer(x)))
        logits: Tensor = self.out(x.mean(1))
        return logits


class GraphAttention(nn.Module):
    """Attention along the edges only; a prediction for every node."""

    def __init__(self) -> None:
        super().__init__()
        self.inward = nn.Linear(6, 12)
        self.values = nn.ModuleList(nn.Linear(12, 12, bias=False) for _ in range(4))
        self.scores = nn.ModuleList(nn.Linear(12, 2, bias=False) for _ in range(4))
        self.out = nn.Linear(12, 3)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        x = self.inward(x)
        for value, score in zip(self.values, self.scores, strict=True):
            h = value(x)
            a, b = score(h).split(1, dim=-1)
            weights = F.leaky_relu(a + b.transpose(1, 2), 0.2).masked_fill(adjacency == 0, -1e9).softmax(-1)
            x = x + F.elu(F.dropout(weights, 0.1, self.training) @ h)
        logits: Tensor = self.out(x)
        return logits


def _graph(rows: int) -> dict[str, Tensor]:
    seeded = generator(rows)
    links = (torch.rand(rows, 7, 7, generator=seeded) < 0.4).float()
    return {
        "x": torch.randn(rows, 7, 6, generator=seeded),
        "adjacency": ((links + links.mT + torch.eye(7)) > 0).float(),
    }


class Scattered(nn.Module):
    """Messages along an edge list, added up at their targets; one graph per row, with the same edges."""

    def __init__(self) -> None:
        super().__init__()
        self.inward = nn.Linear(6, 12)
        self.messages = nn.ModuleList(nn.Linear(24, 12) for _ in range(4))
        self.out = nn.Linear(12, 3)
        self.register_buffer("edges", torch.tensor([[0, 1, 2, 3, 4, 5, 6, 0], [1, 2, 3, 4, 5, 6, 0, 3]]))

    def forward(self, x: Tensor) -> Tensor:
        x = self.inward(x)
        start, end = self.edges
        for layer in self.messages:
            message = layer(torch.cat([x[:, start], x[:, end]], -1)).relu()
            x = x + torch.zeros_like(x).index_add(1, end, message)
        logits: Tensor = self.out(x.amax(1))
        return logits


class Points(nn.Module):
    """PointNet: a transform predicted from the points themselves, then a maximum over them."""

    def __init__(self) -> None:
        super().__init__()
        self.look = nn.Sequential(nn.Conv1d(3, 12, 1), nn.BatchNorm1d(12), nn.ReLU())
        self.transform = nn.Linear(12, 9)
        self.features = nn.Sequential(
            nn.Conv1d(3, 12, 1), nn.BatchNorm1d(12), nn.ReLU(), nn.Conv1d(12, 24, 1), nn.BatchNorm1d(24), nn.ReLU()
        )
        self.classifier = nn.Sequential(nn.Linear(24, 12), nn.ReLU(), nn.Dropout(0.3), nn.Linear(12, 3))

    def forward(self, points: Tensor) -> tuple[Tensor, Tensor]:
        matrix = self.transform(self.look(points).amax(-1)).view(-1, 3, 3) + torch.eye(3, device=points.device)
        logits: Tensor = self.classifier(self.features(matrix @ points).amax(-1))
        return logits, matrix


class Siamese(nn.Module):
    """One encoder for both inputs: every parameter is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, 2, 1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(128, 12),
        )
        self.compare = nn.Sequential(
            nn.Linear(36, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 12), nn.ReLU()
        )
        self.out = nn.Linear(12, 2)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        a, b = self.encoder(left), self.encoder(right)
        logits: Tensor = self.out(self.compare(torch.cat([a, b, (a - b).abs()], 1)))
        return logits


def _two_images(rows: int) -> tuple[Tensor, Tensor]:
    images = torch.randn(2, rows, 1, 8, 8, generator=generator(rows))
    return images[0], images[1]


class Towers(nn.Module):
    """Two towers that meet only in their products: a recommender, with embedding bags."""

    def __init__(self) -> None:
        super().__init__()
        self.users = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))
        self.words = nn.EmbeddingBag(40, 16, mode="mean")
        self.items = nn.Sequential(nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, user: Tensor, item: Tensor) -> dict[str, Tensor]:
        a, b = F.normalize(self.users(user), dim=1), F.normalize(self.items(self.words(item)), dim=1)
        return {"scores": self.scale.exp() * a @ b.t(), "user": a, "item": b}


def _interactions(rows: int) -> dict[str, Tensor]:
    seeded = generator(rows)
    user = torch.randn(rows, 6, generator=seeded)
    return {"user": user, "item": torch.randint(40, (rows, 3), generator=seeded)}


class Tabular(nn.Module):
    """Deep and wide: categories embedded, numbers normalised, crossed layer by layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.ModuleDict({name: nn.Embedding(10, 4) for name in ("city", "shop")})
        self.norm = nn.BatchNorm1d(6)
        self.crosses = nn.ModuleList(nn.Linear(14, 14) for _ in range(3))
        self.deep = nn.Sequential(nn.Linear(14, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU())
        self.out = nn.Linear(38, 3)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        found = [self.embeddings[name](batch[name]) for name in ("city", "shop")]
        x = first = torch.cat([*found, self.norm(batch["numbers"])], 1)
        deep = self.deep(x)
        for layer in self.crosses:
            x = first * layer(x) + x
        logits: Tensor = self.out(torch.cat([x, deep], 1))
        return logits


def _table(rows: int) -> tuple[dict[str, Tensor]]:
    seeded = generator(rows)
    columns = {name: torch.randint(10, (rows,), generator=seeded) for name in ("city", "shop")}
    return ({**columns, "numbers": torch.randn(rows, 6, generator=seeded)},)


def entries() -> list[Entry]:
    return [
        Entry("graphs/convolution", "graphs", GraphConvolution, _graph, quick=True),
        Entry("graphs/attention", "graphs", GraphAttention, _graph),
        Entry("graphs/scattered", "graphs", Scattered, floats(7, 6), quick=True),
        Entry("graphs/points", "graphs", Points, floats(3, 12)),
        Entry("graphs/siamese", "graphs", Siamese, _two_images, quick=True),
        Entry("graphs/towers", "graphs", Towers, _interactions, quick=True),
        Entry("graphs/tabular", "graphs", Tabular, _table, quick=True),
    ]
