"""A model's template, turn ends and generation settings travel with it, and every format stops at them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gguf
import pytest
from builders.families import ROWS, odd_config
from builders.hf_models import hf_folder
from builders.runs import Inputs, run_here
from builders.speakers import SETTINGS, TEMPLATE, TURN_END, chat_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

from apr_dist.apr.reader import AprReader
from apr_dist.cli import main
from apr_dist.errors import TokenizerError
from apr_dist.interop.chat import chat_template, read_chat
from apr_dist.interop.gguf_export import export_gguf
from apr_dist.interop.hf_export import export_huggingface
from apr_dist.interop.importing import import_model
from apr_dist.interop.stamp import stamp_file


def answer_of(folder: Path) -> list[int]:
    """What ``transformers`` generates after a chat, with the folder's own settings."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "b"}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    made = model.generate(ids, max_new_tokens=9, do_sample=False, pad_token_id=33)
    return list(made[0, ids.shape[1] :].tolist())


def test_template_and_settings_come_out_of_an_apr_file_as_they_went_in(tmp_path: Path) -> None:
    folder = chat_folder(tmp_path / "in", settings=SETTINGS)
    import_model(folder, tmp_path / "x.apr")
    assert read_chat(tmp_path / "x.apr").needed(tmp_path).text == TEMPLATE
    export_huggingface(tmp_path / "x.apr", tmp_path / "out")
    for name in ("tokenizer_config.json", "generation_config.json", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes(), name
    assert answer_of(tmp_path / "out") == [0, TURN_END]


def test_they_pass_through_gguf(tmp_path: Path) -> None:
    import_model(chat_folder(tmp_path / "in", settings=SETTINGS), tmp_path / "x.apr")
    export_gguf(tmp_path / "x.apr", tmp_path / "x.gguf")
    fields = {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "x.gguf").fields.items()}
    assert fields["tokenizer.chat_template"] == TEMPLATE
    assert fields["tokenizer.ggml.eos_token_id"] == 33
    assert fields["tokenizer.ggml.eot_token_id"] == TURN_END
    assert fields["general.sampling.temp"] == pytest.approx(0.7)
    assert (fields["general.sampling.top_k"], fields["general.sampling.top_p"]) == (20, pytest.approx(0.9))
    import_model(tmp_path / "x.gguf", tmp_path / "y.apr")
    assert read_chat(tmp_path / "y.apr").end_ids == {33, TURN_END}
    export_huggingface(tmp_path / "y.apr", tmp_path / "out")
    made = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert SETTINGS.items() <= made.items()
    assert answer_of(tmp_path / "out") == [0, TURN_END]


@pytest.mark.shows("chat template")
@pytest.mark.parametrize("family", ROWS)
def test_the_template_of_every_family_passes_through_every_format(family: str, tmp_path: Path) -> None:
    """A tokenizer of 40 tokens, and a vocabulary with rows that no token has."""
    windows = {"sliding_window": 1000} if family == "mistral" else {}
    folder = hf_folder(tmp_path / "in", odd_config(family, 0) | windows)
    spoken = chat_folder(tmp_path / "spoken")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(spoken / name, folder / name)
    import_model(folder, tmp_path / "x.apr")
    export_gguf(tmp_path / "x.apr", tmp_path / "x.gguf")
    fields = gguf.GGUFReader(tmp_path / "x.gguf").fields
    assert fields["tokenizer.chat_template"].contents() == TEMPLATE
    import_model(tmp_path / "x.gguf", tmp_path / "y.apr")
    for source in ("x.apr", "y.apr"):
        export_huggingface(tmp_path / source, tmp_path / f"{source}.out")
        tokenizers = [AutoTokenizer.from_pretrained(one) for one in (spoken, tmp_path / f"{source}.out")]
        chat = [{"role": "user", "content": "b"}]
        before, after = (one.apply_chat_template(chat, add_generation_prompt=True) for one in tokenizers)
        assert before["input_ids"] == after["input_ids"]


