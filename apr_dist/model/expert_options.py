"""Mixtures of experts by number: the options of a configuration, and their checks. No torch.

Which of them a family's models have is in its file, as for the options in ``block_options``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from apr_dist.model.rope_scaling import refuse_key


@dataclass(frozen=True, kw_only=True)
class ExpertOptions:
    """The options, by the names of a Hugging Face ``config.json``; a dense model has none of them.

    Attributes:
        num_experts: MLPs of a block.
        num_experts_per_tok: those of them that compute a token.
        moe_intermediate_size: inner size of an expert; None: ``intermediate_size``.
        norm_topk_prob: a token's weights of its experts are divided by their sum.
        router_aux_loss_coef: weight of the load-balancing loss it is trained with, where a run names none.
    """

    num_experts: int | None = None
    num_experts_per_tok: int | None = None
    moe_intermediate_size: int | None = None
    norm_topk_prob: bool = False
    router_aux_loss_coef: float = 0.0

    def check_experts(self, options: tuple[str, ...]) -> None:
        """Refuse what no mixture can be, for a family that has these options.

        Raises:
            ArchitectureRefused: a number is missing or impossible; the text names it.
        """
        if "num_experts" not in options:
            return
        for name in SIZES:
            value = getattr(self, name)
            if name in options and (type(value) is not int or value < 1):
                raise refuse_key(name, value, "a positive integer")
        experts, each = self.num_experts or 0, self.num_experts_per_tok or 0
        if each > experts:
            raise refuse_key("num_experts_per_tok", each, f"at most num_experts ({experts})")
        if type(self.norm_topk_prob) is not bool:
            raise refuse_key("norm_topk_prob", self.norm_topk_prob, "true or false")
        weight = self.router_aux_loss_coef
        is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not is_number or not 0 <= weight < math.inf:
            raise refuse_key("router_aux_loss_coef", weight, "a finite number that is not negative")


ROUTER: Final = ".mlp.gate.weight"
"""End of the name of a router's weight, which is read in f32 whatever else is computed in."""
SIZES: Final = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")
EXPERT_OPTIONS: Final = tuple(ExpertOptions.__dataclass_fields__)
"""Names of all of them."""
