"""The command `mergemix preflight`."""
