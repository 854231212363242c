from apr_dist.config import TrainConfig as TrainConfig
from apr_dist.errors import AprDistError as AprDistError
from apr_dist.training.library import fit as fit
from apr_dist.training.library import open_session as open_session
from apr_dist.training.session import Session as Session
from apr_dist.version import __version__ as __version__

__all__ = ["AprDistError", "Session", "TrainConfig", "__version__", "fit", "open_session"]
