from typing import Any

import pytest
from omegaconf import OmegaConf

from opd_ray.config.teacher import HttpTeacherConfig


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"urls": []}, r"teacher\.http\.urls=\[\]: expected at least one"),
        ({"urls": ["host:8000"]}, r"teacher\.http\.urls\[0\]=host:8000: expected http"),
        ({"urls": ["http://a", "ftp://b"]}, r"teacher\.http\.urls\[1\]=ftp://b"),
        ({"urls": ["http://a/?x=1"]}, r"urls\[0\]"),
        ({"urls": ["http://a", "http://a"]}, "different URLs"),
        ({"timeout_s": 0}, r"teacher\.http\.timeout_s=0: expected a number above 0"),
        ({"max_attempts": 0}, r"teacher\.http\.max_attempts=0"),
        ({"max_concurrent_requests": 0}, "max_concurrent_requests=0"),
    ],
)
def test_a_wrong_value_is_named_with_its_key(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        HttpTeacherConfig(**{"urls": ["http://127.0.0.1:8000"], **values})


@pytest.mark.parametrize(
    "values",
    [{"urls": ["https://name:hunter2@host"]}, {"urls": ["http://host"], "api_key_env": "hunter2-key"}],
    ids=["in the URL", "instead of the variable's name"],
)
def test_a_secret_in_the_configuration_is_refused_and_not_repeated(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"teacher\.http\.") as caught:
        HttpTeacherConfig(**values)
    assert "hunter2" not in str(caught.value)


def test_it_is_a_schema_for_hydra() -> None:
    merged = OmegaConf.merge(OmegaConf.structured(HttpTeacherConfig), {"urls": ["http://a:1/v1"], "timeout_s": 3})
    config = OmegaConf.to_object(merged)
    assert isinstance(config, HttpTeacherConfig)
    assert config.urls == ["http://a:1/v1"]
    assert config.timeout_s == 3
