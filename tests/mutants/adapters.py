"""Ways of breaking adapters: what is trained, what it belongs to, and what it merges to."""

from mutants.change import ADAPTER, Change

LAYERS = "apr_dist/model/adapter_layers.py"
MODEL = "apr_dist/model/adapters.py"
MERGE = "apr_dist/interop/merge.py"
LOADING = "apr_dist/parallel/weights.py"
GATE = "apr_dist/gates/adapters.py"

MUTANTS: tuple[Change, ...] = (
    Change(
        ADAPTER + "001",
        "trained with the scale of another alpha",
        LAYERS,
        "attach",
        "adapter.alpha",
        "adapter.rank",
    ),
    Change(
        ADAPTER + "001",
        "what is frozen is trained too",
        LAYERS,
        "attach",
        "is_adapter(name)",
        "is_adapter(name) or name.endswith('layernorm.weight')",
    ),
    Change(
        ADAPTER + "002",
        "any base will do",
        GATE,
        "refuse_other_base",
        "stated != found",
        "stated is None",
    ),
    Change(
        ADAPTER + "003",
        "merged with the scale of another alpha",
        MODEL,
        "Adapter.scale",
        "self.alpha",
        "self.rank",
    ),
    Change(
        ADAPTER + "003",
        "a trained bias is forgotten",
        LAYERS,
        "merged_bias",
        "bias + adapter.scale * tensor(f'{module}.{BIAS}')",
        "bias",
    ),
    Change(
        ADAPTER + "003",
        "rows of new tokens are lost",
        LAYERS,
        "merged_rows",
        "tensor(f'{module}.{ROWS}')",
        "merged[list(adapter.tokens)]",
    ),
    Change(
        ADAPTER + "003",
        "merged twice",
        LAYERS,
        "merged_weight",
        "adapter.scale",
        "2 * adapter.scale",
    ),
    Change(
        ADAPTER + "003",
        "what is not the same is written all the same",
        MERGE,
        "_prove_logits",
        "not distance <= BOUNDS[kind]",
        "distance < 0",
    ),
    Change(
        ADAPTER + "004",
        "scales are not proven",
        LOADING,
        "_digests",
        "coded[name].stored()",
        "coded[name].stored()[:1]",
    ),
    Change(
        ADAPTER + "004",
        "another matrix is quantised",
        LOADING,
        "fill_codes",
        "values.to(runtime.device)",
        "values.to(runtime.device).flip(0)",
    ),
)
