"""The run's configuration: its schema and sections, and how text becomes values and values text.

The words a key may hold are in ``apr_dist.choices``. Whether a combination of values can be trained is for
the gates.
"""

from apr_dist.config.schema import TrainConfig, flag_of, leaves, nearest

__all__ = ["TrainConfig", "flag_of", "leaves", "nearest"]
