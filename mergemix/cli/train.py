"""The command `mergemix train`."""
