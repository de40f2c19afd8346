"""What the compiler must do with every entry, and what it did."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from training_tools import assert_same, comparable

import autodecouple
from autodecouple import Decoupled
from autodecouple.errors import PartitionError
from autodecouple.passes.capturing.bind import bind
from autodecouple.passes.inference import emit_inference
from zoo.entry import Entry
from zoo.ops import transformers
from zoo.trial import Trial, Watching, call, compose, weigh

STAGES = 4
ROWS = 4


@dataclass(frozen=True)
class Outcome:
    """What became of an entry.

    captured: whether the library took the model at all
    stages:   how many it was split into
    failures: of each step that failed, its name and the reason
    """

    name: str
    family: str
    captured: bool = False
    stages: int = 0
    failures: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    balance: float = 0.0
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        return not self.failures

    @property
    def reason(self) -> str:
        return "; ".join(f"{step}: {text}" for step, text in self.failures)


def check(entry: Entry) -> Outcome:
    """Capture, split, compose, train."""
    start = time.process_time()
    with warnings.catch_warnings(), contextlib.ExitStack() as stack:
        warnings.simplefilter("ignore")
        trial, decoupled = Trial(entry, entry.model(), entry.model()), None
        with trial.step("capture"):
            trial.graph = autodecouple.capture(
                trial.model, entry.batch(ROWS), example_target=_target(ROWS), tied=entry.tied, mode=entry.mode
            )
        if trial.graph is not None:
            with trial.step("split"):
                decoupled = stack.enter_context(split(trial))
        for name, step in STEPS.items() if decoupled is not None else ():
            with trial.step(name):
                step(trial, decoupled)
    plan = decoupled.plan if decoupled is not None else None
    notes, balance = (plan.warnings, plan.balance) if plan is not None else ((), 0.0)
    seconds = time.process_time() - start
    captured = trial.graph is not None
    return Outcome(entry.name, entry.family, captured, trial.stages, tuple(trial.failures), notes, balance, seconds)


def split(trial: Trial) -> Decoupled:
    """Four stages, or as many as the library says there can be, which is then a failure of this step."""
    for trial.stages in range(STAGES, 0, -1):
        try:
            return trial.compiled("sequential")
        except PartitionError as error:
            if trial.stages == STAGES:
                trial.failures.append(("split", " ".join(str(error).split())[:400]))
    trial.stages = 0
    raise AssertionError("not even one stage")


# ---------------------------------------------------------------- the steps


def equal_in_training(trial: Trial, decoupled: Decoupled) -> None:
    """The stages, one after the other and cut free between, give the original's output and buffers."""
    for rows in (ROWS, *trial.entry.sizes):
        expected, buffers = trial.expected(rows, trial.entry.mode == "train")
        alike(trial.found(lambda rows=rows: compose(decoupled._compiled, trial.entry.batch(rows))), expected)
        for name, buffer in trial.model.named_buffers():
            if name in buffers and buffers[name].shape == buffer.shape and not _is_cache(name):
                torch.testing.assert_close(buffer, buffers[name], equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")


def equal_in_evaluation(trial: Trial, decoupled: Decoupled) -> None:
    """The evaluation graph, the same over the stages' devices, and the call give the original's output."""
    graph, plan = decoupled.graph, decoupled.plan
    devices = ["cpu", "cpu:0"]  # two names of one device: the graph is made as if there were two
    apart = replace(plan, stages=tuple(replace(s, device=devices[s.index % 2]) for s in plan.stages))
    inference = emit_inference(graph, apart) if graph.evaluation is not None else None
    for rows in (ROWS, *trial.entry.sizes):
        expected, _ = trial.expected(rows, False)
        batch = trial.entry.batch(rows)
        with torch.no_grad():
            if graph.evaluation is not None:
                alike(trial.found(lambda batch=batch: call(graph.evaluation, batch)), expected)
            if inference is not None:
                flat = trial.found(lambda batch=batch: inference(*bind(graph, batch)))
                alike(pytree.tree_unflatten(list(flat), graph.evaluation_spec), expected)
    alike(_uncached(trial.found(lambda: call(decoupled, batch))), expected)


def trained_once(trial: Trial, decoupled: Decoupled) -> None:
    """A gradient in exactly one stage for each parameter that plain backpropagation reaches; the others are named.

    Streaming equals sequential: three batches, fed before any is read, give the same losses and parameters to the
    last bit.
    """
    reached = _plain_gradients(trial)
    results = [trial.found(lambda: _train(trial, decoupled))]
    with trial.step("gradients"):
        watching = [optimizer for optimizer in decoupled.optimizers if isinstance(optimizer, Watching)]
        _in_one_stage(trial.model, reached, watching, " ".join(decoupled.plan.warnings))
    with trial.compiled("streaming") as streaming:
        results.append(trial.found(lambda: _train(trial, streaming)))
    assert_same(*results)


def _train(trial: Trial, decoupled: Decoupled) -> Any:
    """The state and the losses after a batch of each size."""
    batches = [(trial.entry.batch(rows), _target(rows)) for rows in (ROWS, *trial.entry.sizes)]
    steps = [decoupled.train_step(*batch) for batch in batches]
    decoupled.synchronize()
    return comparable(decoupled.state_dict()), [step.losses for step in steps]


def _plain_gradients(trial: Trial) -> set[str]:
    """Names of the parameters that the original trains, under every name that they have."""
    trial.original.zero_grad(set_to_none=True)
    output, _ = trial.expected(ROWS, trial.entry.mode == "train")
    weigh(output).backward()
    named = trial.original.named_parameters(remove_duplicate=False)
    return {name for name, parameter in named if parameter.grad is not None}


def _in_one_stage(model: nn.Module, reached: set[str], optimizers: Sequence[Watching], warned: str) -> None:
    for name, parameter in model.named_parameters():
        count = sum(id(parameter) in optimizer.seen for optimizer in optimizers)
        owners = sum(any(p is parameter for g in o.param_groups for p in g["params"]) for o in optimizers)
        assert max(count, owners) < 2, f"{owners} stages own {name}, {count} train it"
        assert parameter.requires_grad or count == 0, f"{name} is frozen, and trained"
        assert count == 1 or name not in reached, f"no stage trains {name}"
        told = name in warned or any(f"{path} runs whole" in warned for path in _owners(name))
        assert count == 1 or not parameter.requires_grad or told, f"nobody tells that {name} is not trained"


STEPS: dict[str, Callable[[Trial, Decoupled], None]] = {
    "train": equal_in_training,
    "eval": equal_in_evaluation,
    "streaming": trained_once,
}

# ---------------------------------------------------------------- tools


def alike(found: Any, expected: Any) -> None:
    """The same structure, and values as close as rounding explains."""
    a, spec = pytree.tree_flatten(expected)
    b, other = pytree.tree_flatten(found)
    assert type(found) is type(expected), f"{type(found).__name__} comes back, not {type(expected).__name__}"
    assert spec == other, f"{other} comes back, not {spec}"
    for x, y in zip(a, b, strict=True):
        if isinstance(x, Tensor):
            torch.testing.assert_close(y, x, equal_nan=True)


def _uncached(output: Any) -> Any:
    """Without the cache that a model of transformers returns when it is called as it is."""
    caches = ("past_key_values", "mems", "cache_params", "state")
    if isinstance(output, transformers.utils.ModelOutput) and any(name in output for name in caches):
        return type(output)(**{name: value for name, value in output.items() if name not in caches})
    return output


def _owners(name: str) -> list[str]:
    """The modules around a parameter: of one that is called whole nobody knows what it trains."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def _is_cache(name: str) -> bool:
    return name.rsplit(".", 1)[-1].startswith(("inv_freq", "original_inv_freq", "relative_position"))


def _target(rows: int) -> Tensor:
    """Two classes, so that there are positives."""
    return torch.arange(rows) % 2
