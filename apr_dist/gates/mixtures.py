"""Whether what a run asks of a mixture of experts goes with its model: asked before anything is built."""

from __future__ import annotations

from apr_dist.choices import Compile
from apr_dist.config.sections import ComputeSection, RouterSection
from apr_dist.errors import UsageError
from apr_dist.model.config import TransformerConfig


def check_mixture(model: TransformerConfig, compute: ComputeSection, router: RouterSection) -> None:
    """Losses of routers need routers, and blocks with experts are not compiled.

    Args:
        model: the decoder.
        compute: how the network is computed.
        router: what the routers add to what is minimised.

    Raises:
        UsageError: losses of routers are asked for of a dense model, or compiled blocks of a mixture.
    """
    if model.num_experts is None and (router.aux_loss or router.z_loss):
        raise UsageError(
            "router.aux_loss and router.z_loss are for mixtures of experts, and this model is dense",
            where="--router.aux-loss" if router.aux_loss else "--router.z-loss",
            expected="a model with experts",
            remedy="leave both out",
        )
    if model.num_experts is not None and compute.compile is Compile.BLOCK:
        raise UsageError(
            "compute.compile is block, and blocks with a mixture of experts are not compiled",
            where="--compute.compile",
            expected="a dense model",
            remedy="use --compute.compile off",
        )
