"""Stages through torch.compile: the same masks, the same training, and eager code with a reason where it fails.

Most let torch trace and differentiate, and leave the kernels alone (`aot_eager`): equal to the last bit, and quick.
"""

from __future__ import annotations

import copy
import threading
import time
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_tools import assert_same, compiled, make_batches, sgd, train

import autodecouple
from autodecouple.backends import resolve_backend
from autodecouple.backends.keyed import TracedRandomness
from autodecouple.backends.turns import Turns
from autodecouple.errors import InputError
from autodecouple.randomness import Randomness

pytestmark = pytest.mark.timeout(120)
TRACED = {"backend": "aot_eager"}


def check_equal(kind: str, sizes: list[int], n_stages: int, backend: Any = TRACED, **options: Any) -> None:
    batches = make_batches(kind, sizes)
    expected = train(compiled(kind, n_stages, optimizer=sgd, **options), batches)
    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="backend=")
        assert_same(train(compiled(kind, n_stages, optimizer=sgd, backend=backend, **options), batches), expected)


def test_compiled_stages_train_alike() -> None:
    """Two lanes compile at once, with dropout, BatchNorm and a smaller last batch: losses, outputs and all state."""
    check_equal("dropout", [8, 8, 8, 5], 2)


def test_what_is_compiled_runs_twice_for_recompute() -> None:
    check_equal("norm", [8, 8], 2, recompute=True, schedule="sequential")


def test_code_is_compiled_once_for_all_batches() -> None:
    """Neither the batch's number nor its keys are part of the code; another size makes it dynamic, once."""
    counters = torch._dynamo.utils.counters
    torch.compiler.reset()
    counters.clear()
    with compiled("dropout", 1, backend=TRACED, schedule="sequential") as decoupled:
        for x, y in make_batches("dropout", [8, 8, 8, 5, 6, 7, 8]):
            decoupled.train_step(x, y)
    assert counters["stats"]["unique_graphs"] == 4, "body and head, static and dynamic"
    assert not counters["graph_break"]


@pytest.mark.parametrize("strides", [torch.contiguous_format, torch.channels_last])
def test_masks_in_compiled_code_are_those_of_eager_code(strides: torch.memory_format) -> None:
    x = torch.ones(4, 6, 3, 5).contiguous(memory_format=strides)

    def double(x: Tensor, randomness: Randomness) -> Tensor:
        return randomness.dropout(x * 1.0, 0.4, "first") + 2 * randomness.dropout(x * 1.0, 0.4, "second")

    torch.compiler.reset()
    fast = torch.compile(double, backend="aot_eager", fullgraph=True)
    for batch in range(3):
        randomness = Randomness(5, batch, 0)
        assert torch.equal(fast(x, TracedRandomness.of(randomness, ["first", "second"])), double(x, randomness))


def _trained(middle: nn.Module, x: Tensor, **options: Any) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), middle, nn.Dropout(0.5), nn.Linear(8, 4))
    options |= {"optimizer": sgd, "schedule": "sequential", "devices": ["cpu"]}
    with autodecouple.compile(model, 1, example_inputs=x, **options) as decoupled:
        for _ in range(2):
            decoupled.train_step(x, torch.arange(len(x)) % 4)
        return {name: value.clone() for name, value in decoupled.model.state_dict().items()}


def test_draws_inside_kernels_stay_outside_of_compiled_code() -> None:
    """They draw what they draw in eager code; the code around them is compiled, and a warning says so."""
    x = torch.randn(6, 6)
    expected = _trained(nn.RReLU(), x)
    torch.compiler.reset()
    with pytest.warns(UserWarning, match="rrelu.* runs as eager code: what draws random numbers inside") as said:
        found = _trained(nn.RReLU(), x, backend=TRACED)
    assert_same(found, expected)
    assert len(said) == 1


