"""Shards to batches: manifest, verification, mixtures and the loader."""

from apr_dist.data.manifest import Manifest, Shard, TokenizerIdentity

__all__ = ["Manifest", "Shard", "TokenizerIdentity"]
