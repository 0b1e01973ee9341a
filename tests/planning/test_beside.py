"""Files beside a base's tensors: carried over, or named as left out with the reason, in plan, JSON and card."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from merger.cli.commands import main
from merger.lock import formats
from merger.models.side_files import left_beside, side_files
from merger.run.options import Options
from merger.run.prepare import plan, read_recipe
from merger.verification.verify import Extent, Report, verify

STEPS = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Dense", "Dense"), ("3_Normalize", "Normalize")]
PIPELINE: Mapping[str, Any] = {
    "modules.json": [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for number, (path, kind) in enumerate(STEPS)
    ],
    "config_sentence_transformers.json": {"prompts": {"query": "query: "}, "similarity_fn_name": "cosine"},
    "sentence_bert_config.json": {"max_seq_length": 32, "do_lower_case": False},
    "1_Pooling/config.json": {
        "word_embedding_dimension": 16, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False,
    },
    "2_Dense/config.json": {
        "in_features": 16, "out_features": 8, "bias": True,
        "activation_function": "torch.nn.modules.linear.Identity",
    },
}  # fmt: skip
DENSE = "2_Dense/model.safetensors"


def put(folder: Path, files: Mapping[str, Any]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content, indent=2))


def dense(folder: Path, seed: int) -> None:
    torch.manual_seed(seed)
    (folder / "2_Dense").mkdir(exist_ok=True)
    save_file({"linear.weight": torch.randn(8, 16), "linear.bias": torch.randn(8)}, folder / DENSE)


def embedder(folder: Path, seed: int, steps: int) -> None:
    """A BERT with a tokenizer, and what sentence-transformers does after it; `steps` draws the dense layer."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(seed)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    BertModel(BertConfig(**shape, vocab_size=64, max_position_embeddings=32)).save_pretrained(folder)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{number}" for number in range(59))]
    put(folder, {"vocab.txt": "\n".join(words) + "\n", "tokenizer_config.json": {"tokenizer_class": "BertTokenizer"}})
    put(folder, PIPELINE)
    dense(folder, steps)


