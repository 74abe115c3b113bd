"""What can go wrong, by whose fault it is."""


class HeadraceError(Exception):
    """Base of every error that is told to the user as one sentence."""


class ConfigError(HeadraceError):
    """The configuration asks for something that does not exist or cannot be."""


class CheckpointError(HeadraceError):
    """The model's folder does not hold what its architecture needs."""


class PlanError(HeadraceError):
    """A plan contradicts what was prepared: a fault of the router, fatal to the group."""


class DeviceError(HeadraceError):
    """The device cannot do what it is asked to."""


class GroupError(HeadraceError):
    """The ranks of the group did not find each other, or lost each other."""
