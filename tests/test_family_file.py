"""A family is one file: added to a copy of the package, it is imported, trained, and exported."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
from builders.changed_package import apr_dist, copy_package, put, run, train
from builders.runs import REPOSITORY, Inputs
from safetensors.numpy import load_file

from apr_dist.interop.hf_export import export_huggingface

ZEBRA = '''
"""Zebra: Qwen2's block and tensor names, with a model type, claims and a GGUF architecture of its own."""

from apr_dist.model.families._definition import FamilyDefinition, GgufForm, only, read
from apr_dist.model.families._gguf import BLOCK, QKV_BIASES, TOP_LEVEL

FAMILY = FamilyDefinition(
    slug="zebra",
    hf_architecture="ZebraForCausalLM",
    hf_model_type="zebra",
    named_like="qwen2",
    hf_keys={"stripes": only(2, why="two stripes are computed")},
    hf_defaults={
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": None,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e4,
        "tie_word_embeddings": False,
    },
    gguf=GgufForm(architecture="zebra", tensors={**TOP_LEVEL, **BLOCK, **QKV_BIASES}, permuted=True),
    pre_tokenizers=("gpt-2",),
    qkv_bias=True,
)
'''


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a copy of the package that has one file more."""
    folder = copy_package(tmp_path_factory.mktemp("one_more_family"))
    put(folder, {"model/families/zebra.py": ZEBRA})
    return folder


def zebra_folder(folder: Path, pretrained: Path, **changes: object) -> Path:
    """A Hugging Face folder of that family: a trained Qwen2 under another name."""
    export_huggingface(pretrained, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["ZebraForCausalLM"], "model_type": "zebra", "stripes": 2} | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_one_file_adds_a_family_to_import_training_and_export(
    package: Path, inputs: Inputs, tmp_path: Path
) -> None:
    source = zebra_folder(tmp_path / "in", inputs.pretrained)
    apr_dist(package, "import", str(source), "--output", str(tmp_path / "zebra.apr"))
    assert "zebra" in apr_dist(package, "inspect", str(tmp_path / "zebra.apr"))
    apr_dist(package, "validate", str(tmp_path / "zebra.apr"))
    flags = ["--init", str(tmp_path / "zebra.apr"), *inputs.data_flags(), "--run-dir", str(tmp_path / "run")]
    done = train(package, *flags, "--num-steps", "3")
    assert done.returncode == 0, done.stderr
    trained = str(tmp_path / "run" / "checkpoint.apr")
    apr_dist(package, "export", trained, "--to", "huggingface", "-o", str(tmp_path / "out"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("zebra", ["ZebraForCausalLM"])
    assert config["stripes"] == 2
    before, after = (load_file(one / "model.safetensors") for one in (source, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert any(not np.array_equal(before[name], after[name]) for name in before)
    apr_dist(package, "export", trained, "--to", "gguf", "--dtype", "f32", "-o", str(tmp_path / "out.gguf"))
    fields = gguf.GGUFReader(tmp_path / "out.gguf").fields
    assert fields["general.architecture"].contents() == "zebra"
    apr_dist(package, "import", str(tmp_path / "out.gguf"), "--output", str(tmp_path / "back.apr"))
    apr_dist(
        package, "export", str(tmp_path / "back.apr"), "--to", "huggingface", "-o", str(tmp_path / "again")
    )
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(np.array_equal(after[name], again[name]) for name in after)


def test_the_file_alone_says_what_of_its_keys_is_computed(
    package: Path, inputs: Inputs, tmp_path: Path
) -> None:
    source = zebra_folder(tmp_path / "in", inputs.pretrained, stripes=3)
    done = run(package, "-m", "apr_dist", "import", str(source), "--output", str(tmp_path / "zebra.apr"))
    assert done.returncode != 0
    assert "stripes is 3" in done.stderr
    assert "two stripes are computed" in done.stderr


def test_without_its_file_the_family_is_refused_by_name(inputs: Inputs, tmp_path: Path) -> None:
    source = zebra_folder(tmp_path / "in", inputs.pretrained)
    done = run(REPOSITORY, "-m", "apr_dist", "import", str(source), "--output", str(tmp_path / "zebra.apr"))
    assert done.returncode != 0
    assert "'zebra'" in done.stderr
