"""Training of experts, and of models on a given mixture."""
