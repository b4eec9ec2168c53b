"""The error tree of the whole system. How errors travel and what they end in: ``model.failures``.

::

    SupercloudError
    ├── UserError            what was asked, what is wrong, what to do; safe to show
    │   ├── Invalid          the request itself is malformed
    │   ├── NotFound
    │   ├── Exists           there already, and different
    │   ├── Busy             something else is being done to it
    │   ├── BadState         not legal in the state that it is in
    │   ├── Denied
    │   ├── NoResources      does not fit: quota, capacity
    │   └── Unsupported      this provider, platform or kind cannot do that, with the reason
    ├── Temporary            try again after ``delay_s``
    └── Permanent            trying again will not help

Anything else that is raised is a bug: it is logged under an id and the user is shown the id only.
"""

from typing import Any, ClassVar

Details = dict[str, Any]


class SupercloudError(Exception):
    """Root of the tree."""


class UserError(SupercloudError):
    """An error that its user can understand and act on.

    ``message`` says what was asked and what is wrong; ``hint`` what to do about it;
    ``where`` locates it (a field path, ``file:line``); ``details`` is for machines, JSON-able.
    """

    code: ClassVar[str] = "error"

    def __init_subclass__(cls, *, code: str = "") -> None:
        cls.code = code or cls.code

    def __init__(
        self,
        message: str,
        *,
        hint: str = "",
        where: str = "",
        details: Details | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.hint, self.where, self.details = message, hint, where, details or {}

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        return f"{place}{self.message}"


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


class Unsupported(UserError, code="unsupported"):
    """Cannot be done here; the message says why."""


class Temporary(SupercloudError):
    """Could not be done now; worth another try after ``delay_s`` seconds."""

    def __init__(self, message: str, *, delay_s: float = 1.0) -> None:
        super().__init__(message)
        self.delay_s = delay_s


class Permanent(SupercloudError):
    """Could not be done, and trying again will not help."""


BY_CODE: dict[str, type[UserError]] = {
    cls.code: cls
    for cls in (Invalid, NotFound, Exists, Busy, BadState, Denied, NoResources, Unsupported)
}
