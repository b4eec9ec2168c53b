"""What emulated machines of both layers have in common: platforms, and VMs in them."""

from typing import Final

EMULATED_CPU: Final = "max,erms=off,fsrm=off,la57=off"
"""For ``-cpu``: all that QEMU emulates but "fast strings": kernels then clear and copy pages by
single bytes, which under emulation is eight times slower than by words; and but page tables of five
levels, each of which is a look into memory more, in both layers."""
