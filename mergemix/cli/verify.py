"""The command `mergemix verify`."""
