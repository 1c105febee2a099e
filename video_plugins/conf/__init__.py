"""Hydra's configurations of the networks: ``hydra.searchpath: [pkg://video_plugins.conf]``, ``module/model=mtnet``."""
