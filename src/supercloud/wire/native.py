"""Functions of C libraries, declared as a table and loaded when the first of them is wanted."""

import ctypes
from collections.abc import Mapping
from typing import Any, Final

# name -> (type of the result, types of the arguments)
Functions = Mapping[str, tuple[Any, ...]]


class Library:
    """A shared library that may not be there: who does without it asks ``is_there`` first."""

    def __init__(self, file: str, functions: Functions) -> None:
        self._file: Final = file
        self._functions: Final = functions
        self._loaded: Any = None

    def load(self) -> Any:
        """The functions; OSError or AttributeError where there is no such library."""
        if self._loaded is None:
            library = ctypes.CDLL(self._file)
            for name, (result, *arguments) in self._functions.items():
                function = getattr(library, name)
                function.restype, function.argtypes = result, arguments
            self._loaded = library
        return self._loaded

    def is_there(self) -> bool:
        """Whether the library can be used here, with all of these functions."""
        try:
            self.load()
        except (OSError, AttributeError):
            return False
        return True
