"""What stands beside the features: sent to the later stages, or computed again there where that takes fewer bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from graph_strategies import Program
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stage_builder import Built, build
from test_candidates import check
from test_insert_codegen import check_composed, check_inference
from test_memory import check_activations, check_walk
from torch import Tensor, nn
from training_tools import assert_same, sgd, train

import autodecouple
from autodecouple import Plan
from autodecouple.objectives import SupCon
from autodecouple.passes.measure import annotate
from autodecouple.passes.trace import capture
from autodecouple.schedules import MicroBatched
from autodecouple.view.text import plan_table

SWEEP = settings(max_examples=3, suppress_health_check=list(HealthCheck))
SLOW = settings(max_examples=30, suppress_health_check=list(HealthCheck))
SMALL = SupCon(hidden=8, out=4)


@st.composite
def beside(draw: st.DrawFn) -> Program:
    """Layers that take turns with values beside them; some are used in one place, some in many."""
    steps = []
    for _ in range(draw(st.integers(2, 6))):
        steps.append((draw(st.sampled_from(("linear", "linear", "layer_norm", "dropout", "save", "add", "relu_"))), 0))
        steps += [("linear", 0), ("side", draw(st.integers(0, 5)))]
    output = draw(st.sampled_from(("tensor", "tuple", "dict")))
    return Program("flat", tuple(steps), output, by_name=draw(st.booleans()))


def check_beside(program: Program, n_stages: int) -> None:
    check(program)
    check_composed(program, n_stages)
    check_inference(program, n_stages)
    check_activations(program, n_stages)


@SWEEP
@given(beside(), st.integers(2, 6))
def test_stages_compute_again_what_they_are_not_sent(program: Program, n_stages: int) -> None:
    """Never more bytes than without, the same values, the model's output to the last bit, memory where it lives."""
    check_beside(program, n_stages)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@SLOW
@given(beside(), st.integers(2, 8))
def test_stages_compute_again_what_they_are_not_sent_for_many(program: Program, n_stages: int) -> None:
    check_beside(program, n_stages)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@SLOW
@given(beside())
def test_memory_tables_count_it_where_it_lives(program: Program) -> None:
    check_walk(annotate(capture(program.model(), program.inputs())))


class Blocks(nn.Module):
    """Four layers that all read one value, which `make` makes of the inputs and the model."""

    def __init__(self, make: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
        self.last, self.scale = nn.Linear(6, 3), nn.Parameter(torch.ones(6))
        self.register_buffer("table", torch.arange(6.0))
        self.register_buffer("count", torch.zeros(()))
        self.make = make

    def forward(self, x: Tensor) -> Tensor:
        side = self.make(self, x)
        for layer in self.layers:
            x = layer(x).tanh() * side
        y: Tensor = self.last(x)
        return y


def blocks(make: Callable[[Any, Tensor], Tensor], n_stages: int = 4) -> Built:
    torch.manual_seed(0)
    return build(Blocks(make), torch.randn(8, 6), n_stages)


def crossing(built: Built) -> list[set[str]]:
    """What crosses at each cut beside the features."""
    return [{spec.name for spec in cut.crossing} - set(cut.carrying) for cut in built.plan.cuts]


AGAIN: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "of nothing": lambda model, x: torch.arange(6).float().cos(),
    "of a buffer": lambda model, x: model.table.cos() + 1,
    "of a size": lambda model, x: torch.ones(x.size(0), 6) * 2,
    "of few bytes": lambda model, x: (x[:, :1] > 0).expand(-1, 6).float() + 1,
    "a long chain": lambda model, x: sum(((model.table + i).sin() for i in range(150)), torch.ones(6)),
}


@pytest.mark.parametrize("kind", AGAIN)
def test_it_is_computed_again_where_that_takes_fewer_bytes(kind: str) -> None:
    built = blocks(AGAIN[kind])
    assert len(built.plan.cuts) == 3 and all(len(cut.recomputed) == 1 for cut in built.plan.cuts)
    for cut in built.plan.cuts:
        sent = [spec for spec in cut.crossing if spec.name not in cut.carrying]
        assert sum(spec.num_bytes for spec in sent) <= 8, f"one number, or a byte per row, of {kind}"


