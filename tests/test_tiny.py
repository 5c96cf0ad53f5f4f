"""The random model that tests serve where transformers is not installed is one that transformers might have written."""

from __future__ import annotations

from safetensors import safe_open

from msi.models.families import load_config
from tests.reference import save_tiny
from tests.tiny import save_plainly


def test_a_plainly_written_model_has_the_tensors_and_the_configuration_of_one_by_transformers(tmp_path):
    save_plainly(tmp_path / "ours", vocab_size=123)
    save_tiny(tmp_path / "theirs", vocab_size=123)
    assert shapes_in(tmp_path / "ours") == shapes_in(tmp_path / "theirs")
    assert load_config(tmp_path / "ours")[0] == load_config(tmp_path / "theirs")[0]


def shapes_in(folder):
    with safe_open(folder / "model.safetensors", framework="numpy") as file:
        return {name: (file.get_slice(name).get_shape(), file.get_slice(name).get_dtype()) for name in file.keys()}
