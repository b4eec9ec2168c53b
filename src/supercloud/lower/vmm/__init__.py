"""One domain per virtual machine: monitor and QEMU."""
