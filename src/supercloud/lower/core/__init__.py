"""The trusted computing base: keeper, core, sandbox."""
