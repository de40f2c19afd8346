"""Image classifiers of the papers, trained in stages beside plain backprop.

python examples/vision.py                                                   residual_cnn on scikit-learn's digits
python examples/vision.py --loss bp supcon deinforeg early_exit             every method, in one table
python examples/vision.py --model vgg --dataset fashion-mnist --data DIR    the four IDX files lie in DIR
python examples/vision.py --model resnet18 --dataset cifar10 --data DIR --augment --optimizer sgd
"""

from __future__ import annotations

import argparse

from torch import Tensor, nn
from torch.nn import functional as F

import compare
import data
import models


def main(argv: list[str] | None = None) -> list[compare.Result]:
    args = parse(argv)
    split = load(args)
    print(
        f"{args.dataset}: {len(split.train_x):,} training rows, {len(split.test_x):,} test rows,"
        f" {args.model} of width {args.width:g}, {args.epochs} epochs\n"
    )
    return compare.compare(lambda: network(args, split), split, args, data.crop_flip if args.augment else None)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = compare.parser(__doc__)
    parser.add_argument("--model", choices=["vgg", "resnet18", "residual_cnn"], default="residual_cnn")
    parser.add_argument("--width", type=float, default=1.0, help="scales every layer")
    parser.add_argument("--dataset", choices=["digits", "fashion-mnist", "cifar10"], default="digits")
    parser.add_argument("--data", metavar="DIR", help="folder of the files; digits come with scikit-learn")
    parser.add_argument("--torchvision", action="store_true", help="DIR is torchvision's; fetch what is absent")
    parser.add_argument("--augment", action="store_true", help="shift and mirror the training images")
    args = parser.parse_args(argv)
    if args.dataset != "digits" and not args.data:
        parser.error(f"--dataset {args.dataset} needs --data DIR")
    return args


def load(args: argparse.Namespace) -> data.Split:
    if args.dataset == "digits":
        split = data.digits()
        split = split._replace(train_x=split.train_x[: args.rows], train_y=split.train_y[: args.rows])
    elif args.torchvision:
        name = {"fashion-mnist": "FashionMNIST", "cifar10": "CIFAR10"}[args.dataset]
        split = data.torchvision_images(name, args.data, args.rows, download=True)
    else:
        read = {"fashion-mnist": data.fashion_mnist, "cifar10": data.cifar10}[args.dataset]
        split = read(args.data, args.rows)
    too_small = args.model == "vgg" and split.train_x.shape[-1] < 16  # it halves the images four times
    return split._replace(train_x=pad(split.train_x), test_x=pad(split.test_x)) if too_small else split


def pad(images: Tensor) -> Tensor:
    return F.pad(images, [4] * 4)


def network(args: argparse.Namespace, split: data.Split) -> nn.Module:
    classes, (channels, size, _) = split.num_classes, split.train_x.shape[1:]
    if args.model == "vgg":
        return models.vgg(classes, channels, args.width, size)
    if args.model == "resnet18":
        return models.resnet18(classes, channels, args.width)
    widths = [round(args.width * width) for width in (24, 24, 24, 48, 48, 48, 96, 96)]
    return models.residual_cnn(classes, channels, widths)


if __name__ == "__main__":
    main()
