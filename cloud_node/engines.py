"""Which engine a node runs on: this process, or Ray.

Knows the settings of `cloud_node serve`; Ray is imported only where it is asked for.
"""

import os
import secrets
from importlib.util import find_spec
from pathlib import Path

from cloud_node.config import ServeConfig
from cloud_node.engine import Engine
from cloud_node.families import check_family
from cloud_node.in_process import InProcessEngine
from cloud_node.loading import load_spans
from isthmus.device import pick_device
from isthmus.errors import UsageError
from isthmus.load import DTYPES, load_config


def build_engine(settings: ServeConfig, directory: Path) -> Engine:
    """Load the span, here or in processes of its own.

    Raises:
        CutError, ModelError: the model cannot be cut or loaded so.
        UsageError: what was asked for needs a package that is not installed, or makes no sense for this model.
        UnreachableError: there is no Ray cluster at the address given.
    """
    config = load_config(directory)
    check_family(config, DTYPES[settings.dtype])
    if settings.engine == "ray":
        return _on_ray(settings, directory, config.get_text_config().num_hidden_layers)
    device = pick_device(settings.device)
    spans = load_spans(directory, settings.cuts, DTYPES[settings.dtype], device, settings.quantize)
    return InProcessEngine(spans, str(device), config.get_text_config().hidden_size, settings.activation_budget)


def _on_ray(settings: ServeConfig, directory: Path, blocks: int) -> Engine:
    if find_spec("ray") is None:
        raise UsageError("--engine ray needs Ray; install it with: pip install 'isthmus[ray]'")
    if settings.address is not None and settings.device == "auto":
        raise UsageError("--address may lead to other machines than this one: say --device cuda or --device cpu")
    if settings.address is None:  # before Ray is imported, which reads them: a cluster of our own is closed to others
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_IGNORE_UNHANDLED_ERRORS"] = "1"  # a pass that is repeated leaves some behind
    os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"  # a call after the end would begin another cluster
    from cloud_node.on_ray.serving import build_engine

    return build_engine(settings, directory, blocks)
