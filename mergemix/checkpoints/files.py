"""The files of a Hugging Face checkpoint directory, by name."""

from fnmatch import fnmatch

CONFIG_NAME = "config.json"
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

# Beside the weights: configuration, tokenizer, chat template, and code that config.json's auto_map names.
SIDE_FILES = ("*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", "*.py")
NOT_SIDE_FILES = ("*.index.json", "trainer_state.json", "*_results.json")


def is_side_file(name: str) -> bool:
    """Whether a file of the top folder belongs to the model, and is neither weights nor training state."""
    if name.startswith(".") or any(fnmatch(name, pattern) for pattern in NOT_SIDE_FILES):
        return False
    return any(fnmatch(name, pattern) for pattern in SIDE_FILES)
