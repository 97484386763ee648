"""All experts of a family, one after the other."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from mergemix.errors import OutputError
from mergemix.train.config import TrainConfig
from mergemix.train.observer import Observer, Silent
from mergemix.train.prepare import prepare
from mergemix.train.run import finished_before, make_accelerator, train


def train_family(
    configs: Mapping[str, TrainConfig], observer: Observer | None = None
) -> dict[str, dict[str, Any]]:
    """Train one model per entry (`expert_configs` makes them); returns their records.

    Everything is read and checked before the first one starts. Finished ones are kept as they are, a begun one is
    resumed. Raises what `train` raises.
    """
    observer = observer or Silent()
    with make_accelerator().main_process_first():  # the others find the corpora tokenised
        for config in configs.values():
            try:
                config.out.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise OutputError(f"cannot create {config.out.parent}: {error.strerror}") from error
            prepared = prepare(config, observer)
            if os.path.lexists(config.out):
                finished_before(config.out, prepared)
    records = {}
    for index, (name, config) in enumerate(configs.items(), 1):
        observer.stage(f"{name} ({index} of {len(configs)})")
        records[name] = train(config, observer)
    return records
