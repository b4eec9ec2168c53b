"""The user's block storage service: volumes on protected devices.

A volume is a qcow2 image (or raw bytes) on a *device*: one connected NBD socket, given by whoever
launched us (the user's data protection service behind it). Each open volume is one
``qemu-storage-daemon`` of its own, our child: 10 MB resident, of which 2 MB are its own, 10 ms to
start. So no volume's failure is another's, a machine that breaks out of one export finds no other
behind the same socket, and each daemon inherits the one descriptor that it needs (its monitor
takes none later: QEMU 10's storage daemon has neither ``getfd`` nor ``add-fd``).

::

    machine --vhost-user-blk | NBD--> limited (throttle) -> volume (qcow2 | raw) -> device (NBD)

Volumes speak to each other (backup, clone) by NBD over sockets without a name in any file system,
inside the domain's own network namespace.

``names`` what nodes and exports are called, ``daemon`` the child and its monitor, ``volume`` one
open volume, ``copies`` backup and clone, ``service`` the calls.
"""