SENT: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "random": lambda model, x: torch.rand(6),
    "written afterwards": lambda model, x: torch.zeros(6).add_(model.table),
    "of a tensor that is written": lambda model, x: torch.ones(6) * model.count.add_(1),
    "trained": lambda model, x: model.scale.detach().cos() + 1,
    "multiplied": lambda model, x: torch.outer(model.table, model.table) @ model.table,
    "looked up": lambda model, x: model.table[torch.tensor([5, 4, 3, 2, 1, 0])],
    "as large as its source": lambda model, x: x.detach().abs(),
}


@pytest.mark.parametrize("kind", SENT)
def test_it_is_sent_where_that_would_not_do(kind: str) -> None:
    """Another value would come out, or it would cost more than it saves."""
    built = blocks(SENT[kind], 3)
    assert built.plan.cuts and not any(cut.recomputed for cut in built.plan.cuts), built.plan
    assert all(map(len, crossing(built)))


class Parted(Blocks):
    """Reads a narrow part of a wide value, too."""

    def forward(self, x: Tensor) -> Tensor:
        wide = (x > 0).float().repeat(1, 2)
        part = wide[:1, :6]
        for layer in self.layers:
            x = layer(x).tanh() * wide[:, 6:] * part
        y: Tensor = self.last(x)
        return y


def test_memory_is_not_made_twice() -> None:
    """The part crosses, since that takes fewer bytes than what both are made of. The stage behind the cut would have
    had the wide value twice: by its part, whose memory it is, and as computed again."""
    torch.manual_seed(0)
    built = build(Parted(AGAIN["of nothing"]), torch.randn(8, 6), 2)
    assert not built.plan.cuts[0].recomputed and crossing(built) == [{"repeat", "slice_2"}]


def test_a_chain_is_computed_as_a_whole() -> None:
    """A mask made of a mask made of the input: only the input's narrow one crosses, and each stage makes it once."""

    def chain(model: Any, x: Tensor) -> Tensor:
        wide = (x[:, :1] > 0).expand(-1, 6).float()
        return wide * 2 + model.table

    built = blocks(chain)
    for code, cut, sent in zip(built.codes[1:], built.plan.cuts, crossing(built), strict=True):
        assert cut.recomputed == ("add",) and sent == {"gt"}
        ran = [str(node.target) for node in code.body.graph.nodes if node.op == "call_function"]
        assert ran.count("aten.expand.default") == ran.count("aten.add.Tensor") == 1
        assert "gt" in code.inputs and "table" in dict(code.body.named_buffers())


