"""What autodecouple raises: every message names the value, the cause and the way out."""


class AutodecoupleError(Exception):
    """Base of all errors that autodecouple raises itself; errors of user code keep their own type."""


class InputError(AutodecoupleError, ValueError):
    """An argument, batch or label does not fit; raised before anything runs."""


class TraceError(AutodecoupleError):
    """The model cannot be captured as a graph, or the capture differs from the model."""


class CutError(AutodecoupleError, ValueError):
    """A cut was asked for where none is legal."""


class PartitionError(AutodecoupleError, ValueError):
    """No plan exists for the wished number of stages, memory or cuts."""


class PlanError(AutodecoupleError, ValueError):
    """A plan does not fit the model, or its JSON is not a plan."""


class ScheduleError(AutodecoupleError, ValueError):
    """Lanes that would deadlock, leave work out, or do not suit the plan."""


class NonFiniteLossError(AutodecoupleError, ArithmeticError):
    """A stage's loss became NaN or infinite; the stage was not updated."""


class CheckpointError(AutodecoupleError, ValueError):
    """A state does not fit the model, or its file is not whole."""


class ClosedError(AutodecoupleError, RuntimeError):
    """The pipeline was closed, or an earlier error stopped it."""


class PeerError(AutodecoupleError, RuntimeError):
    """Another process of the same training failed, or is gone; the message says which one, and what it said."""
