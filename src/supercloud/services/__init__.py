"""The user's infrastructure services below the VM; host-agnostic."""
