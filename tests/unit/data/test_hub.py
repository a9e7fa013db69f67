from pathlib import Path

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from opd_ray.data.hub import local_folder


def test_a_local_folder_is_taken_as_it_is(tmp_path: Path):
    assert local_folder(str(tmp_path)) == tmp_path


def test_a_folder_relative_to_the_working_directory_goes_before_a_hub_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "someone" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert local_folder("someone/model").resolve() == tmp_path / "someone" / "model"


def test_a_hub_name_is_looked_up_in_the_cache_when_offline():
    with pytest.raises(LocalEntryNotFoundError):  # HF_HUB_OFFLINE=1, see conftest.py
        local_folder("nobody/nothing-of-the-kind")
