"""What vision.py and text.py share: train a network by several methods on the same batches, and table the outcome.

Every method gets the same initial weights, order of batches, optimizer, learning rates and epochs. "bp" is a plain
torch loop; every other method is the same network compiled into stages.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import autodecouple
import data
from autodecouple.objectives import OBJECTIVES, Objective

Batches = Iterable[tuple[Tensor, Tensor]]
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": lambda params, lr: torch.optim.Adam(params, lr=lr or 1e-3),
    "sgd": lambda params, lr: torch.optim.SGD(params, lr=lr or 0.05, momentum=0.9, weight_decay=5e-4),
}


@dataclass(frozen=True)
class Result:
    """One row of the table; parameters count what is trained, heads included."""

    method: str
    accuracy: float
    seconds: float
    num_parameters: int
    stages: int
    lanes: int
    balance: float


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that both examples have."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument(
        "--loss", nargs="+", type=method, metavar="METHOD", default=[method(name) for name in ("bp", "supcon")],
        help="bp, supcon, deinforeg, early_exit, with fields where wished: supcon:temperature=0.2,pool=4",
    )  # fmt: skip
    found.add_argument("--stages", type=int, default=4)
    found.add_argument("--epochs", type=int, default=8)
    found.add_argument("--batch-size", type=int, default=128)
    found.add_argument("--optimizer", choices=OPTIMIZERS, default="adam")
    found.add_argument("--lr", type=float, help="highest learning rate of one cycle; 0.001 for adam, 0.05 for sgd")
    found.add_argument("--rows", type=int, help="train on the first ROWS rows only")
    found.add_argument("--hold-out", type=int, default=0, metavar="ROWS", help="test on the last training rows instead")
    found.add_argument("--seed", type=int, default=0)
    found.add_argument("--devices", type=lambda text: text.split(","), help="one per lane, as cuda:0,cuda:1 or cpu,cpu")
    found.add_argument("--threads", type=int, help="CPU threads, shared by the lanes")
    found.add_argument("--amp", choices=["bf16"], help="train in mixed precision")
    found.add_argument("--json", type=Path, metavar="OUT", help="write the results")
    return found


def method(text: str) -> tuple[str, Objective | None]:
    """An objective from its name and fields, `name[:field=value,...]`; None is plain backprop."""
    name, _, fields = text.partition(":")
    if text == "bp":
        return text, None
    if name not in OBJECTIVES or name == "bp":
        raise argparse.ArgumentTypeError(f"{text!r}: there are {', '.join(OBJECTIVES)}")
    pairs = (pair.split("=", 1) for pair in re.split(r",(?=\w+=)", fields) if pair)
    return text, dataclasses.replace(OBJECTIVES[name](), **{field: _literal(value) for field, value in pairs})


def _literal(text: str) -> Any:
    """A number, tuple or None as Python writes it; anything else is a string."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def compare(
    network: Callable[[], nn.Module],
    split: data.Split,
    args: argparse.Namespace,
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None,
) -> list[Result]:
    """Train by every method of `args.loss` and print the table."""
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.hold_out:
        split = hold_out(split, args.hold_out)
    results = []
    for name, objective in args.loss:
        torch.manual_seed(args.seed)
        run = train_backprop if objective is None else train_stages
        results.append(run(network(), name, objective, Training(split, args, augment)))
        print(f"{name}: {results[-1].accuracy:.1%} in {results[-1].seconds:.1f} s", flush=True)
    print(f"\n{table(results)}")
    if args.json:
        args.json.write_text(json.dumps([dataclasses.asdict(result) for result in results], indent=2), encoding="utf-8")
    return results


def hold_out(split: data.Split, rows: int) -> data.Split:
    """The last training rows in place of the test rows: what to choose settings on."""
    return data.Split(split.train_x[:-rows], split.train_y[:-rows], split.train_x[-rows:], split.train_y[-rows:])


@dataclass(frozen=True)
class Training:
    """The batches, optimizer and learning rates that all methods share."""

    split: data.Split
    args: argparse.Namespace
    augment: Callable[[Tensor, torch.Generator], Tensor] | None

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Those of all epochs, one after the other."""
        chance = torch.Generator().manual_seed(self.args.seed)
        loader = data.batches(self.split.train_x, self.split.train_y, self.args.batch_size, True, chance)
        for _ in range(self.args.epochs):
            for x, y in loader:
                yield (self.augment(x, chance) if self.augment else x), y

    def test_batches(self) -> Batches:
        return data.batches(self.split.test_x, self.split.test_y, 500)

    def optimizer(self, params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return OPTIMIZERS[self.args.optimizer](params, self.args.lr)

    def scheduler(self, optimizer: torch.optim.Optimizer) -> Any:
        steps = self.args.epochs * -(-len(self.split.train_x) // self.args.batch_size)
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, optimizer.param_groups[0]["lr"], total_steps=steps)

    def precision(self, device: str) -> AbstractContextManager[object]:
        return torch.autocast(torch.device(device).type, torch.bfloat16) if self.args.amp else nullcontext()


def train_stages(model: nn.Module, name: str, objective: Objective | None, training: Training) -> Result:
    """Stages with local losses; the loop is the usual one."""
    args, example = training.args, training.split.train_x[: training.args.batch_size]
    with autodecouple.compile(
        model, args.stages, objective, example_inputs=example, devices=args.devices, seed=args.seed,
        optimizer=training.optimizer, scheduler=training.scheduler,
    ) as decoupled, training.precision(decoupled.plan.stages[0].device):  # fmt: skip
        start = time.perf_counter()
        for x, y in training.batches():
            decoupled.train_step(x, y)
        decoupled.synchronize()
        seconds = time.perf_counter() - start
        accuracy = decoupled.evaluate(training.test_batches())["accuracy"]
    num_parameters = sum(p.numel() for stage in decoupled.stages for p in stage.parameters)
    plan = decoupled.plan
    return Result(name, accuracy, seconds, num_parameters, len(plan.stages), len(plan.lanes), plan.balance)


def train_backprop(model: nn.Module, name: str, objective: Objective | None, training: Training) -> Result:
    """One loss at the end, in plain torch, on the first device."""
    device = training.args.devices[0] if training.args.devices else "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device).train()
    optimizer, criterion = training.optimizer(model.parameters()), nn.CrossEntropyLoss()
    scheduler = training.scheduler(optimizer)
    start = time.perf_counter()
    for x, y in training.batches():
        with training.precision(device):
            loss = criterion(model(x.to(device)), y.to(device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    hits = torch.zeros((), device=device)
    seconds = time.perf_counter() - start
    with torch.no_grad():
        for x, y in training.test_batches():
            hits += (model.eval()(x.to(device)).argmax(1) == y.to(device)).sum()
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    return Result(name, hits.item() / len(training.split.test_y), seconds, num_parameters, 1, 1, 1.0)


def table(results: list[Result]) -> str:
    """Markdown."""
    head = "| method | test accuracy | seconds | parameters trained | stages | lanes | balance |"
    rows = (
        f"| {r.method} | {r.accuracy:.2%} | {r.seconds:.1f} | {r.num_parameters:,}"
        f" | {r.stages} | {r.lanes} | {r.balance:.2f} |"
        for r in results
    )
    return "\n".join([head, "|---|---:|---:|---:|---:|---:|---:|", *rows])
