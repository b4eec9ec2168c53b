"""Rules by libnftables, which ``nft`` is a command line of: no process is started.

Under emulation ``nft`` costs some 200 ms, most of it for being loaded. It is in no other program's
way here: each call has a context, and so a netlink socket, of its own.
"""

from ctypes import c_char_p, c_int, c_uint32, c_void_p
from typing import Final

from supercloud.model.errors import Permanent
from supercloud.wire.native import Library

MAX_COMPLAINT: Final = 500
# see libnftables(3)
_LIBRARY: Final = Library(
    "libnftables.so.1",
    {
        "nft_ctx_new": (c_void_p, c_uint32),
        "nft_ctx_free": (None, c_void_p),
        "nft_ctx_buffer_error": (c_int, c_void_p),
        "nft_ctx_get_error_buffer": (c_char_p, c_void_p),
        "nft_run_cmd_from_buffer": (c_int, c_void_p, c_char_p),
    },
)


def is_there() -> bool:
    """Whether this can be used here; the ``nft`` command is the other way."""
    return _LIBRARY.is_there()


def apply(text: str) -> None:
    """Do what ``nft -f`` would, all or nothing; Permanent with its complaint. Blocking."""
    library = _LIBRARY.load()
    context = library.nft_ctx_new(0)
    if not context:
        raise Permanent("libnftables gives no context")
    try:
        library.nft_ctx_buffer_error(context)
        if library.nft_run_cmd_from_buffer(context, text.encode()):
            said = (library.nft_ctx_get_error_buffer(context) or b"").decode("utf-8", "replace")
            raise Permanent(f"nftables refused the rules: {said.strip()[-MAX_COMPLAINT:]}")
    finally:
        library.nft_ctx_free(context)
