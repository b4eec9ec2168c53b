"""What emulated machines of both layers have in common: platforms, and VMs in them."""

from typing import Final

EMULATED_CPU: Final = "max,erms=off,fsrm=off"
"""For ``-cpu``: all that QEMU emulates but "fast strings": kernels then clear and copy pages by
single bytes, which under emulation is eight times slower than by words."""
