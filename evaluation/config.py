"""What a run is configured with; see :mod:`mmzoo.config`."""

from mmzoo.config import DEFAULT_MODELS, RunConfig, read_config, to_toml, write_config

__all__ = ["DEFAULT_MODELS", "RunConfig", "read_config", "to_toml", "write_config"]