@pytest.mark.parametrize(
    ("ends", "fits"), [([33, 34, 1], True), ([33, 34, 1, 2], False), ([1, 2, 33], False)]
)
def test_ends_of_a_text_that_gguf_has_no_key_for_are_refused(
    ends: list[int], fits: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The end of a turn counts as one of them, also where the settings do not list it."""
    import_model(
        chat_folder(tmp_path / "in", settings={**SETTINGS, "eos_token_id": ends}), tmp_path / "x.apr"
    )
    found = main(["export", str(tmp_path / "x.apr"), "--to", "gguf", "-o", str(tmp_path / "x.gguf")])
    assert (found == 0) is (tmp_path / "x.gguf").exists() is fits
    assert fits or "GGUF has keys for three" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "x.apr"), "--to", "huggingface", "-o", str(tmp_path / "out")]) == 0
    made = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert set(ends) <= set(made["eos_token_id"])


def test_an_export_stops_at_the_turn_end_even_where_the_settings_never_named_it(tmp_path: Path) -> None:
    folder = chat_folder(tmp_path / "in")
    assert len(answer_of(folder)) == 9  # the fault this is about: the model's own folder does not stop
    import_model(folder, tmp_path / "x.apr")
    export_huggingface(tmp_path / "x.apr", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == [33, 34]
    assert answer_of(tmp_path / "out") == [0, TURN_END]
    export_gguf(tmp_path / "x.apr", tmp_path / "x.gguf")
    assert gguf.GGUFReader(tmp_path / "x.gguf").fields["tokenizer.ggml.eot_token_id"].contents() == TURN_END


def test_a_stamped_template_is_the_one_that_every_export_has(tmp_path: Path) -> None:
    import_model(chat_folder(tmp_path / "in", template="{{ messages }}"), tmp_path / "x.apr")
    (tmp_path / "new.jinja").write_text(TEMPLATE)
    flags = [str(tmp_path / "x.apr"), "-o", str(tmp_path / "y.apr")]
    assert main(["stamp", *flags, "--chat-template", str(tmp_path / "new.jinja")]) == 0
    export_huggingface(tmp_path / "y.apr", tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == TEMPLATE
    assert answer_of(tmp_path / "out") == [0, TURN_END]
    export_gguf(tmp_path / "y.apr", tmp_path / "y.gguf")
    assert gguf.GGUFReader(tmp_path / "y.gguf").fields["tokenizer.chat_template"].contents() == TEMPLATE


def test_a_malformed_template_is_not_stamped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import_model(chat_folder(tmp_path / "in"), tmp_path / "x.apr")
    for name, content in (("bad.jinja", b"{% for %}"), ("bytes.jinja", b"\xff"), ("absent.jinja", None)):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        flags = [str(tmp_path / "x.apr"), "-o", str(tmp_path / "y.apr")]
        assert main(["stamp", *flags, "--chat-template", str(tmp_path / name)]) == 5
        assert name in capsys.readouterr().err
        assert not (tmp_path / "y.apr").exists()


def test_a_template_in_a_file_of_its_own_or_one_of_several_is_replaced_where_it_stands(
    tmp_path: Path,
) -> None:
    folder = chat_folder(tmp_path / "in")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "new.jinja").write_text(TEMPLATE)
    import_model(folder, tmp_path / "x.apr")
    stamp_file(tmp_path / "x.apr", tmp_path / "y.apr", changes={}, chat_template=tmp_path / "new.jinja")
    export_huggingface(tmp_path / "y.apr", tmp_path / "out")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == TEMPLATE
    several = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    stated = json.loads((folder / "tokenizer_config.json").read_text()) | {"chat_template": several}
    (folder / "tokenizer_config.json").write_text(json.dumps(stated))
    (folder / "chat_template.jinja").unlink()
    import_model(folder, tmp_path / "z.apr")
    stamp_file(tmp_path / "z.apr", tmp_path / "w.apr", changes={}, chat_template=tmp_path / "new.jinja")
    export_huggingface(tmp_path / "w.apr", tmp_path / "out2")
    made = json.loads((tmp_path / "out2" / "tokenizer_config.json").read_text())["chat_template"]
    assert made == [{"name": "default", "template": TEMPLATE}, {"name": "tool_use", "template": "t"}]


def test_they_pass_through_another_dtype_and_training(inputs: Inputs, tmp_path: Path) -> None:
    import_model(chat_folder(tmp_path / "in", settings=SETTINGS), tmp_path / "x.apr")
    assert main(["import", str(tmp_path / "x.apr"), "-o", str(tmp_path / "half.apr"), "--dtype", "f16"]) == 0
    with AprReader(tmp_path / "x.apr") as before, AprReader(tmp_path / "half.apr") as after:
        assert after.metadata.chat_template == TEMPLATE
        assert after.metadata.custom["apr_dist.files"] == before.metadata.custom["apr_dist.files"]
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    stamp_file(inputs.pretrained, tmp_path / "init.apr", changes={}, chat_template=tmp_path / "chat.jinja")
    flags = ["--init", str(tmp_path / "init.apr"), "--run-dir", str(tmp_path / "run"), "--num-steps", "2"]
    assert run_here(*flags, *inputs.data_flags(), "--eval-every", "2") == 0
    assert read_chat(tmp_path / "run" / "checkpoint.apr").needed(tmp_path).text == TEMPLATE


def test_a_file_without_a_template_is_refused_with_a_remedy_that_works(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = chat_folder(tmp_path / "in")
    stated = json.loads((folder / "tokenizer_config.json").read_text())
    del stated["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(stated))
    model = tmp_path / "x.apr"
    import_model(folder, model)
    with pytest.raises(TokenizerError, match="carries no chat template") as refused:
        read_chat(model).needed(model)
    (tmp_path / "FILE.jinja").write_text(TEMPLATE)
    words = (refused.value.remedy or "").split("apr-dist ")[1].split()
    words = [
        word.replace("FILE", str(tmp_path / "FILE")).replace("OUTPUT", str(tmp_path / "o")) for word in words
    ]
    assert main(words) == 0
    assert read_chat(tmp_path / "o.apr").needed(model).text == TEMPLATE


def test_the_template_is_found_where_models_keep_it() -> None:
    several = json.dumps(
        {"chat_template": [{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}]}
    )
    where = Path("m.apr")
    assert chat_template("own", {"chat_template.jinja": b"file"}, where=where) == "own"
    assert chat_template(None, {"chat_template.jinja": b"file"}, where=where) == "file"
    assert chat_template(None, {"tokenizer_config.json": several.encode()}, where=where) == "d"
    assert chat_template(None, {}, where=where) is None
    with pytest.raises(TokenizerError, match="not a JSON object"):
        chat_template(None, {"tokenizer_config.json": b"[]"}, where=where)
