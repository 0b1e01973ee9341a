"""What people bring that is no model as it stands: a refusal names what it is, and blames nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
from brought import cloned, of_gguf, of_gguf_with_config, of_mlx, pickled_clone

from merger.cli.commands import main


def nothing(folder: Path) -> None:
    """No such folder."""


LFS = "git lfs pull, in its folder, fetches the files; or download the model with hf download owner/name"
GGUF = "model-Q4_K_M.gguf: the GGUF header cannot be read: it is of version 0, and 2 and 3 are read"
AGAIN = "download it again, or ask its author"
CASES = {
    "weights that are a pointer": (
        cloned("model.safetensors"), "./it", (),
        "models[./it]: model.safetensors is a pointer of Git LFS, not the file itself", LFS),
    "one weight file as the model": (
        cloned("model.safetensors"), "./it/model.safetensors", (),
        "models[./it/model.safetensors]: model.safetensors is a pointer of Git LFS, not the file itself", LFS),
    "a side file that is a pointer": (
        cloned("tokenizer.json"), "./it", (),
        "models[./it]: tokenizer.json is a pointer of Git LFS, not the file itself", LFS),
    "a pickle that is a pointer": (
        pickled_clone, "./it", ("--allow-pickle",),
        "models[./it]: pytorch_model.bin is a pointer of Git LFS, not the file itself", LFS),
    "GGUF alone": (
        of_gguf, "./it", (), f"models[./it]: {GGUF}", AGAIN),
    "GGUF and a config": (
        of_gguf_with_config, "./it", (), f"models[./it]: {GGUF}", AGAIN),
    "a DoRA of MLX": (
        of_mlx, "./base+./it", (),
        "models[./it]: is a fine-tune of MLX by 'dora'; LoRA is the only kind that is built",
        "merge it into its model with mlx_lm.fuse (--dequantize), and name the folder of the result"),
    "a word": (
        nothing, "it", (), "models[it]: there is no folder 'it' here, and the Hub may not be asked for it: "
        "HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_refusal_names_what_it_is(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At the model's place in the recipe, with 3 and the next step."""
    make, reference, options, sentence, hint = CASES[case]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    tiny.model(tmp_path / "base")
    make(tmp_path / "it")
    (tmp_path / "r.yaml").write_text(f"merge_method: passthrough\nmodels:\n  - model: {reference}\n")
    assert main(["plan", "r.yaml", *options]) == 3
    assert capsys.readouterr().err == f"r.yaml:3:12: {sentence}\n    {hint}\n"
