"""Train: ``torchrun --nproc-per-node 2 -m malora_dist.train --config FILE key=value ...``

``python -m malora_dist.train`` alone is one process.
"""

from __future__ import annotations

import argparse
import faulthandler
import logging
import sys

from malora_dist.errors import exit_on_user_error
from malora_dist.files import path_argument
from malora_dist.parallel.process_life import end_with_agent
from malora_dist.parallel.versions import check_versions


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="malora_dist.train", description=__doc__)
    parser.add_argument("--config", type=path_argument, metavar="FILE", help="YAML file of keys (docs/config.md)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="config keys that override the file")
    return parser.parse_args()


@exit_on_user_error
def main() -> None:
    """Load the config, build the layout, train."""
    end_with_agent()
    if sys.__stderr__ is not None:
        faulthandler.enable(sys.__stderr__)  # a process that native code aborts, as NCCL's watchdog does, says where
    arguments = _parse()
    check_versions()
    from malora_dist.config_file import load_config  # imports torch

    config = load_config(arguments.config, arguments.overrides)
    # megatron takes seconds to import: a wrong config is reported before.
    from malora_dist.exchange.plan import check_exchange
    from malora_dist.metrics.loggers.base import check_loggers
    from malora_dist.parallel import topology as layout
    from malora_dist.parallel.device import without_expected_warnings

    config.validate(layout.world_size_from_env())
    check_exchange(config)
    check_loggers(config)
    logging.getLogger("megatron").setLevel(logging.ERROR)
    with without_expected_warnings():
        topology = layout.initialize(config, config.seed)
        try:
            from malora_dist.training.trainer import Trainer

            Trainer(config, topology).train()
        finally:
            layout.destroy()


if __name__ == "__main__":
    main()
