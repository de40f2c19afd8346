"""Peak memory of a training step."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile


def peak_bytes(step: Callable[[], object], kept: Iterable[torch.Tensor], device: torch.device) -> int:
    """What a step takes at its peak, with the tensors that are there before it and after it.

    Counted from the allocator's own events on a processor, which has no counter of it; such a step takes longer.
    """
    held = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}.values())
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before + held
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = profiler.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    total = most = 0
    for _, change in changes:
        total += change
        most = max(most, total)
    return most + held


def kept_by(optimizer: Optimizer) -> list[torch.Tensor]:
    """Parameters, gradients that are still there, and states."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    states = [value for state in optimizer.state.values() for value in state.values()]
    gradients = [parameter.grad for parameter in parameters]
    return [tensor for tensor in (*parameters, *gradients, *states) if isinstance(tensor, torch.Tensor)]
