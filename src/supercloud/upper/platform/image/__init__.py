"""The image builder: the runtime image of the Lower Layer and the L1 image, from Debian packages.

One pass, no privilege, no chroot, no maintainer script::

    lock.json --archive--> verified .debs --tree--> files --recipe/closure--> what is needed
       --bytecode, kernel, initramfs--> base layer (cached tar) + our own code --erofs--> products

``python -m supercloud.upper.platform.image build`` is the command, ``build.build`` the function.
"""
