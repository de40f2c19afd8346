"""Text classifiers of the papers, trained in stages beside plain backprop.

python examples/text.py                                              made-up texts, no files needed
python examples/text.py --model transformer --loss bp supcon early_exit deinforeg
python examples/text.py --dataset imdb --data DIR --width 300        imdb_train.csv and imdb_test.csv in DIR,
python examples/text.py --dataset ag_news --data DIR                 plain, .gz or .xz, with the header label,text
"""

from __future__ import annotations

import argparse

import torch
from torch import nn

import compare
import data
import models

CLASSES, WORDS = 4, 400
SYNTHETIC = "synthetic"


def main(argv: list[str] | None = None) -> list[compare.Result]:
    args = parse(argv)
    if args.dataset == SYNTHETIC:
        split = topics(args.rows or 2000, args.max_len)
        print("synthetic data, no language: random words, about one in five typical of the class")
    else:
        split = data.text(args.data, args.dataset, args.vocabulary, args.max_len, args.rows)
    print(
        f"{args.dataset}: {len(split.train_x):,} training texts, {len(split.test_x):,} test texts of {args.max_len}"
        f" words, {args.model} of width {args.width}, {args.epochs} epochs\n"
    )
    return compare.compare(lambda: network(args, split), split, args)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = compare.parser(__doc__)
    parser.add_argument("--model", choices=["lstm", "transformer"], default="lstm")
    parser.add_argument("--width", type=int, default=60, help="300 in the papers")
    parser.add_argument("--dataset", default=SYNTHETIC, help="the files' name before _train.csv; made up by default")
    parser.add_argument("--data", metavar="DIR", help="folder of the files")
    parser.add_argument("--max-len", type=int, default=32, metavar="WORDS", help="longer texts are cut")
    parser.add_argument("--vocabulary", type=int, default=30000, metavar="WORDS")
    args = parser.parse_args(argv)
    if args.dataset != SYNTHETIC and not args.data:
        parser.error(f"--dataset {args.dataset} needs --data DIR")
    return args


def topics(train_rows: int, max_len: int, test_rows: int = 500, typical: float = 0.2) -> data.Split:
    """Texts of random words, in which about every fifth is one of the 20 that are typical of the class."""
    chance = torch.Generator().manual_seed(0)
    rows = train_rows + test_rows
    labels = torch.randint(CLASSES, (rows,), generator=chance)
    words = torch.randint(2, 2 + WORDS, (rows, max_len), generator=chance)
    own = 2 + 20 * labels[:, None] + torch.randint(20, (rows, max_len), generator=chance)
    texts = torch.where(torch.rand(rows, max_len, generator=chance) < typical, own, words)
    lengths = torch.randint(max_len // 2, max_len + 1, (rows, 1), generator=chance)
    texts = texts.masked_fill(torch.arange(max_len) >= lengths, data.PADDING)
    return data.Split(texts[:train_rows], labels[:train_rows], texts[train_rows:], labels[train_rows:])


def network(args: argparse.Namespace, split: data.Split) -> nn.Module:
    build = {"lstm": models.lstm, "transformer": models.transformer}[args.model]
    return build(int(split.train_x.max()) + 1, split.num_classes, args.width)


if __name__ == "__main__":
    main()
