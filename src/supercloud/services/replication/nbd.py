"""The numbers of NBD that both ends here need; simple replies only.

Source: the protocol as it is published by the NBD project (doc/proto.md).
"""

import errno
import struct
from typing import Final

MAGIC: Final = 0x4E42444D41474943
OPTION_MAGIC: Final = 0x49484156454F5054
OPTION_REPLY_MAGIC: Final = 0x3E889045565A9
REQUEST_MAGIC: Final = 0x25609513
REPLY_MAGIC: Final = 0x67446698

GREETING: Final = struct.Struct(">QQH")
OPTION: Final = struct.Struct(">QII")
OPTION_REPLY: Final = struct.Struct(">QIII")
REQUEST: Final = struct.Struct(">IHHQQI")
REPLY: Final = struct.Struct(">IIQ")

FIXED_NEWSTYLE, NO_ZEROES = 1, 2
OPT_EXPORT_NAME, OPT_ABORT, OPT_LIST, OPT_INFO, OPT_GO = 1, 2, 3, 6, 7
REP_ACK, REP_SERVER, REP_INFO = 1, 2, 3
REP_UNSUPPORTED, REP_INVALID = 0x80000001, 0x80000003
INFO_EXPORT, INFO_BLOCK_SIZE = 0, 3
HAS_FLAGS, SEND_FLUSH, SEND_FUA, SEND_TRIM, SEND_ZEROES, MULTI = 1, 4, 8, 32, 64, 256
READ, WRITE, DISCONNECT, FLUSH, TRIM, ZEROES = 0, 1, 2, 3, 4, 6
FUA: Final = 1

MAX_OPTION_BYTES: Final = 4096
MAX_OPTIONS: Final = 64
MAX_PAYLOAD_BYTES: Final = 32 << 20
BLOCK_BYTES: Final = 4096

# the errors that the protocol knows; any other is told as EIO
ERRORS: Final = frozenset(
    {
        errno.EPERM, errno.EIO, errno.ENOMEM, errno.EINVAL, errno.ENOSPC, errno.EOVERFLOW,
        errno.ENOTSUP, errno.ESHUTDOWN,
    }
)  # fmt: skip
