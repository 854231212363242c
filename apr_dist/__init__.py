"""apr-dist: a distributed trainer that starts from a pretrained APR file and never lies about it."""

__version__ = "0.1.0"
