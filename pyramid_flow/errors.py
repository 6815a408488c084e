"""Errors a user of the model can cause, each naming the field, the value and the rule it breaks."""


class PyramidFlowError(Exception):
    """Base of every error that this package raises on purpose."""


class InvalidValueError(PyramidFlowError, ValueError):
    """A value breaks a rule: "height 700 is not a multiple of 64"."""

    def __init__(self, field: str, value: object, rule: str) -> None:
        super().__init__(field, value, rule)
        self.field, self.value, self.rule = field, value, rule

    def __str__(self) -> str:
        return f"{self.field} {self.value} {self.rule}"


class NonFiniteError(PyramidFlowError, ArithmeticError):
    """What was computed holds NaN or infinity; nothing can be made of it."""


class ShapeError(PyramidFlowError, ValueError):
    """A tensor has the wrong shape; the message shows what was expected and what came."""

    def __init__(self, name: str, expected: str, actual: tuple[int, ...]) -> None:
        super().__init__(name, expected, actual)
        self.name, self.expected, self.actual = name, expected, actual

    def __str__(self) -> str:
        return f"{self.name} must have shape {self.expected}, got {list(self.actual)}"


class CheckpointError(PyramidFlowError):
    """A checkpoint folder lacks something, holds something unknown, or cannot be read."""


class ParallelError(PyramidFlowError):
    """The processes that share a clip are out of step; only starting all of them again helps."""
