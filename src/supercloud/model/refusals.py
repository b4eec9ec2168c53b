"""The errors that a user can understand and act on: all that the core needs of ``model.errors``."""

from typing import Any, ClassVar

Details = dict[str, Any] | None


class SupercloudError(Exception):
    """Root of the tree of errors, which ``model.errors`` draws."""


class UserError(SupercloudError):
    """``message`` says what was asked and what is wrong; ``hint`` what to do about it.

    ``where`` locates it (a field path, ``file:line``); ``details`` is for machines, JSON-able.
    """

    code: ClassVar[str] = "error"

    def __init_subclass__(cls, *, code: str = "") -> None:
        cls.code = code or cls.code

    def __init__(
        self, message: str, *, hint: str = "", where: str = "", details: Details = None
    ) -> None:
        super().__init__(message)
        self.message, self.hint, self.where, self.details = message, hint, where, details or {}

    def __str__(self) -> str:
        return f"{self.where}: {self.message}" if self.where else self.message


class Invalid(UserError, code="invalid"):
    """The request is malformed."""


class NotFound(UserError, code="not_found"):
    """What was asked for is not there."""


class Exists(UserError, code="exists"):
    """It is there already, and differs from what was asked for."""


class Busy(UserError, code="busy"):
    """Another operation on it is under way."""


class BadState(UserError, code="bad_state"):
    """Not legal in the present state."""


class Denied(UserError, code="denied"):
    """The caller lacks the right."""


class NoResources(UserError, code="no_resources"):
    """It does not fit: a quota or a capacity."""


ALL = (Invalid, NotFound, Exists, Busy, BadState, Denied, NoResources)
