"""The agent: runs a platform's execution environments, told by the control plane over one link.

Layers, top to bottom: ``init`` (process 1: restarts the agent, reaps) > ``app`` (composition) >
``link`` (the way to the control plane) and ``manager`` (desired set -> one worker per EE) >
``worker`` (life of one EE) > ``container`` | ``machine`` (engines) > rootfs, namespaces, networks,
firewall, names, blobs, scratch > ``syscalls``, ``netlink``, ``processes``. Standard library only.

What lives longer than the agent: EEs, their namespaces, mounts, cgroups and FIFOs, and under
``/run/supercloud`` (memory) what the next agent needs to take them up again. Nothing survives the
platform's power: the key of its scratch disk is made at each boot and stored nowhere.
"""
