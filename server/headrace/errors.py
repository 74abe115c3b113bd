"""Errors that are somebody's to fix: the user's, the checkpoint's, or the router's."""


class HeadraceError(Exception):
    """Base of the errors whose message is one clear sentence for the person who can act on it."""


class ConfigError(HeadraceError):
    """A setting, or a model's `config.json`, asks for what this server does not do."""


class CheckpointError(HeadraceError):
    """The weights are not what `config.json` promises; names the tensor and what was expected."""


class PlanError(HeadraceError):
    """A plan contradicts the shard's books; fatal to the group."""