class Padded(nn.Module):
    """Layers over tokens; how many of a row's count is one number, the mask is made of it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        behind = torch.arange(x.size(1)) >= lengths[:, None]
        mask = torch.zeros(x.shape[:2]).masked_fill(behind, -1e9)
        for layer in self.layers:
            x = layer(x).tanh() + mask.exp()[..., None]
        y: Tensor = self.last(x.mean(1))
        return y


def padded(rows: int = 8, tokens: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows + tokens)
    x = torch.randn(rows, tokens, 6, generator=generator)
    return x, torch.randint(1, tokens + 1, (rows,), generator=generator)


def test_the_head_finds_its_mask() -> None:
    """It was taken from what crosses only; here the lengths cross, and every stage makes the mask for its head."""
    built = build(Padded(), padded(), 4)
    for index, values in enumerate(built.run(padded(6))[:-1]):
        cut, name = built.plan.cuts[index], built.codes[index].mask
        assert cut.mask == "masked_fill" and cut.mask in cut.recomputed and cut.mask_meaning == "additive"
        assert name is not None
        assert torch.equal(values[name], torch.arange(5) < padded(6)[1][:, None])


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "schedule, recompute",
    [("streaming", False), ("streaming", True), (MicroBatched(num_micro_batches=2), False)],
    ids=str,
)
def test_streaming_equals_sequential_bitwise(schedule: Any, recompute: bool) -> None:
    """Law 3, with sequences of any length."""
    found = []
    for executor in ("inline", "streams"):
        torch.manual_seed(0)
        options: dict[str, Any] = {"schedule": schedule, "executor": executor, "recompute": recompute}
        options |= {"devices": ["cpu"] * 2, "optimizer": sgd, "dynamic": (1,)}
        decoupled = autodecouple.compile(Padded(), 4, SMALL, example_inputs=padded(), **options)
        assert len(decoupled.plan.cuts) == 3 and all(cut.recomputed for cut in decoupled.plan.cuts)
        sizes = ((8, 5), (8, 7), (6, 3))
        found.append(train(decoupled, [(padded(*size), torch.arange(size[0]) % 3) for size in sizes]))
    assert_same(*found)


def test_the_plan_says_so() -> None:
    plan = autodecouple.plan(Padded(), padded(), 3, SMALL)
    assert plan.cuts[0].recomputed and Plan.from_json(plan.to_json()) == plan
    assert "recomputed: " in plan_table(plan)
    data = json.loads(plan.to_json())
    for cut in data["cuts"]:
        del cut["recomputed"]
    assert Plan.from_json(json.dumps(data)).cuts[0].recomputed == (), "a plan of before, whose cuts do not have it"


def test_later_stages_make_it_on_their_device() -> None:
    """Baked devices and buffers follow the stage: the buffer that the first one reads, too, is a copy in the second."""
    torch.manual_seed(0)
    model = Blocks(lambda model, x: model.table.cos() + torch.arange(6, device=x.device))
    built = build(model, torch.randn(8, 6), 2, devices=["cpu", "cpu:0"])
    home, away = (dict(code.body.named_buffers())["table"] for code in built.codes)
    assert home is model.table and away is not model.table and torch.equal(home, away)
    devices = [node.kwargs.get("device") for node in built.codes[1].body.graph.nodes if "arange" in node.name]
    assert devices == [torch.device("cpu:0")]
    inference = autodecouple.passes.inference.emit_inference(built.graph, built.plan)
    x = torch.randn(5, 6)
    assert inference is not None and torch.equal(inference(x)[0], model.eval()(x))


def bytes_without(built: Built, index: int) -> int:
    """What would cross if all that is used behind a cut did."""
    position = built.graph.measures[built.plan.cuts[index].after].position
    positions = {node: at for at, node in enumerate(built.graph.operations)}
    found = 0
    for node in built.graph.train.graph.nodes:
        last = max((positions.get(user, len(positions)) for user in node.users), default=-1)
        if node.op not in ("get_attr", "output") and positions.get(node, -1) <= position < last:
            value = built.graph.measures[node.name].value
            found += value.num_bytes if value is not None else 0
    return found


LANGUAGE: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertForSequenceClassification", {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
             "intermediate_size": 64}),
    "gpt2": ("GPT2ForSequenceClassification", {"n_embd": 32, "n_layer": 4, "n_head": 4, "pad_token_id": 0}),
    "t5": ("T5EncoderModel", {"d_model": 32, "num_layers": 4, "num_heads": 4, "d_ff": 64, "d_kv": 8}),
    "llama": ("LlamaForSequenceClassification", {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
              "num_key_value_heads": 2, "intermediate_size": 64, "pad_token_id": 0}),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", LANGUAGE)
def test_masks_of_language_models_do_not_cross(kind: str) -> None:
    """An expanded mask takes a byte per pair of tokens, what it is made of one per token."""
    from zoo.ops import transformers

    name, options = LANGUAGE[kind]
    config = getattr(transformers, name).config_class(vocab_size=100, **options)
    tokens = 64
    inputs = {"input_ids": torch.randint(100, (8, tokens)), "attention_mask": torch.ones(8, tokens, dtype=torch.int64)}
    built = build(getattr(transformers, name)(config), inputs, 4)
    for index, cut in enumerate(built.plan.cuts):
        features = sum(cut.spec(name).num_bytes for name in cut.carrying)
        before, after = bytes_without(built, index) - features, cut.num_bytes - features
        print(f"{kind} after {cut.after}: features {features:,}, beside them {before:,} -> {after:,} bytes")
        assert before >= 8 * tokens * tokens > after
        assert after <= 8 * tokens * (1 + 8) + 8, "a byte per token, the ids and a number"
