"""The schema that editors read knows every packaged config, and finds mistakes in one."""

from __future__ import annotations

import json

import pytest
import yaml

from lightning_compress.catalog import CONFIGS, config_names
from lightning_compress.cli.main import main
from lightning_compress.cli.schema import config_schema


@pytest.fixture(scope="module")
def schema() -> dict:
    return config_schema()


def arguments(schema: dict, kind: str, name: str) -> dict:
    cases = schema["definitions"][kind]["anyOf"][1]["allOf"]
    case = next(c for c in cases if c["if"]["properties"]["class_path"]["pattern"] == rf"(^|\.){name}$")
    return case["then"]["properties"]["init_args"]["properties"]


def test_arguments_have_types_and_descriptions(schema):
    hrank = arguments(schema, "callback", "HRank")
    assert hrank["mode"]["enum"] == ["one_shot", "sequential"]
    assert hrank["num_batches"]["type"] == "integer"
    assert "share of the filters" in hrank["pruning_ratio"]["description"]
    assert {"type": "string"} in hrank["pruning_ratio"]["anyOf"]
    assert arguments(schema, "model", "ImageClassifier")["optimizer"]["$ref"] == "#/definitions/optimizer"
    assert "root" in arguments(schema, "data", "CIFAR10")


def test_printed_as_json(capsys):
    main(["schema"])
    assert json.loads(capsys.readouterr().out)["properties"]["trainer"]["properties"]["callbacks+"]


def test_every_packaged_config_is_valid(schema):
    validator = pytest.importorskip("jsonschema").Draft7Validator(schema)
    for name in config_names():
        problems = list(validator.iter_errors(yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())))
        assert not problems, f"{name}: {problems[0].message}"


@pytest.mark.parametrize(
    "mistake",
    [
        {"trainr": {}},
        {"trainer": {"max_epoch": 3}},
        {"trainer": {"callbacks+": [{"class_path": "HRank", "init_args": {"prunning_ratio": 0.5}}]}},
        {"trainer": {"callbacks": [{"init_args": {}}]}},
    ],
    ids=str,
)
def test_mistakes_are_invalid(schema, mistake: dict):
    validator = pytest.importorskip("jsonschema").Draft7Validator(schema)
    assert list(validator.iter_errors(mistake))
