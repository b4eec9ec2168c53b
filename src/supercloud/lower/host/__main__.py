"""Start a Lower Layer host and become its keeper; run by path, as root, with an isolated Python.

What takes privilege happens here once (sockets, images, the probe of the accelerator, the grant
manifest); then this process executes the keeper and holds nothing but descriptors.
"""

import os
import sys

if __name__ == "__main__":
    _HERE = os.path.dirname(os.path.abspath(__file__))
    sys.path.insert(0, os.path.normpath(f"{_HERE}/../../.."))
    sys.path.remove(_HERE) if _HERE in sys.path else None
    from supercloud.lower.host.start import main

    sys.exit(main(sys.argv[1:]))