class Last(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 8, num_layers=2, dropout=0.3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.lstm(x.unsqueeze(1))[0][:, -1]
        return y


def test_recurrent_layers_train_alike() -> None:
    """Compiled, a recurrent layer is written out or runs as it is, as torch has it: the same masks, up to rounding."""
    x, last = torch.randn(6, 6), Last()
    expected = _trained(copy.deepcopy(last), x)
    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(_trained(last, x, backend=TRACED), expected, rtol=1e-5, atol=1e-6)


def failing(module: Any, inputs: Any) -> Any:
    raise RuntimeError("no compiler is installed")


def test_what_cannot_be_compiled_runs_as_it_is() -> None:
    batches = make_batches("dropout", [8, 8, 8])
    expected = train(compiled("dropout", 2, optimizer=sgd), batches)
    torch.compiler.reset()
    with pytest.warns(UserWarning, match="runs as eager code: .*no compiler is installed") as said:
        found = train(compiled("dropout", 2, optimizer=sgd, backend={"backend": failing}), batches)
    assert_same(found, expected)
    names = sorted(str(warning.message).split(" runs")[0] for warning in said)
    parts = ("stage 0", "stage 1", "the head of stage 0", "the head of stage 1")
    assert names == [f'backend="compile": {part}' for part in parts]


class Halting(nn.Module):
    """Counts in a buffer, then does what no compiler follows."""

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        self.count.add_(1)
        torch._dynamo.graph_break()
        return nn.functional.cross_entropy(output, target)

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.count: Tensor


def test_a_part_that_ran_before_the_failure_is_undone() -> None:
    """The first part of a broken graph has run when the second one fails to compile: the buffer counted twice."""
    calls: list[int] = []

    def late(module: Any, inputs: Any) -> Any:
        calls.append(0)
        if len(calls) > 2:  # the body, and the first part of the criterion
            raise RuntimeError("too late")
        return module.forward

    torch.compiler.reset()
    criterion = Halting()
    options: dict[str, Any] = {"schedule": "sequential", "criterion": criterion, "backend": {"backend": late}}
    with pytest.warns(UserWarning, match="too late"), compiled("norm", 1, **options) as decoupled:
        before = criterion.count.clone()  # a capture may have called it
        for x, y in make_batches("norm", [8, 8]):
            decoupled.train_step(x, y)
    assert criterion.count == before + 2


@pytest.mark.parametrize(
    "backend, message",
    [
        ("cudagraphs", "backend='cudagraphs' is not known; there are: 'eager', 'compile', 'cuda_graphs', or a dict"),
        ({"mode": "reduce-overhead"}, 'take backend="cuda_graphs"'),
        ({"options": {"triton.cudagraphs": True}}, "would overwrite what one stage gave"),
        ({"backend": "nobody's"}, "is no set of options for torch.compile"),
        ({"speed": 2}, "is no set of options for torch.compile"),
        (3, "backend=3 is not known"),
    ],
)
def test_backends_that_there_are_not(backend: Any, message: str) -> None:
    with pytest.raises(InputError) as caught:
        resolve_backend(backend)
    assert message in str(caught.value)


def test_nobody_runs_while_one_compiles() -> None:
    """torch refuses to run compiled code in any thread while one thread traces."""
    turns, inside = Turns(), threading.Event()
    log: list[str] = []

    def compile_it() -> None:
        with turns.alone():
            inside.set()
            time.sleep(0.02)
            log.append("compiled")

    def run() -> None:
        inside.wait(5)
        with turns.shared():
            log.append("ran")

    with turns.shared():
        threads = [threading.Thread(target=work) for work in (compile_it, run, run)]
        for thread in threads:
            thread.start()
        assert not inside.wait(0.02), "who shares is waited for"
    for thread in threads:
        thread.join(5)
    assert log == ["compiled", "ran", "ran"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_kernels_of_the_compiler_train_alike() -> None:
    """Inductor: other rounding, the same masks, also where the batch becomes smaller."""
    batches = make_batches("dropout", [8, 8, 5])
    expected = train(compiled("dropout", 2, optimizer=sgd), batches)
    torch.compiler.reset()
    found = train(compiled("dropout", 2, optimizer=sgd, backend="compile"), batches)
    for a, b in zip(found.losses, expected.losses, strict=True):
        assert a == pytest.approx(b, rel=1e-3)
    for name, value in expected.state["model"].items():
        torch.testing.assert_close(found.state["model"][name], value, rtol=1e-3, atol=1e-4)
