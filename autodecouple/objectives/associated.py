"""Associated Learning: every stage meets an encoding of the labels, which the stage behind encodes once more."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autodecouple.objectives.early_exit import ACTIVATIONS
from autodecouple.objectives.heads import (
    IGNORED,
    check_choice,
    check_classes,
    check_positive,
    check_specs,
    cross_entropy,
    full_precision,
    head_dtype,
    row_weights,
    widen,
)
from autodecouple.objectives.objective import Signal, labels_of
from autodecouple.objectives.rows import Rows
from autodecouple.plans import TensorSpec

RECONSTRUCTIONS = ("ce", "mse")


@dataclass(frozen=True)
class Associated:
    """Brings the features to an encoding of the labels, which is learnt beside them (Associated Learning).

    With s_k the features of stage k, t_0 the one-hot labels, sg a stopped gradient, encoder g, decoder h and bridge b:

    t_k = g_k(sg t_{k-1});    L_k = MSE(b_k(s_k), sg t_k) + AE(h_k(t_k), sg t_{k-1})

    means over the rows and, of MSE, over the width. A stage's loss needs t_{k-1}, so it waits for the loss of the
    stage before; no gradient goes back. g and h are Linear-activation, b is Linear-activation after an optional hidden
    layer. A code t_k depends on the label alone: heads pass on the labels and one code per class, (C, width).

    There are two ways to the classes. The model's own inference is what it always is: its last stage has its own
    output layers and the criterion. That of Associated Learning goes through a bridge and back through the decoders,
    b_k then h_k to h_1: `decoupled.exits.predict(x, stage=k)`. The last of these stages gives the paper's inference, an
    earlier one its shortcut; with `detach_classifier=True` all stages have such heads, as in the paper.

    Where tokens or positions have labels of their own, each is a row (see `Rows`). Labels below 0 do not count.

    width:          of the codes
    pool:           cells per spatial dimension, None flattens (see `Pool`)
    hidden:         width of the bridge's hidden layer, None for none
    activation:     "tanh", "sigmoid" or "relu"
    reconstruction: AE of the first level: "ce", cross-entropy with h_1 linear, or "mse" to the one-hot labels; that of
                    the others is MSE
    max_rows:       positions of a batch that are used, at equal distances; None: all

    Source: Kao and Chen 2021; Wu 2022. Why these defaults: width, Tanh and cross-entropy are those of the released
    code for text, the hidden layer is what its code for images has: without it the three exits of a small CNN had
    72.8, 84.6 and 90.2 %, with it 94.5, 98.0 and 97.5 % (8x8 digits, 6 epochs, one seed). Its code steps encoder and
    stage with an optimizer each; one per stage does the same for Adam and SGD, since no term reaches both.
    """

    name: ClassVar[str] = "associated"
    encodes: ClassVar[bool] = True

    width: int = 128
    pool: int | None = 2
    hidden: int | None = 512
    activation: str = "tanh"
    reconstruction: str = "ce"
    max_rows: int | None = None

    def __post_init__(self) -> None:
        check_positive(width=self.width, pool=self.pool, hidden=self.hidden, max_rows=self.max_rows)
        check_choice("activation", self.activation, list(ACTIVATIONS))
        check_choice("reconstruction", self.reconstruction, RECONSTRUCTIONS)

    @staticmethod
    def paper() -> Associated:
        """The heads of the released code for images: flatten, codes 500 wide, sigmoid, MSE; sizes must be fixed."""
        return Associated(width=500, pool=None, hidden=2500, activation="sigmoid", reconstruction="mse")

    def head(self, features: TensorSpec, signal: Signal) -> nn.Module:
        """A head for features of any rank, and class indices per row, token or position or what `encoding` says."""
        labels = labels_of(signal)
        check_specs(self.name, features, labels)
        num_classes, is_first = check_classes(self.name, labels), not isinstance(signal, tuple)
        in_width = num_classes if is_first else signal[1].shape[1]  # type: ignore[index]
        rows = Rows(features, labels, self.pool, self.max_rows)
        return AssociatedHead(self, rows, in_width, is_first, head_dtype(features))

    def encoding(self, signal: Signal) -> Signal:
        """The labels, and a code per class."""
        labels = labels_of(signal)
        return labels, TensorSpec("codes", (check_classes(self.name, labels), self.width), "float32", None)


class AssociatedHead(nn.Module):
    """Rows, target encoder g, bridge b and decoder h."""

    predicts = True

    def __init__(self, objective: Associated, rows: Rows, in_width: int, is_first: bool, dtype: torch.dtype) -> None:
        super().__init__()
        activation, width = ACTIVATIONS[objective.activation], objective.width
        self.rows = rows
        self.is_first = is_first
        self.compares_classes = is_first and objective.reconstruction == "ce"
        self.activation = activation()
        self.encoder = nn.Linear(in_width, width, dtype=dtype)
        self.bridge = _layers((rows.width, *([objective.hidden] if objective.hidden else []), width), activation, dtype)
        decoder = _layers((width, in_width), activation, dtype)
        self.decoder = decoder[:1] if self.compares_classes else decoder

    def forward(
        self, features: Tensor, signal: Tensor | tuple[Tensor, Tensor], mask: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        #   features --- b ---> MSE <-- detach -- t_k --- h ---> AE        one row per label
        #   t_{k-1}, detached --- g -----------------+                     one row per class
        labels, given = signal if isinstance(signal, tuple) else (signal, None)
        rows, classes = self.rows(features, labels, mask)
        codes = self.encode(given)
        own = F.embedding(classes.clamp(min=0), codes)
        guessed, decoded = self.bridge(rows), self.decoder(own)
        with full_precision(guessed):
            weights = row_weights(classes != IGNORED, widen(guessed).dtype)
            loss = _mean_square(widen(guessed) - widen(own.detach()), weights)
            loss = loss + self._reconstruction(widen(decoded), classes, given, weights)
            return loss, (labels, widen(codes.detach()))

    def encode(self, codes: Tensor | None) -> Tensor:
        """t_k of every class (C, width) from t_{k-1} (C, in_width), or from one-hot rows where there is none before."""
        if codes is None:
            encoded: Tensor = self.encoder.weight.T + self.encoder.bias  # of the unit matrix, which may be large
        else:
            encoded = self.encoder(codes.detach().to(self.encoder.weight.dtype))
        activated: Tensor = self.activation(encoded)
        return activated

    def _reconstruction(self, decoded: Tensor, classes: Tensor, given: Tensor | None, weights: Tensor) -> Tensor:
        if self.compares_classes:
            return cross_entropy(decoded, classes)
        known = classes.clamp(min=0)
        wanted = F.one_hot(known, decoded.shape[1]) if given is None else F.embedding(known, given.detach())
        return _mean_square(decoded - wanted.to(decoded.dtype), weights)

    def predict(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """The code (..., width) that the bridge makes of the features, row by row or position by position."""
        guessed: Tensor = self.bridge(self.rows.vectors(features, mask))
        return guessed

    def decode(self, codes: Tensor) -> Tensor:
        """(..., width) to the codes of the level before, (..., in_width); at the first level scores of the classes."""
        decoded: Tensor = self.decoder(codes)
        return decoded


def _layers(widths: tuple[int, ...], activation: type[nn.Module], dtype: torch.dtype) -> nn.Sequential:
    pairs = itertools.pairwise(widths)
    return nn.Sequential(*(layer for i, o in pairs for layer in (nn.Linear(i, o, dtype=dtype), activation())))


def _mean_square(gaps: Tensor, weights: Tensor) -> Tensor:
    """Mean over the rows (R, width) that count; what does not is not looked at."""
    return weights @ gaps.square().mean(1)
