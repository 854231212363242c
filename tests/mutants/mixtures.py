"""Ways of breaking mixtures of experts: their routing, the losses of their routers, and their layouts."""

from __future__ import annotations

from mutants.change import TRAINER, Change

EXPERTS, ROUTING = "apr_dist/model/experts.py", "apr_dist/model/routing.py"
LAYOUTS = "apr_dist/interop/expert_layouts.py"

MUTANTS: tuple[Change, ...] = (
    Change(
        TRAINER + "051",
        "weights of experts are never divided by their sum",
        EXPERTS,
        "MixtureMLP.forward",
        "weights / weights.sum(dim=-1, keepdim=True)",
        "weights",
        also=(TRAINER + "053",),
    ),
    Change(
        TRAINER + "051",
        "the router computes in the type of its input",
        EXPERTS,
        "Router.forward",
        "F.linear(x.float(), self.weight.float())",
        "F.linear(x, self.weight.to(x.dtype))",
    ),
    Change(
        TRAINER + "052",
        "the load-balancing loss is dropped",
        ROUTING,
        "Routing.joined",
        "self.balance * balance",
        "0.0 * balance",
    ),
    Change(
        TRAINER + "052",
        "the router's losses are part of the loss that is reported",
        ROUTING,
        "Routing.joined",
        "extra - extra.detach()",
        "extra",
    ),
    Change(
        TRAINER + "052",
        "padding counts as tokens do",
        "apr_dist/model/transformer.py",
        "_counted",
        "documents.with_any(marks)",
        "torch.ones_like(marks)",
    ),
    Change(
        TRAINER + "053",
        "gate and up of an expert change places on import",
        LAYOUTS,
        "_joined_experts",
        "(layout.gate, layout.up)",
        "(layout.up, layout.gate)",
    ),
    Change(
        TRAINER + "053",
        "experts are written in the other order",
        LAYOUTS,
        "parted_tensor",
        "index * each",
        "(model.num_experts * len(together) - 1 - index) * each",
    ),
    Change(
        TRAINER + "053",
        "gates and ups change places in a GGUF file",
        "apr_dist/interop/gguf_names.py",
        "part_of",
        "values.reshape(experts, parts, rows // parts, columns)[:, index]",
        "values.reshape(experts, parts, rows // parts, columns)[:, parts - 1 - index]",
    ),
)
