"""The two ways a run can end badly. Both carry one plain sentence for the user; what caused them is chained."""


class InputError(ValueError):
    """Something the user gave cannot be used; found before any long work starts. The script exits with 2."""


class RunError(RuntimeError):
    """Something failed while the run was under way, such as an image that cannot be read. The script exits with 1."""
