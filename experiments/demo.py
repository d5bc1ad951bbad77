"""A page to try upsamplers in a browser: `python -m experiments.demo`. Settings: configs/demo.yaml."""

import torch
from omegaconf import DictConfig

from experiments.command import command
from experiments.settings import SettingError, check_count


@command
def main(config: DictConfig) -> int | None:
    """The command line of the page."""
    if config.num_threads is not None:
        check_count("num_threads", config.num_threads)
        torch.set_num_threads(config.num_threads)
    try:
        from experiments.page.serve import serve
    except ModuleNotFoundError as error:
        raise SettingError(f"{error.name} is missing: install the extra, pip install -e '.[demo]'") from error
    serve(config)


if __name__ == "__main__":
    main()