def recipe(folder: Path, *models: str, method: str = "linear") -> Path:
    listed = "".join(f"  - model: ./{name}\n    parameters: {{weight: 0.5}}\n" for name in models)
    (folder / "r.yaml").write_text(f"merge_method: {method}\nmodels:\n{listed}publish: {{license: mit}}\n")
    return folder / "r.yaml"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_merged_embedder_is_a_pipeline_of_sentence_transformers(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Loaded by it, it says of a text what the merged model, the parents' pooling and the merged dense layer say."""
    embedder(here / "one", 1, steps=1)
    embedder(here / "two", 2, steps=2)
    assert main(["run", str(recipe(here, "one", "two")), "./out"]) == 0
    assert "differs" not in capsys.readouterr().err
    card = (here / "out/README.md").read_text()
    assert "library_name: sentence-transformers\npipeline_tag: sentence-similarity\n" in card
    assert "model = SentenceTransformer(" in card
    for name in PIPELINE:
        assert (here / "out" / name).read_bytes() == (here / "one" / name).read_bytes()
    layer, *parents = (load_file(f"./{name}/{DENSE}") for name in ("out", "one", "two"))
    assert all(torch.equal(layer[name], (parents[0][name] + parents[1][name]) / 2) for name in parents[0])
    assert verify("./out", Options(), Extent(everything=True, seed=1)).passed

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sentence_transformers import SentenceTransformer
        from transformers import AutoModel, AutoTokenizer

        found = SentenceTransformer("./out", device="cpu").encode(["w1 w2 w3"], convert_to_tensor=True)
        tokens = AutoTokenizer.from_pretrained("./out")(["w1 w2 w3"], return_tensors="pt")
        hidden = AutoModel.from_pretrained("./out")(**tokens).last_hidden_state[:, 0]
    expected = torch.nn.functional.normalize(hidden @ layer["linear.weight"].T + layer["linear.bias"], dim=1)
    torch.testing.assert_close(found, expected.detach(), atol=1e-5, rtol=1e-5)


def changed(**files: Any) -> Callable[[Path], None]:
    return lambda folder: put(folder, {name.replace("__", "/") + ".json": content for name, content in files.items()})


def without(*names: str) -> Callable[[Path], None]:
    def take_out(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return take_out


OTHERS = {
    "equal ones": (lambda folder: None, []),
    "another pooling": (changed(**{"1_Pooling__config": {"pooling_mode_mean_tokens": True}}),
                        ["1_Pooling/config.json differs in two: the result has what one has"]),
    "a step more": (changed(**{"4_More__config": {}}),
                    ["4_More/config.json differs in two: the result has what one has"]),
    "a dense layer of other numbers": (lambda folder: dense(folder, 2), []),
    "no pipeline at all": (without("modules.json"), []),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHERS)
def test_pipelines_that_differ_are_warned_of_by_file(case: str, here: Path) -> None:
    """Once for each file, with the names of the parents that have another."""
    change, sentences = OTHERS[case]
    for name in ("one", "two"):
        tiny.model(here / name, seed=1)
        put(here / name, PIPELINE)
        dense(here / name, 1)
    change(here / "two")
    planned, _ = plan(read_recipe(recipe(here, "one", "two")), Options())
    assert planned.doubts == sentences


def test_code_in_the_folder_that_auto_map_names_comes_along(here: Path) -> None:
    """And the result loads with it."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                         num_key_value_heads=2, vocab_size=64)  # fmt: skip
    config.auto_map = {"AutoModelForCausalLM": "code/modeling_tiny.TinyForCausalLM"}
    code = "from transformers import LlamaForCausalLM\n\n\nclass TinyForCausalLM(LlamaForCausalLM):\n    pass\n"
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(here / name)
        put(here / name, {"code/modeling_tiny.py": code, "other/train.py": "raise SystemExit"})
    assert main(["run", str(recipe(here, "one", "two")), "./out", "--quiet"]) == 0
    assert (here / "out/code/modeling_tiny.py").read_text() == code
    assert not (here / "out/other").exists()
    assert "other/train.py" in (here / "out/README.md").read_text()
    loaded, info = AutoModelForCausalLM.from_pretrained("./out", trust_remote_code=True, output_loading_info=True)
    assert type(loaded).__name__ == "TinyForCausalLM"
    assert not any(info.values())


MAP = {"auto_map": {"AutoModel": "code/modeling.Tiny", "AutoTokenizer": [None, "deep/er/tok.Tok"],
                    "AutoConfig": "org/other--elsewhere/config.Tiny"}}  # fmt: skip
ST = "modules.json"
FATES: Mapping[str, tuple[tuple[str, ...], Mapping[str, Any], str | None]] = {
    "SYSTEM_PROMPT.txt": ((), {}, "taken"),
    "system_prompt.txt": ((), {}, "taken"),
    "params.json": ((), {}, "goes with weights that the result does not have"),
    "original/params.json": (("original/consolidated.00.pth",), {}, "goes with weights that the result does not have"),
    "unet/config.json": (("unet/diffusion.safetensors",), {}, "goes with weights that the result does not have"),
    "config_sentence_transformers.json": ((ST,), {}, "taken"),
    "sentence_xlnet_config.json": ((ST,), {}, "taken"),
    "1_Pooling/config.json": ((ST,), {}, "taken"),
    "query_0_StaticEmbedding/model.safetensors": ((ST,), {}, None),
    "query_0_StaticEmbedding/tokenizer.json": ((ST,), {}, "taken"),
    "router_config.json": ((ST,), {}, "taken"),
    "document_0_Transformer/model.safetensors.index.json": (
        (ST, "document_0_Transformer/model-00001-of-00001.safetensors"), {}, None),
    "0_WordEmbeddings/wordembedding_config.json": ((ST,), {}, "taken"),
    "2_Dense/config.json": ((), {}, "not known to be read by what loads the result"),
    "2_Dense/pytorch_model.bin": ((ST,), {}, "a pickle, which is read with --allow-pickle only: the pipeline lacks its "
                                             "weights"),
    "0_A/pytorch_model.bin.index.json": ((ST, "0_A/model.safetensors"), {}, None),
    "code/modeling.py": ((), MAP, "taken"),
    "code/helpers.py": ((), MAP, "taken"),
    "deep/er/tok.py": ((), MAP, "taken"),
    "elsewhere/config.py": ((), MAP, "code that its config.json does not name"),
    "modeling.py": ((), MAP, "taken"),
    "train.py": ((), {}, "code that its config.json does not name"),
    "adapter_config.json": ((), {}, "an adapter lies beside the model, and is merged only where the recipe names it"),
    "scores.png": ((), {}, "about that model itself"),
    "trainer_state.json": ((), {}, "not known to be read by what loads the result"),
    "model.Q4_K_M.gguf": ((), {}, None),
    "onnx/model.onnx": ((), {}, None),
    "README.md": ((), {}, None),
    "LICENSE": ((), {}, "taken"),
    ".gitattributes": ((), {}, None),
    "merger.lock.yaml": ((), {}, None),
}  # fmt: skip


@pytest.mark.parametrize("name", FATES)
def test_every_file_beside_the_tensors_is_taken_or_named_with_a_reason(name: str) -> None:
    """But for weights of other formats, and what is written anew."""
    more, config, fate = FATES[name]
    files = ["config.json", "model.safetensors", name, *more]
    taken = side_files(files, config)
    assert (name in taken) == (fate == "taken")
    assert left_beside(files, taken).get(name) == (None if fate == "taken" else fate)


def test_what_is_left_out_is_told_by_plan_json_and_card(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the same words."""
    tiny.model(here / "one")
    put(here / "one", {"params.json": {"dim": 16}, "SYSTEM_PROMPT.txt": "Be helpful.\n"})
    why = "goes with weights that the result does not have"
    path = str(recipe(here, "one"))
    assert main(["plan", path]) == 0
    assert f"left out\n  params.json: one: {why}\n" in capsys.readouterr().out
    assert main(["plan", path, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["side_files_left_out"] == {"params.json": why}
    assert "SYSTEM_PROMPT.txt" in told["side_files"]
    assert main(["run", path, "./out", "--quiet"]) == 0
    assert f"- Files of one that were left out: params.json ({why})." in (here / "out/README.md").read_text()
    assert (here / "out/SYSTEM_PROMPT.txt").read_text() == "Be helpful.\n"


def test_a_step_of_a_pipeline_is_read_through_no_link_out_of_its_folder(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is published as it is, which weights never are."""
    tiny.model(here / "one")
    put(here / "one", PIPELINE)
    (here / "secret").write_text("not a real secret")
    (here / "one/1_Pooling/config.json").unlink()
    (here / "one/1_Pooling/config.json").symlink_to(here / "secret")
    assert main(["run", str(recipe(here, "one")), "./out", "--quiet"]) == 3
    assert "1_Pooling/config.json is a link that leads out of its folder" in capsys.readouterr().err
    assert not (here / "out").exists()


@pytest.mark.parametrize("format", [1, 2])
def test_a_merge_that_was_made_without_them_still_verifies(
    format: int, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock of an earlier version does not list what that passed over; one of this version has to."""
    monkeypatch.setattr(formats, "FORMAT", format)
    tiny.model(here / "one")
    put(here / "one", PIPELINE)
    assert main(["run", str(recipe(here, "one")), "./out", "--quiet"]) == 0
    lock = here / "out/merger.lock.yaml"
    lines, kept, skip = lock.read_text().splitlines(keepends=True), [], False
    for line in lines:  # an entry of `output` is a line with the file's name, and those after it
        if line.lstrip().startswith("- "):
            skip = any(f"file: {name}\n" in line for name in PIPELINE)
        elif not line.startswith((" ", "-")):
            skip = False
        kept += [] if skip else [line]
    assert len(kept) < len(lines)
    lock.write_text("".join(kept))
    monkeypatch.undo()
    monkeypatch.chdir(here)
    for name in PIPELINE:
        (here / "out" / name).unlink()
    report = verify("./out", Options(), Extent(everything=True, seed=1))
    assert isinstance(report, Report)
    assert report.passed is (format == 1), report
