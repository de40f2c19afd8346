"""How the lanes of a plan are run.

inline       in the caller's thread: the reference
streams      one worker thread per lane, a CUDA stream each on GPUs
distributed  one process per lane, started by torchrun on one or more machines; where every cut is coupled, in the
             runtime of torch.distributed.pipelining
"""

from collections.abc import Callable, Sequence

from autodecouple.executors.distributed import Distributed
from autodecouple.executors.executor import Executor
from autodecouple.executors.inline import Inline
from autodecouple.executors.job import Step
from autodecouple.executors.processes import Processes
from autodecouple.executors.streams import Streams
from autodecouple.schedules.program import Program
from autodecouple.stage import Stage

EXECUTORS: dict[str, Callable[[Sequence[Stage], Program, int], Executor]] = {
    "inline": Inline,
    "streams": Streams,
    "processes": Processes,
    "distributed": Distributed,
}

__all__ = ["EXECUTORS", "Executor", "Inline", "Step", "Streams"]
